"""A run that nothing intervenes in: the residual stream before and after every block, and how each block was called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..lenses.logit_lens import LogitLens
from ..model.capture import hooked, run_base, stream_of
from .frozen_cache import FrozenCache


@dataclass(frozen=True)
class Call:
    """How a block was called, but for the state it works on."""

    args: tuple
    kwargs: dict
    place: int | str  # of the state, among ``args`` or ``kwargs``

    @classmethod
    def without_state(cls, args: tuple, kwargs: dict) -> tuple[Call, Tensor]:
        """The call, and the state: the first floating tensor."""
        values = [*enumerate(args), *kwargs.items()]
        place = next(key for key, value in values if isinstance(value, Tensor) and value.is_floating_point())
        state = args[place] if isinstance(place, int) else kwargs[place]
        return cls(args, kwargs, place)._with(None), state

    def of(self, block: nn.Module, state: Tensor) -> Tensor:
        """What the block makes of a state, called in the same way."""
        call = self._with(state)
        return stream_of(block(*call.args, **call.kwargs))

    def _with(self, state: Tensor | None) -> Call:
        if isinstance(self.place, str):
            return Call(self.args, self.kwargs | {self.place: state}, self.place)
        return Call((*self.args[: self.place], state, *self.args[self.place + 1 :]), self.kwargs, self.place)


@dataclass(frozen=True)
class CleanRun:
    """One context through the model, with all that is needed to start again before any of its blocks.

    Only the last token where the keys and values of those before it are held: they do not depend on it.
    """

    blocks: nn.ModuleList
    states: list[Tensor]  # n_layers + 1 of [1, token, d_model]: layer 0 and the output of every block
    calls: list[Call]

    @classmethod
    def record(cls, lens: LogitLens, input_ids: Tensor, cached: bool = False) -> CleanRun:
        """Run the model once.

        Args:
            lens: Of the model.
            input_ids: ``[1, token]`` int64.
            cached: Hold keys and values of all tokens but the last, and states of the last alone.
        """
        ids, cache = input_ids.to(lens.model.device), None
        if cached:
            filled = DynamicCache()  # without a configuration it keeps every token, also behind a sliding window
            run_base(lens.model, ids[:, :-1], None, filled)
            ids, cache = ids[:, -1:], FrozenCache(filled)
        blocks = lens.parts.blocks
        with lens.undisturbed(), _recording(blocks) as (states, calls):
            run_base(lens.model, ids, None, cache)
        return cls(blocks, states, calls)

    @property
    def n_layers(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def block(self, index: int, state: Tensor) -> Tensor:
        """What block ``index`` (0-based) makes of ``[batch, token, d_model]`` in this context."""
        with torch.no_grad():
            return self.calls[index].of(self.blocks[index], state)

    def answer_states(self) -> Tensor:
        """``[n_layers + 1, d_model]``: every layer at the last token, which the answer follows."""
        return torch.stack([state[0, -1] for state in self.states])


@contextmanager
def _recording(blocks: nn.ModuleList) -> Iterator[tuple[list[Tensor], list[Call]]]:
    """Within the block, a forward pass fills the two lists of `CleanRun`."""
    states: list[Tensor] = []
    calls: list[Call] = []

    def before(_module, args, kwargs):
        call, state = Call.without_state(args, kwargs)
        calls.append(call)
        if not states:
            states.append(state)

    def after(_module, _args, _kwargs, output):
        states.append(stream_of(output))

    with hooked(blocks, before, after):
        yield states, calls
