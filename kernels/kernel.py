"""The fused lens by pointer loads: the kernel that runs everywhere, with the targets' logits and the merge of splits.

In reading order: what a launch is given; the running sums of a row; products and what a tile of them adds to a row;
the main kernel; the targets' own logits; the merge of the vocabulary's splits. One name means one thing throughout:

    x_hat    [padded R, width] normed states, contiguous, zeros in the padding; ``width`` is their stride, too
    w        [n_vocab, d_model] unembedding, any strides
    z        [BLOCK_M, BLOCK_V] logits before the softcap: rows by tokens ``first_id + offs_v``
    best     [BLOCK_M] largest z of a row so far, ``argmax`` its lowest token, ``rank`` the tokens that beat the target
    total    [BLOCK_M] sum of ``2 ** (l - peak)`` over the logits l so far, in units of log 2
    weighted [BLOCK_M] sum of ``(l - peak) * 2 ** (l - peak)``

Then logsumexp is ``ln 2 * (peak + log2(total))`` and entropy ``ln 2 * (log2(total) - weighted / total)``.

At small widths the instructions per logit decide the speed: the reductions have no branch, and compare once where once
is enough. Pointer loads (cp.async) feed the tensor cores without spills in every supported Triton, take any strides
and need no allocator for descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LensOptions, TileRange
from .launches import empty, launch
from .reference import LOWEST

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(LOWEST)
NO_ID = tl.constexpr(2**30)  # above any token
TARGET_ROWS, TARGET_WARPS = 64, 4  # the fewest rows a warp group multiplies at once
TARGET_STAGES = 6  # a program is over before latency is hidden by anything else
MERGE_ELEMENTS, MERGE_WARPS = 1024, 4  # elements of a program: rows times splits
# Arguments that differ from call to call: no kernel is compiled for a value of the first, an alignment of the second.
VARYING = ["n_rows", "n_vocab", "row_blocks", "first_tile", "n_tiles", "n_splits", "group", "zero"]
_STATS = ["best_ptr", "argmax_ptr", "rank_ptr", "total_ptr", "weighted_ptr"]
UNALIGNED = ["bias_ptr", "targets_ptr", "target_z_ptr", *_STATS, *(f"parts_{name}" for name in _STATS)]
UNALIGNED += ["logsumexp_ptr", "entropy_ptr", "stride_b", "stride_t"]


@dataclass(frozen=True)
class LensRows:
    """The rows of one chunk."""

    x_hat: Tensor  # [padded R, width]
    targets: Tensor | None  # [R] int64
    target_z: Tensor | None  # [R] fp32, the targets' logits before the softcap
    count: int  # R


class PartialStats(NamedTuple):
    """Statistics of every row over each split of the vocabulary, ``[n_splits, R]``, in the order of arguments."""

    best: Tensor  # fp32
    argmax: Tensor  # int32
    rank: Tensor  # int32; not written without targets
    total: Tensor  # fp32
    weighted: Tensor  # fp32

    @classmethod
    def empty(cls, n_splits: int, n_rows: int, device: torch.device) -> PartialStats:
        """Buffers to write."""
        best, total, weighted = empty((3, n_splits, n_rows), torch.float32, device).unbind()
        argmax, rank = empty((2, n_splits, n_rows), torch.int32, device).unbind()
        return cls(best, argmax, rank, total, weighted)


class RowStats(NamedTuple):
    """Statistics of every row, ``[R]``, in the order of arguments."""

    best: Tensor  # fp32
    argmax: Tensor  # int64
    rank: Tensor  # int64; not written without targets
    logsumexp: Tensor  # fp32, nats
    entropy: Tensor  # fp32, nats

    @classmethod
    def empty(cls, n_rows: int, device: torch.device) -> RowStats:
        """Buffers to write."""
        dtypes = (torch.float32, torch.int64, torch.int64, torch.float32, torch.float32)
        return cls(*(torch.empty(n_rows, dtype=dtype, device=device) for dtype in dtypes))


def stride_of(vector: Tensor | None) -> int:
    """Stride of a vector that may be absent."""
    return 0 if vector is None else vector.stride(0)


@triton.jit
def log2_logits(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits in units of log 2, capped by ``tanh(y) = 1 - 2 / (exp(2 y) + 1)``."""
    if HAS_SOFTCAP:
        cap = softcap * _LOG2E
        return cap - 2.0 * cap / (tl.exp2(z * (2.0 * _LOG2E / softcap)) + 1.0)
    return z * _LOG2E


