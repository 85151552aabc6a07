"""Questions and their documents, and the formats of a context: multi-document questions and key-value pairs.

All prompts are those of Liu et al. 2023 (arXiv 2307.03172), github.com/nelson-liu/lost-in-the-middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

DEFAULT, QUERY_AWARE = "default", "query-aware"


@dataclass(frozen=True)
class Document:
    """One passage of a context, or one pair of a key (title) and a value (text)."""

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """One line of a task file."""

    id: int  # 0-based line number in the file
    question: str
    answers: tuple[str, ...]  # all of them right; one is the target. Without any a question is left out
    answer_prefix: str  # appended to the prompt, so that the answer is what comes next; may be empty
    group: str  # questions of one group make each other's distractors first; may be empty
    gold: Document
    distractors: tuple[Document, ...]  # the question's own non-gold passages, in file order
    source_id: str | None = None  # what the file calls the question, if it does
    golds: tuple[Document, ...] = ()  # further ones that state the answer
    decoys: tuple[Document, ...] = ()  # documents that state another answer
    decoy_answer: str = ""  # which

    @property
    def wrong(self) -> tuple[str, ...]:
        """What no distractor may hold beside the answers."""
        return (self.decoy_answer,) if self.decoys else ()


@dataclass(frozen=True)
class Alias:
    """An answer of a question, and why it is the target."""

    index: int  # 0-based place among the answers
    why: str


@dataclass(frozen=True)
class Format:
    """How one kind of task becomes text."""

    name: str
    templates: dict[str, str]  # by the words of ``template``; each has {documents} once and {question}
    closed_book: str | None  # template without documents; None where there is nothing to ask without them
    lines: Callable[[Sequence[Document]], list[str]]  # one line per document
    own_documents: bool  # distractors are the question's own documents alone
    pairs: bool = False  # documents are keys and values: what holds an answer is an equal value


def numbered_lines(documents: Sequence[Document]) -> list[str]:
    """Documents with their titles, numbered from 1."""
    return [f"Document [{i}](Title: {d.title}) {d.text}" for i, d in enumerate(documents, start=1)]


def json_lines(documents: Sequence[Document]) -> list[str]:
    """Pairs as the lines of one JSON object; nothing is escaped, as in the paper."""
    starts = ["{", *[" "] * (len(documents) - 1)]
    ends = [*[","] * (len(documents) - 1), "}"]
    return [f'{start}"{d.title}": "{d.text}"{end}' for start, d, end in zip(starts, documents, ends, strict=True)]


_QA_TASK = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant).\n\n"
)
_QA_QUESTION = "Question: {question}"
QA = Format(
    name="qa",
    templates={
        DEFAULT: f"{_QA_TASK}{{documents}}\n\n{_QA_QUESTION}\nAnswer:",
        QUERY_AWARE: f"{_QA_TASK}{_QA_QUESTION}\n\n{{documents}}\n\n{_QA_QUESTION}\nAnswer:",
    },
    closed_book=f"{_QA_QUESTION}\nAnswer:",
    lines=numbered_lines,
    own_documents=False,
)

_KV_TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_KV_KEY, _KV_DATA = 'Key: "{question}"', "JSON data:\n{documents}"
KV = Format(
    name="kv",
    templates={
        DEFAULT: f"{_KV_TASK}{_KV_DATA}\n\n{_KV_KEY}\nCorresponding value:",
        QUERY_AWARE: f"{_KV_TASK}{_KV_KEY}\n\n{_KV_DATA}\n\n{_KV_KEY}\nCorresponding value:",
    },
    closed_book=None,
    lines=json_lines,
    own_documents=True,
    pairs=True,
)
