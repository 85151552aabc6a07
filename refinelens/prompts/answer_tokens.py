"""Tokens of a prompt and of the answer that goes on with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

OPEN = re.compile(r"(^|\s)[\"'“‘(\[]?$")  # ends of a text that an answer follows without a space


def joint(text: str) -> str:
    """What stands between a text and the answer: a space, but not at the start or after a space or an opening quote."""
    return "" if OPEN.search(text) else " "


@dataclass(frozen=True)
class Tokens:
    """A prompt by itself, and the text of prompt and answer."""

    prompt: list[int]  # the same whatever the answer
    whole: list[int]  # of the text of both
    parts: int  # place in ``whole`` where it parts from the prompt
    answer: int  # place in ``whole`` of the answer's first token
    encoded: BatchEncoding  # the prompt by itself


def tokenise(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, special: bool) -> Tokens:
    """Tokens of a prompt by itself and with an answer.

    The answer begins where the tokens of the two texts part. A token that ends the prompt and begins the answer (in
    some tokenizers a quote with what it opens) so is the answer's first. Where a tokenizer makes the space a token of
    its own (SmolLM2 before digits), the answer begins behind it: predicting a space is not predicting the answer.

    Args:
        tokenizer: What makes the tokens.
        prompt: Text up to the answer.
        answer: Text that goes on with it, its `joint` included.
        special: Put the tokenizer's special tokens before the prompt; a chat has them in its text.

    Raises:
        InputError: The answer has no token.
    """
    encoded = tokenizer(prompt, add_special_tokens=special)
    whole = tokenizer(prompt + answer, add_special_tokens=special)["input_ids"]
    after = _special_tokens_after(tokenizer) if special else 0
    alone, whole = encoded["input_ids"][: len(encoded["input_ids"]) - after], whole[: len(whole) - after]
    parts = (i for i, (a, b) in enumerate(zip(alone, whole, strict=False)) if a != b)
    parting = start = next(parts, min(len(alone), len(whole)))
    while start < len(whole) and not tokenizer.decode(whole[start : start + 1]).strip():
        start += 1
    if start == len(whole):
        raise InputError(f"answer {answer!r}: expected at least one token of {type(tokenizer).__name__}, got none")
    return Tokens(alone, whole, parting, start, encoded)


def token_span(encoded: BatchEncoding, start: int, end: int) -> tuple[int, int] | None:
    """Tokens of a range of characters, end exclusive; None where the tokenizer knows no offsets."""
    if not encoded.is_fast:
        return None
    offsets = encoded.encodings[0].offsets
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else None


@lru_cache(maxsize=8)
def _special_tokens_after(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many special tokens a tokenizer puts behind a text; those it puts before belong to the prompt."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = range(len(full) - len(bare), -1, -1)
    start = next((i for i in starts if full[i : i + len(bare)] == bare), 0)
    return len(full) - len(bare) - start
