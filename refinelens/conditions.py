"""Conditions of a question: how many documents its context has, and where the gold one may stand among them."""

from __future__ import annotations

from .errors import InputError

CLOSED_BOOK, ORACLE = 0, 1  # no document; the gold document alone
MOST_DOCUMENTS = 100_000  # of a context; no model reads so many
NO_POSITION = -1  # of the gold document, where there is none
WORDS = {"closed-book": CLOSED_BOOK, "oracle": ORACLE}


def parse_documents(text: str) -> tuple[int, ...]:
    """Context sizes such as ``closed-book,oracle,5,10`` in ascending order, each once.

    Raises:
        InputError: Neither a word nor a number.
    """
    try:
        return tuple(sorted({WORDS[part] if part in WORDS else int(part) for part in text.split(",")}))
    except ValueError:
        raise InputError(f"--documents: expected closed-book, oracle or sizes such as 5,10, got {text!r}") from None


def condition_name(n_documents: int) -> str:
    """``closed-book``, ``oracle`` or ``5 documents``."""
    names = {number: word for word, number in WORDS.items()}
    return names.get(n_documents, f"{n_documents} documents")


def gold_positions(choice: str, n_documents: int) -> list[int]:
    """0-based gold positions of a context size: ``all``, ``ends-middle`` or a list such as ``0,4,9``.

    Without documents it is `NO_POSITION`, and of one document 0, whatever the list.

    Raises:
        InputError: Not one of these, or a position outside the context.
    """
    listed = [] if choice in ("all", "ends-middle") else _positions(choice)
    if n_documents == CLOSED_BOOK:
        return [NO_POSITION]
    if choice == "all":
        return list(range(n_documents))
    if choice == "ends-middle" or n_documents == ORACLE:
        return sorted({0, (n_documents - 1) // 2, n_documents - 1})
    for position in listed:
        if not 0 <= position < n_documents:
            raise InputError(
                f"--gold-positions: expected 0 to {n_documents - 1} with {n_documents} documents, got {position}"
            )
    return sorted(set(listed))


def _positions(choice: str) -> list[int]:
    try:
        return [int(part) for part in choice.split(",")]
    except ValueError:
        raise InputError(f"--gold-positions: expected all, ends-middle or a list like 0,4,9, got {choice!r}") from None
