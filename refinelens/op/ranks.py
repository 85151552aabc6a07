"""How far two sets of ranks, or of any numbers, agree in their order: between layers, gold positions or runs.

Three comparisons of the last axis of two arrays, whose leading dimensions broadcast as in numpy. With target ranks
``ranks`` of shape ``[positions, questions, n_layers + 1]`` from one run, and ``others`` of the same shape from another:

- between layers: ``between_layers(ranks)`` is ``[positions, n_layers + 1, n_layers + 1]``;
- between gold positions, layer by layer: with ``layers = np.moveaxis(ranks, -1, 0)``,
  ``kendall_tau_b(layers[:, :, None], layers[:, None])`` is ``[n_layers + 1, positions, positions]``;
- between two runs: ``kendall_tau_b(np.moveaxis(ranks, -1, 0), np.moveaxis(others, -1, 0))`` is
  ``[n_layers + 1, positions]``; `refinelens.report.agreement` pairs the rows of two run folders.

Only the order of the numbers counts: int64 is compared as int64, every float as fp64, 0.0 equals -0.0, infinities are
numbers. A NaN anywhere in a row makes the result NaN, as does a correlation of fewer than two entries or of a row
without two different ones. A row that broadcasting uses again is put in order once, and kept in 12 bytes an entry.
The numpy functions are the definition of the C++ ones, and what runs without a compiler.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import InputError

# A sum of n products of ranks, each below n^2, is below 2^63; longer rows are summed in fp64.
EXACT_LENGTH = 1 << 21

Whole = np.ndarray | np.integer[Any]  # a sum over the last axis


def spearman_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Twin of `refinelens.op.ranks.spearman`."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    rho = _over_geometric_mean((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1))
    return np.where(_has_nan(a) | _has_nan(b), np.nan, rho)[()]


def kendall_tau_b_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Twin of `refinelens.op.ranks.kendall_tau_b`: every pair of entries, O(n^2) time and O(n) memory."""
    shared = untied_a = untied_b = np.int64(0)
    for i in range(a.shape[-1]):
        sign_a, sign_b = _signs(a, i), _signs(b, i)
        shared = shared + (sign_a * sign_b).sum(-1, dtype=np.int64)
        untied_a = untied_a + np.abs(sign_a).sum(-1, dtype=np.int64)
        untied_b = untied_b + np.abs(sign_b).sum(-1, dtype=np.int64)
    tau = _over_geometric_mean(shared, untied_a, untied_b)
    return np.where(_has_nan(a) | _has_nan(b), np.nan, tau)[()]


