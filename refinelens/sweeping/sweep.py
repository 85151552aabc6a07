"""The sweep: questions -> prompts -> states -> lens -> results, one question at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import EVERY_QUESTION, ONE_PROCESS, RAY, STATES, EngineConfig, ModelConfig, SweepConfig, check_top
from ..errors import InputError, resume_call
from ..machine import device_name
from ..options import expect
from ..progress import Progress, unseen
from ..report.rows import Report
from ..report.summary import read_report
from ..report.tables import write_outputs
from ..store.files import check_disk
from ..store.folder import go_on, process_entry
from ..store.process import Interrupted, StopSignals, working_on
from ..store.results import MERGING, PREDICTIONS, Run, predictions_schema
from .inputs import SweepInputs
from .recorder import AccuracySoFar, RunWriter
from .run_spec import RunSpec
from .shards import index_and_count, shard_entry
from .workers import Workers

UNIT = "the current question, then its tables"
QUESTIONS_PER_PART = 8


def run_sweep(
    options: SweepConfig | None,
    out: str | Path,
    overwrite: bool = False,
    argv: list[str] | None = None,
    engine: EngineConfig = ONE_PROCESS,
    progress: Progress = unseen,
    summary: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
    questions_per_part: int = QUESTIONS_PER_PART,
    shard: str | None = None,
) -> Run:
    """Run a sweep and write its folder; an interrupt keeps what is finished, with its summary.

    Args:
        options: What to run; None goes on with the run in ``out``, see `resume_sweep`.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        argv: Command line, for the manifest.
        engine: Who asks; of several processes each loads the model for itself.
        progress: Called after every question.
        summary: Called with what the tables and figures say, once they are written.
        warn: Called with a line about what went wrong and was put right, or about the texts, see `remarks`.
        questions_per_part: How many are written together; where every token is read each has a part of its own.
        shard: ``I/N``: every N-th part of the run alone, from the I-th on, for `merge_runs`; a run that goes on has it.

    Raises:
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: Something broke, such as no free disk; what was written stays, and `resume_sweep` goes on with it.
        Interrupted: SIGINT or SIGTERM, after the current question, all finished ones and their summary were
            written; a second signal writes nothing more.
    """
    run = Run(Path(out))
    if engine.engine == RAY:
        from .ray_engine import check_ray

        check_ray(engine)
    if options is None:
        run.checked_manifest()  # before the lock makes a folder
    else:
        run.check_replaceable()
        if shard is not None:
            index_and_count(shard)
    sweep = _Sweep(run, argv, engine, progress, summary, warn, questions_per_part, shard)
    with working_on(run.path, UNIT, sweep.advice) as signals:
        if options is None:
            sweep.go_on()
        else:
            sweep.begin(options, overwrite)
        return sweep.finish(signals)


def resume_sweep(path: str | Path, **keywords: Any) -> Run:
    """Go on with a run that was interrupted, killed or damaged: it becomes equal to one that never was.

    Args:
        path: Folder of the run, whose manifest has all options.
        **keywords: From ``argv`` on as `run_sweep`; ``warn`` hears of each part that is not as it was written, and so
            is computed again.

    Raises:
        InputError: No run, one of another schema version, or a model, task, template, lens, device or dtype that is no
            longer the run's; names the field and both values. Or another process that writes to the folder.
        FaultError: See `run_sweep`; also `Interrupted`.
    """
    return run_sweep(None, path, **keywords)


def check_one_process(options: ModelConfig, engine: EngineConfig) -> None:
    """Refuse several processes beside a model that is split: one has all the devices that it is split over.

    Raises:
        InputError: There are several; Ray gives each worker devices of its own.
    """
    if options.device_map is not None and engine.engine != RAY:
        expect(engine.workers == 1, "workers", "1 beside ``device_map``", engine.workers)


@dataclass
class _Sweep:
    """A sweep under way in a folder that is held: what asks, what keeps the rows, and who is told."""

    run: Run
    argv: list[str] | None
    engine: EngineConfig
    progress: Progress
    summary: Callable[[Report], None]
    warn: Callable[[str], None]
    questions_per_part: int
    shard: str | None = None
    runner: Any = None  # see `_runner`
    writer: RunWriter | None = None
    check: Callable[[list[int]], None] = lambda places: None  # that the questions at some places can be asked

    def begin(self, options: SweepConfig, overwrite: bool) -> None:
        """Load everything, and put the manifest of a new run in its place."""
        check_one_process(options, self.engine)
        self.run.check_overwrite(overwrite, options.arguments())
        inputs = SweepInputs.load(options)
        check_top(options.top, inputs.logit_lens.head.vocab_size)
        size = 1 if options.positions == "all" else self.questions_per_part
        manifest = inputs.manifest(self.argv, self.engine.workers, size)
        if self.shard is not None:
            manifest |= shard_entry(self.shard, manifest)
        check_disk(self.run.path, _bytes_needed(options, manifest))
        for line in manifest["remarks"]:
            self.warn(line)
        self._start(inputs, RunSpec(self.run.path, manifest, "``out``"))

    def go_on(self) -> None:
        """Load everything as the run has it; what is damaged of the run is missing."""
        manifest = self.run.checked_manifest()  # another process may have written it meanwhile
        if manifest.get(MERGING):
            raise InputError(f"``resume`` {self.run.path}: expected a run, got a merge that was stopped; merge again")
        spec, parts = RunSpec(self.run.path, manifest, "``resume``"), self.run.whole_parts(manifest, self.warn)
        try:
            spec.check_columns()
            check_one_process(spec.options, self.engine)
            inputs = SweepInputs.load(spec.options, spec)
        except Interrupted as stop:
            raise Interrupted(stop.signum, self.run if any(part.rows for part in parts) else None) from None
        entry = process_entry(self.argv) | {"workers": self.engine.workers}
        entry["device_name"] = device_name(inputs.loaded.device.type)
        manifest = go_on(manifest, parts, entry) | {"finished": None}
        self._start(inputs, replace(spec, manifest=manifest), resumed=True)

    def _start(self, inputs: SweepInputs, spec: RunSpec, resumed: bool = False) -> None:
        """Of several workers each loads the model for itself; ours goes."""
        self.runner = _runner(self.engine, inputs, spec, self.warn)
        if inputs.stored:
            self.check = inputs.check_stored
        self.writer = RunWriter(self.run, spec.manifest, resumed)

    def finish(self, signals: StopSignals) -> Run:
        """Ask what is missing and conclude the run, whatever happens in between."""
        writer = self.writer
        try:
            stop = self._ask_until_stopped(signals)
            self._conclude("interrupted" if stop else "finished")
        except Interrupted as second_signal:
            stop = second_signal
        except OSError:
            writer.give_up()
            raise
        finally:
            writer.release()
        if stop:
            raise Interrupted(stop.signum, self.run if writer.has_rows else None)
        if not writer.has_rows:
            reasons = "; ".join(f"{len(ids)} at {reason}" for reason, ids in writer.left_out.items())
            if "shard" in writer.manifest:
                self.warn(f"none of the questions of this shard could be asked ({reasons}); the others may have some")
                return self.run
            keeps_all = writer.manifest["arguments"]["keep"] == EVERY_QUESTION
            raise InputError(
                f"expected at least one question that can be asked, got none ({reasons}); change ``documents``"
                f"{'' if keeps_all else ' or ``keep``'}"
            )
        return self.run

    def _ask_until_stopped(self, signals: StopSignals) -> Interrupted | None:
        """Ask what is missing; returns what stopped it, if anything did, and concludes the run only on a fault."""
        try:
            self._ask_missing(signals)
        except (Interrupted, OSError):
            raise
        except KeyboardInterrupt:  # not by our signals: from another thread, or from ``progress``
            return Interrupted(signal.SIGINT)
        except Exception:
            self._conclude("failed")
            raise
        return Interrupted(signals.received) if self.writer.missing() else None

    def _ask_missing(self, signals: StopSignals) -> None:
        """Ask every question that has no rows yet, until a signal comes."""
        writer, missing, rows, contexts, so_far = self.writer, self.writer.missing(), 0, 0, AccuracySoFar()
        total = writer.done + len(missing)
        self.check(missing)
        self.progress("questions", writer.done, total)
        signals.finish_first()
        with closing(self.runner.ask(missing, stopped=lambda: signals.received is not None)) as results:
            for place, result in results:
                for line in result.warnings:
                    self.warn(line)
                writer.add(place, result)
                rows, contexts = rows + result.counts["lens_rows"], contexts + result.counts["contexts"]
                so_far.add(result.rows)
                self.progress("questions", writer.done, total, rows, contexts, str(so_far))
        writer.settle()

    def _conclude(self, status: str) -> None:
        self.writer.close(status)
        if self.writer.has_rows:
            report = read_report(self.run)
            write_outputs(self.run, report)
            self.summary(report)

    def advice(self) -> str:
        """How to go on after a fault, if anything is there to go on with."""
        if self.writer is None or not self.writer.is_placed:
            return ""
        return f"{resume_call(self.run.path)} goes on with the finished questions"


def _runner(engine: EngineConfig, inputs: SweepInputs, spec: RunSpec, warn: Callable[[str], None]) -> Any:
    """Who asks: `SweepInputs` in this process, or what has its method `ask`."""
    if engine.engine == RAY:
        from .ray_engine import RayWorkers

        return RayWorkers(inputs.options, spec, engine, warn)
    return Workers(inputs.options, spec, engine.workers, warn) if engine.workers > 1 else inputs


def _bytes_needed(options: SweepConfig, manifest: dict) -> int:
    """Upper estimate, four answer tokens a question or 200 tokens a document: uncompressed, 64 bytes per layer, 8 per
    further column, and 512 per prediction, 8 per generated token, of answer tokens 4 and 64 more per threshold, 2 per
    number of a state."""
    n_questions, n_layers = manifest["counts"]["questions"], manifest["model"]["n_layers"]
    n_contexts = [len(options.placements(size)) for size in options.documents]
    of_shots = 200 * options.shots * (options.shot_documents + 1)
    n_tokens = [4 if options.positions == "answer" else 200 * (size + 1) + of_shots for size in options.documents]
    extras = [extra for extra in options.extras if extra != STATES]
    per_layer = 64 + 8 * (len(predictions_schema(extras)) - len(PREDICTIONS))
    per_row = (n_layers + 1) * per_layer + 512 + 8 * options.generate
    per_answer = 4 * len(options.top) * ((n_layers + 1) * 4 + 64)
    per_context = sum(n * (tokens * per_row + per_answer) for n, tokens in zip(n_contexts, n_tokens, strict=True))
    states = 2 * (n_layers + 1) * manifest["model"]["d_model"] * sum(n_contexts) if STATES in options.extras else 0
    return n_questions * (per_context * len(options.lens) + states) + (4 << 20)
