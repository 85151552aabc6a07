"""The sweep: task -> prompts -> capture -> lens -> results, one question at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .backends import choose_backend
from .chat import Chat, render_chat, template_hash
from .conditions import CLOSED_BOOK, gold_positions
from .derived import write_outputs
from .durable import disk_error
from .errors import FaultError, InputError
from .formats import KV
from .interrupt import StopSignals, SweepInterrupted
from .kv import generate_task
from .lens_files import Lens, fit_to_model, load_lenses
from .lock import RunLock
from .logit_lens import LogitLens
from .manifest import make_manifest, resumed_entry
from .models import LoadedModel, load_model
from .options import SweepOptions
from .output import check_disk, check_folder, check_overwrite
from .predict import Predictor
from .progress import SweepProgress
from .prompts import Template, load_template
from .question import Question
from .recorder import Recorder
from .report import Report, read_report
from .results import Run, open_run
from .resume import Unfinished
from .task import Task, choose_questions, load_task

QUESTIONS_PER_PART = 8


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
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: Something broke, such as no free disk; what was written stays, and `resume_sweep` goes on with it.
        SweepInterrupted: SIGINT or SIGTERM, after the current question, all finished ones and their summary were
            written; a second signal writes nothing more.
    """
    arguments = options.arguments()
    check_folder(out)
    with StopSignals() as signals, RunLock(out):
        check_overwrite(out, overwrite, arguments)
        inputs = _Inputs.load(options)
        check_disk(out, _bytes_needed(options, len(inputs.questions), inputs.logit_lens.n_layers))
        manifest = inputs.manifest(arguments, argv)
        return _ask(inputs, _begin(Run(Path(out)), manifest), signals, report, summary)


