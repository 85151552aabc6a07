"""The blocks of a model: a clean run with the residual stream around each, and starting again before any of them.

A block's attention and feed-forward part are found by what they do. That a model can be started again before a block is
proven on a few tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..errors import UnsupportedModelError
from ..model.hooks import difference, first_state, hooked, probe_ids, run_base, stream_of
from ..model.resid_mid import Sublayer, Sublayers, zero_ablated
from .logit_lens import LogitLens
from .prefix import check_branching

PROBE_TOKENS = 12
TOKENS_AT_A_TIME = 16384  # of one call of a block, keys that are held included


class FrozenCache(DynamicCache):
    """Keys and values of the first tokens of a clean run; what a block adds it sees itself, and nobody after it.

    So a state that was intervened on leaves nothing behind for another run to read. One row of keys and values serves
    a batch of any size.
    """

    def __init__(self, cache: DynamicCache):
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, token, width]`` of the first tokens with those of the new ones behind."""
        layer = self.layers[layer_idx]
        return _behind(layer.keys, key_states), _behind(layer.values, value_states)


def _behind(held: Tensor, new: Tensor) -> Tensor:
    return torch.cat([held.expand(len(new), *held.shape[1:]), new], -2)


@dataclass(frozen=True)
class Call:
    """How a block was called, but for the state it works on."""

    args: tuple
    kwargs: dict
    place: int | str  # of the state, among ``args`` or ``kwargs``

    @classmethod
    def without_state(cls, args: tuple, kwargs: dict) -> Call:
        """The call; its state is the first floating tensor."""
        values = [*enumerate(args), *kwargs.items()]
        place = next(key for key, value in values if isinstance(value, Tensor) and value.is_floating_point())
        return cls(args, kwargs, place).of(None)

    def of(self, state: Tensor | None) -> Call:
        """The same call of another state."""
        if isinstance(self.place, str):
            return Call(self.args, self.kwargs | {self.place: state}, self.place)
        return Call((*self.args[: self.place], state, *self.args[self.place + 1 :]), self.kwargs, self.place)


@dataclass(frozen=True)
class ActivationCache:
    """One context through the model, with all that is needed to start again before any of its blocks.

    Only the last token where the keys and values of those before it are held: they do not depend on it.
    """

    blocks: nn.ModuleList
    states: list[Tensor]  # n_layers + 1 of [1, token, d_model]: layer 0 and the output of every block
    calls: list[Call]

    @classmethod
    def record(cls, lens: LogitLens, input_ids: Tensor, cached: bool = False) -> ActivationCache:
        """Run the model once.

        Args:
            lens: Of the model.
            input_ids: ``[1, token]`` int64.
            cached: Hold keys and values of all tokens but the last, and states of the last alone.
        """
        ids, cache = input_ids.to(lens.device), None
        if cached:
            filled = DynamicCache()  # without a configuration it keeps every token, also behind a sliding window
            run_base(lens.model, ids[:, :-1], None, filled)
            ids, cache = ids[:, -1:], FrozenCache(filled)
        calls: list[Call] = []
        with hooked(lens.blocks, lambda _, args, kwargs: calls.append(Call.without_state(args, kwargs))):
            states = lens.hidden(ids, torch.arange(ids.shape[1]), None, cache)
        return cls(lens.blocks, list(states), calls)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def block(self, index: int, state: Tensor) -> Tensor:
        """What block ``index`` (0-based) makes of ``[batch, token, d_model]`` in this context."""
        call = self.calls[index].of(state)
        with torch.no_grad():
            return stream_of(self.blocks[index](*call.args, **call.kwargs))

    def answer_states(self) -> Tensor:
        """``[n_layers + 1, d_model]``: every layer at the last token, which the answer follows."""
        return torch.stack([state[0, -1] for state in self.states])


def find_sublayers(run: ActivationCache) -> list[Sublayers | None]:
    """Find attention and feed-forward part of every block, whatever their names; None where there are none such.

    Attention is the direct child that carries something from other tokens to the last one. With it the child is
    sought, the one with the most parameters first, that leaves exactly the identity when both are zero-ablated. A block
    whose attention happens to do nothing has them where another block has them.

    Args:
        run: A context of several tokens, all of whose states were recorded.
    """
    found = [_search(run, index) for index in range(run.n_layers)]
    known = next((index for index, sublayers in enumerate(found) if sublayers), None)
    if known is None:
        return found
    return [sublayers or _alike(run, index, known, found[known]) for index, sublayers in enumerate(found)]


