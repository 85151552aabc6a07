"""Running sums of exponentials on a GPU, and their merge over the splits of a vocabulary.

A row is a peak, ``total``, the sum of ``2 ** (l - peak)``, and ``weighted``, the sum of
``(l - peak) * 2 ** (l - peak)``, over logits ``l`` in units of log 2. Then logsumexp is
``ln 2 * (peak + log2(total))`` and entropy ``ln 2 * (log2(total) - weighted / total)``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .launch import LensRows, stride_of

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
NO_ID = tl.constexpr(2**30)  # above any token
MERGE_ELEMENTS = 1024  # of a program: rows times splits
MERGE_WARPS = 4
_PARTS = ["parts_best_ptr", "parts_argmax_ptr", "parts_rank_ptr", "parts_total_ptr", "parts_weighted_ptr"]
_MERGED = ["targets_ptr", "t_ptr", "best_ptr", "argmax_ptr", "rank_ptr", "logsumexp_ptr", "entropy_ptr"]


class Parts(NamedTuple):
    """Statistics of every row over each split of the vocabulary, ``[splits, R]``, as kernels take them."""

    best: Tensor  # fp32, largest uncapped logit
    argmax: Tensor  # int32
    rank: Tensor  # int32; not written without targets
    total: Tensor  # fp32
    weighted: Tensor  # fp32


class Merged(NamedTuple):
    """Statistics of every row, ``[R]``, as the merging kernel takes them."""

    best: Tensor  # fp32, largest uncapped logit
    argmax: Tensor  # int64
    rank: Tensor  # int64; not written without targets
    logsumexp: Tensor  # fp32, nats
    entropy: Tensor  # fp32, nats


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


@triton.jit(do_not_specialize=["n_rows", "n_splits"], do_not_specialize_on_alignment=[*_PARTS, *_MERGED, "stride_t"])
def _merge_kernel(
    parts_best_ptr, parts_argmax_ptr, parts_rank_ptr, parts_total_ptr, parts_weighted_ptr,
    targets_ptr, t_ptr, best_ptr, argmax_ptr, rank_ptr, logsumexp_ptr, entropy_ptr,
    n_rows, n_splits, stride_t, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    splits = tl.arange(0, BLOCK_S)
    row_ok = offs_m < n_rows
    ok = (splits < n_splits)[:, None] & row_ok[None, :]
    part = splits.to(tl.int64)[:, None] * n_rows + offs_m[None, :]
    part_best = tl.load(parts_best_ptr + part, mask=ok, other=float("-inf"))
    part_argmax = tl.load(parts_argmax_ptr + part, mask=ok, other=0)
    part_total = tl.load(parts_total_ptr + part, mask=ok, other=0.0)
    part_weighted = tl.load(parts_weighted_ptr + part, mask=ok, other=0.0)
    best = tl.maximum(tl.max(part_best, 0), float("-inf"))
    argmax = tl.min(tl.where(part_best == best[None, :], part_argmax, NO_ID), 0)
    argmax = tl.where(argmax == NO_ID, 0, argmax)  # no logit is a number
    peak = peak_of(best, softcap, HAS_SOFTCAP)
    shift = tl.where(ok, peak_of(part_best, softcap, HAS_SOFTCAP) - peak[None, :], 0.0)
    part_total, part_weighted = rescale(part_total, part_weighted, shift)
    total = tl.where(row_ok, tl.sum(part_total, 0), 1.0)
    log2_total = tl.log2(total)
    tl.store(best_ptr + offs_m, best, mask=row_ok)
    tl.store(argmax_ptr + offs_m, argmax.to(tl.int64), mask=row_ok)
    tl.store(logsumexp_ptr + offs_m, (peak + log2_total) * _LN2, mask=row_ok)
    tl.store(entropy_ptr + offs_m, (log2_total - tl.sum(part_weighted, 0) / total) * _LN2, mask=row_ok)
    if HAS_TARGETS:
        rank = tl.sum(tl.load(parts_rank_ptr + part, mask=ok, other=0), 0)
        target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=row_ok, other=-1)
        # The target's own product may differ from its column of the main one, which decides: rank 0 is the argmax.
        is_top = argmax == target
        tl.store(t_ptr + offs_m, best, mask=row_ok & is_top)
        tl.store(rank_ptr + offs_m, tl.where(is_top, 0, tl.maximum(rank, 1)).to(tl.int64), mask=row_ok)


def merge_splits(parts: Parts, merged: Merged, rows: LensRows, softcap: float, flags: dict) -> None:
    """Write the statistics of every row from the partial ones of its splits, always in the same order.

    Args:
        parts: What is merged.
        merged: What is written.
        rows: Their targets and the targets' logits, which become the largest logit where the target has it.
        softcap: Cap of the logits; not used unless ``flags`` has it.
        flags: ``HAS_TARGETS`` and ``HAS_SOFTCAP``; without targets neither rank is touched.
    """
    splits, n_rows = parts.best.shape
    flags = merge_flags(splits, flags)
    _merge_kernel[(triton.cdiv(n_rows, flags["BLOCK_M"]),)](
        *parts, rows.targets, rows.target_z, *merged, n_rows, splits, stride_of(rows.targets), softcap, **flags
    )


def merge_flags(splits: int, flags: dict) -> dict:
    """What `merge_splits` compiles the kernel for: all splits at once, so that their loads wait for nothing."""
    block_s = triton.next_power_of_2(splits)
    return dict(BLOCK_S=block_s, BLOCK_M=max(8, MERGE_ELEMENTS // block_s), num_warps=MERGE_WARPS, **flags)
