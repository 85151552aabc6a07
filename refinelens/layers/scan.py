"""The scan: one intervention at every block in turn, each run restarted from the stored state of its block."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .clean_run import CleanRun


def scan(run: CleanRun, start: Callable[[int], Tensor], at_a_time: int) -> list[Tensor]:
    """What remains of a context when an intervention strikes each block in turn.

    A run that was struck at block i needs blocks ``i + 1 .. n_layers - 1`` alone, so that the whole scan takes
    ``(n_layers - 1) / 2`` forward passes. All runs that are under way go through a block together. One that the
    intervention left as it was, bit for bit, is not run: it is the clean run.

    Args:
        run: The context.
        start: Gives the output ``[1, token, d_model]`` of block ``index`` (0-based) under the intervention.
        at_a_time: Runs that go through a block in one call.

    Returns:
        For each block ``i`` the states ``[n_layers - i, d_model]`` of layers ``i + 1 .. n_layers`` at the last token.
    """
    under_way: dict[int, Tensor] = {}  # block that was struck: state
    kept: list[list[Tensor]] = [[] for _ in run.blocks]
    for index in range(run.n_layers):
        struck = list(under_way)
        for first in range(0, len(struck), at_a_time):
            chunk = struck[first : first + at_a_time]
            states = run.block(index, torch.cat([under_way[i] for i in chunk]))
            under_way.update(zip(chunk, states.split(1), strict=True))
        clean, started = run.states[index + 1], start(index)
        if not torch.equal(started, clean):
            under_way[index] = started
        for i in range(index + 1):
            kept[i].append(under_way.get(i, clean)[0, -1].clone())  # a view would hold all tokens
    return [torch.stack(states) for states in kept]
