"""The definitions of first-correct, settle, depth, flips and censoring: the one place that has them.

A layer l (0 = embedding output, i = output of block i, ``n_layers`` = the model's own prediction) is correct
when the target's rank there is below k. Of one example:

- first-correct: the lowest correct layer;
- settle: the lowest layer from which every layer up to ``n_layers`` is correct;
- refinement depth: settle - first-correct;
- flips: changes of correctness between neighbouring layers from first-correct on;
- censored: not correct at ``n_layers``; settle and depth do not exist;
- largest gain: the layer whose rank improves most on the layer before, whatever k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

try:
    from . import _C
except ImportError:  # built without a compiler
    _C = None

NONE = -1  # stands for a value that does not exist


@dataclass(frozen=True)
class Trajectories:
    """Per example, int64 ``[n]``, `NONE` where the value does not exist."""

    first_correct: np.ndarray
    settle: np.ndarray
    flips: np.ndarray

    def __post_init__(self):
        if not self.first_correct.shape == self.settle.shape == self.flips.shape:
            raise ValueError(
                f"expected equal shapes, got {self.first_correct.shape}, {self.settle.shape}, {self.flips.shape}"
            )

    @property
    def depth(self) -> np.ndarray:
        """Refinement depth, settle - first-correct, int64 ``[n]``."""
        return np.where(self.settle == NONE, NONE, self.settle - self.first_correct)

    @property
    def censored(self) -> np.ndarray:
        """Not correct at the output, bool ``[n]``."""
        return self.settle == NONE


def trajectories(ranks: np.ndarray, k: int = 1) -> Trajectories:
    """Trajectories of target ranks.

    Args:
        ranks: ``[n, n_layers + 1]`` int64, 0-based ranks of the target at every layer.
        k: A layer is correct when its rank is below k.

    Raises:
        ValueError: Another shape, or k below 1.
    """
    ranks = np.ascontiguousarray(ranks, dtype=np.int64)
    if ranks.ndim != 2 or ranks.shape[1] == 0:
        raise ValueError(f"ranks: expected shape [n, n_layers + 1], got {list(ranks.shape)}")
    if k < 1:
        raise ValueError(f"k: expected at least 1, got {k}")
    summarise = summarise_numpy if _C is None else _C.summarise_trajectories
    return Trajectories(*summarise(ranks, k))


def largest_gain(ranks: np.ndarray) -> np.ndarray:
    """The layer in ``1 .. n_layers`` whose rank improves most on the layer before, int64 ``[n]``.

    The lowest among equals; `NONE` where the rank improves nowhere.

    Args:
        ranks: ``[n, n_layers + 1]`` int64.
    """
    if ranks.shape[1] < 2:
        return np.full(len(ranks), NONE)
    gains = ranks[:, :-1] - ranks[:, 1:]
    return np.where(gains.max(axis=1) > 0, gains.argmax(axis=1) + 1, NONE)


def summarise_numpy(ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Plain numpy twin of the C++ pass: (first-correct, settle, flips)."""
    correct = ranks < k
    n_points = correct.shape[1]
    seen = np.logical_or.accumulate(correct, axis=1)
    first = np.where(seen[:, -1], correct.argmax(axis=1), NONE)
    stays = np.logical_and.accumulate(correct[:, ::-1], axis=1)[:, ::-1]
    settle = np.where(correct[:, -1], n_points - stays.sum(axis=1), NONE)
    changes = ((correct[:, 1:] != correct[:, :-1]) & seen[:, :-1]).sum(axis=1)
    return first.astype(np.int64), settle.astype(np.int64), np.where(seen[:, -1], changes, NONE).astype(np.int64)
