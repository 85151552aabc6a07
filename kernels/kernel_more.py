"""The product of the lens with what only some calls ask for: several targets a row, and maxima from which lists come.

As `kernel`, whose names, tiles and bits of logits it has, but for three things. Any number of targets is ranked from
one product, one after another, with counts in memory. The largest logit of every ``GROUP`` neighbouring tokens is
stored, from which `lists` finds the likeliest tokens. And the statistics of the lens may be left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton
import triton.language as tl
from torch import Tensor

from .config import LensOptions, TileRange
from .kernel import (
    UNALIGNED,
    VARYING,
    LensRows,
    PartialStats,
    _count_better,
    add_product,
    add_tile,
    block_and_split,
    stride_of,
)
from .kernel_tma import TIED, _above_or_equal

GROUP = 8  # tokens that share a maximum: fewer cost memory, more cost products for the lists
_GROUP = tl.constexpr(GROUP)
_NOT_COMPILED_FOR = [*VARYING, "n_targets"]
_UNALIGNED = [*UNALIGNED, "ranks_ptr", "maxima_ptr"]


@triton.jit
def _larger(a, b):
    """The larger one, NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _group_maxima(z, INTERPRETED: tl.constexpr):
    """The largest of every `GROUP` neighbours, [BLOCK_M, BLOCK_V / GROUP]; of one with NaN it, or infinity."""
    if INTERPRETED:
        z = tl.where(z == z, z, float("inf"))  # the interpreter's maxima leave NaN out
    groups = tl.reshape(z, [z.shape[0], z.shape[1] // _GROUP, _GROUP])
    return tl.max(groups, 2) if INTERPRETED else tl.reduce(groups, 2, _larger)


@triton.jit
def _count_alike(z, target_col, target_z, BLOCK_V: tl.constexpr, INTERPRETED: tl.constexpr):
    """Tokens of each row of ``z`` that beat its target, plus `TIED` where others of its own tile equal it.

    Three instructions a logit, but only where a target's logit has the bits of its column.
    """
    # Logits above the target's count 1 each, equal ones 2**-10 each: exact, a tile has at most 256 columns.
    both = tl.sum(_above_or_equal(z - target_z[:, None], INTERPRETED), 1)
    above = both.to(tl.int32)
    equal = ((both - above.to(tl.float32)) * 1024.0).to(tl.int32)
    # An equal logit beats the target from a lower id only. In its own tile it equals itself.
    is_own = (target_col >= 0) & (target_col < BLOCK_V)
    return above + tl.where(target_col >= BLOCK_V, equal, tl.where(is_own & (equal > 1), TIED, 0))


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _more_kernel(
    x_ptr, w_ptr, bias_ptr, targets_ptr, target_z_ptr,  # x_hat, w, [n_vocab], [T, R] int64, [T, R] fp32
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,  # [n_splits, R], ``rank`` not written
    ranks_ptr, maxima_ptr,  # [T, R] int32, [R, stride_g] fp32
    n_rows, n_targets, n_vocab, d_model, row_blocks, first_tile, n_tiles, n_splits, group,
    width, stride_wv, stride_wd, stride_b, stride_g, scale, softcap,
    HAS_TARGETS: tl.constexpr, HAS_STATS: tl.constexpr, HAS_MAXIMA: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr, SAME_BITS: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: one row block over the tiles of one split. `SAME_BITS` needs whole tiles."""
    block, split = block_and_split(tl.program_id(0), row_blocks, n_splits, group)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    mask_m = offs_m < n_rows
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(first_tile + split * n_tiles // n_splits, first_tile + (split + 1) * n_tiles // n_splits):
        first_id = tile * BLOCK_V
        token = (first_id + offs_v).to(tl.int64)  # [BLOCK_V]
        if MASKED:
            # Columns past the end repeat the last one, which leaves the maximum of its group as it is.
            token = tl.minimum(token, n_vocab - 1)
        w_ptrs = w_ptr + token[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + token * stride_b).to(tl.float32)[None, :]
        z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, False, INTERPRETED, PRECISION, BLOCK_K)
        if HAS_SCALE:
            z *= scale
        if HAS_MAXIMA:
            groups = first_id // _GROUP + tl.arange(0, BLOCK_V // _GROUP)
            maxima_ptrs = maxima_ptr + offs_m.to(tl.int64)[:, None] * stride_g + groups[None, :]
            tl.store(maxima_ptrs, _group_maxima(z, INTERPRETED), mask=mask_m[:, None])
        if HAS_TARGETS:
            # Not unrolled: one target at a time has registers.
            for t in tl.range(0, n_targets, num_stages=1, loop_unroll_factor=1):
                own = t * n_rows + offs_m
                target = tl.load(targets_ptr + own, mask=mask_m, other=-1).to(tl.int32) - first_id
                target_z = tl.load(target_z_ptr + own, mask=mask_m, other=0.0)
                if SAME_BITS:
                    count = _count_alike(z, target, target_z, BLOCK_V, INTERPRETED)
                else:
                    counted = z
                    if MASKED:
                        counted = tl.where((offs_v < n_vocab - first_id)[None, :], z, float("-inf"))
                    count = _count_better(counted, offs_v[None, :], target, target_z, False).to(tl.int32)
                # Added up in memory: registers that stay occupied over the K loop would spill.
                tl.atomic_add(ranks_ptr + own, count, mask=mask_m, sem="relaxed")
        if HAS_STATS:
            best, argmax, _, total, weighted = add_tile(
                best, argmax, argmax, total, weighted, z, offs_v, first_id, n_vocab, argmax, best, softcap,
                False, HAS_SOFTCAP, MASKED, HAS_BIAS or MASKED, False,
            )  # fmt: skip
    if HAS_STATS:
        out = split.to(tl.int64) * n_rows + offs_m
        tl.store(best_ptr + out, best, mask=mask_m)
        tl.store(argmax_ptr + out, argmax, mask=mask_m)
        tl.store(total_ptr + out, total, mask=mask_m)
        tl.store(weighted_ptr + out, weighted, mask=mask_m)


@dataclass(frozen=True)
class MoreOutputs:
    """What a launch is to find of a chunk of rows, for ranges of tiles with ``n_splits`` splits in all."""

    parts: PartialStats | None  # of every split, ``[n_splits, R]``
    ranks: Tensor | None  # [T, R] int32, to which every launch adds; whole numbers, so that their order is nothing
    maxima: Tensor | None  # [R, groups of whole tiles] fp32

    def of_splits(self, part: slice) -> MoreOutputs:
        """Those that the launch of some splits writes."""
        parts = None if self.parts is None else PartialStats(*(field[part] for field in self.parts))
        return MoreOutputs(parts, self.ranks, self.maxima)

    def apart(self) -> list[MoreOutputs]:
        """In two launches: beside some forms of the others maxima spill."""
        if self.maxima is None or (self.parts is None and self.ranks is None):
            return [self]
        return [replace(self, maxima=None), MoreOutputs(None, None, self.maxima)]


def launch_more(rows: LensRows, out: MoreOutputs, options: LensOptions, tiles: TileRange) -> None:
    """Write ``out`` of every split of ``tiles``; targets and their logits are ``[T, R]``, contiguous."""
    head, row_blocks = options.head, triton.cdiv(rows.count, options.config.block_m)
    parts = (None,) * len(PartialStats._fields) if out.parts is None else out.parts
    stride_g = 0 if out.maxima is None else out.maxima.stride(0)
    n_targets = 0 if out.ranks is None else len(out.ranks)
    _more_kernel[(row_blocks * tiles.splits,)](
        rows.x_hat, head.weight, head.bias, rows.targets, rows.target_z, *parts, out.ranks, out.maxima,
        rows.count, n_targets, *head.weight.shape, row_blocks, tiles.first, tiles.count, tiles.splits, tiles.group,
        rows.x_hat.shape[1], *head.weight.stride(), stride_of(head.bias), stride_g, options.scale, options.softcap,
        **more_flags(options, tiles, n_targets > 0, out.parts is not None, out.maxima is not None),
    )  # fmt: skip


def more_flags(options: LensOptions, tiles: TileRange, has_targets: bool, has_stats: bool, has_maxima: bool) -> dict:
    """What `launch_more` compiles the kernel for."""
    config = options.config
    flags = options.product_flags() | options.logit_flags() | dict(HAS_SOFTCAP=options.head.softcap is not None)
    flags |= dict(HAS_TARGETS=has_targets, HAS_STATS=has_stats, HAS_MAXIMA=has_maxima, MASKED=tiles.masked)
    # Ties of the last, partial tiles are told apart by their columns, as the tiles are not those of the ties' kernel.
    flags |= dict(SAME_BITS=options.same_bits and not tiles.masked)
    launch = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return dict(BLOCK_M=config.block_m, BLOCK_V=tiles.width, **flags, **launch)
