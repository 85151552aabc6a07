"""The parts of a block, a block without one of them, and the stream between them while a model runs.

``resid_mid``, the residual stream behind attention, is what a block puts out whose feed-forward part is zero-ablated.
To keep it from an ordinary pass a block is run once more with what its parts put out a moment ago, so that nothing is
multiplied twice and no key enters a cache twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from threading import Lock, get_ident

import torch
from torch import Tensor, nn

from .hooks import hooked, stream_of

REPLAY = Lock()  # a module has one forward method for all threads


@dataclass(frozen=True)
class Sublayer:
    """A module inside a block that adds to the residual stream."""

    module: nn.Module
    adds_stream: bool  # the module adds the stream it is given to its own output, as in BLOOM


Sublayers = dict[str, Sublayer]  # attn and mlp of a block, of which zero-ablated nothing but the identity is left


@contextmanager
def zero_ablated(sublayer: Sublayer, tokens: slice) -> Iterator[None]:
    """Within the block, a part of a model adds nothing to the residual stream.

    Args:
        sublayer: The part.
        tokens: Of one context; all of them, ``slice(None)``, also of a batch of contexts.
    """

    def after(_module, args, kwargs, output):
        values = stream_of(output).clone()
        shape = (1, -1, values.shape[-1])
        added = _given_stream(args, kwargs, values).view(shape)[:, tokens] if sublayer.adds_stream else 0.0
        values.view(shape)[:, tokens] = added
        return _with_stream(output, values)

    with hooked([sublayer.module], after=after):
        yield


def _given_stream(args: tuple, kwargs: dict, output: Tensor) -> Tensor:
    """The second state that a module is called with; zeros where there is none."""
    values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.shape == output.shape]
    return values[1] if len(values) > 1 else torch.zeros_like(output)


def _with_stream(output: Tensor | tuple | list, stream: Tensor) -> Tensor | tuple | list:
    """What a module returned, with another state in the place of its own."""
    if isinstance(output, tuple | list):
        return [stream, *output[1:]] if isinstance(output, list) else (stream, *output[1:])
    return stream


@contextmanager
def keep_mid(blocks: nn.ModuleList, sublayers: Sequence[Sublayers] | None, positions: Tensor) -> Iterator[list[Tensor]]:
    """Within the block, one forward pass fills the yielded list with ``resid_mid`` of every block at kept positions.

    The list ends with ``n_layers`` tensors ``[batch, n_positions, d_model]`` in the model's dtype. Contexts may go on
    from a cache of keys and values: a block's attention is called once.

    Args:
        blocks: Of the model.
        sublayers: Of every block; None keeps nothing.
        positions: ``[batch, n_positions]`` int64, of the tokens of the pass.
    """
    kept: list[Tensor] = []
    if sublayers is None:
        yield kept
        return
    made: dict[nn.Module, Tensor | tuple | list] = {}  # by the parts of the block that is running
    modules = [part.module for own in sublayers for part in own.values()]

    def of_part(module, _args, _kwargs, output):
        made[module] = _with_stream(output, stream_of(output).clone())  # a block may add to it in place

    def of_block(block, args, kwargs, _output):
        own = sublayers[len(kept)]
        with ExitStack() as stack:
            stack.enter_context(REPLAY)
            for part in own.values():
                stack.enter_context(_replayed(part.module, made[part.module]))
            stack.enter_context(zero_ablated(own["mlp"], slice(None)))
            mid = stream_of(block.forward(*args, **kwargs))  # not the block itself, whose hooks keep states
        made.clear()
        index = positions.to(mid.device)
        kept.append(mid[torch.arange(len(index), device=mid.device)[:, None], index])

    with hooked(modules, after=of_part), hooked(blocks, after=of_block):
        yield kept


@contextmanager
def _replayed(module: nn.Module, output: Tensor | tuple | list) -> Iterator[None]:
    """Within the block, a module called by this thread returns ``output`` and computes nothing; its hooks still run."""
    thread, own = get_ident(), module.forward
    was_set = "forward" in vars(module)  # by a package that wraps modules

    def forward(*args, **kwargs):
        return output if get_ident() == thread else own(*args, **kwargs)

    module.forward = forward
    try:
        yield
    finally:
        if was_set:
            module.forward = own
        else:
            del module.forward