@triton.jit
def peak_of(best, softcap, HAS_SOFTCAP: tl.constexpr):
    """What exponents are measured from: the largest logit, or 0 before there is one."""
    return tl.where(best == float("-inf"), 0.0, log2_logits(best, softcap, HAS_SOFTCAP))


@triton.jit
def rescale(total, weighted, shift):
    """Move both sums to a peak that lies ``-shift`` higher; sums that are still 0 may come with any shift."""
    shift = tl.minimum(shift, 0.0)
    factor = tl.exp2(shift)
    return total * factor, (weighted + shift * total) * factor


@triton.jit
def add_product(
    acc, x_ptrs, w_ptrs, d_model, stride_wd,
    SWAPPED: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus a product over the whole width, in one order over K for the targets and for the vocabulary.

    ``acc`` is [rows, tokens], ``x_ptrs`` [rows, BLOCK_K], ``w_ptrs`` [BLOCK_K, tokens]; all transposed if ``SWAPPED``.
    """
    offs_k = tl.arange(0, BLOCK_K)
    # Known to run at least once, the loop needs only one set of zeroed accumulators.
    tl.assume(d_model > 0)
    for k in range(0, d_model, BLOCK_K):
        x = tl.load(x_ptrs + k)  # zeros past d_model and past the last row: nothing to mask
        mask_k = offs_k < d_model - k
        mask = mask_k[None, :] if SWAPPED else mask_k[:, None]
        w = tl.load(w_ptrs + tl.cast(k, tl.int64) * stride_wd, mask=mask, other=0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _add_best(best, argmax, z, offs_v, first_id):
    """The largest logit of each row and its lowest token, with those of ``z``."""
    tile_best = tl.max(z, 1)  # [BLOCK_M]
    tile_argmax = tl.min(tl.where(z == tile_best[:, None], offs_v, NO_ID), 1) + first_id
    return tl.maximum(best, tile_best), tl.where(tile_best > best, tile_argmax, argmax)


@triton.jit
def _next_up(z):
    """The float above ``z``: ``a >= _next_up(z)`` is ``a > z``, also at infinities and either zero."""
    bits = z.to(tl.int32, bitcast=True)
    return tl.where(z == 0, 1, tl.where(z > 0, bits + 1, bits - 1)).to(tl.float32, bitcast=True)


@triton.jit
def _count_better(z, offs_v, target_col, target_z, SAME_BITS: tl.constexpr):
    """Tokens of each row of ``z`` that beat its target, whose column ``target_col`` may lie outside.

    An equal logit beats the target from a lower id only: left of the target's column the bar is ``target_z``, from
    there on the float above it. The column itself may differ from ``target_z`` by rounding unless ``SAME_BITS``; it
    never counts.
    """
    better = z >= tl.where(offs_v < target_col[:, None], target_z[:, None], _next_up(target_z)[:, None])
    if SAME_BITS:
        counted = tl.where(better, 1.0, 0.0)
    else:
        # Two selects, not one conjunction: it needs fewer registers at a time and does not spill.
        counted = tl.where(better, tl.where(offs_v != target_col[:, None], 1.0, 0.0), 0.0)
    return tl.sum(counted, 1)  # exact: a tile has far fewer than 2**24 columns


@triton.jit
def _add_exponentials(
    total, weighted, old_best, best, z, mask_v, softcap,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, HAS_NEG_INF: tl.constexpr,
):  # fmt: skip
    """The running sums, measured from ``old_best``, with those of ``z``, measured from ``best``."""
    logits = log2_logits(z, softcap, HAS_SOFTCAP)  # [BLOCK_M, BLOCK_V]
    if HAS_SOFTCAP and MASKED:
        logits = tl.where(mask_v, logits, float("-inf"))
    peak = peak_of(best, softcap, HAS_SOFTCAP)
    total, weighted = rescale(total, weighted, peak_of(old_best, softcap, HAS_SOFTCAP) - peak)
    shifted = logits - peak[:, None]
    p = tl.exp2(shifted)
    if HAS_NEG_INF:
        # A logit of -inf has to add 0 to the entropy: keep it finite, 0 * -inf is NaN.
        shifted = tl.maximum(shifted, _LOWEST)
    return total + tl.sum(p, 1), weighted + tl.sum(p * shifted, 1)


@triton.jit
def add_tile(
    best, argmax, rank, total, weighted, z, offs_v, first_id, n_vocab, target, target_z, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, HAS_NEG_INF: tl.constexpr,
    SAME_BITS: tl.constexpr,
):  # fmt: skip
    """The statistics of rows with those of a tile ``z``.

    ``MASKED`` leaves out columns past the vocabulary; ``HAS_NEG_INF`` says that a logit may be -inf. ``target`` and
    ``target_z``, [BLOCK_M], are read with ``HAS_TARGETS``.
    """
    mask_v = (offs_v < n_vocab - first_id)[None, :]
    if MASKED:
        z = tl.where(mask_v, z, float("-inf"))
    old_best = best
    best, argmax = _add_best(best, argmax, z, offs_v[None, :], first_id)
    if HAS_TARGETS:
        rank += _count_better(z, offs_v[None, :], target - first_id, target_z, SAME_BITS).to(tl.int32)
    total, weighted = _add_exponentials(
        total, weighted, old_best, best, z, mask_v, softcap, HAS_SOFTCAP, MASKED, HAS_NEG_INF
    )
    return best, argmax, rank, total, weighted


@triton.jit
def block_and_split(program, row_blocks, n_splits, group):
    """The row block and the split of a program.

    Programs start in the order of their number. A group of row blocks goes through all splits before the next group
    begins, and within a group the row blocks of one split are neighbours: the states of few row blocks stay in L2 while
    all of them read the same tiles of the unembedding at about the same time. The last group may be smaller.
    """
    first = program // (group * n_splits) * group
    size = tl.minimum(group, row_blocks - first)
    within = program - first * n_splits
    return first + within % size, within // size


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _lens_kernel(
    x_ptr, w_ptr, bias_ptr, targets_ptr, target_z_ptr,  # x_hat, w, [n_vocab], [R] int64, [R] fp32
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,  # [n_splits, R]
    n_rows, n_vocab, d_model, row_blocks, first_tile, n_tiles, n_splits, group,
    width, stride_wv, stride_wd, stride_b, stride_t, scale, softcap,
    HAS_TARGETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, SWAPPED: tl.constexpr, SAME_BITS: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: one row block over the tiles of one split."""
    block, split = block_and_split(tl.program_id(0), row_blocks, n_splits, group)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    mask_m = offs_m < n_rows
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    if SWAPPED:
        x_ptrs = tl.trans(x_ptrs)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M], tl.int32)
    rank = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first_tile + split * n_tiles // n_splits, first_tile + (split + 1) * n_tiles // n_splits):
        first_id = tile * BLOCK_V
        token = (first_id + offs_v).to(tl.int64)  # [BLOCK_V]
        if MASKED:
            # Columns past the end repeat the last one and are left out below; a mask here costs spills.
            token = tl.minimum(token, n_vocab - 1)
        if SWAPPED:
            w_ptrs = w_ptr + token[:, None] * stride_wv + offs_k.to(tl.int64)[None, :] * stride_wd
            z = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
        else:
            w_ptrs = w_ptr + token[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
            z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + token * stride_b).to(tl.float32)
            z += bias[:, None] if SWAPPED else bias[None, :]
        z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, SWAPPED, INTERPRETED, PRECISION, BLOCK_K)
        if SWAPPED:
            z = tl.trans(z)  # [BLOCK_M, BLOCK_V]
        if HAS_SCALE:
            z *= scale
        target, target_z = offs_m, total  # read with targets only
        if HAS_TARGETS:
            # Loaded again for every tile: registers that stay occupied over the K loop would spill.
            target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=mask_m, other=-1).to(tl.int32)
            target_z = tl.load(target_z_ptr + offs_m, mask=mask_m, other=0.0)
        best, argmax, rank, total, weighted = add_tile(
            best, argmax, rank, total, weighted, z, offs_v, first_id, n_vocab, target, target_z, softcap,
            HAS_TARGETS, HAS_SOFTCAP, MASKED, HAS_BIAS or MASKED, SAME_BITS,
        )  # fmt: skip
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=mask_m)
    tl.store(argmax_ptr + out, argmax, mask=mask_m)
    tl.store(total_ptr + out, total, mask=mask_m)
    tl.store(weighted_ptr + out, weighted, mask=mask_m)
    if HAS_TARGETS:
        tl.store(rank_ptr + out, rank, mask=mask_m)