def _search(run: ActivationCache, index: int) -> Sublayers | None:
    state = run.states[index]
    others = torch.cat([state[:, :-1].flip(-1), state[:, -1:]], 1)  # the same last token behind other ones
    seen, changed = _children_seen(run, index, state), _children_seen(run, index, others)
    mixing = [m for m in seen if m in changed and _carries(seen[m], changed[m])]
    if len(mixing) != 1:
        return None
    fits = [m for m in seen if m is not mixing[0] and seen[m][1].numel() == state.numel()]
    fits.sort(key=lambda m: -sum(p.numel() for p in m.parameters()))
    for other, *adds in product(fits, (False, True), (False, True)):
        found = {"attn": Sublayer(mixing[0], adds[0]), "mlp": Sublayer(other, adds[1])}
        if _leave_identity(run, index, found):
            return found
    return None


def _alike(run: ActivationCache, index: int, known: int, sublayers: Sublayers) -> Sublayers | None:
    """The children of a block that have the names of another block's parts."""
    names = {module: name for name, module in run.blocks[known].named_children()}
    children = dict(run.blocks[index].named_children())
    if not all(names[part.module] in children for part in sublayers.values()):
        return None
    own = {name: Sublayer(children[names[p.module]], p.adds_stream) for name, p in sublayers.items()}
    return own if _leave_identity(run, index, own) else None


def _leave_identity(run: ActivationCache, index: int, sublayers: Sublayers) -> bool:
    state, every = run.states[index], slice(None)
    try:
        with zero_ablated(sublayers["attn"], every), zero_ablated(sublayers["mlp"], every):
            return torch.equal(run.block(index, state), state)
    except RuntimeError:  # a guess that does not fit
        return False


def _children_seen(run: ActivationCache, index: int, state: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Input and output of the direct children of a block that work on the residual stream's width."""
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def after(module, args, kwargs, output):
        given, made = first_state(args, kwargs), stream_of(output)
        if given is not None and isinstance(made, Tensor) and made.shape[-1] == state.shape[-1]:
            seen[module] = (given.detach().clone(), made.detach().clone())

    with hooked(run.blocks[index].children(), after=after):
        run.block(index, state)
    return seen


def _carries(seen: tuple[Tensor, Tensor], changed: tuple[Tensor, Tensor]) -> bool:
    """Whether the last token came out otherwise although it went in the same."""
    (given, made), (given_changed, made_changed) = seen, changed
    same_in = torch.equal(_last(given), _last(given_changed))
    return same_in and not torch.equal(_last(made), _last(made_changed))


def _last(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])[-1]


