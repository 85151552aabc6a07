"""All that a sweep reads, loaded and, where a run goes on, compared with what the run was made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ..conditions import CLOSED_BOOK
from ..errors import InputError
from ..lenses.lens_files import Lens, fit_to_model, load_lenses
from ..lenses.logit_lens import LogitLens
from ..model.loading import LoadedModel, load_model
from ..op.backends import choose_backend
from ..options import SweepOptions
from ..prompts.chat import render_chat, template_hash
from ..prompts.context import FIELD, Template, load_template
from ..runs.results import Outcome
from ..tasks import kv, tiny_task
from ..tasks.formats import KV
from ..tasks.question import Question
from ..tasks.task import Task, choose_questions, load_task
from ..tasks.tiny_task import TINY
from .contexts import ContextBuilder
from .manifest import make_manifest
from .predict import Predictor
from .remarks import remarks
from .resume import Terms

GENERATORS = {KV.name: kv.generate_task, TINY.name: tiny_task.generate_task}


@dataclass(frozen=True)
class SweepInputs:
    """Task, questions, template, lenses and model of a sweep; make one with `SweepInputs.load`."""

    options: SweepOptions
    task: Task
    template: Template
    questions: list[Question]
    lenses: list[Lens]
    loaded: LoadedModel
    logit_lens: LogitLens

    @classmethod
    def load(cls, options: SweepOptions, terms: Terms | None = None) -> SweepInputs:
        """Load everything, the quick things first.

        Args:
            options: What to run.
            terms: Of the run that goes on, None where one begins.

        Raises:
            InputError: Anything that cannot be loaded, or is not as the run has it.
        """
        require = terms.require if terms else lambda field, here: None
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
            chat = terms.chat if terms else render_chat(loaded.tokenizer)  # the template may write the date
            template = replace(template, chat=chat)
        logit_lens = LogitLens.from_model(loaded.model)
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

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, Outcome]]:
        """Ask the questions at these places one after another, each with its outcome, until ``stopped``."""
        predictor = self.predictor()
        for place in places:
            if stopped():
                return
            yield place, predictor.ask(self.questions[place])


def _check_words(options: SweepOptions, template: Template, questions: list[Question], loaded: LoadedModel) -> None:
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
            f"--template {options.template}: expected words that the tokenizer of --model {options.model} has, got "
            f"{strange!r}; write others"
        )
    odd = [q for q in questions[:100] if is_odd(q.question)]
    if 2 * len(odd) > len(questions[:100]):
        remedy = "; use --task tiny" if options.model == TINY.name else ""
        raise InputError(
            f"--task {options.task}: expected questions in words that the tokenizer of --model {options.model} has, "
            f"got {len(odd)} of the first {len(questions[:100])} with others, such as {odd[0].question!r}{remedy}"
        )


def _load_task(options: SweepOptions) -> Task:
    generate = GENERATORS.get(options.task)
    return generate(options.examples, max(options.documents), options.seed) if generate else load_task(options.task)
