"""Passes that go on from a key-value cache: what contexts share runs once, and a long context runs in chunks.

Both rest on one proof, that a model which goes on from its cache has the states of one whole pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from ..config import SweepConfig
from ..errors import InputError
from ..model.hooks import SkipHiddenKeys, difference, probe_ids
from ..model.identity import shared_length
from ..model.resid_mid import Sublayers
from .parity import rounding_of

if TYPE_CHECKING:
    from .logit_lens import LogitLens

PROBE_TOKENS = 12
ROWS_OF_LOGITS = 16  # whose logits are held at a time, where argmaxes differ
FULL_CHUNKS = 8192  # tokens of a context that run in chunks of full size; twice as many halve it


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


class _RoomyLayer(DynamicLayer):
    """Keys and values of a block, with room for all tokens from the first on.

    Transformers' own layer is copied to a larger one with every chunk: that takes time, and leaves holes in memory that
    no later one fits into.
    """

    def __init__(self, n_tokens: int):
        super().__init__()
        self._n_tokens = n_tokens
        self._rooms: list[Tensor] = []  # [batch, head, n_tokens, d_head], of keys and of values

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """All keys and values so far, ``[batch, head, token, d_head]``, these among them."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            new = (key_states, value_states)
            self._rooms = [own.new_empty((*own.shape[:2], self._n_tokens, own.shape[3])) for own in new]
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        for room, own in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., start:end, :] = own
        self.keys, self.values = (room[..., :end, :] for room in self._rooms)
        return self.keys, self.values


def roomy_cache(n_tokens: int) -> DynamicCache:
    """An empty cache for so many tokens, which keeps all of them, whatever a window drops."""
    cache = DynamicCache()
    cache.layer_class_to_replicate = partial(_RoomyLayer, n_tokens)
    return cache


def in_chunks(
    lens: LogitLens,
    input_ids: Tensor,
    positions: Tensor,
    cache: Cache,
    size: int,
    sublayers: Sequence[Sublayers] | None = None,
) -> Iterator[tuple[slice, Tensor]]:
    """Run one context some tokens at a time: which of its positions each chunk has, and their states.

    What a pass holds is then that of a chunk, whatever the length of the context, apart from the cache. A mask of a
    chunk's tokens by those so far, and weights of eager attention, do not grow either: chunks get shorter instead.

    Args:
        lens: Of the model.
        input_ids: ``[1, token]`` int64, on the CPU.
        positions: ``[1, n_positions]`` int64, ascending.
        cache: Empty, see `roomy_cache`; holds every token in the end.
        size: Tokens of a chunk, among the first `FULL_CHUNKS` of the context.
        sublayers: As of `LogitLens.hidden`.

    Yields:
        A slice of ``positions``, empty where a chunk has none of them, and `LogitLens.hidden` there.
    """
    places, start = positions[0].contiguous(), 0
    while start < input_ids.shape[1]:
        stop = start + max(1, size >> (start // FULL_CHUNKS).bit_length())
        first, end = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
        with SkipHiddenKeys():
            ids, own = input_ids[:, start:stop], positions[:, first:end] - start
            states = lens.hidden(ids, own, None, cache, sublayers)
        yield slice(first, end), states
        start = stop
        del states  # is not held while the next chunk runs


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
        why = f"its layers do not go on from a cache of keys and values ({in_words(error)})"
        return PrefixReuse(False, f"{type(lens.model).__name__} cannot branch: {why}")


def in_words(error: Exception) -> str:
    """Its class and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__


def compare(
    lens: LogitLens, pairs: list[tuple[Tensor, Tensor]], allowed: float | None = None, tie: float | None = None
) -> PrefixReuse:
    """Whether states of branched and of whole runs are the same, in words.

    Args:
        lens: Gives tolerance and argmaxes.
        pairs: Branched and whole, ``[n_layers + 1, batch, n_positions, d_model]`` each.
        allowed: Largest difference, where argmaxes need not be equal; by default the gate's, where they must.
        tie: Of an argmax that must be equal: how far below the largest logit, as a share of the logit range, another
            token counts as equal to it. By default what the gate takes for a tie, rounding of the dtype.
    """
    largest, limit = max(difference(*pair) for pair in pairs), lens.parity.tolerance if allowed is None else allowed
    found, equal = f"largest difference {largest:.2g} of the states, allowed {limit:.2g}", True
    if allowed is None:
        tie = rounding_of(lens.head.weight.dtype) if tie is None else tie
        n_other, widest = _other_argmaxes(lens, pairs)
        equal = widest <= tie
        total = sum(whole[..., 0].numel() for _, whole in pairs)
        margin = f" in {n_other} of {total}, by {widest:.2g} of the logit range, allowed {tie:.2g}"
        found += f"; argmax {'equal' if not n_other else f'different{margin}'}"
    if largest <= limit and equal:
        return PrefixReuse(True, found)
    return PrefixReuse(False, f"{type(lens.model).__name__} branched is not the model: {found}")


def _other_argmaxes(lens: LogitLens, pairs: list[tuple[Tensor, Tensor]]) -> tuple[int, float]:
    """How many argmaxes differ, and how far below the largest logit of the whole run the others are at most.

    As a share of the logit range, which takes all logits of these rows, a few at a time.
    """
    count, widest = 0, 0.0
    for branched, whole in pairs:
        other = lens.stats(branched).argmax
        differs = lens.stats(whole).argmax != other
        if not differs.any():
            continue
        count += int(differs.sum())
        for rows, ids in zip(*(v[differs].split(ROWS_OF_LOGITS) for v in (whole, other)), strict=True):
            with torch.no_grad(), torch.autocast(lens.head.weight.device.type, enabled=False):
                logits = lens.head.logits(rows)
            margin = logits.amax(-1) - logits.gather(1, ids[:, None])[:, 0]
            widest = max(widest, float((margin / (logits.amax(-1) - logits.amin(-1))).max()))
    return count, widest


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
