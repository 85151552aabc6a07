"""Plain numpy twins of the C++ comparisons of order: their definition, and what runs without a compiler.

Arguments are int64 or fp64 ``[..., n]`` whose leading dimensions broadcast, checked by `refinelens.op.rank_agreement`.
"""

from __future__ import annotations

import numpy as np

# A sum of n products of ranks, each below n^2, is below 2^63; longer rows are summed in fp64.
EXACT_LENGTH = 1 << 21


def spearman_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Twin of `refinelens.op.rank_agreement.spearman`."""
    x, y = _centred_ranks(a), _centred_ranks(b)
    rho = _over_geometric_mean((x * y).sum(-1), (x * x).sum(-1), (y * y).sum(-1))
    return np.where(_has_nan(a) | _has_nan(b), np.nan, rho)[()]


def kendall_tau_b_numpy(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Twin of `refinelens.op.rank_agreement.kendall_tau_b`: every pair of entries, O(n^2) time and O(n) memory."""
    shared = untied_a = untied_b = np.int64(0)
    for i in range(a.shape[-1]):
        sign_a, sign_b = _signs(a, i), _signs(b, i)
        shared = shared + (sign_a * sign_b).sum(-1, dtype=np.int64)
        untied_a = untied_a + np.abs(sign_a).sum(-1, dtype=np.int64)
        untied_b = untied_b + np.abs(sign_b).sum(-1, dtype=np.int64)
    tau = _over_geometric_mean(shared, untied_a, untied_b)
    return np.where(_has_nan(a) | _has_nan(b), np.nan, tau)[()]


def top_k_overlap_numpy(a: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """Twin of `refinelens.op.rank_agreement.top_k_overlap`."""
    share = (_in_top_k(a, k) & _in_top_k(b, k)).sum(-1) / k
    return np.where(_has_nan(a) | _has_nan(b), np.nan, share)[()]


def _over_geometric_mean(shared: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
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
