"""Conditions of a question: how many documents its context has, and which of them stand where.

Positions are 0-based, and of neighbours those of the first. Gold documents state the answer, decoys another one.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError
from .options import expect

CLOSED_BOOK, ORACLE = 0, 1  # no document; the gold document alone
MOST_DOCUMENTS = 100_000  # of a context; no model reads so many
NO_POSITION = -1  # of a document, where there is none
PLACES = ("all", "ends-middle", "quarters")  # words for positions of the gold document
WORDS = {"closed-book": CLOSED_BOOK, "oracle": ORACLE}


@dataclass(frozen=True)
class Placement:
    """Where gold documents and decoys stand in a context; each kind stands side by side."""

    gold_position: int = NO_POSITION
    golds: int = 1
    decoy_position: int = NO_POSITION
    decoys: int = 0

    @property
    def spans(self) -> dict[str, range]:
        """Positions by kind, ``gold`` and ``decoy``; of what there is none of they are empty."""
        kinds = {"gold": (self.gold_position, self.golds), "decoy": (self.decoy_position, self.decoys)}
        return {
            kind: range(0) if first == NO_POSITION else range(first, first + count)
            for kind, (first, count) in kinds.items()
        }


def condition_name(n_documents: int) -> str:
    """``closed-book``, ``oracle`` or ``5 documents``."""
    names = {number: word for word, number in WORDS.items()}
    return names.get(n_documents, f"{n_documents} documents")


def gold_positions(choice: str, n_documents: int, count: int = 1, name: str = "gold_positions") -> list[int]:
    """Positions of the first of ``count`` neighbours: those of a word of `PLACES`, or of a list such as ``0,4,9``.

    ``ends-middle`` are the first, a middle and the last one, ``quarters`` also those halfway between. Without documents
    it is `NO_POSITION`, and of one document 0, whatever the list.

    Args:
        choice: As above.
        n_documents: Of the context.
        count: Documents that stand side by side.
        name: Of the option, for errors.

    Raises:
        InputError: Not one of these, or a position from which they do not fit into the context.
    """
    try:
        listed = [] if choice in PLACES else [int(part) for part in choice.split(",")]
    except ValueError:
        words = ", ".join(PLACES)
        raise InputError(f"``{name}``: expected {words} or a list like 0,4,9, got {choice!r}") from None
    if n_documents == CLOSED_BOOK:
        return [NO_POSITION]
    last = n_documents - count
    if choice == "all":
        return list(range(last + 1))
    if choice == "quarters":
        return sorted({quarter * last // 4 for quarter in range(5)})
    if choice == "ends-middle" or n_documents == ORACLE:
        return sorted({0, last // 2, last})
    for position in listed:
        expect(0 <= position <= last, name, f"0 to {last} with {n_documents} documents", position)
    return sorted(set(listed))


def placements(
    n_documents: int, gold_choice: str, golds: int = 1, decoy_choice: str = "all", decoys: int = 0
) -> list[Placement]:
    """Every placement of a context size, by gold position, then by that of decoys; closed-book and oracle have none.

    Args:
        n_documents: Of the context, all kinds.
        gold_choice: Of `gold_positions`.
        golds: Gold documents.
        decoy_choice: Of `gold_positions`, for the decoys; where gold documents stand they do not.
        decoys: How many.

    Raises:
        InputError: Too few documents for all of them, or no place where both fit.
    """
    if n_documents <= ORACLE:
        return [Placement(position) for position in gold_positions(gold_choice, n_documents)]
    kinds = f"for ``golds`` {golds}" + (f" and ``decoys`` {decoys}" if decoys else "")
    expect(n_documents >= golds + decoys, "documents", f"{golds + decoys} or more {kinds}", n_documents)
    own = gold_positions(gold_choice, n_documents, golds)
    if not decoys:
        return [Placement(position, golds) for position in own]
    others = gold_positions(decoy_choice, n_documents, decoys, "decoy_positions")
    found = [Placement(a, golds, b, decoys) for a in own for b in others if b + decoys <= a or a + golds <= b]
    expect(found, "decoy_positions", f"one beside gold documents at {gold_choice}", repr(decoy_choice))
    return found
