"""Whether a text gives an answer: the score of Lost in the Middle, and a stricter look at what may hold one.

Scripts differ in whether they put spaces between words, and in the particles and prefixes that they join to them.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

# Beginnings of the names that Unicode gives the letters of a script.
WITHOUT_SPACES = tuple("CJK HIRAGANA KATAKANA BOPOMOFO YI THAI LAO KHMER MYANMAR TIBETAN".split())
WITH_AFFIXES = ("HANGUL", "ARABIC", "HEBREW")  # particles behind a word, prefixes before it, written together with it


@lru_cache(maxsize=4096)
def _name(letter: str) -> str:
    return unicodedata.name(letter, "") if not letter.isascii() else ""


def has_word_spaces(letter: str) -> bool:
    """Whether the script of a letter puts spaces between words; what is no letter has no script."""
    return not _name(letter).startswith(WITHOUT_SPACES)


def has_word_boundaries(text: str) -> bool:
    """Whether words of this text stand by themselves wherever they are written."""
    return not any(_name(letter).startswith((*WITHOUT_SPACES, *WITH_AFFIXES)) for letter in text)


def normalise_answer(text: str) -> str:
    """Lower case, no punctuation, no articles, single spaces: the normalisation of Lost in the Middle.

    Accents are composed first (Unicode NFC), so that two spellings of one name are equal.
    """
    text = unicodedata.normalize("NFC", text).lower()
    return _without_articles(text.translate(dict.fromkeys(map(ord, string.punctuation))))


def _without_articles(text: str) -> str:
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


class _Folding(dict):
    """A table for `str.translate`, filled as characters come up: letters and digits stay, signs become another text."""

    def __init__(self, sign: str):
        super().__init__()
        self._sign = sign

    def __missing__(self, code: int) -> str:
        letter = chr(code)
        kind = unicodedata.category(letter)
        if kind == "Nd":
            found = str(unicodedata.digit(letter))
        elif kind == "Cf" or letter in OPTIONAL or (kind == "Mn" and unicodedata.name(letter, "").startswith(POINTED)):
            found = ""  # joiners, soft hyphens, directions, accents, vowel points
        else:
            found = self._sign if kind[0] in "PS" or letter in APOSTROPHES else letter
        self[code] = found
        return found


POINTED = ("COMBINING", "ARABIC", "HEBREW")  # marks that a writer may leave out; of other scripts they are letters
OPTIONAL = "\N{ARABIC TATWEEL}"
APOSTROPHES = "\N{MODIFIER LETTER APOSTROPHE}\N{MODIFIER LETTER TURNED COMMA}"  # letters by Unicode, signs to writers
_JOINED, _SPACED = _Folding(""), _Folding(" ")


def fold(text: str, punctuation: str = "") -> str:
    """A text as it is compared, however it was typed: one form for all that readers take for the same.

    Compatibility characters (full-width letters, ligatures) are written out (Unicode NFKD), case is folded (ß is ss),
    accents, vowel points and punctuation of every script go, digits are those from 0 to 9, and so do English articles.

    Args:
        text: As written.
        punctuation: Nothing or a space, which stands in its place.
    """
    text = unicodedata.normalize("NFKD", unicodedata.normalize("NFKD", text).casefold())
    return _without_articles(unicodedata.normalize("NFC", text.translate(_SPACED if punctuation else _JOINED)))


def word_forms(text: str) -> tuple[str, ...]:
    """What `has_answer` looks at, made once for many answers: as written, and folded in two ways.

    Without punctuation "U.S." is "us", with a space for it "London-based" holds "london" and "O'Brien's" "o brien".
    """
    return unicodedata.normalize("NFKC", text), fold(text), fold(text, " ")


_answer_forms = lru_cache(maxsize=4096)(word_forms)


def has_answer(forms: tuple[str, ...], answer: str) -> bool:
    """Whether the words of an answer stand in a text, folded and whole: DPR's ``has_answer`` for any script.

    In a script without spaces between words (Chinese, Japanese, Thai), and in one that joins particles or prefixes to
    them (Korean, Arabic, Hebrew), an answer stands in a text that contains it anywhere. That finds too much rather
    than too little. What is not found is an answer in another inflection (Москве for Москва), or in other words.
    An answer such as "A" or "?" has nothing left after folding: it is looked for as it stands.

    Args:
        forms: Of the text, see `word_forms`.
        answer: As written.
    """
    written, joined, spaced = forms
    as_written, plain, parts = _answer_forms(answer)
    if not plain:
        return _stands_in(written, as_written)
    if not has_word_boundaries(plain):
        return "".join(plain.split()) in "".join(joined.split())
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
