"""How frequent tokens are in a text, in the buckets of Gupta et al. 2025 (arXiv 2510.18871)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..errors import InputError
from ..model.loading import LoadedModel
from ..store.results import BUCKET_ENDS
from .texts import Text

MOST_TOKENS = 1_000_000  # counted, from the beginning of the text


@dataclass(frozen=True)
class TokenFrequencies:
    """What was counted in a text."""

    text: Text
    counts: np.ndarray  # int64 [vocab_size]

    def __post_init__(self):
        if not self.counts.any():
            raise InputError(f"``{self.text.parameter}`` {self.text.name}: expected a text with tokens, got none")

    @property
    def buckets(self) -> np.ndarray:
        """The bucket of every token by its frequency rank, int8 ``[vocab_size]``: 0 holds the most frequent tokens.

        Of equally frequent tokens the lower id ranks first. Tokens that the text does not have are in the last bucket.
        """
        order = np.argsort(-self.counts, kind="stable")
        buckets = np.empty(len(order), np.int8)
        buckets[order] = np.searchsorted(BUCKET_ENDS, np.arange(len(order)), side="right")
        return np.where(self.counts > 0, buckets, np.int8(len(BUCKET_ENDS)))

    def entry(self) -> dict:
        """What the manifest of a run says of it."""
        text = self.text
        return {
            "name": text.name,
            "path": None if text.path is None else str(text.path),
            "sha256": text.sha256,
            "tokens": int(self.counts.sum()),
            "distinct_tokens": int(np.count_nonzero(self.counts)),
        }


def count_tokens(text: Text, loaded: LoadedModel, vocab_size: int, limit: int = MOST_TOKENS) -> TokenFrequencies:
    """Count the first tokens of a text, without those that a tokenizer adds.

    Args:
        text: What is counted.
        loaded: Model with its tokenizer.
        vocab_size: Tokens of the model.
        limit: Tokens that are counted at most.

    Raises:
        InputError: A text that cannot be read or has no tokens, or tokens that the model does not have.
    """
    counts, left = np.zeros(vocab_size, np.int64), limit
    for piece in text.pieces():
        ids = loaded.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"][:left]
        loaded.check_ids(ids, f"``{text.parameter}`` {text.name}")
        counts += np.bincount(np.asarray(ids, np.int64), minlength=vocab_size)
        left -= len(ids)
        if not left:
            break
    return TokenFrequencies(text, counts)
