"""Prompts: templates, gold positions and the token ids of a context with its answer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import InputError
from .task import Document, Question

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

# Lost in the Middle (Liu et al. 2023, arXiv 2307.03172), prompt for multi-document question answering.
DEFAULT_TEMPLATE = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n{documents}\n\nQuestion: {question}\nAnswer:"
)


@dataclass(frozen=True)
class Context:
    """One prompt with its answer, as token ids."""

    question: Question
    n_documents: int
    gold_position: int  # 0-based
    input_ids: tuple[int, ...]  # prompt, then all answer tokens but the last
    prompt_length: int  # tokens of the prompt
    answer_ids: tuple[int, ...]  # teacher-forced; token i is predicted at position prompt_length - 1 + i
    gold_span: tuple[int, int] | None  # tokens of the gold document, end exclusive; None if unknown

    def __post_init__(self):
        if len(self.input_ids) != self.prompt_length + len(self.answer_ids) - 1:
            raise ValueError(
                f"input_ids: expected {self.prompt_length + len(self.answer_ids) - 1} ids, got {len(self.input_ids)}"
            )

    @property
    def positions(self) -> list[int]:
        """Token positions whose next token is an answer token, one per answer token."""
        return list(range(self.prompt_length - 1, len(self.input_ids)))


def load_template(path: str | None) -> str:
    """The template of a file, or the default one. One newline at the end of the file is not part of it.

    Raises:
        InputError: No such file, or not one field ``{documents}`` and at least one ``{question}``.
    """
    if path is None:
        return DEFAULT_TEMPLATE
    try:
        template = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--template {path}: expected a readable text file, got {error}") from None
    template = template.removesuffix("\n")
    found = [template.count(field) for field in ("{documents}", "{question}")]
    if found[0] != 1 or found[1] < 1:
        raise InputError(
            f"--template {path}: expected one field {{documents}} and at least one {{question}}, got {found[0]} and "
            f"{found[1]}"
        )
    return template


def gold_positions(choice: str, n_documents: int) -> list[int]:
    """0-based gold positions of a context size: ``all``, ``ends-middle`` or a list such as ``0,4,9``.

    Raises:
        InputError: Not one of these, or a position outside the context.
    """
    if choice == "all":
        return list(range(n_documents))
    if choice == "ends-middle":
        return sorted({0, (n_documents - 1) // 2, n_documents - 1})
    try:
        positions = [int(part) for part in choice.split(",")]
    except ValueError:
        raise InputError(f"--gold-positions: expected all, ends-middle or a list like 0,4,9, got {choice!r}") from None
    for position in positions:
        if not 0 <= position < n_documents:
            raise InputError(
                f"--gold-positions: expected 0 to {n_documents - 1} with {n_documents} documents, got {position}"
            )
    return sorted(set(positions))


def format_documents(documents: list[Document]) -> list[str]:
    """One line per document, numbered from 1, as in Lost in the Middle."""
    return [f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, start=1)]


def build_context(
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    question: Question,
    distractors: list[Document],
    gold_position: int,
) -> Context:
    """Put the gold document among the distractors, fill the template and tokenise."""
    documents = [*distractors[:gold_position], question.gold, *distractors[gold_position:]]
    lines = format_documents(documents)
    before, after = template.split("{documents}", 1)
    before, after = (part.replace("{question}", question.question) for part in (before, after))
    prompt = before + "\n".join(lines) + after + question.answer_prefix
    gold_start = len(before) + sum(len(line) + 1 for line in lines[:gold_position])
    encoded = tokenizer(prompt)
    prompt_ids, answer_ids = _tokenise(tokenizer, prompt, encoded["input_ids"], question.answers[0])
    return Context(
        question=question,
        n_documents=len(documents),
        gold_position=gold_position,
        input_ids=(*prompt_ids, *answer_ids[:-1]),
        prompt_length=len(prompt_ids),
        answer_ids=tuple(answer_ids),
        gold_span=_token_span(encoded, gold_start, gold_start + len(lines[gold_position])),
    )


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, prompt: str, encoded: list[int], answer: str
) -> tuple[list[int], list[int]]:
    """Ids of the prompt and of the answer that continues it, its first token carrying the space.

    Where a tokenizer makes the space a token of its own (SmolLM2 before digits), that token belongs to the
    prompt: predicting a space is not predicting the answer.
    """
    space = "" if prompt[-1:].isspace() else " "
    prompt_ids = _without_end(tokenizer, encoded)
    whole = _without_end(tokenizer, tokenizer(f"{prompt}{space}{answer}")["input_ids"])
    answer_ids = whole[len(prompt_ids) :]
    if whole[: len(prompt_ids)] != prompt_ids:  # merged across the boundary: tokenise the answer by itself
        answer_ids = tokenizer(f"{space}{answer}", add_special_tokens=False)["input_ids"]
    while answer_ids and not tokenizer.decode(answer_ids[:1]).strip():
        prompt_ids, answer_ids = [*prompt_ids, answer_ids[0]], answer_ids[1:]
    if not answer_ids:
        raise InputError(f"answer {answer!r}: expected at least one token of {type(tokenizer).__name__}, got none")
    return prompt_ids, answer_ids


def _without_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Ids with the special tokens a tokenizer puts before a text, without those it puts after it."""
    return ids[: len(ids) - _special_tokens_after(tokenizer)]


@lru_cache(maxsize=8)
def _special_tokens_after(tokenizer: PreTrainedTokenizerBase) -> int:
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(full) - len(bare), -1, -1)
    start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
    return len(full) - len(bare) - start


def _token_span(encoded: BatchEncoding, start: int, end: int) -> tuple[int, int] | None:
    if not encoded.is_fast:
        return None
    offsets = encoded.encodings[0].offsets
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else None
