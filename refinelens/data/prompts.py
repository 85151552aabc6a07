"""Prompts: templates, a tokenizer's chat template around them, and the token ids of a context with its answer."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CannotAskError, InputError
from ..model.identity import encode
from ..placement import NO_POSITION, Placement, condition_name
from .answer_tokens import Tokens, joint, token_span, tokenise
from .questions import DEFAULT, QA, Document, Format, Question
from .scoring import has_answer, word_forms

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT, REPLY = "{prompt}", "{reply}"
ROLES = ("user", "assistant")
DOCUMENTS, QUESTION = "{documents}", "{question}"
UNKNOWN_ANSWER = "an answer in words that the tokenizer does not know"
SAME_BEGINNING = "an answer that begins with the same token as that of the decoys"
FIELD = re.compile(r"\{\w+\}")


@dataclass(frozen=True)
class Chat:
    """A conversation up to where the reply begins: the user's turn, behind those of worked examples if there are any.

    The text is rendered once for a run and kept in its manifest: a template may write the date.
    """

    template_sha256: str
    text: str  # with {prompt} once, before it `shot_fields` of worked examples; special tokens are in it

    def __post_init__(self):
        if self.text.count(PROMPT) != 1:
            raise InputError(f"``chat``: expected a chat template that writes the user's turn once, got {self.text!r}")

    def around(self) -> tuple[str, str]:
        """What stands before and after the prompt."""
        before, _, after = self.text.partition(PROMPT)
        return before, after


def shot_fields(number: int) -> tuple[str, str]:
    """Fields of a chat's text for prompt and answer of a worked example, counted from 0."""
    return f"{{shot_{number}}}", f"{{answer_{number}}}"


def template_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of a tokenizer's chat template.

    Raises:
        InputError: It has none, or several and no default.
    """
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()


def render_chat(tokenizer: PreTrainedTokenizerBase, n_shots: int = 0) -> Chat:
    """The chat of a tokenizer, with the space, if any, that its template puts before a reply.

    Args:
        tokenizer: The model's.
        n_shots: Worked examples, each a turn of the user and one of the assistant before the prompt.

    Raises:
        InputError: No chat template, or one that does not render these turns in their order.
    """
    template, fields = _template(tokenizer), [shot_fields(number) for number in range(n_shots)]
    turn = [{"role": role, "content": own} for pair in fields for role, own in zip(ROLES, pair, strict=True)]
    turn.append({"role": "user", "content": PROMPT})
    try:
        text = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template is a program
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"``chat``: expected a chat template that renders a user's turn, got {what}") from None
    written = [field for field in FIELD.findall(text) if field == PROMPT or any(field in pair for pair in fields)]
    if n_shots and written != [*(field for pair in fields for field in pair), PROMPT]:
        raise InputError(
            f"``shots``: expected a chat template that writes every turn once, in their order, got {text!r}; leave "
            "``chat`` or ``shots`` out"
        )
    return Chat(template_hash(tokenizer), text + _space_before_reply(tokenizer, template, turn, text))


def _template(tokenizer: PreTrainedTokenizerBase) -> str:
    several = getattr(tokenizer, "chat_template", None)
    if isinstance(several, dict) and "default" not in several:
        raise InputError(
            f"``chat``: expected a tokenizer with one chat template or one named default, got several, "
            f"{', '.join(sorted(several))}; name the one to use default in its files"
        )
    try:
        return tokenizer.get_chat_template()
    except (ValueError, NotImplementedError):
        raise InputError(
            f"``chat``: expected a tokenizer with a chat template, got {type(tokenizer).__name__} without one; leave "
            "``chat`` out, or use an instruction-tuned model"
        ) from None


def _space_before_reply(tokenizer: PreTrainedTokenizerBase, template: str, turn: list[dict], opening: str) -> str:
    try:
        answered = [*turn, {"role": "assistant", "content": REPLY}]
        text = tokenizer.apply_chat_template(answered, chat_template=template, tokenize=False)
    except Exception:  # a template need not take a reply
        return ""
    between = text.partition(REPLY)[0].removeprefix(opening)
    return between if between.isspace() else ""


@dataclass(frozen=True)
class Shot:
    """One worked example, as text with its documents and, where the task can be asked so, closed-book."""

    question_id: int
    source_id: str | None  # what the task file calls the question
    content: str  # documents, question and answer, without the words of the template
    prompt: str
    answer: str  # as it goes on with the prompt; in a chat the whole reply
    closed_book_prompt: str | None = None
    closed_book_answer: str | None = None

    def turns(self, has_documents: bool) -> tuple[str, str]:
        """Prompt and answer, with documents or without."""
        if has_documents:
            return self.prompt, self.answer
        return self.closed_book_prompt, self.closed_book_answer


@dataclass(frozen=True)
class Shots:
    """The worked examples of a run, in their order."""

    shots: tuple[Shot, ...]

    @classmethod
    def of_entries(cls, entries: Sequence[dict]) -> Shots:
        """Those that a manifest holds."""
        return cls(tuple(Shot(**entry) for entry in entries))

    def entries(self) -> list[dict]:
        """What a manifest holds of them."""
        return [asdict(shot) for shot in self.shots]

    @property
    def ids(self) -> list[int]:
        """Of their questions."""
        return [shot.question_id for shot in self.shots]

    def before_prompt(self, has_documents: bool) -> str:
        """The text before a prompt: each prompt with its answer, and a blank line."""
        turns = (shot.turns(has_documents) for shot in self.shots)
        return "".join(f"{prompt}{answer}\n\n" for prompt, answer in turns)

    def in_chat(self, opening: str, has_documents: bool) -> str:
        """What stands before the last prompt of a chat, with its fields (`shot_fields`) filled."""
        texts = {
            field: text
            for number, shot in enumerate(self.shots)
            for field, text in zip(shot_fields(number), shot.turns(has_documents), strict=True)
        }
        return FIELD.sub(lambda field: texts.get(field.group(), field.group()), opening)

    def has_answer_of(self, question: Question) -> bool:
        """Whether one of a question's answers, or that of its decoys, stands in them as whole words."""
        return any(has_answer(self._forms, answer) for answer in (*question.answers, *question.wrong))

    @cached_property
    def _forms(self) -> tuple[str, ...]:
        return word_forms("\n".join(shot.content for shot in self.shots))


