"""What a sweep is made of, loaded and held to what its run says: task, template, questions, lenses and model."""

from __future__ import annotations

import platform
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from ..config import NEEDS_DOCUMENT, SUBLAYERS, SweepConfig
from ..data.frequencies import TokenFrequencies, count_tokens
from ..data.generated import GENERATORS, TINY, generate_task
from ..data.prompts import FIELD, Chat, Context, Shots, Template, load_template, render_chat, template_hash
from ..data.questions import Question
from ..data.shots import draw_shots
from ..data.tasks import Task, choose_questions, load_task
from ..data.texts import load_text
from ..errors import InputError
from ..lens.blocks import sublayers_of
from ..lens.chunks import chunk_tokens
from ..lens.files import Lens, load_lenses
from ..lens.logit_lens import LogitLens, fit_to_model
from ..lens.runner import ForwardRunner
from ..lens.stored_states import HeadLens, StoredStates, context_id
from ..machine import device_name, working_folder
from ..model.identity import ids_of
from ..model.loading import HEAD, LoadedModel, load_model
from ..model.quantize import method_of
from ..model.resid_mid import Sublayers
from ..model.split import places
from ..op.backends import choose_backend
from ..placement import CLOSED_BOOK
from ..store.folder import process_entry
from ..store.results import SCHEMA_VERSION, QuestionResult
from .contexts import ContextBuilder, choose_context, remarks
from .predict import Predictor, groups_of, questions_together
from .run_spec import RunSpec


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
    stored: StoredStates | None = None  # of every context, where another engine ran the model
    chunk_tokens: int = 0  # see `ForwardRunner`

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
        task, template, questions = load_questions(options, spec)
        lenses = load_lenses(options.lens)
        for index, lens in enumerate(lenses):
            require(f"lenses.{index}.sha256", lens.sha256)
        if options.frequencies is not None and spec is None:  # a run that is there is also read without the text
            load_text(options.frequencies, "frequencies")
        part = {} if options.states is None else {"part": HEAD}
        loaded = load_model(options.model, **options.loading, **part)
        check_words(options, template, questions, loaded)
        require("model.device", loaded.device.type)
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
        logit_lens = LogitLens(loaded.model) if options.states is None else HeadLens(loaded)
        stored = StoredStates(options.states, logit_lens) if isinstance(logit_lens, HeadLens) else None
        require("model.backend", choose_backend(loaded.device.type, logit_lens.backend)[0])
        lenses = [fit_to_model(lens, loaded, logit_lens) for lens in lenses]
        measured = SUBLAYERS in options.measures
        sublayers = sublayers_of(logit_lens, f"leave {SUBLAYERS} out of ``measures``") if measured else None
        size = spec.chunk_tokens if spec else 0 if stored else chunk_tokens(logit_lens)
        return cls(options, task, template, questions, lenses, loaded, logit_lens, sublayers, stored, size)

    def manifest(self, argv: list[str] | None, workers: int, questions_per_part: int) -> dict:
        """The manifest of a run that starts now; parts, counts, status and times follow while it goes on."""
        options, task, template, loaded, lens = self.options, self.task, self.template, self.loaded, self.logit_lens
        device = loaded.device.type
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
                "places": places(loaded.model),
                "whole_difference": loaded.whole_difference,
                "quantization": method_of(loaded.model.config),
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
            **({"states": self.stored.entry()} if self.stored else {}),
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
            "chunk_tokens": self.chunk_tokens,
            "parts": [],
        }

    def builder(self) -> ContextBuilder:
        """What builds contexts."""
        runner = self.stored or ForwardRunner(self.logit_lens)
        return ContextBuilder(self.options, self.task, self.template, self.loaded, runner)

    def check_stored(self, places: list[int]) -> None:
        """Refuse to ask the questions at these places while a context of theirs lacks its states, where these are read.

        Raises:
            InputError: Says how many contexts and files there are, and names the first context without one.
        """
        if self.stored is None:
            return
        builder, there = self.builder(), {}  # by the ids of contexts, whose token ids are not kept
        absent = None
        for place in places:
            for _, context in builder.every_context(self.questions[place]):
                id = context_id(context.input_ids)
                there[id] = self.stored.has(context.input_ids)
                absent = absent or (None if there[id] else f"{context.where} ({id})")
        if absent is not None:
            folder = self.options.states
            raise InputError(
                f"``states`` {folder}: expected a file for each of {len(there)} contexts, got {sum(there.values())}; "
                f"the first without one is {absent}; ``prompts(states='{folder}')`` writes those that are missing"
            )

    def context(self, *which: int | None) -> Context:
        """One context of a run to look at, see `choose_context`."""
        return choose_context(self.builder(), self.questions, self.options.documents, *which)

    def predictor(self) -> Predictor:
        """What asks the questions."""
        parts = (self.options, self.builder(), self.loaded, self.logit_lens, self.lenses)
        buckets = self.frequencies and self.frequencies.buckets
        how = {"sublayers": self.sublayers, "stored": self.stored, "chunk_tokens": self.chunk_tokens}
        return Predictor(*parts, buckets=buckets, **how)

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, QuestionResult]]:
        """Ask the questions at these places, each with its result, in their order, until ``stopped``.

        Contexts of the next questions are built by a thread meanwhile, unless the model says what they are.
        """
        predictor, questions = self.predictor(), self.questions
        groups = groups_of(places, questions_together(self.options, self.loaded.device.type))
        with closing(predictor):
            for index, group in enumerate(groups):
                if stopped():
                    return
                for soon in groups[index : index + 2]:
                    predictor.prepare(questions, soon)
                yield from zip(group, predictor.ask(questions, group), strict=True)


def load_questions(options: SweepConfig, spec: RunSpec | None = None) -> tuple[Task, Template, list[Question]]:
    """Task, template and the questions that are asked, by the options alone, which take no model.

    Args:
        options: What to run.
        spec: Of the run that goes on, None where one begins.

    Raises:
        InputError: Anything that cannot be loaded, or is not as the run has it.
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
    return task, template, questions


def check_words(options: SweepConfig, template: Template, questions: list[Question], loaded: LoadedModel) -> None:
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