def top_k_overlap_numpy(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Twin of `refinelens.op.ranks.top_k_overlap`."""
    share = (_in_top_k(a, k) & _in_top_k(b, k)).sum(-1) / k
    return np.where(_has_nan(a) | _has_nan(b), np.nan, share)[()]


def _over_geometric_mean(shared: Whole, a: Whole, b: Whole) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # 0 over 0 is NaN: a constant row, or fewer than two entries
        return shared / np.sqrt(np.multiply(a, b, dtype=np.float64))


def _has_nan(values: np.ndarray) -> np.ndarray:
    return np.isnan(values).any(-1)


def _centred_ranks(values: np.ndarray) -> np.ndarray:
    """Per entry: how many are smaller less how many are larger, twice its average rank about the mean."""
    n = values.shape[-1]
    order = np.argsort(values, axis=-1, kind="stable")
    ascending = np.take_along_axis(values, order, axis=-1)
    starts = np.ones(values.shape, bool)  # of runs of equal values
    starts[..., 1:] = ascending[..., 1:] != ascending[..., :-1]
    ends = np.ones(values.shape, bool)
    ends[..., :-1] = starts[..., 1:]
    place = np.arange(n)
    smaller = np.maximum.accumulate(np.where(starts, place, 0), axis=-1)
    not_larger = np.minimum.accumulate(np.where(ends, place + 1, n)[..., ::-1], axis=-1)[..., ::-1]
    ranks = np.empty(values.shape, np.int64 if n <= EXACT_LENGTH else np.float64)
    np.put_along_axis(ranks, order, (smaller + not_larger - n).astype(ranks.dtype), axis=-1)
    return ranks


def _signs(values: np.ndarray, i: int) -> np.ndarray:
    """Sign of every later entry less entry i, int8; by comparison, because a difference may overflow."""
    later, entry = values[..., i + 1 :], values[..., i : i + 1]
    return (later > entry).astype(np.int8) - (later < entry).astype(np.int8)


def _in_top_k(values: np.ndarray, k: int) -> np.ndarray:
    chosen = np.zeros(values.shape, bool)
    order = np.argsort(values, axis=-1, kind="stable")
    np.put_along_axis(chosen, order[..., :k], True, axis=-1)
    return chosen


try:
    from .. import _C
except ImportError:  # built without a compiler
    _C = None  # type: ignore[assignment]

INT64_MAX = np.iinfo(np.int64).max


def spearman(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's rho: Pearson's correlation of average ranks, from exact integer sums.

    Args:
        a: ``[..., n]``, integers or floats.
        b: ``[..., n]``; the leading dimensions of both broadcast.

    Returns:
        fp64, of the broadcast leading shape.

    Raises:
        InputError: No last axis, last axes of different lengths, shapes that do not broadcast, or another dtype.
    """
    return _compare("spearman", a, b)


def kendall_tau_b(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Kendall's tau-b (Kendall 1945, Biometrika 33:239), from exact counts in O(n log n) (Knight 1966, JASA 61:436).

    Concordant less discordant pairs, over the geometric mean of the pairs not tied in ``a`` and those not tied in
    ``b``. Arguments, result and errors are those of `spearman`.
    """
    return _compare("kendall_tau_b", a, b)


def top_k_overlap(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Share of the k best entries of ``a`` that are among the k best of ``b``: 0, 1/k, ... or 1.

    The best are the smallest, as for ranks; pass ``-scores`` where the largest are. Of equal entries the one with the
    lower index is better, so that there are always exactly k. Arguments, result and errors are those of `spearman`,
    and:

    Args:
        k: 1 to n.

    Raises:
        InputError: k outside of 1 to n, hence always where n is 0.
    """
    n = _checked("a", a).shape[-1]
    if not hasattr(k, "__index__") or not 1 <= operator.index(k) <= n:
        raise InputError(f"k: expected an integer from 1 to the length of the last axis, {n}, got {k!r}")
    return _compare("top_k_overlap", a, b, operator.index(k))


def between_layers(
    ranks: np.ndarray, compare: Callable[[np.ndarray, np.ndarray], np.ndarray] = kendall_tau_b
) -> np.ndarray:
    """Agreement of every layer with every other on the order of the examples.

    Args:
        ranks: ``[..., n, n_layers + 1]``, ranks of n examples at every layer.
        compare: `kendall_tau_b`, `spearman`, or for instance ``functools.partial(top_k_overlap, k=10)``.

    Returns:
        ``[..., n_layers + 1, n_layers + 1]`` fp64, symmetric.

    Raises:
        InputError: Fewer than two dimensions, or what ``compare`` refuses.
    """
    ranks = np.asarray(ranks)
    if ranks.ndim < 2:
        raise InputError(f"ranks: expected shape [..., n, n_layers + 1], got {list(ranks.shape)}")
    layers = np.swapaxes(ranks, -1, -2)
    return compare(layers[..., :, None, :], layers[..., None, :, :])


def _compare(name: str, a: np.ndarray, b: np.ndarray, *options: int) -> np.ndarray:
    a, b = _checked("a", a), _checked("b", b)
    if a.shape[-1] != b.shape[-1]:
        raise InputError(f"a and b: expected last axes of one length, got shapes {list(a.shape)} and {list(b.shape)}")
    try:
        shape = np.broadcast_shapes(a.shape[:-1], b.shape[:-1])
    except ValueError:
        raise InputError(
            f"a and b: expected leading dimensions that broadcast, got shapes {list(a.shape)} and {list(b.shape)}"
        ) from None
    if _C is None:
        return globals()[f"{name}_numpy"](a, b, *options)
    out = getattr(_C, name)(_rows(a), _row_numbers(a, shape), _rows(b), _row_numbers(b, shape), *options)
    return out.reshape(shape)[()]


def _checked(name: str, values: np.ndarray) -> np.ndarray:
    """The values as int64 or fp64, without loss."""
    values = np.asarray(values)
    if values.ndim == 0:
        raise InputError(f"{name}: expected shape [..., n], got a single value")
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind not in "iuf" or size > 8 or (values.dtype == np.uint64 and values.max(initial=0) > INT64_MAX):
        raise InputError(f"{name}: expected integers below 2**63 or floats of at most 64 bits, got {values.dtype}")
    return values.astype(np.float64 if kind == "f" else np.int64, copy=False)


def _rows(values: np.ndarray) -> np.ndarray:
    rows = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    return np.require(rows, requirements=["C_CONTIGUOUS", "ALIGNED"])


def _row_numbers(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which of ``_rows(values)`` stands at each place of the broadcast leading shape, flat."""
    numbers = np.arange(math.prod(values.shape[:-1])).reshape(values.shape[:-1])
    return np.broadcast_to(numbers, shape).flatten()  # a copy, because reshape may give a view with stride 0
