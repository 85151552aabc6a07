"""An analysis of the layers of a finished sweep: the model again, question by question, stopped and gone on with.

What it loads is held to what the run was made of. Its manifest says what it is of, how it was made and what is
finished.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from ..config import EVERY_QUESTION, LayersConfig
from ..data.questions import Question
from ..errors import UnsupportedModelError
from ..lens.blocks import check_replay
from ..progress import Progress, unseen
from ..report.rows import LayersReport
from ..store.folder import FolderWriter, MadeOf, go_on, process_entry
from ..store.layers import MEANS, SCHEMA_VERSION, LayersFolder, QuestionPart, write_rows
from ..store.process import StopSignals, working_on
from ..store.results import LAYERS, Run, open_run
from ..sweeping.inputs import SweepInputs
from ..sweeping.run_spec import RunSpec
from .ablation import AblationRunner
from .examples import RunExamples
from .interventions import MeanContributions
from .measures import read_report, write_outputs


def begin(
    folder: LayersFolder,
    examples: RunExamples,
    options: LayersConfig,
    overwrite: bool,
    argv: list[str] | None,
    warn: Callable[[str], None],
) -> dict:
    """The manifest to work with: a new one, or that of an analysis that goes on, without its damaged parts.

    Nothing is written: what is there stays until model and task are known to fit.

    Raises:
        InputError: An analysis of another run or with other options is there, and ``overwrite`` is not set.
    """
    new = _new(examples, options, argv)
    folder.check_foreign()
    if overwrite or not folder.exists:
        return new
    there = folder.checked_manifest()
    remedy = "choose another ``out`` or pass ``overwrite=True``"
    made_of = MadeOf(folder.path, _identity(there), "``out``", "the analysis", remedy)
    for name, wanted in _identity(new).items():
        made_of.require(name, wanted)
    whole = folder.whole_parts(there, warn)
    if len(whole) == len(there["questions"]) or not options.interventions:
        return there
    return go_on(there, whole, process_entry(argv))


def _new(examples: RunExamples, options: LayersConfig, argv: list[str] | None) -> dict:
    run = examples.manifest
    return {
        "schema_version": SCHEMA_VERSION,
        **process_entry(argv),
        "run_id": run["run_id"],
        "status": "running",
        "arguments": options.arguments(),
        "lens": examples.lens,
        "model": run["model"]["name"],
        "task": run["task"]["name"],
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


def run_layers(
    path: str | Path,
    options: LayersConfig,
    out: str | Path | None = None,
    overwrite: bool = False,
    argv: list[str] | None = None,
    progress: Progress = unseen,
    warn: Callable[[str], None] = lambda line: None,
) -> tuple[LayersFolder, LayersReport]:
    """Analyse the layers of a finished run, or go on with an analysis that was stopped, and write its folder.

    Args:
        path: Folder of the run.
        options: What to do; an analysis that goes on must have been begun with the same.
        out: Folder of the analysis, by default `LAYERS` in the run's.
        overwrite: Replace an analysis that is there.
        argv: Command line, for the manifest.
        progress: Called with the stage, what is done of it and what there is to do.
        warn: Called with a line about what was put right.

    Raises:
        InputError: Input that does not fit, a model that is not the run's or cannot be intervened on.
        FaultError: Something broke; what was finished stays, and the same call goes on with it.
        Interrupted: SIGINT or SIGTERM, after the current question was written; a second one at once.
    """
    run = open_run(path)
    examples = RunExamples.read(run, options.lens, options.examples)
    folder = LayersFolder(Path(out or run.path / LAYERS))
    with working_on(folder.path, "the current question", lambda: how_to_resume(overwrite)) as signals:
        writer = FolderWriter(folder, begin(folder, examples, options, overwrite, argv, warn))
        analysis = _Analysis(run, examples, options, writer, signals, progress)
        analysis.finish()
        return folder, analysis.conclude()


def how_to_resume(overwrite: bool) -> str:
    """What becomes of an analysis that was stopped, in words; ``overwrite`` again would begin it anew."""
    return f"the same command {'without ``overwrite=True`` ' if overwrite else ''}goes on with what is finished"


@dataclass
class _Analysis:
    """What one process does to the folder that it has the lock of."""

    run: Run
    examples: RunExamples
    options: LayersConfig
    writer: FolderWriter
    signals: StopSignals
    progress: Progress

    def finish(self) -> None:
        """Ask what is missing; the manifest names every question as soon as its rows are on the disk."""
        manifest, folder = self.writer.manifest, self.writer.folder
        ids, asked = manifest["questions"], {part["question_id"] for part in manifest["parts"]}
        missing = [id for id in ids if id not in asked] if self.options.interventions else []
        if missing:
            self.progress("loading the model", 0, 1)
            runner, questions = self._load()
            self.signals.finish_first()
        self.writer.place()
        if missing and "mean" in self.options.interventions:
            self._prepare_means(runner, questions)
        for done, id in enumerate(missing, len(ids) - len(missing)):
            self._next("questions", done, len(ids))
            path, rows = folder.part_path(ids.index(id)), runner.rows(questions[id])
            sha256 = self.writer.write(path, partial(write_rows, rows))
            self.writer.append(QuestionPart(id, path.name, len(rows), sha256))

    def _load(self) -> tuple[AblationRunner, dict[int, Question]]:
        """Load model, task and lens of the run, and its questions by id.

        Raises:
            InputError: Something that is no longer the run's, or a model whose blocks cannot be intervened on.
        """
        examples, options = self.examples, self.options
        spec = RunSpec(self.run.path, examples.manifest, "layers")
        inputs = SweepInputs.load(replace(spec.options, keep=EVERY_QUESTION), spec)  # those of the run were kept
        lens = next(lens for lens in inputs.lenses if lens.name == examples.lens)
        restarts = check_replay(inputs.logit_lens, "``interventions='none'`` reads the lens alone")
        if None in restarts.sublayers and {"attn", "mlp"} & set(options.interventions):
            raise UnsupportedModelError(
                f"{type(inputs.loaded.model).__name__}: expected blocks that add attention and feed-forward part to "
                "the residual stream and nothing else, got another in block "
                f"{restarts.sublayers.index(None) + 1}; use ``interventions='skip,mean,patch'``"
            )
        targets = examples.by_key(examples.columns["target_id"])
        runner = AblationRunner(options, inputs.builder(), inputs.logit_lens, lens, restarts, targets, examples.top)
        return runner, {question.id: question for question in inputs.questions}

    def _prepare_means(self, runner: AblationRunner, questions: dict[int, Question]) -> None:
        """Give the runner the mean contributions over all contexts: from the disk, or one pass over every context."""
        manifest, folder = self.writer.manifest, self.writer.folder
        if folder.is_whole(MEANS, manifest):
            runner.means = MeanContributions.load(folder.path / MEANS, runner.device)
            return
        ids = manifest["questions"]
        runner.begin_means(max(c.prompt_length for id in ids for c in runner.contexts(questions[id])))
        for done, id in enumerate(ids):
            self._next("means", done, len(ids))
            for context in runner.contexts(questions[id]):
                runner.add_to_means(context)
        self.writer.write_named(MEANS, runner.means.save)

    def _next(self, stage: str, done: int, total: int) -> None:
        """Between two questions: stop if a signal came, or say what is next."""
        self.signals.stop_if_received()
        self.progress(stage, done, total)

    def conclude(self) -> LayersReport:
        """Write tables and figure of a finished analysis."""
        writer = self.writer
        report = read_report(writer.folder, writer.manifest | {"status": "finished"}, self.examples)
        write_outputs(writer.folder, report)
        if writer.manifest["status"] != "finished":
            writer.save(status="finished")
        return report