@dataclass(frozen=True)
class BlockReplay:
    """What was proven of a model's blocks."""

    cached: bool  # the last token alone can be run, on keys and values that are held
    batched: bool  # a block takes several runs of one context at a time
    sublayers: list[Sublayers | None]  # of every block

    def at_a_time(self, n_tokens: int, cached: bool, on_cpu: bool) -> int:
        """Runs of a context of ``n_tokens`` that go through a block together; whole ones gain nothing on a CPU."""
        if not self.batched or (on_cpu and not cached):
            return 1
        return max(1, TOKENS_AT_A_TIME // n_tokens)


def check_replay(lens: LogitLens, remedy: str = "") -> BlockReplay:
    """Start a short context again before every block: what comes out must be the model's own states.

    Args:
        lens: Of the model.
        remedy: What to do where it cannot be started again, for the error.

    Raises:
        UnsupportedModelError: It is not, or a block cannot be called by itself; the class is named.
    """
    ids, name = probe_ids(lens.model, PROBE_TOKENS), type(lens.model).__name__
    try:
        run = ActivationCache.record(lens, ids)
        own = lens.hidden(ids, torch.tensor([ids.shape[1] - 1]))[:, :, 0]
        found = max(difference(_again(run, first), own[first:]) for first in range(lens.n_layers))
    except Exception as error:  # anything can come out of a model's own code
        raise _refusal(name, _in_words(error), remedy) from error
    if not found <= lens.parity.tolerance:
        raise _refusal(name, f"states that differ by {found:.2g}, allowed {lens.parity.tolerance:.2g}", remedy)
    cached = check_branching(lens).used and _cached_is_whole(lens, ids, own)
    return BlockReplay(cached, _takes_batches(run, lens.parity.tolerance), find_sublayers(run))


def sublayers_of(lens: LogitLens, remedy: str = "") -> list[Sublayers]:
    """Attention and feed-forward part of every block, proven on a few tokens.

    A block that is called again with its state must give the next one, and ``resid_mid`` as an ordinary pass keeps it
    must be that of blocks that are called again without their feed-forward part.

    Args:
        lens: Of the model.
        remedy: What to do where there are none such, for the error.

    Raises:
        UnsupportedModelError: Blocks that cannot be run by themselves or have no such parts, or streams that differ by
            more than the parity gate allows.
    """
    ids, name, allowed = probe_ids(lens.model, PROBE_TOKENS), type(lens.model).__name__, lens.parity.tolerance
    try:
        with lens.undisturbed():
            run = ActivationCache.record(lens, ids)
            ran = torch.stack([run.block(index, state) for index, state in enumerate(run.states[:-1])])
            found = find_sublayers(run)
    except Exception as error:  # anything can come out of a model's own code
        raise _refusal(name, _in_words(error), remedy) from error
    largest = difference(ran, torch.stack(run.states[1:]))
    if not largest <= allowed:
        raise _refusal(name, f"states that differ by {largest:.2g}, allowed {allowed:.2g}", remedy)
    missing = [str(index + 1) for index, own in enumerate(found) if own is None]
    what, behind = f"{name}: expected attention and feed-forward part in every block, ", f"; {remedy}" if remedy else ""
    if missing:
        more = " ..." if len(missing) > 5 else ""
        raise UnsupportedModelError(f"{what}found none such in block {', '.join(missing[:5])}{more}{behind}")
    with lens.undisturbed():
        again = torch.stack([mid_state(run, index, own) for index, own in enumerate(found)])
    kept = lens.hidden(ids, torch.arange(ids.shape[1]), None, None, found)[-lens.n_layers :]
    largest = difference(kept, again)
    if not largest <= allowed:
        got = f"got streams between them that differ by {largest:.2g}, allowed {allowed:.2g}"
        raise UnsupportedModelError(f"{what}{got}{behind}")
    return found


def mid_state(run: ActivationCache, index: int, sublayers: Sublayers) -> Tensor:
    """``resid_mid`` ``[1, token, d_model]`` of block ``index`` (0-based), which runs once more."""
    with zero_ablated(sublayers["mlp"], slice(None)):
        return run.block(index, run.states[index])


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _refusal(name: str, got: str, remedy: str) -> UnsupportedModelError:
    what = f"{name}: expected blocks that can be started again from a stored state, got {got}"
    return UnsupportedModelError(f"{what}; {remedy}" if remedy else what)


def _again(run: ActivationCache, first: int) -> Tensor:
    """``[n_layers - first + 1, 1, d_model]``: the last token from layer ``first`` on, run again."""
    states = [run.states[first]]
    for index in range(first, run.n_layers):
        states.append(run.block(index, states[-1]))
    return torch.stack([state[:, -1] for state in states])


def _cached_is_whole(lens: LogitLens, ids: Tensor, own: Tensor) -> bool:
    try:
        run = ActivationCache.record(lens, ids, cached=True)
        again = _again(run, 0)
    except Exception:  # a model without such a cache runs whole
        return False
    return difference(again, own) <= lens.parity.tolerance


def _takes_batches(run: ActivationCache, tolerance: float) -> bool:
    """Two different runs through every block at once, beside each by itself."""
    try:
        for index, state in enumerate(run.states[:-1]):
            pair = [state, 0.5 * state]
            together = run.block(index, torch.cat(pair))
            alone = torch.cat([run.block(index, one) for one in pair])
            if difference(together[None], alone[None]) > tolerance:
                return False
    except Exception:  # a mask or a bias that was made for one context, as BLOOM's
        return False
    return True
