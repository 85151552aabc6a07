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

And by the divergence of a layer from the output, see `settle_by_divergence` and `is_deep`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from .results import KEYS, NO_ANSWER_TOKEN, TRAJECTORIES, Run

COLUMNS = [*(name for name, _ in KEYS), "answer_id", "generated_correct", "argmax", "target_rank", "target_logprob"]
LISTS = ["logprob_gain"]  # the only column that grows with the layers


try:
    from .. import _C
except ImportError:  # built without a compiler
    _C = None  # type: ignore[assignment]

NONE = -1  # stands for a value that does not exist
INT64_MAX = np.iinfo(np.int64).max
SETTLED = 0.5 * math.log(2.0)  # nats: half of the largest Jensen-Shannon divergence
LATE = 0.85  # of the layers: those of deep-thinking tokens begin there


@dataclass(frozen=True, eq=False, repr=False)
class Trajectories:
    """Per example, int64 ``[...]``, -1 where the value does not exist."""

    first_correct: np.ndarray
    settle: np.ndarray
    flips: np.ndarray
    largest_gain: np.ndarray

    def __post_init__(self) -> None:
        shapes = [column.shape for column in vars(self).values()]
        if len(set(shapes)) > 1:
            raise ValueError(f"expected equal shapes, got {', '.join(map(str, shapes))}")

    @property
    def depth(self) -> np.ndarray:
        """Refinement depth, settle - first-correct, int64 ``[...]``."""
        return np.where(self.settle == NONE, NONE, self.settle - self.first_correct)

    def __repr__(self) -> str:
        settled = ~self.censored
        counts = f"{int(settled.sum())} of {settled.size} settled"
        if not settled.any():
            return f"Trajectories {list(settled.shape)}: {counts}"
        means = ((name, getattr(self, name)[settled].mean()) for name in ("first_correct", "settle", "depth"))
        return f"Trajectories {list(settled.shape)}: {counts}; mean {', '.join(f'{n} {m:.2f}' for n, m in means)}"

    @property
    def censored(self) -> np.ndarray:
        """Not correct at the output, bool ``[...]``."""
        return np.asarray(self.settle == NONE)


def trajectories(ranks: np.ndarray, k: int = 1, *, axis: int = 0) -> Trajectories:
    """Trajectories of target ranks, in one pass and without the GIL.

    Args:
        ranks: ``[n_layers + 1, ...]`` of any integer dtype, array or tensor: 0-based ranks of the target at every
            layer, such as ``LayerReading.rank``. All but int64 that is contiguous along the layers is copied first.
        k: A layer is correct when its rank is below k.
        axis: Of the layers.

    Returns:
        Trajectories of the other axes.

    Raises:
        InputError: No layer, another dtype, or k below 1.
        ValueError: A rank below 0.
    """
    ranks = _checked_ranks(ranks, axis)
    summarise = summarise_numpy if _C is None else _C.summarise_trajectories
    return Trajectories(*summarise(ranks, _checked_k(k)))


