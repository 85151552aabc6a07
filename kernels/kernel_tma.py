"""The fused lens on Hopper for plain logits: tiles by TMA, one loop over all of a program's tiles, and ties apart.

Two things make it faster than `kernel`, whose names it shares. Its loops over tiles and over K are one, so that the
loads of a tile begin while the statistics of the tile before are still being formed. And the four threads that share a
row of the product keep statistics of their own, merged once at the end: a tile needs no exchange between threads, its
columns are numbers known to the compiler, and registers stay free for it to mix what runs on a processor's different
pipes (comparisons and maxima on one at half the rate, sums and products on another, exponentials on a third at a
quarter of it).

Only for operands of half precision in rows that TMA can read, no bias, scale or softcap, and, with targets, only where
a target's own product has the bits of its column (`fused_lens.target_matches_main_product`).

Tokens whose logit equals that of a target in the same tile are told apart by their columns alone. They are rare:
duplicate rows of an unembedding, or logits that round to the same float. The main kernel marks the ranks of such rows
and leaves them to a second one, whose products have the bits of the first one's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LensOptions, TileRange
from .kernel import (
    NO_ID,
    TARGET_ROWS,
    TARGET_WARPS,
    UNALIGNED,
    VARYING,
    LensRows,
    PartialStats,
    add_product,
    add_tile,
    block_and_split,
    log2_logits,
    peak_of,
    rescale,
    stride_of,
)
from .launches import launch

# Asked for, although there are no more: the compiler then mixes the statistics' instructions by the pipe they run on;
# left to itself it takes 172 registers and makes one kind after the other.
MAX_REGISTERS = 255
_LANES = tl.constexpr(4)  # threads that share a row of a product on Hopper
# Added to a rank: for every logit equal to the target's in its own tile while they are summed, then for a row whose
# ties are not counted yet. Both are more than any vocabulary has tokens.
_EQUAL = tl.constexpr(2**26)
TIED = tl.constexpr(2**30)


@triton.jit
def _add_step(z, x_tiles, w_tiles, first_row, first_id, k, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr):
    """``z`` [rows, tokens] plus one step of the product, over the columns from ``k`` on."""
    x = x_tiles.load([first_row, k])  # [BLOCK_M, BLOCK_K]
    w = w_tiles.load([first_id, k])  # [tokens, BLOCK_K]
    if INTERPRETED:
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    return tl.dot(x, w.T, z, input_precision=PRECISION)


@triton.jit
def _by_lane(z):
    """``z`` [rows, tokens] as [rows, 4, tokens / 4], so that every thread keeps what it holds.

    Thread ``l`` of the four that share a row holds columns ``8 i + 2 l`` and ``8 i + 2 l + 1``.
    """
    z = tl.reshape(z, [z.shape[0], z.shape[1] // 8, _LANES, 2])
    return tl.reshape(tl.permute(z, [0, 2, 1, 3]), [z.shape[0], _LANES, z.shape[1] * 2])


@triton.jit
def _above_or_equal(difference, INTERPRETED: tl.constexpr):
    """1 where ``difference`` is positive, 2**-10 where it is 0, else 0.

    On a GPU one multiply-add that saturates; nearer to 0 than 2**-126 it gives something between.
    """
    if INTERPRETED:
        return tl.where(difference > 0, 1.0, tl.where(difference == 0, 2.0**-10, 0.0))
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, 0f7E800000, 0f3A800000;", "=f,f", [difference], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _count_better(rank, z, first_id, target, target_z, BLOCK_V: tl.constexpr, INTERPRETED: tl.constexpr):
    """``rank`` [rows, 4] plus the tokens of ``z`` that beat the row's target, plus `_EQUAL` for each that equals it in
    its own tile.
    """
    # Logits above the target's count 1 each, equal ones 2**-10 each.
    both = tl.sum(_above_or_equal(z - target_z[:, None, None], INTERPRETED), 2)  # [rows, 4]
    above = both.to(tl.int32)  # exact: a lane has at most 128 columns of a tile
    equal = ((both - above.to(tl.float32)) * 1024.0).to(tl.int32)
    target_col = (target - first_id)[:, None]
    # An equal logit beats the target from a lower id only.
    rank += above + tl.where(target_col >= BLOCK_V, equal, 0)
    return rank + tl.where((target_col >= 0) & (target_col < BLOCK_V), tl.minimum(equal, 2) * _EQUAL, 0)


@triton.jit
def _merge_lanes(best, argmax, rank, total, weighted):
    """The statistics of rows, [BLOCK_M], from those of their lanes, [BLOCK_M, 4]."""
    top = tl.max(best, 1)
    argmax = tl.min(tl.where(best == top[:, None], argmax, NO_ID), 1)
    shift = peak_of(best, 0.0, False) - peak_of(top, 0.0, False)[:, None]
    total, weighted = rescale(total, weighted, shift)
    rank = tl.sum(rank, 1)
    # The target's own logit equals itself; where others of its tile do too, the kernel of the ties counts them.
    rank = rank % _EQUAL + tl.where(rank >= 2 * _EQUAL, TIED, 0)
    return top, argmax, rank, tl.sum(total, 1), tl.sum(weighted, 1)


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _tma_kernel(
    x_ptr, w_ptr, targets_ptr, target_z_ptr,  # x_hat, w, [R] int64, [R] fp32
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,  # [n_splits, R]
    n_rows, n_vocab, d_model, row_blocks, n_tiles, n_splits, group, width, stride_wv, stride_t, zero,
    HAS_TARGETS: tl.constexpr, MASKED: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, TAIL_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: one row block over the tiles of one split, the last split with the rest of the vocabulary."""
    block, split = block_and_split(tl.program_id(0), row_blocks, n_splits, group)
    first_row = block * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_rows
    lane = tl.arange(0, _LANES)
    of_lane = tl.arange(0, BLOCK_V // _LANES)
    offs_v = of_lane // 2 * 8 + of_lane % 2  # and 2 * lane
    x_tiles = tl.make_tensor_descriptor(x_ptr, [row_blocks * BLOCK_M, width], [width, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [n_vocab, d_model], [stride_wv, 1], [BLOCK_V, BLOCK_K])
    best = tl.full([BLOCK_M, _LANES], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M, _LANES], tl.int32)
    rank = tl.zeros([BLOCK_M, _LANES], tl.int32)
    total = tl.zeros([BLOCK_M, _LANES], tl.float32)
    weighted = tl.zeros([BLOCK_M, _LANES], tl.float32)
    target = tl.zeros([BLOCK_M], tl.int32)
    target_z = tl.zeros([BLOCK_M], tl.float32)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=mask_m, other=-1).to(tl.int32)
        target_z = tl.load(target_z_ptr + offs_m, mask=mask_m, other=0.0)
    end = (split + 1) * n_tiles // n_splits
    whole = n_vocab // BLOCK_V
    for tile in tl.range(split * n_tiles // n_splits, tl.minimum(end, whole), flatten=True):
        first_id = tile * BLOCK_V
        # From an argument: for a constant the compiler takes two instructions a logit to clear the registers.
        z = tl.full([BLOCK_M, BLOCK_V], zero, tl.float32)
        for k in range(0, d_model, BLOCK_K):
            z = _add_step(z, x_tiles, w_tiles, first_row, first_id, k, INTERPRETED, PRECISION)
        z = _by_lane(z)  # [BLOCK_M, 4, BLOCK_V / 4]
        if HAS_TARGETS:
            rank = _count_better(rank, z, first_id, target, target_z, BLOCK_V, INTERPRETED)
        tile_best = tl.max(z, 2)  # [BLOCK_M, 4]
        old_best = best
        best = tl.maximum(best, tile_best)
        peak = peak_of(best, 0.0, False)
        total, weighted = rescale(total, weighted, peak_of(old_best, 0.0, False) - peak)
        shifted = log2_logits(z, 0.0, False) - peak[:, :, None]
        p = tl.exp2(shifted)
        total += tl.sum(p, 2)
        weighted += tl.sum(p * shifted, 2)
        tile_argmax = tl.min(tl.where(z == tile_best[:, :, None], offs_v[None, None, :], NO_ID), 2)
        argmax = tl.where(tile_best > old_best, tile_argmax + first_id, argmax)
    best, argmax, rank, total, weighted = _merge_lanes(best, argmax + 2 * lane[None, :], rank, total, weighted)
    if MASKED:
        # The last split ends with the rest of the vocabulary, in smaller tiles: masks need registers.
        w_rest = tl.make_tensor_descriptor(w_ptr, [n_vocab, d_model], [stride_wv, 1], [TAIL_V, BLOCK_K])
        offs_rest = tl.arange(0, TAIL_V)
        for first_id in range(tl.where(end > whole, whole * BLOCK_V, n_vocab), n_vocab, TAIL_V):
            z = tl.zeros([BLOCK_M, TAIL_V], tl.float32)
            for k in range(0, d_model, BLOCK_K):
                z = _add_step(z, x_tiles, w_rest, first_row, first_id, k, INTERPRETED, PRECISION)
            best, argmax, rank, total, weighted = add_tile(
                best, argmax, rank, total, weighted, z, offs_rest, first_id, n_vocab, target, target_z, 0.0,
                HAS_TARGETS, False, True, True, True,
            )  # fmt: skip
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=mask_m)
    tl.store(argmax_ptr + out, argmax, mask=mask_m)
    tl.store(total_ptr + out, total, mask=mask_m)
    tl.store(weighted_ptr + out, weighted, mask=mask_m)
    if HAS_TARGETS:
        tl.store(rank_ptr + out, rank, mask=mask_m)


