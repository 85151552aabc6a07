"""The kernel of the fused lens that runs everywhere: products and running statistics over parts of the vocabulary.

In reading order: the options and rows of a launch, the running sums of a row, what a tile of logits adds to them, the
targets' own logits, the main kernel with its launcher.

A row's running sums are a peak, ``total``, the sum of ``2 ** (l - peak)``, and ``weighted``, the sum of
``(l - peak) * 2 ** (l - peak)``, over logits ``l`` in units of log 2. Then logsumexp is
``ln 2 * (peak + log2(total))`` and entropy ``ln 2 * (log2(total) - weighted / total)``.

The instructions that every logit costs decide the speed at small widths, so the reductions hold no branch and compare
once where once is enough. Tiles are loaded by pointers: cp.async feeds the tensor cores without spills in every Triton
supported, for any strides, and needs no allocator for descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LensConfig, TileRange, block_and_split

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
NO_ID = tl.constexpr(2**30)  # above any token
MERGE_ELEMENTS = 1024  # of a program: rows times splits
MERGE_WARPS = 4
_PARTS = ["parts_best_ptr", "parts_argmax_ptr", "parts_rank_ptr", "parts_total_ptr", "parts_weighted_ptr"]
_MERGED = ["targets_ptr", "t_ptr", "best_ptr", "argmax_ptr", "rank_ptr", "logsumexp_ptr", "entropy_ptr"]
_LOWEST = tl.constexpr(-3.0e38)
TARGET_ROWS = 64  # the fewest a warp group multiplies at once
TARGET_WARPS = 4
TARGET_STAGES = 6  # a program is over before latency is hidden by anything else
UNALIGNED = ["bias_ptr", "targets_ptr", "t_ptr", "best_ptr", "argmax_ptr", "rank_ptr", "total_ptr", "weighted_ptr"]


@dataclass(frozen=True)
class LensOptions:
    """The operands and options of one call apart from its rows; see ``lens_triton.fused_lens_triton``."""

    unembedding: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    config: LensConfig

    @property
    def cap(self) -> float:
        """The softcap as a kernel's argument, which does not read it without one."""
        return float(self.softcap or 0.0)

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter; a compile-time argument where the two differ."""
        return triton.knobs.runtime.interpret

    @property
    def is_plain(self) -> bool:
        """Whether a logit is nothing but its product."""
        return self.bias is None and self.softcap is None and self.logit_scale == 1.0

    def by_tma(self, targets: bool, same_bits: bool) -> bool:
        """Whether whole tiles go through that of ``kernel_tma``, which takes plain logits, rows that do not overlap
        and, with ``targets``, their logits with the bits of the main product.
        """
        can_read = self.is_plain and self.unembedding.stride(0) >= self.unembedding.shape[1]
        return self.config.kind == "tma" and can_read and (same_bits or not targets)

    def product_flags(self) -> dict:
        """Compile-time arguments of the kernels that form logits."""
        return dict(
            HAS_BIAS=self.bias is not None,
            HAS_SCALE=self.logit_scale != 1.0,
            # The interpreter multiplies bfloat16 wrongly; products of fp32 copies are the same numbers.
            UPCAST=self.interpreted,
            # "ieee" has no tensor core instruction; three tf32 products keep fp32's accuracy.
            PRECISION="tf32x3" if self.unembedding.dtype == torch.float32 else "tf32",
            BLOCK_K=self.config.block_k,
        )

    def row_flags(self, targets: bool) -> dict:
        """Compile-time arguments of the kernels that reduce logits."""
        return dict(HAS_TARGETS=targets, HAS_SOFTCAP=self.softcap is not None)


@dataclass(frozen=True)
class LensRows:
    """The rows of one chunk."""

    x_hat: Tensor  # [padded R, padded d_model], zeros in the padding
    targets: Tensor | None  # [R] int64
    target_z: Tensor | None  # [R] fp32, the targets' uncapped logits
    count: int  # R


def stride_of(vector: Tensor | None) -> int:
    """Stride of a vector that may be absent."""
    return 0 if vector is None else vector.stride(0)


class PartialStats(NamedTuple):
    """Statistics of every row over each split of the vocabulary, ``[splits, R]``, as kernels take them."""

    best: Tensor  # fp32, largest uncapped logit
    argmax: Tensor  # int32
    rank: Tensor  # int32; not written without targets
    total: Tensor  # fp32
    weighted: Tensor  # fp32


class RowStats(NamedTuple):
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


def merge_splits(parts: PartialStats, merged: RowStats, rows: LensRows, softcap: float, flags: dict) -> None:
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


@triton.jit
def add_product(
    acc, x_ptrs, w_ptrs, d_model, stride_wd,
    SWAPPED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products; one order over K for the targets and for the whole vocabulary.

    ``x_ptrs`` is ``[rows, BLOCK_K]``, ``w_ptrs`` ``[BLOCK_K, tokens]``, ``acc`` ``[rows, tokens]``, or all
    three transposed with ``SWAPPED``.
    """
    offs_k = tl.arange(0, BLOCK_K)
    # Known to run at least once, the loop needs only one set of zeroed accumulators.
    tl.assume(d_model > 0)
    for k in range(0, d_model, BLOCK_K):
        x = tl.load(x_ptrs + k)  # zeros past d_model and past the last row: nothing to mask
        k_ok = offs_k < d_model - k
        mask = k_ok[None, :] if SWAPPED else k_ok[:, None]
        w = tl.load(w_ptrs + tl.cast(k, tl.int64) * stride_wd, mask=mask, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _next_up(t):
    """The float above ``t``: ``z >= _next_up(t)`` is ``z > t``, also at infinities and either zero."""
    bits = t.to(tl.int32, bitcast=True)
    return tl.where(t == 0, 1, tl.where(t > 0, bits + 1, bits - 1)).to(tl.float32, bitcast=True)


@triton.jit
def _add_best(best, argmax, z, ids, first_id):
    """The largest logit of each row and its lowest id, with those of ``z``, whose first column is ``first_id``."""
    tile_best = tl.max(z, 1)
    tile_argmax = tl.min(tl.where(z == tile_best[:, None], ids, NO_ID), 1) + first_id
    return tl.maximum(best, tile_best), tl.where(tile_best > best, tile_argmax, argmax)


@triton.jit
def _count_better(z, ids, own, t, SAME_BITS: tl.constexpr):
    """Tokens of each row of ``z`` that beat its target, which has the column ``own`` and the logit ``t``.

    An equal logit beats the target from a lower id only: ``t`` is the bar before the target's column and the
    float above it from there on. The target's own column may differ from ``t`` by rounding unless ``SAME_BITS``;
    it never counts.
    """
    better = z >= tl.where(ids < own[:, None], t[:, None], _next_up(t)[:, None])
    if SAME_BITS:
        counted = tl.where(better, 1.0, 0.0)
    else:
        # Two selects, not one conjunction: it needs fewer registers at a time and does not spill.
        counted = tl.where(better, tl.where(ids != own[:, None], 1.0, 0.0), 0.0)
    return tl.sum(counted, 1)  # exact: a tile has far fewer than 2**24 columns


@triton.jit
def _add_exponentials(
    total, weighted, old_best, best, z, col_ok, softcap,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MAY_LACK: tl.constexpr,
):  # fmt: skip
    """The running sums, measured from ``old_best``, with those of ``z``, then measured from ``best``.

    ``col_ok`` is read with ``MASKED`` only; ``MAY_LACK`` says that a logit may be -inf.
    """
    logits = log2_logits(z, softcap, HAS_SOFTCAP)
    if HAS_SOFTCAP and MASKED:
        logits = tl.where(col_ok, logits, float("-inf"))
    peak = peak_of(best, softcap, HAS_SOFTCAP)
    total, weighted = rescale(total, weighted, peak_of(old_best, softcap, HAS_SOFTCAP) - peak)
    shifted = logits - peak[:, None]
    p = tl.exp2(shifted)
    if MAY_LACK:
        # A logit of -inf has to add 0 to the entropy: keep it finite, 0 * -inf is NaN.
        shifted = tl.maximum(shifted, _LOWEST)
    return total + tl.sum(p, 1), weighted + tl.sum(p * shifted, 1)


@triton.jit
def add_tile(
    best, argmax, rank, total, weighted, z, ids, first_id, n_vocab, target, t, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MAY_LACK: tl.constexpr,
    SAME_BITS: tl.constexpr,
):  # fmt: skip
    """The statistics of rows with those of a tile ``z`` ``[rows, tokens]``, whose columns are ``first_id + ids``.

    With ``MASKED`` columns past the vocabulary are struck out; ``MAY_LACK`` says that a logit may be -inf. ``target``
    and ``t``, its logit, are read with ``HAS_TARGETS``.
    """
    col_ok = (ids < n_vocab - first_id)[None, :]
    if MASKED:
        z = tl.where(col_ok, z, float("-inf"))
    old_best = best
    best, argmax = _add_best(best, argmax, z, ids[None, :], first_id)
    if HAS_TARGETS:
        rank += _count_better(z, ids[None, :], target - first_id, t, SAME_BITS).to(tl.int32)
    total, weighted = _add_exponentials(
        total, weighted, old_best, best, z, col_ok, softcap, HAS_SOFTCAP, MASKED, MAY_LACK
    )
    return best, argmax, rank, total, weighted


@triton.jit(
    do_not_specialize=["n_rows", "n_vocab"],
    do_not_specialize_on_alignment=["bias_ptr", "targets_ptr", "t_ptr", "stride_b", "stride_t"],
)
def _target_kernel(
    x_ptr, w_ptr, bias_ptr, targets_ptr, t_ptr,
    n_rows, n_vocab, d_model, width, stride_wv, stride_wd, stride_b, stride_t, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    row_ok = offs_m < n_rows
    target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=row_ok, other=0)
    target = tl.minimum(tl.maximum(target, 0), n_vocab - 1)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    w_ptrs = w_ptr + target[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
    acc = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + target * stride_b, mask=row_ok, other=0.0).to(tl.float32)[None, :]
    acc = add_product(acc, x_ptrs, w_ptrs, d_model, stride_wd, False, UPCAST, PRECISION, BLOCK_K)
    ids = tl.arange(0, BLOCK_M)
    z = tl.sum(tl.where(ids[:, None] == ids[None, :], acc, 0.0), 1)
    if HAS_SCALE:
        z *= logit_scale
    tl.store(t_ptr + offs_m, z, mask=row_ok)


def launch_targets(rows: LensRows, options: LensOptions) -> None:
    """Write the targets' uncapped logits into ``rows.target_z``; ``rows.x_hat`` has whole blocks of ``TARGET_ROWS``."""
    weight = options.unembedding
    _target_kernel[(triton.cdiv(rows.count, TARGET_ROWS),)](
        rows.x_hat, weight, options.bias, rows.targets, rows.target_z,
        rows.count, *weight.shape, rows.x_hat.shape[1], *weight.stride(),
        stride_of(options.bias), stride_of(rows.targets), options.logit_scale, **target_flags(options),
    )  # fmt: skip


def target_flags(options: LensOptions) -> dict:
    """What `launch_targets` compiles the kernel for."""
    launch = dict(num_warps=TARGET_WARPS, num_stages=TARGET_STAGES)
    return dict(BLOCK_M=TARGET_ROWS, **options.product_flags(), **launch)


@triton.jit(
    do_not_specialize=["n_rows", "n_vocab", "row_blocks", "first_tile", "n_tiles", "n_splits", "group"],
    do_not_specialize_on_alignment=[*UNALIGNED, "stride_b", "stride_t"],
)
def _lens_kernel(
    x_ptr, w_ptr, bias_ptr, targets_ptr, t_ptr,
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,
    n_rows, n_vocab, d_model, row_blocks, first_tile, n_tiles, n_splits, group,
    width, stride_wv, stride_wd, stride_b, stride_t, logit_scale, softcap,
    HAS_TARGETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, SWAPPED: tl.constexpr, SAME_BITS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, split = block_and_split(tl.program_id(0), row_blocks, n_splits, group)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.arange(0, BLOCK_V)
    row_ok = offs_m < n_rows
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    if SWAPPED:
        x_ptrs = tl.trans(x_ptrs)
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M], tl.int32)
    rank = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first_tile + split * n_tiles // n_splits, first_tile + (split + 1) * n_tiles // n_splits):
        first_id = tile * BLOCK_V
        rows_w = (first_id + ids).to(tl.int64)
        if MASKED:
            # Columns past the end repeat the last one and are struck out below; a mask here costs spills.
            rows_w = tl.minimum(rows_w, n_vocab - 1)
        if SWAPPED:
            w_ptrs = w_ptr + rows_w[:, None] * stride_wv + offs_k.to(tl.int64)[None, :] * stride_wd
            z = tl.zeros([BLOCK_V, BLOCK_M], tl.float32)
        else:
            w_ptrs = w_ptr + rows_w[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
            z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + rows_w * stride_b).to(tl.float32)
            z += bias[:, None] if SWAPPED else bias[None, :]
        z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, SWAPPED, UPCAST, PRECISION, BLOCK_K)
        if SWAPPED:
            z = tl.trans(z)
        if HAS_SCALE:
            z *= logit_scale
        target, t = offs_m, total  # read with targets only
        if HAS_TARGETS:
            # Loaded again for every tile: registers that stay occupied over the K loop would spill.
            target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=row_ok, other=-1).to(tl.int32)
            t = tl.load(t_ptr + offs_m, mask=row_ok, other=0.0)
        best, argmax, rank, total, weighted = add_tile(
            best, argmax, rank, total, weighted, z, ids, first_id, n_vocab, target, t, softcap,
            HAS_TARGETS, HAS_SOFTCAP, MASKED, HAS_BIAS or MASKED, SAME_BITS,
        )  # fmt: skip
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=row_ok)
    tl.store(argmax_ptr + out, argmax, mask=row_ok)
    tl.store(total_ptr + out, total, mask=row_ok)
    tl.store(weighted_ptr + out, weighted, mask=row_ok)
    if HAS_TARGETS:
        tl.store(rank_ptr + out, rank, mask=row_ok)


def launch_tiles(rows: LensRows, parts: PartialStats, options: LensOptions, tiles: TileRange, same_bits: bool) -> None:
    """Write the statistics of every split of ``tiles`` into ``parts``."""
    weight, row_blocks = options.unembedding, triton.cdiv(rows.count, options.config.block_m)
    _lens_kernel[(row_blocks * tiles.splits,)](
        rows.x_hat, weight, options.bias, rows.targets, rows.target_z, *parts,
        rows.count, *weight.shape, row_blocks, tiles.first, tiles.count, tiles.splits, tiles.group,
        rows.x_hat.shape[1], *weight.stride(), stride_of(options.bias), stride_of(rows.targets),
        options.logit_scale, options.cap, **tile_flags(options, tiles, rows.targets is not None, same_bits),
    )  # fmt: skip


def tile_flags(options: LensOptions, tiles: TileRange, targets: bool, same_bits: bool) -> dict:
    """What `launch_tiles` compiles the kernel for."""
    config = options.config
    return dict(
        MASKED=tiles.masked,
        SWAPPED=config.kind == "few_rows",
        SAME_BITS=same_bits,
        BLOCK_M=config.block_m,
        BLOCK_V=tiles.width,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options.row_flags(targets),
        **options.product_flags(),
    )
