"""Attention and feed-forward part of a block, found by what they do, and how to silence them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from ..model.capture import first_state, hooked, stream_of
from .clean_run import CleanRun


@dataclass(frozen=True)
class Sublayer:
    """A module inside a block that adds to the residual stream."""

    module: nn.Module
    adds_stream: bool  # the module adds the stream it is given to its own output, as in BLOOM


@dataclass(frozen=True)
class Sublayers:
    """The two parts of one block, of which nothing but the identity is left when both are silent."""

    attention: Sublayer
    mlp: Sublayer


def find_sublayers(run: CleanRun) -> list[Sublayers | None]:
    """Find attention and feed-forward part of every block, whatever their names; None where there are none such.

    Attention is the direct child that carries something from other tokens to the last one. With it the child is
    sought, the one with the most parameters first, that leaves exactly the identity when both are silent. A block
    whose attention happens to do nothing has them where another block has them.

    Args:
        run: A context of several tokens, all of whose states were recorded.
    """
    found = [_search(run, index) for index in range(run.n_layers)]
    known = next((index for index, sublayers in enumerate(found) if sublayers), None)
    if known is None:
        return found
    return [sublayers or _alike(run, index, known, found[known]) for index, sublayers in enumerate(found)]


def _search(run: CleanRun, index: int) -> Sublayers | None:
    state = run.states[index]
    seen, changed = _children_seen(run, index, state), _children_seen(run, index, _other_tokens(state))
    mixing = [m for m in seen if m in changed and _carries(seen[m], changed[m])]
    if len(mixing) != 1:
        return None
    fits = [m for m in seen if m is not mixing[0] and seen[m][1].numel() == state.numel()]
    others = sorted(fits, key=lambda m: -sum(p.numel() for p in m.parameters()))
    for other, *adds in product(others, (False, True), (False, True)):
        attention, mlp = Sublayer(mixing[0], adds[0]), Sublayer(other, adds[1])
        if _leave_identity(run, index, attention, mlp):
            return Sublayers(attention, mlp)
    return None


def _alike(run: CleanRun, index: int, known: int, sublayers: Sublayers) -> Sublayers | None:
    """The children of a block that have the names of another block's parts."""
    names = {module: name for name, module in run.blocks[known].named_children()}
    children = dict(run.blocks[index].named_children())
    parts = (sublayers.attention, sublayers.mlp)
    if not all(names[part.module] in children for part in parts):
        return None
    own = [Sublayer(children[names[part.module]], part.adds_stream) for part in parts]
    return Sublayers(*own) if _leave_identity(run, index, *own) else None


@contextmanager
def silenced(sublayer: Sublayer, tokens: slice) -> Iterator[None]:
    """Within the block, a part of a model adds nothing to the residual stream of these tokens of one context."""

    def after(_module, args, kwargs, output):
        values = stream_of(output).clone()
        shape = (1, -1, values.shape[-1])
        added = _given_stream(args, kwargs, values).view(shape)[:, tokens] if sublayer.adds_stream else 0.0
        values.view(shape)[:, tokens] = added
        if isinstance(output, tuple | list):
            return [values, *output[1:]] if isinstance(output, list) else (values, *output[1:])
        return values

    with hooked([sublayer.module], after=after):
        yield


def _given_stream(args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The second state that a module is called with; zeros where there is none."""
    values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.shape == output.shape]
    return values[1] if len(values) > 1 else torch.zeros_like(output)


def _leave_identity(run: CleanRun, index: int, attention: Sublayer, mlp: Sublayer) -> bool:
    state, every = run.states[index], slice(None)
    try:
        with silenced(attention, every), silenced(mlp, every):
            return torch.equal(run.block(index, state), state)
    except RuntimeError:  # a guess that does not fit
        return False


def _other_tokens(state: Tensor) -> Tensor:
    """The same last token behind others."""
    return torch.cat([state[:, :-1].flip(-1), state[:, -1:]], 1)


def _children_seen(run: CleanRun, index: int, state: Tensor) -> dict[nn.Module, tuple[Tensor, Tensor]]:
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
