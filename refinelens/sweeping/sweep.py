"""The sweep: questions -> prompts -> states -> lens -> results, one question at a time."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from ..config import CLOSED_BOOK, SweepConfig, check_top, gold_positions
from ..data.generated import TINY, generate_kv_task, generate_tiny_task
from ..data.prompts import FIELD, Template, load_template, render_chat, template_hash
from ..data.questions import KV, Question
from ..data.tasks import Task, choose_questions, load_task
from ..errors import FaultError, InputError, resume_call
from ..lens.files import Lens, fit_to_model, load_lenses
from ..lens.logit_lens import LogitLens
from ..model.loading import LoadedModel, load_model
from ..op.backends import choose_backend
from ..progress import SweepProgress
from ..report.rows import Report
from ..report.summary import read_report
from ..report.tables import write_outputs
from ..store.files import check_disk, disk_error
from ..store.folder import go_on
from ..store.process import Interrupted, RunLock, StopSignals
from ..store.results import QuestionResult, Run, open_run
from .contexts import ContextBuilder, remarks
from .manifest import RunSpec, make_manifest, resumed_entry
from .predict import Predictor, groups_of, questions_together
from .recorder import RunWriter
from .workers import Workers, check_workers

UNIT = "the current question, then its tables"
GENERATORS = {KV.name: generate_kv_task, TINY.name: generate_tiny_task}
QUESTIONS_PER_PART = 8


@dataclass(frozen=True)
class SweepInputs:
    """Task, questions, template, lenses and model of a sweep; make one with `SweepInputs.load`."""

    options: SweepConfig
    task: Task
    template: Template
    questions: list[Question]
    lenses: list[Lens]
    loaded: LoadedModel
    logit_lens: LogitLens

    @classmethod
    def load(cls, options: SweepConfig, spec: RunSpec | None = None) -> SweepInputs:
        """Load everything, the quick things first.

        Args:
            options: What to run.
            spec: Of the run that goes on, None where one begins.

        Raises:
            InputError: Anything that cannot be loaded, or is not as the run has it.
        """
        require = spec.require if spec else lambda field, here: None
        task = _load_task(options)
        require("task.sha256", task.sha256)
        template = Template(task.format, load_template(options.template, task.format))
        require("template", template.text)
        if CLOSED_BOOK in options.documents and task.format.closed_book is None:
            raise InputError(f"``documents='closed-book'``: expected a task that can be asked so, got {options.task}")
        questions = choose_questions(task, options.examples, options.seed)
        lenses = load_lenses(options.lens)
        for index, lens in enumerate(lenses):
            require(f"lenses.{index}.sha256", lens.sha256)
        loaded = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
        _check_words(options, template, questions, loaded)
        require("model.device", loaded.model.device.type)
        require("model.dtype", str(loaded.model.dtype).removeprefix("torch."))
        for name in ("config_sha256", "weights_sha256", "tokenizer_sha256"):
            require(f"model.{name}", getattr(loaded, name))
        if options.generate:
            require("model.end_ids", sorted(loaded.end_ids))
        if options.chat:
            require("chat.template_sha256", template_hash(loaded.tokenizer))
            chat = spec.chat if spec else render_chat(loaded.tokenizer)  # the template may write the date
            template = replace(template, chat=chat)
        logit_lens = LogitLens(loaded.model)
        require("model.backend", choose_backend(loaded.model.device.type, logit_lens.backend)[0])
        lenses = [fit_to_model(lens, loaded, logit_lens) for lens in lenses]
        return cls(options, task, template, questions, lenses, loaded, logit_lens)

    @cached_property
    def remarks(self) -> list[str]:
        """What a reader must know of these texts, a line each."""
        return list(remarks(self.options, self.template, self.questions, self.loaded))

    def manifest(self, argv: list[str] | None, workers: int, questions_per_part: int) -> dict:
        """The manifest of a run that starts now."""
        things = (self.task, self.template, self.loaded, self.logit_lens, self.lenses)
        counts = {"n_questions": len(self.questions), "questions_per_part": questions_per_part, "workers": workers}
        return make_manifest(self.options.arguments(), argv, *things, **counts, remarks=self.remarks)

    def builder(self) -> ContextBuilder:
        """What builds contexts."""
        return ContextBuilder(self.options, self.task, self.template, self.loaded, self.logit_lens)

    def predictor(self) -> Predictor:
        """What asks the questions."""
        return Predictor(self.options, self.builder(), self.loaded, self.logit_lens, self.lenses)

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, QuestionResult]]:
        """Ask the questions at these places, each with its outcome, in their order, until ``stopped``."""
        predictor = self.predictor()
        for group in groups_of(places, questions_together(self.options, self.loaded.model.device.type)):
            if stopped():
                return
            yield from zip(group, predictor.ask(self.questions, group), strict=True)


def _check_words(options: SweepConfig, template: Template, questions: list[Question], loaded: LoadedModel) -> None:
    """Refuse a template of one's own with words that the model's tokenizer does not have, and questions mostly in such.

    OPT's puts the token that stands for them before every text, as its beginning.
    """
    unknown = loaded.tokenizer.unk_token_id
    if unknown is None:
        return

    def is_odd(text: str) -> bool:
        return unknown in loaded.tokenizer(text, add_special_tokens=False)["input_ids"]

    own_text = "" if options.template in template.format.templates else FIELD.sub(" ", template.text)
    for special in loaded.tokenizer.all_special_tokens:  # one of them may stand for unknown words too
        own_text = own_text.replace(special, " ")
    strange = next(filter(is_odd, own_text.split()), None)
    if strange is not None:
        raise InputError(
            f"``template`` {options.template}: expected words that the tokenizer of ``model`` {options.model} has, got "
            f"{strange!r}; write others"
        )
    odd = [q for q in questions[:100] if is_odd(q.question)]
    if 2 * len(odd) > len(questions[:100]):
        remedy = "; use ``task='tiny'``" if options.model == TINY.name else ""
        raise InputError(
            f"``task`` {options.task}: expected questions in words that the tokenizer of ``model`` {options.model} "
            f"has, got {len(odd)} of the first {len(questions[:100])} with others, such as {odd[0].question!r}{remedy}"
        )


def _load_task(options: SweepConfig) -> Task:
    generate = GENERATORS.get(options.task)
    return generate(options.examples, max(options.documents), options.seed) if generate else load_task(options.task)


def run_sweep(
    options: SweepConfig,
    out: str,
    overwrite: bool = False,
    argv: list[str] | None = None,
    workers: int = 1,
    report: Callable[[SweepProgress], None] = lambda progress: None,
    summary: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
    questions_per_part: int = QUESTIONS_PER_PART,
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
        questions_per_part: How many are written together; where every token is read each has a part of its own.

    Raises:
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: Something broke, such as no free disk; what was written stays, and `resume_sweep` goes on with it.
        Interrupted: SIGINT or SIGTERM, after the current question, all finished ones and their summary were
            written; a second signal writes nothing more.
    """
    check_workers(workers)
    run = Run(Path(out))
    run.check_replaceable()
    with StopSignals(UNIT) as signals, RunLock(out):
        run.check_overwrite(overwrite, options.arguments())
        runner = SweepInputs.load(options)
        check_top(options.top, runner.logit_lens.head.vocab_size)
        manifest = runner.manifest(argv, workers, 1 if options.positions == "all" else questions_per_part)
        check_disk(out, _bytes_needed(options, manifest))
        for line in runner.remarks:
            warn(line)
        if workers > 1:
            runner = Workers(options, RunSpec(run.path, manifest, "``out``"), workers, warn)  # our model goes
        return _Sweep(runner, _begin(run, manifest), signals, report, summary, warn).finish()


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
        FaultError: See `run_sweep`; also `Interrupted`.
    """
    check_workers(workers)
    run = open_run(path)
    with StopSignals(UNIT) as signals, RunLock(path):
        manifest = run.checked_manifest()  # another process may have written it meanwhile
        spec = RunSpec(run.path, manifest, "``resume``")
        parts, damaged = run.whole_parts(manifest)
        for line in damaged:
            warn(line)
        try:
            runner = SweepInputs.load(spec.options, spec)
        except Interrupted as stop:
            raise Interrupted(stop.signum, run if any(part.rows for part in parts) else None) from None
        entry = resumed_entry(argv, runner.loaded.model.device.type, workers)
        manifest = go_on(manifest, parts, entry) | {"finished": None}
        if workers > 1:
            runner = Workers(spec.options, replace(spec, manifest=manifest), workers, warn)
        return _Sweep(runner, _begin(run, manifest, resumed=True), signals, report, summary, warn).finish()


def _begin(run: Run, manifest: dict, resumed: bool = False) -> RunWriter:
    try:
        return RunWriter(run, manifest, resumed)
    except OSError as error:
        raise disk_error(run.path, error) from None


@dataclass(frozen=True)
class _Sweep:
    """A sweep under way: what asks, what keeps the rows, and who is told."""

    runner: SweepInputs | Workers
    recorder: RunWriter
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
        except Interrupted as second_signal:
            stop = second_signal
        except OSError as error:
            recorder.give_up()
            raise self._with_advice(disk_error(recorder.run.path, error)) from None
        except FaultError as error:
            raise self._with_advice(error) from error.__cause__
        if stop:
            raise Interrupted(stop.signum, recorder.run if recorder.has_rows else None)
        if not recorder.has_rows:
            reasons = "; ".join(f"{len(ids)} at {reason}" for reason, ids in recorder.left_out.items())
            raise InputError(
                f"expected at least one question that can be asked, got none ({reasons}); change ``documents``"
            )
        return recorder.run

    def _ask_until_stopped(self) -> Interrupted | None:
        """Ask what is missing; returns what stopped it, if anything did, and concludes the run only on a fault."""
        try:
            self._ask_missing()
        except (Interrupted, OSError):
            raise
        except KeyboardInterrupt:  # not by our signals: from another thread, or from ``report``
            return Interrupted(signal.SIGINT)
        except Exception:
            self._conclude("failed")
            raise
        return Interrupted(self.signals.received) if self.recorder.missing() else None

    def _ask_missing(self) -> None:
        """Ask every question that has no rows yet, until a signal comes."""
        recorder, signals = self.recorder, self.signals
        missing = recorder.missing()
        progress = SweepProgress(recorder.done + len(missing), recorder.done)
        self.report(progress)
        signals.finish_first()
        with closing(self.runner.ask(missing, stopped=lambda: signals.received is not None)) as outcomes:
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
        if not self.recorder.is_placed:
            return error
        path = self.recorder.run.path
        return type(error)(f"{error}; {resume_call(path)} goes on with the finished questions")


def _bytes_needed(options: SweepConfig, manifest: dict) -> int:
    """Upper estimate, four answer tokens a question or 200 tokens a document: uncompressed, 64 bytes per layer and 512
    per prediction, 8 per generated token, and of answer tokens 4 and 64 more per threshold."""
    n_questions, n_layers = manifest["counts"]["questions"], manifest["model"]["n_layers"]
    n_contexts = [len(gold_positions(options.gold_positions, size)) for size in options.documents]
    n_tokens = [4 if options.positions == "answer" else 200 * (size + 1) for size in options.documents]
    per_row = (n_layers + 1) * 64 + 512 + 8 * options.generate
    per_answer = 4 * len(options.top) * ((n_layers + 1) * 4 + 64)
    per_context = sum(n * (tokens * per_row + per_answer) for n, tokens in zip(n_contexts, n_tokens, strict=True))
    return n_questions * per_context * len(options.lens) + (4 << 20)
