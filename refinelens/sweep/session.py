"""The sweep: task -> prompts -> capture -> lens -> results, one question at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from ..conditions import gold_positions
from ..errors import FaultError, InputError
from ..options import SweepOptions, check_top
from ..progress import SweepProgress
from ..report.derived import write_outputs
from ..report.report import Report, read_report
from ..runs.durable import disk_error
from ..runs.lock import RunLock
from ..runs.output import check_disk, check_folder, check_overwrite
from ..runs.results import Run, open_run
from .inputs import SweepInputs
from .interrupt import StopSignals, SweepInterrupted
from .manifest import resumed_entry
from .recorder import Recorder
from .resume import Terms, Unfinished
from .workers import Workers, check_workers

QUESTIONS_PER_PART = 8


def run_sweep(
    options: SweepOptions,
    out: str,
    overwrite: bool = False,
    argv: list[str] | None = None,
    workers: int = 1,
    report: Callable[[SweepProgress], None] = lambda progress: None,
    summary: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Run:
    """Run a sweep and write its folder; an interrupt keeps what is finished, with its summary.

    Args:
        options: What to run.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        argv: Command line, for the manifest.
        workers: Processes that ask; with more than one, each loads the model for itself.
        report: Called after every question.
        summary: Called with what the tables and figures say, once they are written.
        warn: Called with a line about what went wrong and was put right, or about the texts, see `remarks`.

    Raises:
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: Something broke, such as no free disk; what was written stays, and `resume_sweep` goes on with it.
        SweepInterrupted: SIGINT or SIGTERM, after the current question, all finished ones and their summary were
            written; a second signal writes nothing more.
    """
    check_workers(workers)
    check_folder(out)
    run = Run(Path(out))
    with StopSignals() as signals, RunLock(out):
        check_overwrite(out, overwrite, options.arguments())
        asker = SweepInputs.load(options)
        check_top(options.top, len(asker.logit_lens.parts.unembedding))
        manifest = asker.manifest(argv, workers, 1 if options.positions == "all" else QUESTIONS_PER_PART)
        check_disk(out, _bytes_needed(options, manifest))
        for line in asker.remarks:
            warn(line)
        if workers > 1:
            asker = Workers(options, Terms(run.path, manifest, "--out"), workers, warn)  # the model loaded here goes
        return _Sweep(asker, _begin(run, manifest), signals, report, summary, warn).finish()


def resume_sweep(
    path: str,
    argv: list[str] | None = None,
    workers: int = 1,
    report: Callable[[SweepProgress], None] = lambda progress: None,
    summary: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Run:
    """Go on with a run that was interrupted, killed or damaged: it becomes equal to one that never was.

    Args:
        path: Folder of the run, whose manifest has all options.
        argv: See `run_sweep`; also the others. ``warn`` hears of each part that is not as it was written, and so is
            computed again.

    Raises:
        InputError: No run, one of another schema version, or a model, task, template, lens, device or dtype that is no
            longer the run's; names the field and both values. Or another process that writes to the folder.
        FaultError: See `run_sweep`; also `SweepInterrupted`.
    """
    check_workers(workers)
    open_run(path)
    with StopSignals() as signals, RunLock(path):
        unfinished = Unfinished.read(path)
        run, terms = unfinished.run, unfinished.terms
        for line in unfinished.damaged:
            warn(line)
        try:
            asker = SweepInputs.load(terms.options, terms)
        except SweepInterrupted as stop:
            raise SweepInterrupted(stop.signum, run if unfinished.has_rows else None) from None
        manifest = unfinished.goes_on(resumed_entry(argv, asker.loaded.model.device.type, workers))
        if workers > 1:
            asker = Workers(terms.options, replace(terms, manifest=manifest), workers, warn)
        return _Sweep(asker, _begin(run, manifest, resumed=True), signals, report, summary, warn).finish()


def _begin(run: Run, manifest: dict, resumed: bool = False) -> Recorder:
    try:
        return Recorder(run, manifest, resumed)
    except OSError as error:
        raise disk_error(run.path, error) from None


@dataclass(frozen=True)
class _Sweep:
    """A sweep under way: what asks, what keeps the rows, and who is told."""

    asker: SweepInputs | Workers
    recorder: Recorder
    signals: StopSignals
    report: Callable[[SweepProgress], None]
    summary: Callable[[Report], None]
    warn: Callable[[str], None]

    def finish(self) -> Run:
        """Ask what is missing and conclude the run, whatever happens in between."""
        recorder = self.recorder
        try:
            stop = self._ask_until_stopped()
            self._conclude("interrupted" if stop else "finished")
        except SweepInterrupted as second_signal:
            stop = second_signal
        except OSError as error:
            recorder.give_up()
            raise self._with_advice(disk_error(recorder.run.path, error)) from None
        except FaultError as error:
            raise self._with_advice(error) from error.__cause__
        if stop:
            raise SweepInterrupted(stop.signum, recorder.run if recorder.has_rows else None)
        if not recorder.has_rows:
            reasons = "; ".join(f"{len(ids)} at {reason}" for reason, ids in recorder.left_out.items())
            raise InputError(
                f"expected at least one question that can be asked, got none ({reasons}); change --documents"
            )
        return recorder.run

    def _ask_until_stopped(self) -> SweepInterrupted | None:
        """Ask what is missing; returns what stopped it, if anything did, and concludes the run only on a fault."""
        try:
            self._ask_missing()
        except (SweepInterrupted, OSError):
            raise
        except KeyboardInterrupt:  # not by our signals: from another thread, or from ``report``
            return SweepInterrupted(signal.SIGINT)
        except Exception:
            self._conclude("failed")
            raise
        return SweepInterrupted(self.signals.received) if self.recorder.missing() else None

    def _ask_missing(self) -> None:
        """Ask every question that has no rows yet, until a signal comes."""
        recorder, signals = self.recorder, self.signals
        missing = recorder.missing()
        progress = SweepProgress(recorder.done + len(missing), recorder.done)
        self.report(progress)
        signals.wait_for_questions()
        with closing(self.asker.ask(missing, stopped=lambda: signals.received is not None)) as outcomes:
            for place, outcome in outcomes:
                for line in outcome.warnings:
                    self.warn(line)
                recorder.add(place, outcome)
                progress.done, progress.rows = recorder.done, progress.rows + outcome.counts["lens_rows"]
                self.report(progress)

    def _conclude(self, status: str) -> None:
        self.recorder.close(status)
        if self.recorder.has_rows:
            report = read_report(self.recorder.run)
            write_outputs(self.recorder.run, report)
            self.summary(report)

    def _with_advice(self, error: InputError | FaultError) -> InputError | FaultError:
        if not self.recorder.can_be_resumed:
            return error
        path = self.recorder.run.path
        return type(error)(f"{error}; refinelens sweep --resume {path} goes on with the finished questions")


def _bytes_needed(options: SweepOptions, manifest: dict) -> int:
    """Upper estimate, four answer tokens a question or 200 tokens a document: uncompressed, 64 bytes per layer and 512
    per prediction, 8 per generated token, and of answer tokens 4 and 64 more per threshold."""
    n_questions, n_layers = manifest["counts"]["questions"], manifest["model"]["n_layers"]
    n_contexts = [len(gold_positions(options.gold_positions, size)) for size in options.documents]
    n_tokens = [4 if options.positions == "answer" else 200 * (size + 1) for size in options.documents]
    per_row = (n_layers + 1) * 64 + 512 + 8 * options.generate
    per_answer = 4 * len(options.top) * ((n_layers + 1) * 4 + 64)
    per_context = sum(n * (tokens * per_row + per_answer) for n, tokens in zip(n_contexts, n_tokens, strict=True))
    return n_questions * per_context * len(options.lens) + (4 << 20)