def resume_sweep(
    path: str,
    argv: list[str] | None = None,
    report: Callable[[SweepProgress], None] = lambda progress: None,
    summary: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Run:
    """Go on with a run that was interrupted, killed or damaged: it becomes equal to one that never was.

    Args:
        path: Folder of the run, whose manifest has all options.
        argv: See `run_sweep`; also ``report`` and ``summary``.
        warn: Called with a line about each part that is not as it was written, and so is computed again.

    Raises:
        InputError: No run, one of another schema version, or a model, task, template, lens, device or dtype that is no
            longer the run's; names the field and both values. Or another process that writes to the folder.
        FaultError: See `run_sweep`; also `SweepInterrupted`.
    """
    open_run(path)
    with StopSignals() as signals, RunLock(path):
        unfinished = Unfinished.read(path)
        for line in unfinished.damaged:
            warn(line)
        inputs = _Inputs.load(unfinished.options, unfinished.require, unfinished.chat)
        manifest = unfinished.goes_on(resumed_entry(argv, inputs.loaded.model.device.type))
        return _ask(inputs, _begin(unfinished.run, manifest, resumed=True), signals, report, summary)


@dataclass(frozen=True)
class _Inputs:
    """All that a sweep reads, loaded."""

    options: SweepOptions
    task: Task
    template: Template
    questions: list[Question]
    lenses: list[Lens]
    loaded: LoadedModel
    logit_lens: LogitLens

    @classmethod
    def load(
        cls,
        options: SweepOptions,
        require: Callable[[str, object], None] = lambda field, value: None,
        chat: Chat | None = None,
    ) -> _Inputs:
        """Load everything, the quick things first.

        Args:
            options: What to run.
            require: Refuses what is not as a run has it.
            chat: That of a run, whose template may have written the date.
        """
        task = _load_task(options)
        require("task.sha256", task.sha256)
        template = Template(task.format, load_template(options.template, task.format))
        require("template", template.text)
        if CLOSED_BOOK in options.documents and task.format.closed_book is None:
            raise InputError(f"--documents closed-book: expected a task that can be asked so, got {options.task}")
        questions = choose_questions(task, options.examples, options.seed)
        lenses = load_lenses(options.lens)
        for index, lens in enumerate(lenses):
            require(f"lenses.{index}.sha256", lens.sha256)
        loaded = load_model(options.model, options.device, options.dtype)
        require("model.device", loaded.model.device.type)
        require("model.dtype", str(loaded.model.dtype).removeprefix("torch."))
        for name in ("config_sha256", "weights_sha256", "tokenizer_sha256"):
            require(f"model.{name}", getattr(loaded, name))
        if options.chat:
            require("chat.template_sha256", template_hash(loaded.tokenizer))
            template = replace(template, chat=chat or render_chat(loaded.tokenizer))
        logit_lens = LogitLens.from_model(loaded.model)
        require("model.backend", choose_backend(loaded.model.device.type, logit_lens.backend)[0])
        lenses = [fit_to_model(lens, loaded, logit_lens) for lens in lenses]
        return cls(options, task, template, questions, lenses, loaded, logit_lens)

    def manifest(self, arguments: dict, argv: list[str] | None) -> dict:
        """The manifest of a run that starts now."""
        things = (self.task, self.template, self.loaded, self.logit_lens, self.lenses)
        return make_manifest(arguments, argv, *things, len(self.questions), QUESTIONS_PER_PART)

    def predictor(self) -> Predictor:
        """What asks the questions."""
        return Predictor(self.options, self.task, self.template, self.loaded, self.logit_lens, self.lenses)


def _load_task(options: SweepOptions) -> Task:
    if options.task == KV.name:
        return generate_task(options.examples, max(options.documents), options.seed)
    return load_task(options.task)


def _begin(run: Run, manifest: dict, resumed: bool = False) -> Recorder:
    try:
        return Recorder(run, manifest, resumed)
    except OSError as error:
        raise disk_error(run.path, error) from None


def _ask(
    inputs: _Inputs,
    recorder: Recorder,
    signals: StopSignals,
    report: Callable[[SweepProgress], None],
    summary: Callable[[Report], None],
) -> Run:
    """Ask what is missing and conclude the run, whatever happens in between."""
    try:
        stop = _ask_until_stopped(inputs, recorder, signals, report, summary)
        _conclude(recorder, "interrupted" if stop else "finished", summary)
    except SweepInterrupted as second_signal:
        stop = second_signal
    except OSError as error:
        recorder.give_up()
        raise _with_advice(disk_error(recorder.run.path, error), recorder) from None
    except FaultError as error:
        raise _with_advice(error, recorder) from error.__cause__
    if stop:
        raise SweepInterrupted(stop.signum, recorder.run if recorder.has_rows else None)
    if not recorder.has_rows:
        reasons = "; ".join(f"{len(ids)} at {reason}" for reason, ids in recorder.left_out.items())
        raise InputError(f"expected at least one question that can be asked, got none ({reasons}); change --documents")
    return recorder.run


def _ask_until_stopped(
    inputs: _Inputs,
    recorder: Recorder,
    signals: StopSignals,
    report: Callable[[SweepProgress], None],
    summary: Callable[[Report], None],
) -> SweepInterrupted | None:
    """Ask what is missing; returns what stopped it, if anything did, and concludes the run itself only on a fault."""
    try:
        _ask_missing(inputs.questions, inputs.predictor(), recorder, signals, report)
    except (SweepInterrupted, OSError):
        raise
    except KeyboardInterrupt:  # not by our signals: from another thread, or from ``report``
        return SweepInterrupted(signal.SIGINT)
    except Exception:
        _conclude(recorder, "failed", summary)
        raise
    return SweepInterrupted(signals.received) if recorder.done < len(inputs.questions) else None


def _ask_missing(
    questions: list[Question],
    predictor: Predictor,
    recorder: Recorder,
    signals: StopSignals,
    report: Callable[[SweepProgress], None],
) -> None:
    """Ask every question that has no rows yet, until a signal comes."""
    progress = SweepProgress(len(questions), recorder.done)
    report(progress)
    signals.wait_for_questions()
    for question in recorder.missing(questions):
        if signals.received is not None:
            break
        try:
            rows = predictor.rows(question)
        except (InputError, FaultError, OSError):
            raise
        except Exception as error:
            raise FaultError(f"question {question.id}: {type(error).__name__}: {error}") from error
        counts, left_out = predictor.take_counts()
        recorder.note("prefix_reuse", asdict(predictor.reuse))
        recorder.add(rows, counts, left_out)
        progress.done, progress.rows = recorder.done, progress.rows + counts["lens_rows"]
        report(progress)


def _conclude(recorder: Recorder, status: str, summary: Callable[[Report], None]) -> None:
    recorder.close(status)
    if recorder.has_rows:
        report = read_report(recorder.run)
        write_outputs(recorder.run, report)
        summary(report)


def _with_advice(error: InputError | FaultError, recorder: Recorder) -> InputError | FaultError:
    if not recorder.can_be_resumed:
        return error
    return type(error)(f"{error}; refinelens sweep --resume {recorder.run.path} goes on with the finished questions")


def _bytes_needed(options: SweepOptions, n_questions: int, n_layers: int) -> int:
    """Upper estimate, four answer tokens a question: uncompressed, 64 bytes per layer and 512 per prediction, and 4
    and 64 more per threshold."""
    n_contexts = sum(len(gold_positions(options.gold_positions, size)) for size in options.documents)
    per_layer, per_row = 64 + 4 * len(options.top), 512 + 64 * len(options.top)
    return n_questions * n_contexts * 4 * len(options.lens) * ((n_layers + 1) * per_layer + per_row) + (4 << 20)
