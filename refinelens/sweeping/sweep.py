"""The sweep: questions -> prompts -> states -> lens -> results, one question at a time.

What a run is made of is loaded here, said in its manifest, and held to that when the run goes on.
"""

from __future__ import annotations

import platform
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import EVERY_QUESTION, NEEDS_DOCUMENT, STATES, SUBLAYERS, SweepConfig, check_top
from ..data.frequencies import TokenFrequencies, count_tokens
from ..data.generated import GENERATORS, TINY, generate_task
from ..data.prompts import FIELD, Chat, Context, Shots, Template, load_template, render_chat, template_hash
from ..data.questions import Question
from ..data.shots import draw_shots
from ..data.tasks import Task, choose_questions, load_task
from ..data.texts import load_text
from ..errors import InputError, resume_call
from ..lens.blocks import sublayers_of
from ..lens.files import Lens, load_lenses
from ..lens.logit_lens import LogitLens, fit_to_model
from ..machine import device_name, working_folder
from ..model.identity import ids_of
from ..model.loading import LoadedModel, load_model
from ..model.resid_mid import Sublayers
from ..op.backends import choose_backend
from ..placement import CLOSED_BOOK
from ..progress import Progress, unseen
from ..report.rows import Report
from ..report.summary import read_report
from ..report.tables import write_outputs
from ..store.files import check_disk
from ..store.folder import go_on, process_entry
from ..store.process import Interrupted, StopSignals, working_on
from ..store.results import PREDICTIONS, SCHEMA_VERSION, QuestionResult, Run, predictions_schema
from .contexts import ContextBuilder, choose_context, remarks
from .predict import Predictor, groups_of, questions_together
from .recorder import AccuracySoFar, RunWriter
from .run_spec import RunSpec
from .workers import Workers

