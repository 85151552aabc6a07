"""Scripts of a text: which put spaces between words, and which join particles and prefixes to them."""

from __future__ import annotations

import unicodedata
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
