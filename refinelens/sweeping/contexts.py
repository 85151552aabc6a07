"""The contexts a question is asked in: every size and gold position with the answer measured, or the reason why not.

What a reader must know of their texts is said when a sweep begins and kept in its manifest.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch

from ..config import EVERY_QUESTION, SweepConfig
from ..data.generated import HOPS
from ..data.prompts import Context, Template, arrange, build_context, find_documents
from ..data.questions import Alias, Document, Question
from ..data.scoring import fold, has_word_boundaries
from ..data.tasks import DistractorSource, Task
from ..errors import CannotAskError, InputError
from ..lens.runner import ModelInput, blamed_on_context
from ..lens.stored_states import Runner
from ..model.identity import encode, ids_of
from ..model.loading import LoadedModel
from ..placement import CLOSED_BOOK, ORACLE, Placement, condition_name
from ..report.rows import counted
from .keep import CONDITIONS, is_predicted

Thing = TypeVar("Thing")

NO_ALIAS = Alias(0, "none")  # of a question that is not asked
CONTEXT_TOO_LONG = "a context longer than the model's positions"
TOO_FEW_DISTRACTORS = "too few passages without an answer"
NO_ANSWER = "no answer in the task file"
TOO_FEW_GOLDS = "too few gold documents"
TOO_FEW_DECOYS = "too few decoys"
ANSWER_IN_SHOTS = "an answer that stands in the worked examples"
NO_EMBEDDING = "a token that the model has no embedding for"
LOOKED_AT = 100  # questions whose documents are read for unknown words
UNKNOWN_SHARE = 0.01  # of the tokens of documents, from which on it is said
THINKING = re.compile(r"[<\[](think|thinking|thought|reasoning|reason)[>\]]\s*$", re.IGNORECASE)


def best_alias(scores: dict[int, float]) -> Alias:
    """The answer of the highest score, of equal ones the first.

    Args:
        scores: By the place of every answer that can be asked for, in their order, see `alias_scores`.
    """
    index, *others = sorted(scores, key=lambda place: -scores[place])
    if not others:
        return Alias(index, "the only one that the model can be asked for")
    found = f"{scores[index]:.2f} against {scores[others[0]]:.2f} nats a token"
    return Alias(index, f"best of {len(scores)}: {found}")


def alias_scores(runner: Runner, contexts: Sequence[Context]) -> list[float]:
    """Mean log-probability per token, nats, that the model gives all that follows each prompt by itself.

    That is the teacher-forced answer, with the space before it where that is a token: no answer gets one for nothing.

    Raises:
        FaultError: Names the context at fault.
    """
    spans = [context.reply_span for context in contexts]
    inputs = [ModelInput(c.input_ids, s.positions, c.where) for c, s in zip(contexts, spans, strict=True)]
    scores = [0.0] * len(contexts)

    for ran in runner.run(inputs):
        with blamed_on_context(inputs[ran.index]):
            targets = torch.tensor(spans[ran.index].next_ids, device=ran.hidden.device)
            logprobs = runner.lens.stats(ran.hidden[-1], targets).target_logprob
            scores[ran.index] = float(logprobs.double().mean())
    return scores


@dataclass(frozen=True)
class QuestionContexts:
    """All contexts of one question, for one of its answers."""

    alias: Alias
    contexts: list[Context]
    left_out: dict[str, list[int]]  # context size and reason: the question's id
    n_tokens: int  # computed to choose the answer, and whether to keep the question
    n_replaced: int  # of its own passages that hold an answer; others stand for them


def choose_context(
    builder: ContextBuilder,
    questions: list[Question],
    sizes: Sequence[int],
    question: int | None,
    documents: int | None,
    gold_position: int | None,
    decoy_position: int | None = None,
) -> Context:
    """One context to look at.

    Args:
        builder: What builds contexts.
        questions: That are there.
        sizes: Context sizes that are there.
        question: Its id; None for the first that could be asked at the size.
        documents: The size; None for the one that shows best, the smallest with other documents.
        gold_position: None for the first.
        decoy_position: None for the first.

    Raises:
        InputError: There is no such context.
    """
    if question is not None:
        questions = [pick("``question``", questions, lambda question: question.id, question)]
    if documents is not None:
        sizes = [pick("``documents``", sizes, lambda size: size, documents)]
    # Of those without other documents oracle is shown better than closed-book.
    for size in sorted(sizes, key=lambda size: (size <= ORACLE, -size if size <= ORACLE else size)):
        for asked in questions:
            contexts = [context for context in builder.build(asked).contexts if context.n_documents == size]
            if contexts:
                pick("``gold_position``", contexts, lambda context: context.gold_position, gold_position)
                own = [c for c in contexts if gold_position in (None, c.gold_position)]
                return pick("``decoy_position``", own, lambda c: c.placement.decoy_position, decoy_position)
    where = "" if documents is None else f" with {condition_name(documents)}"
    got = "none" if question is None else f"question {question}, which was left out"
    raise InputError(f"``question``: expected one that the run could ask{where}, got {got}")


def pick(option: str, things: Sequence[Thing], value: Callable[[Thing], object], wanted: object) -> Thing:
    """The first thing of the wanted value, or the first of all where none is wanted.

    Raises:
        InputError: There is none; says what there is.
    """
    found = next((thing for thing in things if wanted is None or value(thing) == wanted), None)
    if found is None:
        there = ", ".join(dict.fromkeys(str(value(thing)) for thing in things[:20]))
        raise InputError(f"{option}: expected one that the run has, such as {there}, got {wanted}")
    return found


class ContextBuilder:
    """Builds the contexts of questions: always the same for one task, template, model and seed."""

    def __init__(
        self, options: SweepConfig, task: Task, template: Template, loaded: LoadedModel, runner: Runner | None
    ):
        """
        Args:
            options: What is asked.
            task: Where other documents come from.
            template: What prompts look like.
            loaded: The model, of which tokenizer, positions and embedding are asked.
            runner: Of the model, where answers or questions are chosen by what it says; None where `build` is not used.
        """
        self._options = options
        self._template = template
        self._loaded = loaded
        self._runner = runner
        self._distractors = DistractorSource(task, options.seed)
        self._thread = ThreadPoolExecutor(1, "contexts")
        self._ahead: dict[int, Future[QuestionContexts]] = {}  # by question id, see `prepare`

    def prepare(self, questions: Sequence[Question]) -> None:
        """Let a thread do what `build` does of some questions, which then takes that, errors included.

        Not twice, however often it is asked to, and not where the model is asked which answer is the target, or whether
        to keep a question: two threads must not encode with one tokenizer at a time, whose calls change its settings.
        """
        if self._options.keep == EVERY_QUESTION and self._options.alias == "first":
            new = [question for question in questions if question.id not in self._ahead]
            self._ahead |= {question.id: self._thread.submit(self._built, question) for question in new}

    def close(self) -> None:
        """Nothing more is prepared; what nobody asked for yet is not waited for."""
        self._thread.shutdown(cancel_futures=True)

    def build(self, question: Question) -> QuestionContexts:
        """Contexts in the order of sizes and gold positions. A sweep is paired: of a size all positions, or none."""
        ahead = self._ahead.pop(question.id, None)
        return self._built(question) if ahead is None else ahead.result()

    def _built(self, question: Question) -> QuestionContexts:
        n_tokens = 0
        try:
            alias, n_tokens = self._alias(question)
            reason, n_more = self._why_not_kept(question, alias.index)
            n_tokens += n_more
        except CannotAskError as error:
            reason = str(error)
        if reason is not None:
            reasons = {f"{condition_name(size)}: {reason}": [question.id] for size in self._options.documents}
            return QuestionContexts(NO_ALIAS, [], reasons, n_tokens, 0)
        contexts, left_out, n_replaced = [], {}, 0
        for size in self._options.documents:
            found = self._of_size(question, size, alias.index)
            if isinstance(found, str):
                left_out[f"{condition_name(size)}: {found}"] = [question.id]
            else:
                contexts += found
                placement = found[0].placement
                others = max(0, size - placement.golds - placement.decoys)
                n_replaced = self._distractors.replaced(question, others)  # of the largest size
        return QuestionContexts(alias, contexts, left_out, n_tokens, n_replaced)

    def every_context(self, question: Question) -> list[tuple[int, Context]]:
        """Every context that `build` may run or return, whatever the model says, each with the place of its answer.

        Where the answer is chosen by the model, these are the contexts of all its answers.
        """
        try:
            oracles = self._oracles(question)
        except CannotAskError:
            return []
        if self._any_too_long(list(oracles.values())):
            found, aliases = [], [min(oracles)]
        else:
            found, aliases = list(oracles.items()), list(oracles) or [0]
        for alias in aliases:
            with suppress(CannotAskError):
                found += ((alias, context) for context in self._of_alias(question, alias))
        return found

    def _of_alias(self, question: Question, alias: int) -> Iterator[Context]:
        """Contexts that one answer is decided by and asked in, up to where the question would be left out."""
        for size, *_ in CONDITIONS[self._options.keep]:
            context = self._condition(question, size, alias)
            if self._any_too_long([context]):
                return
            yield context
        for size in self._options.documents:
            found = self._of_size(question, size, alias)
            yield from () if isinstance(found, str) else found

    def document_spans(self, context: Context) -> list[tuple[int, int] | None]:
        """Tokens of every document of a context, end exclusive; None where the tokenizer knows no offsets."""
        placement = context.placement
        others = context.n_documents - placement.golds - placement.decoys
        distractors = self._distractors.choose(context.question, max(0, others)) or []
        documents = arrange(context.question, distractors, placement)
        return find_documents(self._loaded.tokenizer, self._template, context.question, documents)

    def _of_size(self, question: Question, size: int, alias: int) -> list[Context] | str:
        """The contexts, or why there are none."""
        placements = self._options.placements(size)
        golds, decoys = placements[0].golds, placements[0].decoys
        if golds > 1 + len(question.golds):
            return TOO_FEW_GOLDS
        if self._options.n_decoys and max(1, decoys) > len(question.decoys):
            return TOO_FEW_DECOYS
        distractors = self._distractors.choose(question, max(0, size - golds - decoys))
        if distractors is None:
            return TOO_FEW_DISTRACTORS
        try:
            contexts = [self._build(question, distractors, placement, alias) for placement in placements]
        except CannotAskError as error:
            return str(error)
        return CONTEXT_TOO_LONG if self._any_too_long(contexts) else contexts

    def _build(
        self, question: Question, distractors: list[Document], placement: Placement, alias: int, decoy: bool = True
    ) -> Context:
        decoy = decoy and self._options.n_decoys > 0
        context = build_context(self._loaded.tokenizer, self._template, question, distractors, placement, alias, decoy)
        ids = (*context.input_ids, *context.prompt_ids, context.answer_ids[-1], context.decoy_id or 0)
        if not self._loaded.has_embeddings(ids):
            raise CannotAskError(NO_EMBEDDING)
        return context

    def _alias(self, question: Question) -> tuple[Alias, int]:
        """The answer that is the target everywhere, so that contexts can be compared, and the tokens this took.

        Raises:
            CannotAskError: There is none, or none that this model can be asked for.
        """
        oracles = self._oracles(question)
        if self._options.alias == "first" or len(question.answers) == 1:
            return Alias(0, "first" if len(question.answers) > 1 else "only"), 0
        contexts = list(oracles.values())
        if self._any_too_long(contexts):
            return Alias(min(oracles), f"first: {CONTEXT_TOO_LONG}"), 0
        n_tokens = sum(len(context.input_ids) for context in contexts)
        return best_alias(dict(zip(oracles, alias_scores(self._runner, contexts), strict=True))), n_tokens

    def _oracles(self, question: Question) -> dict[int, Context]:
        """Contexts with the gold document alone, by the answers that can be the target; none for a single one.

        Raises:
            CannotAskError: There is no answer, or none that this model can be asked for.
        """
        if not question.answers:
            raise CannotAskError(NO_ANSWER)
        if self._template.shots and self._template.shots.has_answer_of(question):
            raise CannotAskError(ANSWER_IN_SHOTS)
        if self._options.alias == "first" or len(question.answers) == 1:
            return {}
        oracles: dict[int, Context] = {}
        for alias in range(len(question.answers)):
            try:
                oracles[alias] = self._build(question, [], Placement(0), alias, decoy=False)
            except CannotAskError as error:
                reason = error
        if not oracles:
            raise reason
        return oracles

    def _condition(self, question: Question, size: int, alias: int) -> Context:
        """The context without documents, or with the gold one alone, that decides whether a question is kept."""
        placement = Placement() if size == CLOSED_BOOK else Placement(0)
        return self._build(question, [], placement, alias, decoy=False)

    def _why_not_kept(self, question: Question, alias: int) -> tuple[str | None, int]:
        """The reason to leave a question out by what the model says of it, None to keep it, and the tokens this took.

        Raises:
            CannotAskError: See `_build`.
        """
        n_tokens = 0
        for size, is_wanted, reason in CONDITIONS[self._options.keep]:
            context = self._condition(question, size, alias)
            if self._any_too_long([context]):
                return CONTEXT_TOO_LONG, n_tokens
            n_tokens += len(context.input_ids)
            if is_predicted(self._runner, context) != is_wanted:
                return reason, n_tokens
        return None, n_tokens

    def _any_too_long(self, contexts: list[Context]) -> bool:
        lengths = (max(len(context.input_ids), len(context.prompt_ids)) for context in contexts)
        limit = self._loaded.max_tokens
        return limit is not None and any(length > limit for length in lengths)


def remarks(options: SweepConfig, template: Template, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    """One line for each thing that numbers are read with, and that no number shows."""
    task = f"``task`` {options.task}"
    distinct = len({(question.question, question.answers) for question in questions})
    if distinct < len(questions):
        yield (
            f"{task}: {counted(len(questions), 'question')}, {distinct} of them distinct; tables and figures count "
            "equal ones as independent, so that intervals are too narrow"
        )
    if options.task == HOPS and ORACLE in options.documents:
        yield (
            f"{task}: with the gold document alone the one that names the friend is missing; what is right there is "
            "the only value of the context, found in no hop"
        )
    if template.shots:
        ids = ", ".join(map(str, template.shots.ids))
        yield f"``shots`` {options.shots}: the worked examples are questions of the task that are not asked, {ids}"
    yield from _special_tokens(task, template, questions, loaded)
    yield from _unknown_words(task, questions, loaded)
    yield from _prompt(options, template, questions, loaded)
    joined = sum(not has_word_boundaries(fold(" ".join(question.answers))) for question in questions)
    if joined and not template.format.pairs:
        yield (
            f"{task}: {counted(joined, 'question')} with answers in a script that does not set words apart; a passage "
            "that contains one anywhere is taken to hold it, which may leave out more than need be"
        )


def _special_tokens(task: str, template: Template, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    """Those in documents, where the prompt has some too, so that the tokenizer reads all alike."""
    if template.is_literal(loaded.tokenizer):
        return
    names = sorted(filter(None, loaded.tokenizer.all_special_tokens), key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, names)))
    found = [match for question in questions if (match := special.search(_text_of(question)))]
    if found:
        yield (
            f"{task}: {counted(len(found), 'question')} with special tokens of the tokenizer in the text, such as "
            f"{found[0].group()!r}; the prompt has some of its own, so that the model reads these as special tokens too"
        )


def _text_of(question: Question) -> str:
    documents = (question.gold, *question.distractors)
    texts = [text for document in documents for text in (document.title, document.text)]
    return "\n".join([question.question, question.answer_prefix, *question.answers, *texts])


def _unknown_words(task: str, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    unknown = loaded.tokenizer.unk_token_id
    if unknown is None:
        return
    ids = [id for question in questions[:LOOKED_AT] for id in ids_of(loaded.tokenizer, question.gold.text)]
    share = ids.count(unknown) / max(1, len(ids))
    if share >= UNKNOWN_SHARE:
        yield (
            f"{task}: {share:.0%} of the tokens of the gold documents stand for words that the tokenizer does not "
            "know; the model cannot read those"
        )


def _prompt(options: SweepConfig, template: Template, questions: list[Question], loaded: LoadedModel) -> Iterator[str]:
    """A second beginning of the text, and a chat that makes the model think before it answers."""
    tokenizer = loaded.tokenizer
    if template.chat is not None:
        opening = THINKING.search(template.chat.around()[1])
        if opening:
            yield (
                f"``chat``: the template opens the reply with {opening.group().strip()!r}; the answer is read where "
                "the model would begin to think"
            )
        return
    prompt = template.fill(questions[0], [questions[0].gold], 0)[0]
    ids = encode(tokenizer, prompt, True, template.is_literal(tokenizer))["input_ids"]
    if tokenizer.bos_token_id is not None and list(ids[:2]) == [tokenizer.bos_token_id] * 2:
        yield (
            f"``template`` {options.template}: it begins with {tokenizer.bos_token!r}, which the tokenizer puts before "
            "every text by itself, so that contexts begin with two of them"
        )
