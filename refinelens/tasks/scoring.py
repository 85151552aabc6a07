"""Whether a text gives an answer: the normalisation and the score of Lost in the Middle."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the normalisation of Lost in the Middle.

    Accents are composed first (Unicode NFC), so that two spellings of one name are equal.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains_answer(text: str, normalised: str, answer: str) -> bool:
    """Whether a normalised answer stands in a normalised text.

    An answer such as "A" or "?" has nothing left after normalisation and would be in every text: it is looked for as
    it stands, not inside a word.

    Args:
        text: As written.
        normalised: `normalise_answer` of it, made once for many answers.
        answer: As written.
    """
    plain = normalise_answer(answer)
    return plain in normalised if plain else bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text))


def first_line(generated: str) -> str:
    """What of a generated text is scored: up to the first newline, as in Lost in the Middle.

    A model that copies its documents is not to be right because the answer stands in one of them.
    """
    return generated.split("\n", 1)[0].strip()


def best_subspan_em(generated: str, answers: Iterable[str]) -> bool:
    """Whether the first line of a generated text contains one of the answers, all normalised.

    ``best_subspan_em`` of Liu et al. 2023, arXiv 2307.03172 (``metrics.py`` and ``evaluate_qa_responses.py`` of its
    repository), where an answer without letters, see `contains_answer`, makes every text right.
    """
    line = first_line(generated)
    normalised = normalise_answer(line)
    return any(contains_answer(line, normalised, answer) for answer in answers)
