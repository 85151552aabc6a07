"""Greedy generation after prompts: the next token is what the lens reads at the output, one position at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedTokenizerBase

from ..data.scoring import first_line
from ..lens.logit_lens import LogitLens
from ..lens.prefix import PrefixReuse, check_branching
from ..model.identity import decode
from ..model.loading import LoadedModel


@dataclass(frozen=True)
class Generation:
    """What a model wrote after a prompt."""

    text: str  # its first line, which is what is scored
    ids: tuple[int, ...]  # the one that ended it included
    # [n_layers + 1, tokens, d_model], the residual stream that each of its tokens was predicted from; None unless kept
    hidden: Tensor | None = field(default=None, compare=False)
    # By the name of each lens the layers at which its tokens settle, int [tokens]; empty unless measured
    settled: dict[str, np.ndarray] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Generator:
    """Writes after prompts, always the argmax at layer ``n_layers``: no sampling, no penalties, no full logits.

    A text ends with ``limit`` tokens, an end-of-sequence token, its first line unless more are wanted, or the model's
    last position.
    """

    lens: LogitLens
    tokenizer: PreTrainedTokenizerBase
    limit: int  # tokens
    max_tokens: int | None  # positions that the model has, None if it states no limit
    end_ids: frozenset[int]
    one_line: bool = True
    keeps_states: bool = False  # of every layer, of every token that is written

    @classmethod
    def from_model(
        cls, loaded: LoadedModel, lens: LogitLens, limit: int, one_line: bool = True, keeps_states: bool = False
    ) -> Generator:
        """What writes after the prompts of a model."""
        return cls(lens, loaded.tokenizer, limit, loaded.max_tokens, loaded.end_ids, one_line, keeps_states)

    def generate(
        self, prompts: Sequence[Sequence[int]], n_shared: Sequence[int], cache: Cache | None
    ) -> list[Generation]:
        """Write after each prompt; those of one length that share as much go on together, so that nothing is padded.

        Args:
            prompts: Token ids.
            n_shared: How many of its tokens each prompt shares with the text that the cache holds.
            cache: Keys and values of a text per prompt; they are copied, not added to. What a prompt shares with its
                text, but for its last token, is not run again. Without a cache all runs again for every token.
        """
        places = [(len(ids), min(shared, len(ids) - 1)) for ids, shared in zip(prompts, n_shared, strict=True)]
        found = {}
        for place in sorted(set(places)):
            rows = [row for row, own in enumerate(places) if own == place]
            beginning = None if cache is None else _beginning(cache, rows, place[1])
            texts = self._go_on(torch.tensor([prompts[row] for row in rows]), beginning)
            found |= dict(zip(rows, texts, strict=True))
        return [found[row] for row in range(len(prompts))]

    def _go_on(self, ids: Tensor, cache: Cache | None) -> list[Generation]:
        """Texts that go on from prompts ``[prompt, token]``. Ended ones run along until all have."""
        n_prompt, ends = ids.shape[1], [0] * len(ids)  # tokens of a text, 0 while it goes on
        kept: list[Tensor] = []  # [n_layers + 1, prompt, 1, d_model] a token
        while not all(ends):
            new = ids[:, 0 if cache is None else cache.get_seq_length() :]
            hidden = self.lens.hidden(new, torch.tensor([new.shape[1] - 1]), None, cache)
            kept += [hidden] if self.keeps_states else []
            ids = torch.cat([ids, self.lens.stats(hidden[-1]).argmax.cpu()], 1)
            texts = ids[:, n_prompt:].tolist()
            ends = [end or self._end(text, n_prompt) for end, text in zip(ends, texts, strict=True)]
        whole = [text[:end] for text, end in zip(texts, ends, strict=True)]
        states = torch.cat(kept, 2) if kept else None
        own = [None if states is None else states[:, row, : len(text)] for row, text in enumerate(whole)]
        return [
            Generation(first_line(self._decode(text)), tuple(text), of) for text, of in zip(whole, own, strict=True)
        ]

    def _end(self, text: list[int], n_prompt: int) -> int:
        """Number of tokens if the text ends with the last of them, else 0."""
        full = len(text) == self.limit or n_prompt + len(text) - 1 == self.max_tokens
        ended = full or text[-1] in self.end_ids or (self.one_line and "\n" in self._decode(text))
        return len(text) if ended else 0

    def _decode(self, text: list[int]) -> str:
        written = [token for token in text if token not in self.end_ids]
        return decode(self.tokenizer, written)


def check_cache(lens: LogitLens) -> PrefixReuse:
    """Whether generation may go on from a cache: as for branches, but for what half precision rounds.

    There each block rounds the state once, whichever way it came about; and a text is generated by such a cache
    everywhere else.
    """
    dtype = lens.model.dtype
    return check_branching(lens, None if dtype == torch.float32 else lens.n_layers * torch.finfo(dtype).eps)


def _beginning(cache: Cache, rows: list[int], n_tokens: int) -> DynamicCache:
    """A copy of the first tokens of some rows of a cache that keeps every token."""
    copy = DynamicCache()
    for number, layer in enumerate(cache.layers):
        copy.update(layer.keys[rows, ..., :n_tokens, :], layer.values[rows, ..., :n_tokens, :], number)
    return copy
