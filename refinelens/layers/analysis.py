"""An analysis of the layers of a finished sweep: the model again, question by question, stopped and gone on with.

What it loads is held to what the run was made of. Its manifest says what it is of, how it was made and what is
finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..config import LayersConfig
from ..data.questions import Question
from ..errors import FaultError, InputError, UnsupportedModelError
from ..machine import now, packages
from ..store.folder import RunLock, disk_error, sha256_of, write_whole
from ..store.layers import MEANS, SCHEMA_VERSION, LayersFolder, QuestionPart, entries_of, parts_of
from ..store.results import LAYERS, Run, open_run
from ..sweeping.manifest import RunSpec
from ..sweeping.sweep import StopSignals, SweepInputs, SweepInterrupted
from .ablation import AblationRunner
from .blocks import BlockReplay, check_replay
from .examples import RunExamples
from .interventions import MeanContributions
from .report import LayersReport, read_report, write_outputs

Progress = Callable[[str, int, int], None]  # stage, done, total


def begin(
    folder: LayersFolder,
    examples: RunExamples,
    options: LayersConfig,
    overwrite: bool,
    argv: list[str] | None,
    warn: Callable[[str], None],
) -> tuple[dict, bool]:
    """The manifest to work with: a new one, or that of an analysis that goes on, without its damaged parts.

    Nothing is written: what is there stays until model and task are known to fit.

    Returns:
        The manifest, and whether the analysis goes on.

    Raises:
        InputError: An analysis of another run or with other options is there, and ``overwrite`` is not set.
    """
    new = _new(examples, options, argv)
    folder.check_foreign()
    there = None if overwrite else folder.manifest()
    if there is None:
        return new, False
    for (name, wanted), found in zip(_identity(new).items(), _identity(there).values(), strict=True):
        if found != wanted:
            raise InputError(
                f"{folder.path}: expected an analysis with {name} {wanted}, got one with {found}; choose another "
                "``out`` or pass ``overwrite=True``"
            )
    whole = []
    for part in parts_of(there):
        if folder.read_part(part) is None:
            warn(f"{folder.path / 'parts' / part.file}: expected the part as it was written; it is computed again")
        else:
            whole.append(part)
    if len(whole) == len(there["questions"]) or not options.interventions:
        return there, True
    entry = {"started": now(), "argv": argv, "refinelens_version": __version__, "packages": packages()}
    return there | {"status": "running", "parts": entries_of(whole), "resumed": [*there["resumed"], entry]}, True


def _new(examples: RunExamples, options: LayersConfig, argv: list[str] | None) -> dict:
    run = examples.manifest
    return {
        "schema_version": SCHEMA_VERSION,
        "refinelens_version": __version__,
        "run_id": run["run_id"],
        "status": "running",
        "arguments": options.arguments(),
        "argv": argv,
        "lens": examples.lens,
        "model": run["model"]["name"],
        "task": run["task"]["name"],
        "packages": packages(),
        "started": now(),
        "seconds": 0.0,
        "resumed": [],
        "questions": examples.questions,
        "means_sha256": None,
        "parts": [],
    }


def _identity(manifest: dict) -> dict[str, object]:
    """What an analysis that goes on was begun with, as it is asked for; run and number determine the questions."""
    return {
        "run_id": manifest["run_id"],
        "``lens``": manifest["lens"],
        "``interventions``": ",".join(manifest["arguments"]["interventions"]) or "none",
        "``at``": manifest["arguments"]["at"],
        "``examples``": len(manifest["questions"]),
    }


def open_runner(run: Run, examples: RunExamples, options: LayersConfig) -> tuple[AblationRunner, dict[int, Question]]:
    """Load model, task and lens of a run, and its questions by id.

    Raises:
        InputError: Something that is no longer the run's, or a model whose blocks cannot be intervened on.
    """
    spec = RunSpec(run.path, examples.manifest, "layers")
    inputs = SweepInputs.load(spec.options, spec)
    lens = next(lens for lens in inputs.lenses if lens.name == examples.lens)
    restarts = check_replay(inputs.logit_lens)
    _check_sublayers(type(inputs.loaded.model).__name__, restarts, options)
    targets = examples.by_key(examples.target_id)
    runner = AblationRunner(options, inputs.builder(), inputs.logit_lens, lens, restarts, targets, examples.top)
    return runner, {question.id: question for question in inputs.questions}


def prepare_means(
    runner: AblationRunner,
    folder: LayersFolder,
    manifest: dict,
    questions: dict[int, Question],
    stop_if_told: Callable[[], None],
    report: Callable[[str, int, int], None],
) -> None:
    """Give the runner the mean contributions over all contexts: from the disk, or one pass over every context."""
    path = folder.path / MEANS
    if path.exists() and sha256_of(path) == manifest["means_sha256"]:
        runner.means = MeanContributions.load(path, runner.device)
        return
    ids = manifest["questions"]
    runner.begin_means(max(c.prompt_length for id in ids for c in runner.contexts(questions[id])))
    for done, id in enumerate(ids):
        stop_if_told()
        report("means", done, len(ids))
        for context in runner.contexts(questions[id]):
            runner.add_to_means(context)
    write_whole(path, runner.means.save)
    manifest |= {"means_sha256": sha256_of(path)}
    folder.write_manifest(manifest)


def _check_sublayers(name: str, restarts: BlockReplay, options: LayersConfig) -> None:
    if None in restarts.sublayers and {"attn", "mlp"} & set(options.interventions):
        raise UnsupportedModelError(
            f"{name}: expected blocks that add attention and feed-forward part to the residual stream and nothing "
            f"else, got another in block {restarts.sublayers.index(None) + 1}; use ``interventions='skip,mean,patch'``"
        )


def run_layers(
    path: str | Path,
    options: LayersConfig,
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
            manifest, resumed = begin(folder, examples, options, overwrite, argv, warn)
            analysis = _Analysis(run, examples, options, folder, manifest, resumed, signals, report)
            analysis.finish()
            return folder, analysis.conclude()
        except OSError as error:
            raise disk_error(folder.path, error) from None
        except FaultError as error:
            raise FaultError(f"{error}; {how_to_resume(overwrite)}") from error.__cause__


def how_to_resume(overwrite: bool) -> str:
    """What becomes of an analysis that was stopped, in words; ``overwrite`` again would begin it anew."""
    return f"the same command {'without ``overwrite=True`` ' if overwrite else ''}goes on with what is finished"


@dataclass
class _Analysis:
    """What one process does to the folder that it has the lock of."""

    run: Run
    examples: RunExamples
    options: LayersConfig
    folder: LayersFolder
    manifest: dict
    resumed: bool  # with what is in the folder
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
        runner, questions = open_runner(self.run, self.examples, self.options)
        self._place()
        self.signals.wait_for_questions()
        if "mean" in self.options.interventions:
            prepare_means(runner, self.folder, self.manifest, questions, self._stop_if_told, self.report)
        for done, id in enumerate(missing, n - len(missing)):
            self._stop_if_told()
            self.report("questions", done, n)
            yield self.folder.write_part(self.manifest["questions"].index(id), id, runner.rows(questions[id]))

    def _place(self) -> None:
        """Make the folder this analysis's; another one that was there goes."""
        if not self.resumed:
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
