"""The definitions of first-correct, settle, depth, flips and censoring: the one place that has them.

A layer l (0 = embedding output, i = output of block i, ``n_layers`` = the model's own prediction) is correct
when the target's rank there is below k. Of one example:

- first-correct: the lowest correct layer;
- settle: the lowest layer from which every layer up to ``n_layers`` is correct;
- refinement depth: settle - first-correct;
- flips: changes of correctness between neighbouring layers from first-correct on;
- censored: not correct at ``n_layers``; settle and depth do not exist;
- largest gain: the layer whose rank lies furthest below that of the layer before, the lowest among equals. It does
  not depend on k, and does not exist where the rank never falls.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

try:
    from .. import _C
except ImportError:  # built without a compiler
    _C = None

NONE = -1  # stands for a value that does not exist
INT64_MAX = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Trajectories:
    """Per example, int64 ``[...]``, `NONE` where the value does not exist."""

    first_correct: np.ndarray
    settle: np.ndarray
    flips: np.ndarray
    largest_gain: np.ndarray

    def __post_init__(self):
        shapes = [column.shape for column in vars(self).values()]
        if len(set(shapes)) > 1:
            raise ValueError(f"expected equal shapes, got {', '.join(map(str, shapes))}")

    @property
    def depth(self) -> np.ndarray:
        """Refinement depth, settle - first-correct, int64 ``[...]``."""
        return np.where(self.settle == NONE, NONE, self.settle - self.first_correct)

    @property
    def censored(self) -> np.ndarray:
        """Not correct at the output, bool ``[...]``."""
        return np.asarray(self.settle == NONE)


def trajectories(ranks: np.ndarray, k: int = 1) -> Trajectories:
    """Trajectories of target ranks, in one pass and without the GIL.

    Args:
        ranks: ``[..., n_layers + 1]`` of any integer dtype, 0-based ranks of the target at every layer. Anything but a
            C-contiguous int64 array is copied first.
        k: A layer is correct when its rank is below k.

    Raises:
        InputError: No layer, another dtype, or k below 1.
        ValueError: A rank below 0.
    """
    ranks = _checked_ranks(ranks)
    summarise = summarise_numpy if _C is None else _C.summarise_trajectories
    return Trajectories(*summarise(ranks, _checked_k(k)))


def summarise_numpy(ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Plain numpy twin of the C++ pass: (first-correct, settle, flips, largest gain), int64 ``[...]`` each."""
    if ranks.min(initial=0) < 0:
        raise ValueError(f"ranks: expected 0 or more, got {ranks.min()}; leave out the examples that have no rank")
    correct = ranks < k
    n_points = correct.shape[-1]
    seen = np.logical_or.accumulate(correct, axis=-1)
    first = np.where(seen[..., -1], correct.argmax(axis=-1), NONE)
    stays = np.logical_and.accumulate(correct[..., ::-1], axis=-1)
    settle = np.where(correct[..., -1], n_points - stays.sum(axis=-1), NONE)
    changes = ((correct[..., 1:] != correct[..., :-1]) & seen[..., :-1]).sum(axis=-1)
    flips = np.where(seen[..., -1], changes, NONE)
    gains = -np.diff(ranks, axis=-1, prepend=ranks[..., :1])  # no gain at layer 0
    largest_gain = np.where((gains > 0).any(axis=-1), gains.argmax(axis=-1), NONE)
    return first.astype(np.int64), settle.astype(np.int64), flips.astype(np.int64), largest_gain.astype(np.int64)


def _checked_ranks(ranks: np.ndarray) -> np.ndarray:
    ranks = np.asarray(ranks)
    if ranks.ndim == 0 or ranks.shape[-1] == 0:
        raise InputError(f"ranks: expected shape [..., n_layers + 1] with a layer or more, got {list(ranks.shape)}")
    if ranks.dtype.kind not in "iu" or (ranks.dtype == np.uint64 and ranks.max(initial=0) > INT64_MAX):
        raise InputError(f"ranks: expected integers below 2**63, got {ranks.dtype}; convert them")
    return np.require(ranks, np.int64, ["C_CONTIGUOUS", "ALIGNED"])


def _checked_k(k: int) -> int:
    if not hasattr(k, "__index__") or not 1 <= operator.index(k) <= INT64_MAX:
        raise InputError(f"k: expected an integer of at least 1, got {k!r}")
    return operator.index(k)
