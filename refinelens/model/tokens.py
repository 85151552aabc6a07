"""What is asked of any tokenizer: fast, slow, or one that is no Transformers tokenizer but looks like it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def is_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it knows which characters each token covers; not every tokenizer says."""
    return bool(getattr(tokenizer, "is_fast", False))


def added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that were added to the vocabulary after it was made."""
    try:
        return set(tokenizer.added_tokens_decoder)
    except (AttributeError, NotImplementedError, TypeError):  # mistral-common's has a method of that name
        return set()


def text_of(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The text of one token; ``<id N>`` of a row of the unembedding that the tokenizer has no token for."""
    try:
        text = tokenizer.decode([token_id])
    except Exception:  # a slow tokenizer looks it up
        return f"<id {token_id}>"
    return text if text or token_id < len(tokenizer) else f"<id {token_id}>"


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """The text of several tokens, without special ones."""
    ids = list(token_ids)
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except Exception:  # one of them is beyond its vocabulary
        return "".join(text_of(tokenizer, id) for id in ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, literal: bool) -> BatchEncoding:
    """A text as tokens.

    Args:
        tokenizer: What makes them.
        text: The text.
        special: Put the tokenizer's special tokens around it.
        literal: Read what looks like a special token in the text as the characters that it is written with.
    """
    if literal:
        try:
            return tokenizer(text, add_special_tokens=special, split_special_tokens=True)
        except ValueError:  # mistral-common's never reads them in a text
            pass
    return tokenizer(text, add_special_tokens=special)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text by itself, without those that a tokenizer puts around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]
