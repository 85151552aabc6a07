"""Whether a model can be started again before any of its blocks, proven on a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..lenses.logit_lens import LogitLens
from ..lenses.prefix import check_branching
from ..model.capture import difference, probe_ids
from .clean_run import CleanRun
from .sublayers import Sublayers, find_sublayers

PROBE_TOKENS = 12
TOKENS_AT_A_TIME = 16384  # of one call of a block, keys that are held included


@dataclass(frozen=True)
class Restarts:
    """What was proven of a model's blocks."""

    cached: bool  # the last token alone can be run, on keys and values that are held
    batched: bool  # a block takes several runs of one context at a time
    sublayers: list[Sublayers | None]  # of every block

    def at_a_time(self, n_tokens: int, cached: bool, on_cpu: bool) -> int:
        """Runs of a context of ``n_tokens`` that go through a block together; whole ones gain nothing on a CPU."""
        if not self.batched or (on_cpu and not cached):
            return 1
        return max(1, TOKENS_AT_A_TIME // n_tokens)


def check_restarts(lens: LogitLens) -> Restarts:
    """Start a short context again before every block: what comes out must be the model's own states.

    Raises:
        UnsupportedModelError: It is not, or a block cannot be called by itself; the class is named.
    """
    ids, name = probe_ids(lens.model, PROBE_TOKENS), type(lens.model).__name__
    try:
        run = CleanRun.record(lens, ids)
        if len(run.states) != lens.n_layers + 1:
            raise ValueError(f"{len(run.states) - 1} calls of {lens.n_layers} blocks")
        own = lens.hidden(ids, torch.tensor([ids.shape[1] - 1]))[:, :, 0]
        found = max(_difference(_again(run, first), own[first:]) for first in range(lens.n_layers))
    except Exception as error:  # anything can come out of a model's own code
        raise _refusal(name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
    if not found <= lens.parity.tolerance:
        raise _refusal(name, f"states that differ by {found:.2g}, allowed {lens.parity.tolerance:.2g}")
    cached = check_branching(lens).used and _cached_is_whole(lens, ids, own)
    return Restarts(cached, _takes_batches(run, lens.parity.tolerance), find_sublayers(run))


def _refusal(name: str, got: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name}: expected blocks that can be started again from a stored state, got {got}; "
        "--interventions none reads the lens alone"
    )


def _again(run: CleanRun, first: int) -> Tensor:
    """``[n_layers - first + 1, 1, d_model]``: the last token from layer ``first`` on, run again."""
    states = [run.states[first]]
    for index in range(first, run.n_layers):
        states.append(run.block(index, states[-1]))
    return torch.stack([state[:, -1] for state in states])


def _difference(states: Tensor, own: Tensor) -> float:
    return difference(states[:, :, None], own[:, :, None])


def _cached_is_whole(lens: LogitLens, ids: Tensor, own: Tensor) -> bool:
    try:
        run = CleanRun.record(lens, ids, cached=True)
        again = _again(run, 0)
    except Exception:  # a model without such a cache runs whole
        return False
    return _difference(again, own) <= lens.parity.tolerance


def _takes_batches(run: CleanRun, tolerance: float) -> bool:
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