def launch_tiles(rows: LensRows, parts: PartialStats, options: LensOptions, tiles: TileRange) -> None:
    """Write the statistics of every split of ``tiles`` into ``parts``."""
    head, row_blocks = options.head, triton.cdiv(rows.count, options.config.block_m)
    args = (
        rows.x_hat, head.weight, head.bias, rows.targets, rows.target_z, *parts,
        rows.count, *head.weight.shape, row_blocks, tiles.first, tiles.count, tiles.splits, tiles.group,
        rows.x_hat.shape[1], *head.weight.stride(), stride_of(head.bias), stride_of(rows.targets),
        options.scale, options.softcap,
    )  # fmt: skip
    launch(_lens_kernel, row_blocks * tiles.splits, args, tile_flags(options, tiles))


def tile_flags(options: LensOptions, tiles: TileRange) -> dict:
    """What `launch_tiles` compiles the kernel for."""
    config = options.config
    flags = options.product_flags() | options.logit_flags() | options.row_flags()
    flags |= dict(MASKED=tiles.masked, SWAPPED=config.kind == "few_rows", SAME_BITS=options.same_bits)
    launch = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return dict(BLOCK_M=config.block_m, BLOCK_V=tiles.width, **flags, **launch)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _target_kernel(
    x_ptr, w_ptr, bias_ptr, targets_ptr, target_z_ptr,  # x_hat, w, [n_vocab], [R] int64, [R] fp32
    n_rows, n_vocab, d_model, width, stride_wv, stride_wd, stride_b, stride_t, scale,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The diagonal of a block's rows times their targets' weights: the same product as the main one's, bit for bit."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_rows
    given = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=mask_m, other=0)
    target = tl.minimum(tl.maximum(given, 0), n_vocab - 1)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    w_ptrs = w_ptr + target[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd  # [BLOCK_K, BLOCK_M]
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + target * stride_b, mask=mask_m, other=0.0).to(tl.float32)[None, :]
    acc = add_product(acc, x_ptrs, w_ptrs, d_model, stride_wd, False, INTERPRETED, PRECISION, BLOCK_K)
    cols = tl.arange(0, BLOCK_M)
    z = tl.sum(tl.where(cols[:, None] == cols[None, :], acc, 0.0), 1)  # [BLOCK_M]
    if HAS_SCALE:
        z *= scale
    tl.store(target_z_ptr + offs_m, tl.where(given == target, z, float("nan")), mask=mask_m)