@dataclass(frozen=True)
class Template:
    """How a question and its documents become a prompt."""

    format: Format
    text: str  # with {documents} once and {question}
    chat: Chat | None = None  # around the prompt, or None
    shots: Shots | None = None  # before it, or None

    @property
    def frame(self) -> str:
        """All that stands around question and documents."""
        texts = (self.text, self.format.closed_book or "", self.chat.text if self.chat else "")
        return FIELD.sub(" ", "\n".join(texts))

    def is_literal(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether no special token belongs to the prompt, so that what looks like one in a document is text.

        One in a chat or in a template of one's own is meant; with it, those of documents are read alike.
        """
        return not any(token and token in self.frame for token in tokenizer.all_special_tokens)

    def fill(self, question: Question, documents: list[Document], gold_position: int) -> tuple[str, int, int]:
        """The prompt up to the answer prefix, and where the gold document's line starts and ends in it.

        Without documents it is the format's closed-book prompt, and the line is empty. In a chat it is the user's
        turn, without white space around it, which templates treat differently. Worked examples stand before it.
        """
        lines = self.format.lines(documents)
        parts = (self.text if documents else self.format.closed_book).partition(DOCUMENTS)
        before, _, after = (part.replace(QUESTION, question.question) for part in parts)
        prompt = before + "\n".join(lines) + after
        start = len(before) + sum(len(line) + 1 for line in lines[: max(0, gold_position)])
        length = len(lines[gold_position]) if lines else 0
        if self.chat is not None:
            opening, closing = self.chat.around()
            opening = self.shots.in_chat(opening, bool(documents)) if self.shots else opening
            start += len(opening) - (len(prompt) - len(prompt.lstrip()))
            prompt = opening + prompt.strip() + closing
        elif self.shots is not None:
            opening = self.shots.before_prompt(bool(documents))
            start, prompt = start + len(opening), opening + prompt
        return prompt, start, start + length


DEFAULT_TEMPLATE = Template(QA, QA.templates[DEFAULT])


@dataclass(frozen=True)
class Span:
    """Neighbouring positions of a context, and the token ids that follow each."""

    positions: range
    next_ids: tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """One prompt with its answer, as token ids."""

    question: Question
    n_documents: int
    placement: Placement  # of the documents that state an answer; none without documents
    input_ids: tuple[int, ...]  # prompt, then all answer tokens but the last
    prompt_length: int  # tokens before the answer's first: the prompt, with the space where that is a token
    answer_ids: tuple[int, ...]  # teacher-forced; token i is predicted at position prompt_length - 1 + i
    prompt_ids: tuple[int, ...]  # the prompt by itself, the same whatever the answer: what a model goes on from
    n_shared: int  # tokens of ``prompt_ids`` that ``input_ids`` begins with; an answer may change those behind them
    gold_span: tuple[int, int] | None  # tokens of the gold document, end exclusive; None if unknown or there is none
    covers_before: str  # what the answer's first token covers of the text before the answer, without white space
    decoy_id: int | None = None  # first token of the other answer, in the place of ``answer_ids[0]``

    def __post_init__(self):
        if len(self.input_ids) != self.prompt_length + len(self.answer_ids) - 1:
            raise ValueError(
                f"input_ids: expected {self.prompt_length + len(self.answer_ids) - 1} ids, got {len(self.input_ids)}"
            )

    @property
    def gold_position(self) -> int:
        """0-based, of the first gold document; `NO_POSITION` without documents."""
        return self.placement.gold_position

    @property
    def where(self) -> str:
        """The context in words."""
        position = f", gold position {self.gold_position}" if self.n_documents else ""
        position += f", decoy position {self.placement.decoy_position}" if self.placement.decoys else ""
        return f"question {self.question.id}, {condition_name(self.n_documents)}{position}"

    @property
    def answer_span(self) -> Span:
        """The positions that an answer token follows."""
        return self._from(self.prompt_length - 1)

    @property
    def reply_span(self) -> Span:
        """The positions that all tokens behind the prompt by itself follow: a space that is a token, and the answer."""
        return self._from(self.n_shared - 1)

    @property
    def whole_span(self) -> Span:
        """Every position."""
        return self._from(0)

    def _from(self, first: int) -> Span:
        return Span(range(first, len(self.input_ids)), (*self.input_ids[first + 1 :], self.answer_ids[-1]))


def load_template(name: str, format: Format = QA) -> str:
    """The template that a word names, or that of a file, whose one newline at the end is not part of it.

    Raises:
        InputError: No such file, not one field ``{documents}`` and at least one ``{question}``, or another field.
    """
    if name in format.templates:
        return format.templates[name]
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = ", ".join(format.templates)
        raise InputError(f"``template`` {name}: expected {words} or a readable text file, got {error}") from None
    text = text.removesuffix("\n")
    found = [text.count(field) for field in (DOCUMENTS, QUESTION)]
    if found[0] != 1 or found[1] < 1:
        raise InputError(
            f"``template`` {name}: expected one field {{documents}} and at least one {{question}}, got {found[0]} and "
            f"{found[1]}"
        )
    unknown = sorted(set(FIELD.findall(text)) - {DOCUMENTS, QUESTION})
    if unknown:
        raise InputError(f"``template`` {name}: expected no field but {DOCUMENTS} and {QUESTION}, got {unknown[0]}")
    return text


def build_context(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    question: Question,
    distractors: list[Document],
    placement: Placement | int,
    alias: int = 0,
    decoy: bool = False,
) -> Context:
    """Put gold documents and decoys among the distractors, fill the template and tokenise.

    Args:
        tokenizer: The model's.
        template: What the prompt looks like.
        question: What is asked.
        distractors: The other documents, in order.
        placement: Where they stand; a number is the position of one gold document, or `NO_POSITION` for a prompt
            without documents.
        alias: Which of the question's answers goes on with the prompt.
        decoy: Whether the token is wanted that the other answer begins with.

    Raises:
        CannotAskError: An answer without a token of its own, or with one for unknown words; with ``decoy`` another
            answer that begins with the same token.
    """
    placement = Placement(placement) if isinstance(placement, int) else placement
    documents = arrange(question, distractors, placement)
    prompt, start, end = template.fill(question, documents, placement.gold_position)
    # A reply begins with the prefix; a prompt goes on with it.
    prefix = question.answer_prefix.lstrip() if template.chat else question.answer_prefix

    def with_answer(answer: str) -> Tokens:
        answer = joint(prefix if template.chat else prompt + prefix) + answer
        found = tokenise(tokenizer, prompt + prefix, answer, template.chat is None, template.is_literal(tokenizer))
        if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in found.whole[found.answer :]:
            raise CannotAskError(UNKNOWN_ANSWER)
        return found

    tokens = with_answer(question.answers[alias])
    decoy_id = None
    if decoy:
        other = with_answer(question.decoy_answer)
        decoy_id = other.whole[other.answer]
        if other.whole[: other.answer] != tokens.whole[: tokens.answer] or decoy_id == tokens.whole[tokens.answer]:
            raise CannotAskError(SAME_BEGINNING)
    return Context(
        question=question,
        n_documents=len(documents),
        placement=placement,
        input_ids=tuple(tokens.whole[:-1]),
        prompt_length=tokens.answer,
        answer_ids=tuple(tokens.whole[tokens.answer :]),
        prompt_ids=tuple(tokens.prompt),
        n_shared=tokens.parts,
        gold_span=token_span(tokens.encoded, start, end),
        covers_before=tokens.covers_before,
        decoy_id=decoy_id,
    )


def arrange(question: Question, distractors: Sequence[Document], placement: Placement) -> list[Document]:
    """The documents of a context in their order; none where there is no gold position."""
    if placement.gold_position == NO_POSITION:
        return []
    golds, decoys = (question.gold, *question.golds)[: placement.golds], question.decoys[: placement.decoys]
    blocks = [(placement.gold_position, golds), (placement.decoy_position, decoys)]
    documents = list(distractors)
    for position, block in sorted((first, own) for first, own in blocks if own):
        documents[position:position] = block  # the earlier block first, so that the later one comes to its place
    return documents


def find_documents(
    tokenizer: PreTrainedTokenizerBase, template: Template, question: Question, documents: list[Document]
) -> list[tuple[int, int] | None]:
    """Tokens of every document in a question's prompt, end exclusive; None where the tokenizer knows no offsets."""
    if not documents:
        return []
    found = [template.fill(question, documents, place) for place in range(len(documents))]
    encoded = encode(tokenizer, found[0][0], template.chat is None, template.is_literal(tokenizer))
    return [token_span(encoded, start, end) for _, start, end in found]
