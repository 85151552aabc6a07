"""Whether a text gives an answer: the normalisation and the score of Lost in the Middle."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable


def normalise_answer(text: str, punctuation: str = "") -> str:
    """Lower case, no punctuation, no articles, single spaces: the normalisation of Lost in the Middle.

    Accents are composed first (Unicode NFC), so that two spellings of one name are equal.

    Args:
        text: As written.
        punctuation: What stands in its place.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(punctuation if c in string.punctuation else c for c in text)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def word_forms(text: str) -> tuple[str, ...]:
    """What `has_answer` looks at, made once for many answers: as written, and normalised in two ways.

    Without punctuation "U.S." is "us", with a space for it "London-based" holds "london" and "O'Brien's" "o brien".
    """
    return text, normalise_answer(text), normalise_answer(text, " ")


def has_answer(forms: tuple[str, ...], answer: str) -> bool:
    """Whether the words of an answer stand in a text, normalised and whole, as in DPR's ``has_answer``.

    An answer such as "A" or "?" has nothing left after normalisation: it is looked for as it stands.

    Args:
        forms: Of the text, see `word_forms`.
        answer: As written.
    """
    written, joined, spaced = forms
    _, plain, parts = word_forms(answer)
    if not plain:
        return _stands_in(written, answer)
    return _stands_in(joined, plain) or _stands_in(spaced, plain) or _stands_in(spaced, parts)


def _stands_in(text: str, words: str) -> bool:
    """Whether they do, not inside a word."""
    return words in text and bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text))


def first_line(generated: str) -> str:
    """What of a generated text is scored: up to the first newline, as in Lost in the Middle.

    A model that copies its documents is not to be right because the answer stands in one of them.
    """
    return generated.split("\n", 1)[0].strip()


def best_subspan_em(generated: str, answers: Iterable[str]) -> bool:
    """Whether the first line of a generated text contains one of the answers, all normalised, also inside a word.

    ``best_subspan_em`` of Liu et al. 2023, arXiv 2307.03172 (``metrics.py`` and ``evaluate_qa_responses.py`` of its
    repository). There an answer such as "A" or "?", which has nothing left after normalisation, makes every text
    right; here it is looked for as it stands, not inside a word.
    """
    line = first_line(generated)
    normalised = normalise_answer(line)
    plain = {answer: normalise_answer(answer) for answer in answers}
    return any(form in normalised if form else _stands_in(line, answer) for answer, form in plain.items())
