"""Prefix reuse: tokens that contexts share run once, and each context branches off from their key-value cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from ..config import SweepConfig
from ..errors import InputError
from ..model.hooks import SkipHiddenKeys, difference, probe_ids
from ..model.identity import shared_length
from ..model.resid_mid import Sublayers
from .logit_lens import LogitLens

PROBE_TOKENS = 12


@dataclass(frozen=True)
class PrefixReuse:
    """Whether contexts branch off from a shared prefix, and why, or why not."""

    used: bool
    why: str


class Branches:
    """Runs contexts one after another; each starts from the cache of what it shares with the one before.

    In the order of `branch_order` every token of the contexts' trie runs exactly once.
    """

    def __init__(self, lens: LogitLens, sublayers: Sequence[Sublayers] | None = None):
        """
        Args:
            lens: Of the model.
            sublayers: As of `LogitLens.hidden`.
        """
        self.shared = 0  # tokens that the last context took from the cache
        self.cache: DynamicCache | None = None  # of the last context, for the next to branch off: not to be added to
        self._lens, self._sublayers = lens, sublayers
        self._ids: list[int] = []  # tokens in the cache

    def hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """As `LogitLens.hidden` of one context: ``[n_layers + 1, 1, n_positions, d_model]``, more with ``sublayers``.

        Args:
            input_ids: ``[1, token]`` int64, on the CPU.
            positions: ``[1, n_positions]`` int64. Kept positions are always run, also where they are shared.
        """
        ids = input_ids[0].tolist()
        shared = min(shared_length(self._ids, ids), int(positions.min()))
        cache = self._branch(shared)
        self._ids, self.cache = [], None  # a run that fails leaves a cache that nobody knows
        with SkipHiddenKeys():
            states = self._lens.hidden(input_ids[:, shared:], positions - shared, None, cache, self._sublayers)
        self._ids, self.cache, self.shared = ids, cache, shared
        return states

    def _branch(self, shared: int) -> DynamicCache:
        """The cache of the first ``shared`` tokens.

        A cache without configuration keeps every token of every layer, also behind a sliding window, which
        is left to the attention mask: what a window has dropped could not be branched off from.
        """
        if shared == 0:
            return DynamicCache()
        if self.cache.get_seq_length() != len(self._ids):
            raise RuntimeError(f"expected a cache of {len(self._ids)} tokens, got {self.cache.get_seq_length()}")
        if shared < len(self._ids):
            self.cache.crop(shared - len(self._ids))  # negative: tokens to remove
        return self.cache


def branch_order(contexts: list[tuple[int, ...]]) -> list[int]:
    """Indices of the contexts in the order of a walk through their trie: sorted by token ids."""
    return sorted(range(len(contexts)), key=contexts.__getitem__)


def choose_reuse(options: SweepConfig, lens: LogitLens) -> PrefixReuse:
    """What ``reuse_prefix`` means for a model; ``auto`` reuses on a CPU in fp32, one context at a time.

    Raises:
        InputError: ``on``, and the model's cache cannot branch.
    """
    choice, batch_size, model = options.reuse_prefix, options.batch_size, lens.model
    if choice == "off":
        return PrefixReuse(False, "``reuse_prefix='off'``")
    if options.positions == "all":
        return PrefixReuse(False, "every token is read")
    if choice == "auto" and batch_size not in ("auto", "1"):
        return PrefixReuse(False, f"``batch_size='{batch_size}'``")
    if choice == "auto" and lens.device.type != "cpu":
        return PrefixReuse(False, f"on {lens.device.type} contexts run in batches")
    if choice == "auto" and model.dtype != torch.float32:
        return PrefixReuse(False, "in half precision rounding may change ranks")
    reuse = check_branching(lens)
    if choice == "on" and not reuse.used:
        raise InputError(f"``reuse_prefix='on'``: expected a model whose cache can branch, got {reuse.why}")
    return reuse


def check_branching(lens: LogitLens, allowed: float | None = None) -> PrefixReuse:
    """Run a few short contexts branched and whole: every state and argmax of every layer must be the same.

    The same is what the parity gate calls so: within its tolerance of the layer's largest state. With ``allowed``, a
    share in its place, states alone are compared.
    """
    if lens.independence.one_at_a_time is not None:
        return PrefixReuse(False, f"{type(lens.model).__name__} cannot branch: {lens.independence.one_at_a_time}")
    branches, pairs = Branches(lens), []
    try:
        for ids, start in _probe_contexts(lens):
            positions = torch.arange(start, ids.shape[1])[None]
            pairs.append((branches.hidden(ids, positions), lens.hidden(ids, positions)))
        return compare(lens, pairs, allowed)
    except Exception as error:  # anything can come out of a model's own code
        what = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
        why = f"its layers do not go on from a cache of keys and values ({what})"
        return PrefixReuse(False, f"{type(lens.model).__name__} cannot branch: {why}")


def compare(lens: LogitLens, pairs: list[tuple[Tensor, Tensor]], allowed: float | None = None) -> PrefixReuse:
    """Whether states of branched and of whole runs are the same, in words.

    Args:
        lens: Gives tolerance and argmaxes.
        pairs: Branched and whole, ``[n_layers + 1, batch, n_positions, d_model]`` each.
        allowed: Largest difference, where argmaxes need not be equal; by default the gate's, where they must.
    """
    largest, limit = max(difference(*pair) for pair in pairs), lens.parity.tolerance if allowed is None else allowed
    found, equal = f"largest difference {largest:.2g} of the states, allowed {limit:.2g}", True
    if allowed is None:
        equal = all(torch.equal(*(lens.stats(states).argmax for states in pair)) for pair in pairs)
        found += f"; argmax {'equal' if equal else 'different'}"
    if largest <= limit and equal:
        return PrefixReuse(True, found)
    return PrefixReuse(False, f"{type(lens.model).__name__} branched is not the model: {found}")


def _probe_contexts(lens: LogitLens) -> list[tuple[Tensor, int]]:
    """Contexts ``[1, token]`` that branch off late, early, and for a single token, with the first position kept."""
    ids = probe_ids(lens.model, PROBE_TOKENS).cpu()
    late, early = PROBE_TOKENS * 2 // 3, PROBE_TOKENS // 3
    other = ids.flip(1)
    return [
        (ids, 0),
        (torch.cat([ids[:, :late], other[:, :3]], 1), late),
        (torch.cat([ids[:, :early], other[:, 3:9]], 1), early),
        (torch.cat([ids[:, :early], other[:, :1]], 1), early),
    ]
