"""An analysis of the layers of a finished sweep: the model again, question by question, stopped and gone on with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FaultError
from ..runs.durable import disk_error
from ..runs.layers_folder import LayersFolder, QuestionPart, entries_of, parts_of
from ..runs.lock import RunLock
from ..runs.results import LAYERS, Run, open_run
from ..sweep.interrupt import StopSignals, SweepInterrupted
from .examples import RunExamples
from .manifest import begin
from .options import LayerOptions
from .outputs import write_outputs
from .report import LayersReport, read_report
from .work import open_scanner, prepare_means

Progress = Callable[[str, int, int], None]  # stage, done, total


def run_layers(
    path: str | Path,
    options: LayerOptions,
    out: str | Path | None = None,
    overwrite: bool = False,
    argv: list[str] | None = None,
    report: Progress = lambda stage, done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[LayersFolder, LayersReport]:
    """Analyse the layers of a finished run, or go on with an analysis that was stopped, and write its folder.

    Args:
        path: Folder of the run.
        options: What to do; an analysis that goes on must have been begun with the same.
        out: Folder of the analysis, by default `LAYERS` in the run's.
        overwrite: Replace an analysis that is there.
        argv: Command line, for the manifest.
        report: Called with the stage, what is done of it and what there is to do.
        warn: Called with a line about what was put right.

    Raises:
        InputError: Input that does not fit, a model that is not the run's or cannot be intervened on.
        FaultError: Something broke; what was finished stays, and the same call goes on with it.
        SweepInterrupted: SIGINT or SIGTERM, after the current question was written; a second one at once.
    """
    run = open_run(path)
    examples = RunExamples.read(run, options.lens, options.examples)
    folder = LayersFolder(Path(out or run.path / LAYERS))
    with StopSignals() as signals, RunLock(folder.path):
        try:
            manifest, goes_on = begin(folder, examples, options, overwrite, argv, warn)
            analysis = _Analysis(run, examples, options, folder, manifest, goes_on, signals, report)
            analysis.finish()
            return folder, analysis.conclude()
        except OSError as error:
            raise disk_error(folder.path, error) from None
        except FaultError as error:
            raise FaultError(f"{error}; {how_it_goes_on(overwrite)}") from error.__cause__


def how_it_goes_on(overwrite: bool) -> str:
    """What becomes of an analysis that was stopped, in words; ``overwrite`` again would begin it anew."""
    return f"the same command {'without --overwrite ' if overwrite else ''}goes on with what is finished"


@dataclass
class _Analysis:
    """What one process does to the folder that it has the lock of."""

    run: Run
    examples: RunExamples
    options: LayerOptions
    folder: LayersFolder
    manifest: dict
    goes_on: bool  # with what is in the folder
    signals: StopSignals
    report: Progress

    def finish(self) -> None:
        """Ask what is missing; the manifest names every question as soon as its rows are on the disk."""
        parts = parts_of(self.manifest)
        asked = {part.question_id for part in parts}
        missing = [id for id in self.manifest["questions"] if id not in asked]
        if not missing or not self.options.interventions:
            self._place()
            return
        began, spent = time.monotonic(), self.manifest["seconds"]
        for part in self._ask(missing):
            parts.append(part)
            self.manifest |= {"parts": entries_of(parts)}
            self.manifest["seconds"] = round(spent + time.monotonic() - began, 3)
            self.folder.write_manifest(self.manifest)

    def _ask(self, missing: list[int]) -> Iterator[QuestionPart]:
        """A part per question, until a signal comes."""
        n = len(self.manifest["questions"])
        self.report("loading the model", 0, 1)
        scanner, questions = open_scanner(self.run, self.examples, self.options)
        self._place()
        self.signals.wait_for_questions()
        if "mean" in self.options.interventions:
            prepare_means(scanner, self.folder, self.manifest, questions, self._stop_if_told, self.report)
        for done, id in enumerate(missing, n - len(missing)):
            self._stop_if_told()
            self.report("questions", done, n)
            yield self.folder.write_part(self.manifest["questions"].index(id), id, scanner.rows(questions[id]))

    def _place(self) -> None:
        """Make the folder this analysis's; another one that was there goes."""
        if not self.goes_on:
            self.folder.clear()
        self.folder.write_manifest(self.manifest)

    def _stop_if_told(self) -> None:
        if self.signals.received is not None:
            raise SweepInterrupted(self.signals.received)

    def conclude(self) -> LayersReport:
        """Write tables and figure of a finished analysis."""
        self.manifest |= {"status": "finished"}
        report = read_report(self.folder, self.manifest, self.examples)
        write_outputs(self.folder, report)
        self.folder.write_manifest(self.manifest)
        return report