UNIT = "the current question, then its tables"
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
    sublayers: list[Sublayers] | None  # of every block, where they are measured

    @cached_property
    def frequencies(self) -> TokenFrequencies | None:
        """How often tokens are in a text, where that is measured; counted when it is asked for."""
        name, vocab_size = self.options.frequencies, self.logit_lens.head.vocab_size
        return None if name is None else count_tokens(load_text(name, "frequencies"), self.loaded, vocab_size)

    @classmethod
    def load(cls, options: SweepConfig, spec: RunSpec | None = None) -> SweepInputs:
        """Load everything, the quick things first.

        Args:
            options: What to run.
            spec: Of the run that goes on, None where one begins.

        Raises:
            InputError: Anything that cannot be loaded, or is not as the run has it.
            UnsupportedModelError: Blocks without the parts that are to be measured.
        """
        require = spec.require if spec else lambda field, here: None
        if options.task in GENERATORS:
            task = generate_task(options.task, options.examples, max(options.documents), options.seed)
        else:
            task = load_task(options.task)
        require("task.sha256", task.sha256)
        template = Template(task.format, load_template(options.template, task.format))
        require("template", template.text)
        for option, is_given in (
            ("documents='closed-book'", CLOSED_BOOK in options.documents),
            ("keep='needs-document'", options.keep == NEEDS_DOCUMENT),
        ):
            if is_given and task.format.closed_book is None:
                raise InputError(f"``{option}``: expected a task that can be asked closed-book, got {options.task}")
        questions = choose_questions(task, options.examples, options.seed)
        if options.shots:
            drawn = Shots.of_entries(spec.manifest["shots"]) if spec else draw_shots(options, task, questions, template)
            template = replace(template, shots=drawn)
            questions = [question for question in questions if question.id not in drawn.ids]
        lenses = load_lenses(options.lens)
        for index, lens in enumerate(lenses):
            require(f"lenses.{index}.sha256", lens.sha256)
        if options.frequencies is not None and spec is None:  # a run that is there is also read without the text
            load_text(options.frequencies, "frequencies")
        loaded = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
        _check_words(options, template, questions, loaded)
        require("model.device", loaded.model.device.type)
        require("model.dtype", loaded.dtype_name)
        for name in ("config_sha256", "weights_sha256", "tokenizer_sha256"):
            require(f"model.{name}", getattr(loaded, name))
        if options.generate:
            require("model.end_ids", sorted(loaded.end_ids))
        if options.chat:
            require("chat.template_sha256", template_hash(loaded.tokenizer))
            # The template may write the date: a run that goes on keeps the text that it began with.
            chat = Chat(**spec.manifest["chat"]) if spec else render_chat(loaded.tokenizer, options.shots)
            template = replace(template, chat=chat)
        logit_lens = LogitLens(loaded.model)
        require("model.backend", choose_backend(loaded.model.device.type, logit_lens.backend)[0])
        lenses = [fit_to_model(lens, loaded, logit_lens) for lens in lenses]
        measured = SUBLAYERS in options.measures
        sublayers = sublayers_of(logit_lens, f"leave {SUBLAYERS} out of ``measures``") if measured else None
        return cls(options, task, template, questions, lenses, loaded, logit_lens, sublayers)

    def manifest(self, argv: list[str] | None, workers: int, questions_per_part: int) -> dict:
        """The manifest of a run that starts now; parts, counts, status and times follow while it goes on."""
        options, task, template, loaded, lens = self.options, self.task, self.template, self.loaded, self.logit_lens
        device = loaded.model.device.type
        return {
            "schema_version": SCHEMA_VERSION,
            **process_entry(argv),
            "run_id": uuid.uuid4().hex,  # tells two runs in one folder apart
            "status": "running",
            "arguments": options.arguments(),
            "extras": list(options.extras),
            "folder": working_folder(),  # that relative paths among the arguments start from
            "remarks": [
                *remarks(options, template, self.questions, loaded),
                *(f"``lens`` {lens.name}: {lens.note}" for lens in self.lenses if lens.note),
            ],
            "seed": options.seed,
            "model": {
                "name": loaded.name,
                "class": type(loaded.model).__name__,
                "config_sha256": loaded.config_sha256,
                "weights_sha256": loaded.weights_sha256,
                "weights_sample_sha256": loaded.weights_sample_sha256,
                "tokenizer_sha256": loaded.tokenizer_sha256,
                "unused_weights": list(loaded.unused_weights),
                "n_layers": lens.n_layers,
                "d_model": lens.d_model,
                "vocab_size": lens.head.vocab_size,
                "max_tokens": loaded.max_tokens,
                "end_ids": sorted(loaded.end_ids) if options.generate else None,
                "dtype": loaded.dtype_name,
                "device": device,
                "device_name": device_name(device),
                "backend": choose_backend(device, lens.backend)[0],
                "norm": None if lens.head.norm is None else type(lens.head.norm).__name__,
                "projection": None if lens.head.projection is None else list(lens.head.projection.shape),
                "softcap": lens.head.softcap,
                "logit_scale": lens.head.scale,
                "parity": asdict(lens.parity),
                "one_at_a_time": lens.independence.one_at_a_time,
            },
            "task": {
                "name": task.name,
                "path": None if task.path is None else str(task.path),
                "format": task.format.name,
                "sha256": task.sha256,
                "questions": len(task.questions),
            },
            "frequencies": self.frequencies and self.frequencies.entry(),
            "lenses": [lens.entry() for lens in self.lenses],
            "template": template.text,
            "closed_book_template": template.format.closed_book,
            "chat": None if template.chat is None else asdict(template.chat),
            **({"shots": template.shots.entries()} if template.shots else {}),
            "platform": platform.platform(),
            "finished": None,
            "seconds": None,
            "workers": workers,
            "resumed": [],
            "counts": {"questions": len(self.questions), "done": 0, "left_out": {}},
            "questions_per_part": questions_per_part,
            "parts": [],
        }

    def builder(self) -> ContextBuilder:
        """What builds contexts."""
        return ContextBuilder(self.options, self.task, self.template, self.loaded, self.logit_lens)

    def context(self, *which: int | None) -> Context:
        """One context of a run to look at, see `choose_context`."""
        return choose_context(self.builder(), self.questions, self.options.documents, *which)

    def predictor(self) -> Predictor:
        """What asks the questions."""
        parts = (self.options, self.builder(), self.loaded, self.logit_lens, self.lenses)
        return Predictor(*parts, buckets=self.frequencies and self.frequencies.buckets, sublayers=self.sublayers)

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, QuestionResult]]:
        """Ask the questions at these places, each with its result, in their order, until ``stopped``."""
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
        return unknown in ids_of(loaded.tokenizer, text)

    own_text = "" if options.template in template.format.templates else FIELD.sub(" ", template.text)
    for special in loaded.tokenizer.all_special_tokens:  # one of them may stand for unknown words too
        own_text = own_text.replace(special, " ")
    strange = next(filter(is_odd, own_text.split()), None)
    if strange is not None:
        raise InputError(
            f"``template`` {options.template}: expected words that the tokenizer of ``model`` {options.model} has, got "
            f"{strange!r}; write others"
        )
    looked_at = questions[:100]
    odd = [q for q in looked_at if is_odd(q.question)]
    if 2 * len(odd) > len(looked_at):
        remedy = "; use ``task='tiny'``" if options.model == TINY.name else ""
        raise InputError(
            f"``task`` {options.task}: expected questions in words that the tokenizer of ``model`` {options.model} "
            f"has, got {len(odd)} of the first {len(looked_at)} with others, such as {odd[0].question!r}{remedy}"
        )


