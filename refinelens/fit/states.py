"""From text to the residual stream of its tokens: the roles that sequences play, and a pass over them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..errors import InputError
from ..lenses.logit_lens import LogitLens
from ..model.loading import LoadedModel
from .options import SEQUENCES, SHORTEST, FitOptions
from .text import Text, sequences

LONGEST = 512  # tokens of a sequence


@dataclass(frozen=True)
class Split:
    """Sequences in the order of the text: the first are fitted on, the next choose, the last are reported on."""

    length: int  # tokens of a sequence
    fit: range
    choose: range
    report: range

    def tokens(self, sequences: range) -> int:
        """Tokens of some sequences; the first of each is nobody's."""
        return len(sequences) * (self.length - 1)


class States:
    """The residual stream of a text's sequences, one at a time.

    The first token of a sequence is left out: models park attention there, and its states lie so far from all
    others that they would rule a regression.
    """

    def __init__(self, options: FitOptions, text: Text, loaded: LoadedModel, logit_lens: LogitLens):
        self._text, self._loaded, self._logit_lens = text, loaded, logit_lens
        length = max(SHORTEST, min(LONGEST, options.tokens // (2 * SEQUENCES)))
        self._limit = options.tokens // min(length, loaded.max_tokens or length)
        self._length = min(length, loaded.max_tokens or length)
        self.split = self._split()

    def _split(self) -> Split:
        count = sum(1 for _ in self._sequences(self._limit))
        if count < SEQUENCES:
            remedy = "give more text or a smaller --tokens" if count else "give more text"
            raise InputError(
                f"--text {self._text.name}: expected at least {SEQUENCES} sequences of {self._length} tokens, got "
                f"{count}; {remedy}"
            )
        tenth = round(count / 10)
        return Split(
            self._length,
            range(count - 2 * tenth),
            range(count - 2 * tenth, count - tenth),
            range(count - tenth, count),
        )

    def _sequences(self, limit: int) -> Iterator[Tensor]:
        for ids in sequences(self._text, self._loaded.tokenizer, self._length, limit):
            self._loaded.check_ids(ids[0].tolist(), f"--text {self._text.name}")
            yield ids

    def of(self, which: range) -> Iterator[Tensor]:
        """States ``[n_layers + 1, tokens, d_model]`` of some sequences, one after the other."""
        positions = torch.arange(1, self._length)
        for ids in self._some(which):
            yield self._logit_lens.hidden(ids, positions)[:, 0]

    def sample(self, which: range, limit: int) -> Iterator[Tensor]:
        """The same of tokens drawn evenly from some sequences, ``limit`` of them at most, the same ones every time."""
        per_sequence = self._length - 1
        total = self.split.tokens(which)
        drawn = torch.tensor(sorted(random.Random(0).sample(range(total), min(limit, total))))
        for index, ids in enumerate(self._some(which)):
            positions = drawn[drawn // per_sequence == index] % per_sequence + 1
            if len(positions):
                yield self._logit_lens.hidden(ids, positions)[:, 0]

    def _some(self, which: range) -> Iterator[Tensor]:
        return islice(self._sequences(which.stop), which.start, None)