def launch_tma(rows: LensRows, parts: PartialStats, options: LensOptions, tiles: TileRange) -> None:
    """As `kernel.launch_tiles`, for a whole vocabulary; ranks may carry the mark that `add_ties` resolves."""
    weight, row_blocks = options.head.weight, triton.cdiv(rows.count, options.config.block_m)
    args = (
        rows.x_hat, weight, rows.targets, rows.target_z, *parts,
        rows.count, *weight.shape, row_blocks, tiles.count, tiles.splits, tiles.group,
        rows.x_hat.shape[1], weight.stride(0), stride_of(rows.targets), 0.0,
    )  # fmt: skip
    launch(_tma_kernel, row_blocks * tiles.splits, args, tma_flags(options, tiles), allocator=_descriptor_memory)


def tma_flags(options: LensOptions, tiles: TileRange) -> dict:
    """What `launch_tma` compiles the kernel for."""
    config = options.config
    blocks = dict(BLOCK_M=config.block_m, BLOCK_V=tiles.width, TAIL_V=config.tail_v, **options.product_flags())
    launch = dict(num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=MAX_REGISTERS)
    return dict(HAS_TARGETS=options.has_targets, MASKED=tiles.masked, **blocks, **launch)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=UNALIGNED)
def _ties_kernel(
    x_ptr, w_ptr, targets_ptr, target_z_ptr, rank_ptr,  # x_hat, w, [R] int64, [R] fp32, [R] int64
    n_rows, n_vocab, d_model, width, stride_wv, stride_wd, stride_t,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    TILE_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiplies the whole row block for each marked row: slow, and rare."""
    first_row = tl.program_id(0) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    ranks = tl.load(rank_ptr + offs_m, mask=offs_m < n_rows, other=0)
    if tl.max(ranks, 0) >= TIED:
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
        for row in range(first_row, tl.minimum(first_row + BLOCK_M, n_rows)):
            rank = tl.load(rank_ptr + row)
            if rank >= TIED:
                target = tl.load(targets_ptr + tl.cast(row, tl.int64) * stride_t).to(tl.int32)
                target_z = tl.load(target_z_ptr + row)
                for first_id in range(target // TILE_V * TILE_V, target, BLOCK_M):
                    ids = first_id + tl.arange(0, BLOCK_M)
                    token = tl.minimum(ids, n_vocab - 1).to(tl.int64)
                    w_ptrs = w_ptr + token[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
                    z = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)  # rows by tokens
                    z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, False, INTERPRETED, PRECISION, BLOCK_K)
                    counts = (offs_m == row)[:, None] & (ids < target)[None, :] & (z == target_z)
                    rank += tl.sum(tl.sum(counts.to(tl.int64), 1), 0)
                tl.store(rank_ptr + row, rank - TIED)


def add_ties(rows: LensRows, rank: Tensor, options: LensOptions) -> None:
    """Resolve the marks in ``rank`` [R] int64: add the equal tokens before each target in its tile.

    ``rows.x_hat`` has whole blocks of ``TARGET_ROWS``.
    """
    weight = options.head.weight
    args = (
        rows.x_hat, weight, rows.targets, rows.target_z, rank,
        rows.count, *weight.shape, rows.x_hat.shape[1], *weight.stride(), stride_of(rows.targets),
    )  # fmt: skip
    launch(_ties_kernel, triton.cdiv(rows.count, TARGET_ROWS), args, tie_flags(options))


def tie_flags(options: LensOptions) -> dict:
    """What `add_ties` compiles the kernel for."""
    launch = dict(num_warps=TARGET_WARPS, num_stages=options.config.num_stages)
    return dict(TILE_V=options.config.block_v, BLOCK_M=TARGET_ROWS, **options.product_flags(), **launch)
