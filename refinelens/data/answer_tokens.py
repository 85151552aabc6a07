"""Tokens of a prompt and of the answer that goes on with it."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

from transformers import BatchEncoding, PreTrainedTokenizerBase

from ..errors import CannotAskError
from ..model.identity import encode, shared_length
from .scoring import has_word_spaces


def joint(text: str) -> str:
    """What stands between a text and the answer: a space, but for where nobody writes one.

    That is at the start, after white space, after an opening quote or bracket of any script, after a full-width sign,
    and after letters of a script that puts no spaces between words.
    """
    if text[-1:] in ("'", '"'):  # a closing one stands behind a word
        return "" if _is_open(text[:-1]) or text[-2:-1] in (":", "=") else " "
    return "" if _is_open(text) or not has_word_spaces(text[-1]) else " "


def _is_open(text: str) -> bool:
    """Whether a text ends where a word can begin without a space: at nothing, a space, a bracket, a full-width sign."""
    if not text or text[-1].isspace():
        return True
    kind = unicodedata.category(text[-1])
    return kind in ("Ps", "Pi") or (kind.startswith("P") and unicodedata.east_asian_width(text[-1]) in ("W", "F"))


@dataclass(frozen=True)
class Tokens:
    """A prompt by itself, and the text of prompt and answer."""

    prompt: list[int]  # the same whatever the answer
    whole: list[int]  # of the text of both
    parts: int  # place in ``whole`` where it parts from the prompt
    answer: int  # place in ``whole`` of the answer's first token
    covers_before: str  # what that token covers of the text before the answer, without white space
    encoded: BatchEncoding  # the prompt by itself


def tokenise(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, special: bool, literal: bool = False
) -> Tokens:
    """Tokens of a prompt by itself and with an answer.

    The answer's first token is the first one that covers a letter or digit of it (of an answer without any: another
    sign than white space). What comes before, a space that is a token of its own (SmolLM2 before digits), a sign that
    the tokenizer joins with the space, or the answer's own opening quote, is a part of the context: to predict it is
    not to predict the answer. A token that ends the prompt and begins the answer is the answer's.

    Args:
        tokenizer: What makes the tokens.
        prompt: Text up to the answer.
        answer: Text that goes on with it, its `joint` included.
        special: Put the tokenizer's special tokens before the prompt; a chat has them in its text.
        literal: See `refinelens.model.identity.encode`.

    Raises:
        CannotAskError: The answer has no token of its own.
    """
    encoded = encode(tokenizer, prompt, special, literal)
    both = encode(tokenizer, prompt + answer, special, literal)
    after = _special_tokens_after(tokenizer) if special else 0
    alone, whole = (list(e["input_ids"])[: len(e["input_ids"]) - after] for e in (encoded, both))
    parting, text = shared_length(alone, whole), prompt + answer
    own = len(answer) - len(answer.lstrip())  # characters of the joint
    place = len(prompt) + next((i for i, c in enumerate(answer) if c.isalnum()), own)
    offsets = _offsets(both)
    if offsets is None:
        found = _by_text(tokenizer, whole, parting, text, place)
    else:
        covering = ((i, first) for i, (first, last) in enumerate(offsets[: len(whole)]) if first <= place < last)
        found = next(covering, None)
    if found is None or found[0] < max(parting, 1):
        raise CannotAskError("an answer without a token of its own")
    start, first = found
    covered = "".join(text[first : len(prompt) + own].split())
    return Tokens(alone, whole, parting, start, covered, encoded)


def _offsets(encoded: BatchEncoding) -> list[tuple[int, int]] | None:
    """Characters that each token covers, end exclusive; None where the tokenizer does not know."""
    return encoded.encodings[0].offsets if getattr(encoded, "is_fast", False) else None


def _by_text(
    tokenizer: PreTrainedTokenizerBase, whole: list[int], parting: int, text: str, place: int
) -> tuple[int, int] | None:
    """The last token from which on all from a character of the text on is written, and the first that it covers.

    Where the decoded text is not the one that went in (unknown words) it is the first token behind the prompt that is
    not white space.
    """
    wanted = _squeezed(text[place:])
    for start in range(len(whole) - 1, parting - 1, -1):
        written = _squeezed(tokenizer.decode(whole[start:]))
        if written.endswith(wanted):
            n_before = len(written) - len(wanted)  # characters, white space not counted
            first = place
            while n_before and first:
                first -= 1
                n_before -= not text[first].isspace()
            return start, first
    shown = (i for i in range(parting, len(whole)) if tokenizer.decode(whole[i : i + 1]).strip())
    start = next(shown, None)
    return None if start is None else (start, place)


def _squeezed(text: str) -> str:
    """Without case and white space, of which ▁ is one."""
    return "".join(text.replace("▁", " ").casefold().split())


def token_span(encoded: BatchEncoding, start: int, end: int) -> tuple[int, int] | None:
    """Tokens of a range of characters, end exclusive; None where the tokenizer knows no offsets."""
    offsets = _offsets(encoded) or []
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else None


@lru_cache(maxsize=8)
def _special_tokens_after(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens a tokenizer puts behind a text; those it puts before belong to the prompt."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(full) - len(bare), -1, -1)
    start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
    return len(full) - len(bare) - start
