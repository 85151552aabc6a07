"""From ordinary text to the residual stream of its tokens, and the roles that sequences play."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import SEQUENCES, SHORTEST, FitConfig
from ..data.texts import Text
from ..errors import InputError
from ..lens.logit_lens import LogitLens
from ..lens.runner import ForwardRunner
from ..model.loading import LoadedModel

LONGEST = 512  # tokens of a sequence
KEPT_BYTES = 2**30  # of states that are read more than once, instead of running the model again


def sequences(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, limit: int) -> Iterator[list[int]]:
    """At most ``limit`` sequences of ``length`` token ids; documents follow each other, a rest is left.

    A sequence begins with the token that the tokenizer puts before a context, if it puts one there.
    """

    def ids() -> Iterator[int]:
        for piece in text.pieces():
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]

    begin = tokenizer("a")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    stream = ids()
    for _ in range(limit):
        sequence = begin + list(islice(stream, length - len(begin)))
        if len(sequence) < length:
            return
        yield sequence


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

    def __init__(self, options: FitConfig, text: Text, loaded: LoadedModel, logit_lens: LogitLens):
        self.text, self.loaded, self.lens = text, loaded, logit_lens
        self._runner = ForwardRunner(logit_lens)
        on_cpu = logit_lens.head.weight.device.type == "cpu"  # a GPU's memory is dear, and it runs the model in no time
        self._room = KEPT_BYTES if options.objective == "kl" and on_cpu else 0
        self._kept: dict[int, Tensor] = {}
        length = max(SHORTEST, min(LONGEST, options.tokens // (2 * SEQUENCES)))
        self._length = min(length, loaded.max_tokens or length)
        self._limit = options.tokens // self._length
        self.split = self._split()

    def _split(self) -> Split:
        count = sum(1 for _ in self._sequences(self._limit))
        if count < SEQUENCES:
            remedy = "give more text or a smaller ``tokens``" if count else "give more text"
            raise InputError(
                f"``text`` {self.text.name}: expected at least {SEQUENCES} sequences of {self._length} tokens, got "
                f"{count}; {remedy}"
            )
        tenth = round(count / 10)
        choose, report = count - 2 * tenth, count - tenth
        return Split(self._length, range(choose), range(choose, report), range(report, count))

    def _sequences(self, limit: int) -> Iterator[list[int]]:
        for ids in sequences(self.text, self.loaded.tokenizer, self._length, limit):
            self.loaded.check_ids(ids, f"``text`` {self.text.name}")
            yield ids

    def of(self, which: range) -> Iterator[Tensor]:
        """States ``[n_layers + 1, tokens, d_model]`` of some sequences, one after the other; not to be written to.

        Those that training comes back to are kept as they come, up to `KEPT_BYTES`.
        """
        for number, ids in zip(which, self.some(which), strict=False):
            hidden = self._kept.get(number)
            if hidden is None:
                hidden = self._runner.states(ids, range(1, self._length))
                if number in self.split.fit and hidden.nbytes <= self._room:
                    self._kept[number] = hidden
                    self._room -= hidden.nbytes
            yield hidden

    def sample(self, which: range, limit: int) -> Iterator[Tensor]:
        """The same of tokens drawn evenly from some sequences, ``limit`` of them at most, the same ones every time."""
        per_sequence = self._length - 1
        total = self.split.tokens(which)
        drawn = torch.tensor(sorted(random.Random(0).sample(range(total), min(limit, total))))
        for index, ids in enumerate(self.some(which)):
            positions = drawn[drawn // per_sequence == index] % per_sequence + 1
            if len(positions):
                yield self._runner.states(ids, positions.tolist())

    def some(self, which: range) -> Iterator[list[int]]:
        """Token ids of some sequences."""
        return islice(self._sequences(which.stop), which.start, None)
