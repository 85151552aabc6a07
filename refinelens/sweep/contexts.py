"""The contexts a question is asked in: every size and gold position, or the reason why not."""

from __future__ import annotations

from dataclasses import dataclass

from ..conditions import CLOSED_BOOK, condition_name, gold_positions
from ..errors import CannotAskError, FaultError, InputError
from ..lenses.logit_lens import LogitLens
from ..model.loading import LoadedModel
from ..options import SweepOptions
from ..prompts.context import Context, Template, build_context
from ..tasks.question import Alias, Document, Question
from ..tasks.task import DistractorSource, Task
from .alias import NO_ALIAS, alias_score, best_alias, first_alias

CONTEXT_TOO_LONG = "a context longer than the model's positions"
TOO_FEW_DISTRACTORS = "too few passages without an answer"
NO_ANSWER = "no answer in the task file"
NO_EMBEDDING = "a token that the model has no embedding for"


@dataclass(frozen=True)
class QuestionContexts:
    """All contexts of one question, for one of its answers."""

    alias: Alias
    contexts: list[Context]
    left_out: dict[str, list[int]]  # context size and reason: the question's id
    n_tokens: int  # computed to choose the answer
    n_replaced: int  # of its own passages that hold an answer; others stand for them


class ContextBuilder:
    """Builds the contexts of questions: always the same for one task, template, model and seed."""

    def __init__(
        self, options: SweepOptions, task: Task, template: Template, loaded: LoadedModel, logit_lens: LogitLens
    ):
        self._options = options
        self._template = template
        self._loaded = loaded
        self._logit_lens = logit_lens
        self._distractors = DistractorSource(task, options.seed)

    def build(self, question: Question) -> QuestionContexts:
        """Contexts in the order of sizes and gold positions. A sweep is paired: of a size all positions, or none."""
        try:
            alias, n_tokens = self._alias(question)
        except CannotAskError as error:
            reasons = {f"{condition_name(size)}: {error}": [question.id] for size in self._options.documents}
            return QuestionContexts(NO_ALIAS, [], reasons, 0, 0)
        contexts, left_out, n_replaced = [], {}, 0
        for size in self._options.documents:
            found = self._of_size(question, size, alias.index)
            if isinstance(found, str):
                left_out[f"{condition_name(size)}: {found}"] = [question.id]
            else:
                contexts += found
                n_replaced = self._distractors.replaced(question, max(0, size - 1))  # of the largest size
        return QuestionContexts(alias, contexts, left_out, n_tokens, n_replaced)

    def _of_size(self, question: Question, size: int, alias: int) -> list[Context] | str:
        """The contexts, or why there are none."""
        distractors = [] if size == CLOSED_BOOK else self._distractors.choose(question, size - 1)
        if distractors is None:
            return TOO_FEW_DISTRACTORS
        positions = gold_positions(self._options.gold_positions, size)
        try:
            contexts = [self._build(question, distractors, position, alias) for position in positions]
        except CannotAskError as error:
            return str(error)
        return CONTEXT_TOO_LONG if self._any_too_long(contexts) else contexts

    def _build(self, question: Question, distractors: list[Document], gold_position: int, alias: int) -> Context:
        context = build_context(self._loaded.tokenizer, self._template, question, distractors, gold_position, alias)
        if not self._loaded.has_embeddings((*context.input_ids, *context.prompt_ids, context.answer_ids[-1])):
            raise CannotAskError(NO_EMBEDDING)
        return context

    def _alias(self, question: Question) -> tuple[Alias, int]:
        """The answer that is the target everywhere, so that contexts can be compared, and the tokens this took.

        Raises:
            CannotAskError: There is none, or none that this model can be asked for.
        """
        if not question.answers:
            raise CannotAskError(NO_ANSWER)
        if self._options.alias == "first" or len(question.answers) == 1:
            return first_alias(question), 0
        contexts = self._of_aliases(question)
        if self._any_too_long(list(contexts.values())):
            return Alias(min(contexts), f"first: {CONTEXT_TOO_LONG}"), 0
        n_tokens = sum(len(context.input_ids) for context in contexts.values())
        return best_alias({alias: self._score(context) for alias, context in contexts.items()}), n_tokens

    def _of_aliases(self, question: Question) -> dict[int, Context]:
        """The oracle context of every answer that the model can be asked for."""
        found, reason = {}, None
        for alias in range(len(question.answers)):
            try:
                found[alias] = self._build(question, [], 0, alias)
            except CannotAskError as error:
                reason = error
        if not found:
            raise reason
        return found

    def _score(self, context: Context) -> float:
        try:
            return alias_score(self._logit_lens, context)
        except InputError as error:
            raise FaultError(f"{context.where}: {error}") from None

    def _any_too_long(self, contexts: list[Context]) -> bool:
        lengths = (max(len(context.input_ids), len(context.prompt_ids)) for context in contexts)
        limit = self._loaded.max_tokens
        return limit is not None and any(length > limit for length in lengths)
