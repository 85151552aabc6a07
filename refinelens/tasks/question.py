"""Questions and their documents."""

from __future__ import annotations

from dataclasses import dataclass


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


@dataclass(frozen=True)
class Alias:
    """An answer of a question, and why it is the target."""

    index: int  # 0-based place among the answers
    why: str