def run_sweep(
    options: SweepConfig | None,
    out: str | Path,
    overwrite: bool = False,
    argv: list[str] | None = None,
    workers: int = 1,
    progress: Progress = unseen,
    summary: Callable[[Report], None] = lambda report: None,
    warn: Callable[[str], None] = lambda line: None,
    questions_per_part: int = QUESTIONS_PER_PART,
) -> Run:
    """Run a sweep and write its folder; an interrupt keeps what is finished, with its summary.

    Args:
        options: What to run; None goes on with the run in ``out``, see `resume_sweep`.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        argv: Command line, for the manifest.
        workers: Processes that ask; with more than one, each loads the model for itself.
        progress: Called after every question.
        summary: Called with what the tables and figures say, once they are written.
        warn: Called with a line about what went wrong and was put right, or about the texts, see `remarks`.
        questions_per_part: How many are written together; where every token is read each has a part of its own.

    Raises:
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: Something broke, such as no free disk; what was written stays, and `resume_sweep` goes on with it.
        Interrupted: SIGINT or SIGTERM, after the current question, all finished ones and their summary were
            written; a second signal writes nothing more.
    """
    if workers < 1:
        raise InputError(f"``workers``: expected 1 or more processes, got {workers}")
    run = Run(Path(out))
    if options is None:
        run.checked_manifest()  # before the lock makes a folder
    else:
        run.check_replaceable()
    sweep = _Sweep(run, argv, workers, progress, summary, warn, questions_per_part)
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


@dataclass
class _Sweep:
    """A sweep under way in a folder that is held: what asks, what keeps the rows, and who is told."""

    run: Run
    argv: list[str] | None
    workers: int
    progress: Progress
    summary: Callable[[Report], None]
    warn: Callable[[str], None]
    questions_per_part: int
    runner: SweepInputs | Workers | None = None
    writer: RunWriter | None = None

    def begin(self, options: SweepConfig, overwrite: bool) -> None:
        """Load everything, and put the manifest of a new run in its place."""
        self.run.check_overwrite(overwrite, options.arguments())
        inputs = SweepInputs.load(options)
        check_top(options.top, inputs.logit_lens.head.vocab_size)
        size = 1 if options.positions == "all" else self.questions_per_part
        manifest = inputs.manifest(self.argv, self.workers, size)
        check_disk(self.run.path, _bytes_needed(options, manifest))
        for line in manifest["remarks"]:
            self.warn(line)
        self._start(inputs, RunSpec(self.run.path, manifest, "``out``"))

    def go_on(self) -> None:
        """Load everything as the run has it; what is damaged of the run is missing."""
        manifest = self.run.checked_manifest()  # another process may have written it meanwhile
        spec, parts = RunSpec(self.run.path, manifest, "``resume``"), self.run.whole_parts(manifest, self.warn)
        try:
            spec.check_columns()
            inputs = SweepInputs.load(spec.options, spec)
        except Interrupted as stop:
            raise Interrupted(stop.signum, self.run if any(part.rows for part in parts) else None) from None
        entry = process_entry(self.argv) | {"workers": self.workers}
        entry["device_name"] = device_name(inputs.loaded.model.device.type)
        manifest = go_on(manifest, parts, entry) | {"finished": None}
        self._start(inputs, replace(spec, manifest=manifest), resumed=True)

    def _start(self, inputs: SweepInputs, spec: RunSpec, resumed: bool = False) -> None:
        """Of several workers each loads the model for itself; ours goes."""
        self.runner = Workers(inputs.options, spec, self.workers, self.warn) if self.workers > 1 else inputs
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
        if stop:
            raise Interrupted(stop.signum, self.run if writer.has_rows else None)
        if not writer.has_rows:
            reasons = "; ".join(f"{len(ids)} at {reason}" for reason, ids in writer.left_out.items())
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
