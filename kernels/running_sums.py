"""Running sums of exponentials on a GPU, and their merge over the splits of a vocabulary.

A row is a peak, ``total``, the sum of ``2 ** (l - peak)``, and ``weighted``, the sum of
``(l - peak) * 2 ** (l - peak)``, over logits ``l`` in units of log 2. Then logsumexp is
``ln 2 * (peak + log2(total))`` and entropy ``ln 2 * (log2(total) - weighted / total)``.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
MERGE_ROWS = 128
_PARTS = ["parts_best_ptr", "parts_argmax_ptr", "parts_rank_ptr", "parts_total_ptr", "parts_weighted_ptr"]
_MERGED = ["best_ptr", "argmax_ptr", "rank_ptr", "logsumexp_ptr", "entropy_ptr"]


@triton.jit
def log2_logits(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logits of ``z`` in units of log 2, by ``tanh(y) = 1 - 2 / (exp(2 y) + 1)``."""
    if HAS_SOFTCAP:
        cap = softcap * _LOG2E
        return cap - 2.0 * cap / (tl.exp2(z * (2.0 * _LOG2E / softcap)) + 1.0)
    return z * _LOG2E


@triton.jit
def peak_of(best, softcap, HAS_SOFTCAP: tl.constexpr):
    """What the exponents are measured from: the largest logit, or 0 before there is one."""
    return tl.where(best == float("-inf"), 0.0, log2_logits(best, softcap, HAS_SOFTCAP))


@triton.jit
def rescale(total, weighted, shift):
    """Move both sums to a peak that lies ``-shift`` higher; sums that are still 0 may come with any shift."""
    shift = tl.minimum(shift, 0.0)
    factor = tl.exp2(shift)
    return total * factor, (weighted + shift * total) * factor


@triton.jit(do_not_specialize=["n_rows", "n_splits"], do_not_specialize_on_alignment=[*_PARTS, *_MERGED])
def _merge_kernel(
    parts_best_ptr, parts_argmax_ptr, parts_rank_ptr, parts_total_ptr, parts_weighted_ptr,
    best_ptr, argmax_ptr, rank_ptr, logsumexp_ptr, entropy_ptr,
    n_rows, n_splits, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = offs_m < n_rows
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M], tl.int32)
    rank = tl.zeros([BLOCK_M], tl.int64)
    peak = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for split in range(n_splits):
        part = tl.cast(split, tl.int64) * n_rows + offs_m
        part_best = tl.load(parts_best_ptr + part, mask=row_ok, other=0.0)
        part_argmax = tl.load(parts_argmax_ptr + part, mask=row_ok, other=0)
        part_total = tl.load(parts_total_ptr + part, mask=row_ok, other=1.0)
        part_weighted = tl.load(parts_weighted_ptr + part, mask=row_ok, other=0.0)
        if HAS_TARGETS:
            rank += tl.load(parts_rank_ptr + part, mask=row_ok, other=0)
        # Splits come in the order of their ids: among equals the first, with the lowest id, stays.
        argmax = tl.where(part_best > best, part_argmax, argmax)
        best = tl.maximum(best, part_best)
        new_peak = peak_of(best, softcap, HAS_SOFTCAP)
        part_shift = peak_of(part_best, softcap, HAS_SOFTCAP) - new_peak
        part_total, part_weighted = rescale(part_total, part_weighted, part_shift)
        total, weighted = rescale(total, weighted, peak - new_peak)
        total += part_total
        weighted += part_weighted
        peak = new_peak
    log2_total = tl.log2(total)
    tl.store(best_ptr + offs_m, best, mask=row_ok)
    tl.store(argmax_ptr + offs_m, argmax.to(tl.int64), mask=row_ok)
    tl.store(logsumexp_ptr + offs_m, (peak + log2_total) * _LN2, mask=row_ok)
    tl.store(entropy_ptr + offs_m, (log2_total - weighted / total) * _LN2, mask=row_ok)
    if HAS_TARGETS:
        tl.store(rank_ptr + offs_m, rank, mask=row_ok)


def merge_splits(parts: tuple[Tensor, ...], merged: tuple[Tensor, ...], softcap: float, flags: dict) -> None:
    """Write the statistics of every row from the partial ones of its splits, always in the same order.

    Args:
        parts: best, argmax, rank, total, weighted, each ``[splits, R]``; fp32, int32, int32, fp32, fp32.
        merged: best, argmax, rank, logsumexp, entropy, each ``[R]``; fp32, int64, int64, fp32, fp32.
        softcap: Cap of the logits; not used unless ``flags`` has it.
        flags: ``HAS_TARGETS`` and ``HAS_SOFTCAP``; without targets neither rank is touched.
    """
    splits, n_rows = parts[0].shape
    _merge_kernel[(triton.cdiv(n_rows, MERGE_ROWS),)](
        *parts, *merged, n_rows, splits, softcap, **flags, BLOCK_M=MERGE_ROWS
    )
