"""The sweep: task -> prompts -> capture -> lens -> results, one question at a time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from .errors import InputError
from .lens_files import fit_to_model, load_lenses
from .logit_lens import LogitLens
from .manifest import make_manifest, now
from .models import load_model
from .options import SweepOptions
from .predict import Predictor
from .progress import SweepProgress
from .prompts import gold_positions, load_template
from .report import Report, read_report, write_outputs
from .results import Run, begin_run, check_disk, check_output, disk_error
from .task import choose_questions, load_task

QUESTIONS_PER_PART = 8


class SweepInterrupted(KeyboardInterrupt):
    """Ctrl-C in a sweep; ``run`` holds all finished questions, or is None if there are none yet."""

    def __init__(self, run: Run | None):
        self.run = run


def run_sweep(
    options: SweepOptions,
    out: str,
    overwrite: bool = False,
    argv: list[str] | None = None,
    report: Callable[[SweepProgress], None] = lambda progress: None,
    summary: Callable[[Report], None] = lambda report: None,
) -> Run:
    """Run a sweep and write its folder; an interrupt keeps what is finished, with its summary.

    Args:
        options: What to run.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        argv: Command line, for the manifest.
        report: Called after every question.
        summary: Called with what the tables and figures say, once they are written.

    Raises:
        InputError: Input that does not fit, or no free disk; parts that were written stay readable.
        SweepInterrupted: Ctrl-C, after the finished questions and their summary were written.
    """
    arguments = options.arguments()
    check_output(out, overwrite, arguments)
    task = load_task(options.task)
    template = load_template(options.template)
    questions = choose_questions(task, options.examples, options.seed)
    lenses = load_lenses(options.lens)
    loaded = load_model(options.model, options.device, options.dtype)
    logit_lens = LogitLens.from_model(loaded.model)
    lenses = [fit_to_model(lens, loaded, logit_lens) for lens in lenses]
    check_disk(out, _bytes_needed(options, len(questions), logit_lens.n_layers))
    manifest = make_manifest(arguments, argv, task, template, loaded, logit_lens, lenses, len(questions))
    predictor = Predictor(options, task, template, loaded, logit_lens, lenses)
    recorder = _Recorder(Run(Path(out)), manifest, predictor, overwrite, summary)
    progress = SweepProgress(len(questions))
    try:
        report(progress)
        for question in questions:
            recorder.add(predictor.rows(question))
            progress.done, progress.rows = progress.done + 1, predictor.counts["lens_rows"]
            report(progress)
        recorder.close("finished")
    except KeyboardInterrupt:
        recorder.close("interrupted")
        raise SweepInterrupted(recorder.run if recorder.parts else None) from None
    except OSError as error:
        recorder.give_up()
        raise disk_error(out, error) from None
    except Exception:
        recorder.close("failed")
        raise
    if not recorder.parts:
        reasons = "; ".join(f"{len(ids)} at {reason}" for reason, ids in predictor.left_out.items())
        raise InputError(f"expected at least one question that can be asked, got none ({reasons}); change --documents")
    return recorder.run


class _Recorder:
    """Writes a part every few questions and keeps the manifest true after each.

    The folder is made, and a run that is there replaced, when the first part is ready: whatever fails
    before that leaves everything as it was.
    """

    def __init__(
        self,
        run: Run,
        manifest: dict,
        predictor: Predictor,
        overwrite: bool,
        summary: Callable[[Report], None],
    ):
        self.run = run
        self._summary = summary
        self._overwrite = overwrite
        self.parts = 0
        self._manifest = manifest
        self._predictor = predictor
        self._started = time.monotonic()
        self._rows: list[dict] = []
        self._asked = 0  # questions taken
        self._done = 0  # questions written
        self._written = 0  # rows written

    def add(self, rows: list[dict]) -> None:
        """Take the rows of one more question."""
        self._rows += rows
        self._asked += 1
        if self._asked % QUESTIONS_PER_PART == 0:
            self._flush("running")

    def close(self, status: str) -> None:
        """Write what is left, the status and the summary; a failed run does not replace one that is there."""
        if status == "failed" and not self.parts and self.run.path.exists():
            self._rows = []
        self._flush(status)
        if self.parts:
            report = read_report(self.run)
            write_outputs(self.run, report)
            self._summary(report)

    def give_up(self) -> None:
        """After a failed write: let go of what was not written and, if there is room, close the rest."""
        self._rows = []
        with suppress(OSError):
            self.close("failed")

    def _flush(self, status: str) -> None:
        if self.parts and self.run.manifest["run_id"] != self._manifest["run_id"]:
            self.parts, self._rows = 0, []
            raise InputError(f"--out {self.run.path}: expected this sweep's own run, got another that replaced it")
        if self._rows:
            if self.parts == 0:
                begin_run(self.run, self._manifest, self._rows, self._overwrite)
            else:
                self.run.write_part(self.parts, self._rows)
            self._written += len(self._rows)
            self._rows, self.parts, self._done = [], self.parts + 1, self._asked
        if self.parts:
            self._manifest["status"], self._manifest["finished"] = status, now()
            self._manifest["seconds"] = round(time.monotonic() - self._started, 3)
            counts = {"done": self._done, "rows": self._written, "left_out": self._predictor.left_out}
            self._manifest["prefix_reuse"] = asdict(self._predictor.reuse)
            self._manifest["counts"] |= {**self._predictor.counts, **counts}
            self.run.write_manifest(self._manifest)


def _bytes_needed(options: SweepOptions, n_questions: int, n_layers: int) -> int:
    """Upper estimate, four answer tokens a question: uncompressed, 64 bytes per layer and 512 per prediction, and 4
    and 64 more per threshold."""
    n_contexts = sum(len(gold_positions(options.gold_positions, size)) for size in options.documents)
    per_layer, per_row = 64 + 4 * len(options.top), 512 + 64 * len(options.top)
    return n_questions * n_contexts * 4 * len(options.lens) * ((n_layers + 1) * per_layer + per_row) + (4 << 20)