def summarise_numpy(ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Plain numpy reference of the C++ pass: (first-correct, settle, flips, largest gain), int64 ``[...]`` each."""
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


def _checked_ranks(ranks: np.ndarray, axis: int) -> np.ndarray:
    if ranks is None:
        raise InputError("ranks: expected those of targets, got None; read with targets")
    ranks = np.asarray(ranks.detach().cpu() if hasattr(ranks, "detach") else ranks)  # a tensor may be on a GPU
    if not -ranks.ndim <= axis < ranks.ndim or ranks.shape[axis] == 0:
        raise InputError(f"ranks: expected n_layers + 1 along axis {axis}, one or more, got {list(ranks.shape)}")
    ranks = np.moveaxis(ranks, axis, -1)
    if ranks.dtype.kind not in "iu" or (ranks.dtype == np.uint64 and ranks.max(initial=0) > INT64_MAX):
        raise InputError(f"ranks: expected integers below 2**63, got {ranks.dtype}; convert them")
    return np.require(ranks, np.int64, ["C_CONTIGUOUS", "ALIGNED"])


def _checked_k(k: int) -> int:
    if not hasattr(k, "__index__") or not 1 <= operator.index(k) <= INT64_MAX:
        raise InputError(f"k: expected an integer of at least 1, got {k!r}")
    return operator.index(k)


def settle_by_divergence(jsd: np.ndarray) -> np.ndarray:
    """The lowest layer at which a prediction is as near to the output's as `SETTLED`, int64 ``[...]``.

    This is the settling depth of Chen et al. 2026 (arXiv 2602.13517): the first layer at which the smallest divergence
    so far is at or below the threshold. Layers above it may be further away again.

    Args:
        jsd: ``[..., n_layers + 1]`` nats, Jensen-Shannon divergence of every layer from the output; 0 at the last one,
            so that every prediction settles.
    """
    return np.asarray((jsd <= SETTLED).argmax(axis=-1))


def first_layer(fits: np.ndarray) -> np.ndarray:
    """The lowest layer at which bool ``[n, n_layers + 1]`` is true, fp64 ``[n]``, NaN where none is."""
    return np.where(fits.any(1), fits.argmax(1), np.nan)


def is_deep(settle: np.ndarray, n_layers: int) -> np.ndarray:
    """Whether tokens are deep-thinking ones: they settle at layer ``ceil(LATE * n_layers)`` or above, bool ``[...]``.

    Args:
        settle: Of `settle_by_divergence`, ``[...]``.
        n_layers: The layer of the output.
    """
    return np.asarray(settle) >= math.ceil(LATE * n_layers)


def trajectory_tables(run: Run, tops: tuple[int, ...]) -> Iterator[pa.Table]:
    """Trajectories of answer tokens, part by part: one row per prediction and threshold, thresholds side by side."""
    for part in run.parts(COLUMNS):
        part = choose_tokens(part, "all")
        tables = _tables(part, tops)
        order = np.arange(len(part) * len(tops)).reshape(len(tops), -1).T.ravel()
        yield pa.concat_tables(tables).combine_chunks().take(order)


def read_trajectories(run: Run, tops: tuple[int, ...]) -> pa.Table:
    """All trajectories of a run without their lists."""
    tables = (table.drop_columns(LISTS) for table in trajectory_tables(run, tops))
    return pa.concat_tables([TRAJECTORIES.empty_table().drop_columns(LISTS), *tables])


def choose_tokens(table: pa.Table, answer_tokens: str) -> pa.Table:
    """The rows a summary is about: of the ``first`` answer token of each question, or of ``all``."""
    token = table["answer_token"]
    return table.filter(pc.equal(token, 0) if answer_tokens == "first" else pc.greater(token, NO_ANSWER_TOKEN))


def list_matrix(lists: pa.ChunkedArray) -> np.ndarray:
    """``[rows, layers]`` of a list column whose lists all have the same length."""
    flat = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(lists), -1) if len(lists) else flat.reshape(0, 1)


def _tables(part: pa.Table, tops: tuple[int, ...]) -> list[pa.Table]:
    ranks, logprobs = list_matrix(part["target_rank"]), list_matrix(part["target_logprob"])
    gains = np.diff(logprobs, axis=1)
    offsets = np.arange(len(part) + 1, dtype=np.int32) * gains.shape[1]
    correct = list_matrix(part["argmax"])[:, -1] == part["answer_id"].to_numpy()
    shared = {
        **{name: part[name] for name, _ in KEYS},
        "answer_correct": correct,
        "all_correct": _of_whole_answers(correct, part["answer_token"].to_numpy()),
        "generated_correct": part["generated_correct"],
        "logprob_gain": pa.ListArray.from_arrays(offsets, gains.ravel()),
    }
    tables = []
    for top in tops:
        found = trajectories(ranks, top, axis=-1)
        values = shared | {"top": np.full(len(part), top), "final_correct": ~found.censored}
        for name in ("first_correct", "settle", "depth", "flips", "largest_gain"):
            numbers = getattr(found, name)
            values[name] = pa.array(numbers, mask=numbers == NONE)
        tables.append(pa.table([values[name] for name in TRAJECTORIES.names], TRAJECTORIES.names).cast(TRAJECTORIES))
    return tables


def _of_whole_answers(correct: np.ndarray, answer_token: np.ndarray) -> np.ndarray:
    """Per row whether all tokens of its answer are correct; the tokens of an answer stand together, in order."""
    starts = np.diff(answer_token, prepend=answer_token[:1]) <= 0
    return np.logical_and.reduceat(correct, np.flatnonzero(starts))[starts.cumsum() - 1]