def launch_targets(rows: LensRows, options: LensOptions) -> None:
    """Write the targets' logits into ``rows.target_z``, NaN for ids outside the vocabulary.

    ``rows.x_hat`` has whole blocks of ``TARGET_ROWS``.
    """
    head = options.head
    args = (
        rows.x_hat, head.weight, head.bias, rows.targets, rows.target_z,
        rows.count, *head.weight.shape, rows.x_hat.shape[1], *head.weight.stride(),
        stride_of(head.bias), stride_of(rows.targets), options.scale,
    )  # fmt: skip
    launch(_target_kernel, triton.cdiv(rows.count, TARGET_ROWS), args, target_flags(options))


def target_flags(options: LensOptions) -> dict:
    """What `launch_targets` compiles the kernel for."""
    launch = dict(num_warps=TARGET_WARPS, num_stages=TARGET_STAGES)
    return dict(BLOCK_M=TARGET_ROWS, **options.product_flags(), **options.logit_flags(), **launch)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _merge_kernel(
    parts_best_ptr, parts_argmax_ptr, parts_rank_ptr, parts_total_ptr, parts_weighted_ptr,  # [n_splits, R]
    targets_ptr, target_z_ptr, best_ptr, argmax_ptr, rank_ptr, logsumexp_ptr, entropy_ptr,  # [R]
    n_rows, n_splits, stride_t, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """All splits of a block of rows at once, so that their loads wait for nothing."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_s = tl.arange(0, BLOCK_S)
    mask_m = offs_m < n_rows
    mask = (offs_s < n_splits)[:, None] & mask_m[None, :]
    offs = offs_s.to(tl.int64)[:, None] * n_rows + offs_m[None, :]  # [BLOCK_S, BLOCK_M]
    part_best = tl.load(parts_best_ptr + offs, mask=mask, other=float("-inf"))
    part_argmax = tl.load(parts_argmax_ptr + offs, mask=mask, other=0)
    part_total = tl.load(parts_total_ptr + offs, mask=mask, other=0.0)
    part_weighted = tl.load(parts_weighted_ptr + offs, mask=mask, other=0.0)
    best = tl.maximum(tl.max(part_best, 0), float("-inf"))
    argmax = tl.min(tl.where(part_best == best[None, :], part_argmax, NO_ID), 0)
    argmax = tl.where(argmax == NO_ID, 0, argmax)  # no logit is a number
    peak = peak_of(best, softcap, HAS_SOFTCAP)
    shift = tl.where(mask, peak_of(part_best, softcap, HAS_SOFTCAP) - peak[None, :], 0.0)
    part_total, part_weighted = rescale(part_total, part_weighted, shift)
    total = tl.where(mask_m, tl.sum(part_total, 0), 1.0)
    log2_total = tl.log2(total)
    tl.store(best_ptr + offs_m, best, mask=mask_m)
    tl.store(argmax_ptr + offs_m, argmax.to(tl.int64), mask=mask_m)
    tl.store(logsumexp_ptr + offs_m, (peak + log2_total) * _LN2, mask=mask_m)
    tl.store(entropy_ptr + offs_m, (log2_total - tl.sum(part_weighted, 0) / total) * _LN2, mask=mask_m)
    if HAS_TARGETS:
        rank = tl.sum(tl.load(parts_rank_ptr + offs, mask=mask, other=0), 0)
        target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=mask_m, other=-1)
        # The target's own product may differ from its column of the main one, which decides: rank 0 is the argmax.
        is_top = argmax == target
        tl.store(target_z_ptr + offs_m, best, mask=mask_m & is_top)
        tl.store(rank_ptr + offs_m, tl.where(is_top, 0, tl.maximum(rank, 1)).to(tl.int64), mask=mask_m)


def merge_splits(parts: PartialStats, merged: RowStats, rows: LensRows, options: LensOptions) -> None:
    """Write the statistics of ``rows`` into ``merged`` from those of all splits, always added in one order.

    ``rows.target_z`` becomes the largest logit where the target has it.
    """
    n_splits, n_rows = parts.best.shape
    flags = merge_flags(n_splits, options)
    numbers = (n_rows, n_splits, stride_of(rows.targets), options.softcap)
    args = (*parts, rows.targets, rows.target_z, *merged, *numbers)
    launch(_merge_kernel, triton.cdiv(n_rows, flags["BLOCK_M"]), args, flags)


def merge_flags(n_splits: int, options: LensOptions) -> dict:
    """What `merge_splits` compiles the kernel for."""
    block_s = triton.next_power_of_2(n_splits)
    block_m = max(8, MERGE_ELEMENTS // block_s)
    return dict(BLOCK_S=block_s, BLOCK_M=block_m, num_warps=MERGE_WARPS, **options.row_flags())
