"""The main kernel on Hopper for plain logits: tiles by TMA, and one loop over all of a program's tiles.

Two things make it faster than `lens_kernel`. Its loops over tiles and over K are one, so that the loads of a tile
begin while the statistics of the tile before are still being formed. And those statistics are formed in two passes over
the registers, each of which keeps several of a processor's pipes busy: comparisons and maxima run on one at half the
rate, sums and products on another, exponentials on a third at a quarter of it.

Only for operands of half precision in rows that TMA can read, whole tiles, no bias, scale or softcap, and, with
targets, only where a target's own product has the bits of its column (`target_bits`).
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LensOptions, LensRows, stride_of
from .lens_kernel import UNALIGNED
from .running_sums import log2_logits, peak_of, rescale
from .schedule import TileRange, block_and_split
from .ties import TIED

_NO_ID = tl.constexpr(2**31 - 1)


@triton.jit
def _above_or_equal(difference, INTERPRET: tl.constexpr):
    """1 where ``difference`` is positive, 2**-10 where it is 0, else 0.

    On a GPU one multiply-add that saturates; nearer to 0 than 2**-126 it gives something between.
    """
    if INTERPRET:
        return tl.where(difference > 0, 1.0, tl.where(difference == 0, 2.0**-10, 0.0))
    return tl.inline_asm_elementwise(
        "fma.rn.sat.f32 $0, $1, 0f7E800000, 0f3A800000;", "=f,f", [difference], tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _max_and_sum(best, total, other_best, other_total):
    return tl.maximum(best, other_best), total + other_total


@triton.jit
def _min_and_sums(low, total, weighted, other_low, other_total, other_weighted):
    return tl.minimum(low, other_low), total + other_total, weighted + other_weighted


@triton.jit(
    do_not_specialize=["n_rows", "n_vocab", "row_blocks", "n_tiles", "n_splits", "group"],
    do_not_specialize_on_alignment=[*UNALIGNED[1:], "stride_t"],
)
def _tma_kernel(
    x_ptr, w_ptr, targets_ptr, t_ptr,
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,
    n_rows, n_vocab, d_model, row_blocks, n_tiles, n_splits, group, width, stride_wv, stride_t,
    HAS_TARGETS: tl.constexpr, UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, split = block_and_split(tl.program_id(0), row_blocks, n_splits, group)
    first_row = block * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    ids = tl.arange(0, BLOCK_V)
    row_ok = offs_m < n_rows
    x_tiles = tl.make_tensor_descriptor(x_ptr, [row_blocks * BLOCK_M, width], [width, 1], [BLOCK_M, BLOCK_K])
    w_tiles = tl.make_tensor_descriptor(w_ptr, [n_vocab, d_model], [stride_wv, 1], [BLOCK_V, BLOCK_K])
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M], tl.int32)
    rank = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    if HAS_TARGETS:
        target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=row_ok, other=-1).to(tl.int32)
        t = tl.load(t_ptr + offs_m, mask=row_ok, other=0.0)
    for tile in tl.range(split * n_tiles // n_splits, (split + 1) * n_tiles // n_splits, flatten=True):
        first_id = tile * BLOCK_V
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for k in range(0, d_model, BLOCK_K):
            x = x_tiles.load([first_row, k])
            w = w_tiles.load([first_id, k])
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w.T, z)
        # First pass: the largest logit, and how many lie above the target's (1 each) or equal it (2**-10 each).
        if HAS_TARGETS:
            tile_best, both = tl.reduce((z, _above_or_equal(z - t[:, None], UPCAST)), 1, _max_and_sum)
            above = both.to(tl.int32)  # exact: a tile has at most 512 columns
            equal = ((both - above.to(tl.float32)) * 1024.0).to(tl.int32)
            own = target - first_id
            # An equal logit beats the target from a lower id only. In its own tile the target equals itself; where
            # others do too, `ties` counts them.
            rank += above + tl.where(own >= BLOCK_V, equal, 0)
            rank += tl.where((own >= 0) & (own < BLOCK_V) & (equal > 1), TIED, 0)
        else:
            tile_best = tl.max(z, 1)
        # Second pass: the column of the largest logit, and the exponentials.
        old_best = best
        best = tl.maximum(best, tile_best)
        peak = peak_of(best, 0.0, False)
        total, weighted = rescale(total, weighted, peak_of(old_best, 0.0, False) - peak)
        shifted = log2_logits(z, 0.0, False) - peak[:, None]
        p = tl.exp2(shifted)
        column = tl.where(z == tile_best[:, None], ids[None, :], _NO_ID)
        low, tile_total, tile_weighted = tl.reduce((column, p, p * shifted), 1, _min_and_sums)
        argmax = tl.where(tile_best > old_best, low + first_id, argmax)
        total += tile_total
        weighted += tile_weighted
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=row_ok)
    tl.store(argmax_ptr + out, argmax, mask=row_ok)
    tl.store(total_ptr + out, total, mask=row_ok)
    tl.store(weighted_ptr + out, weighted, mask=row_ok)
    if HAS_TARGETS:
        tl.store(rank_ptr + out, rank, mask=row_ok)


def launch_tma(rows: LensRows, parts: tuple[Tensor, ...], options: LensOptions, tiles: TileRange) -> None:
    """As ``lens_kernel.launch_tiles``, for whole tiles; ranks may carry the mark that ``ties.add_ties`` resolves."""
    config, weight = options.config, options.unembedding
    row_blocks = triton.cdiv(rows.count, config.block_m)

    def launch():
        triton.set_allocator(_descriptor_memory)
        _tma_kernel[(row_blocks * tiles.splits,)](
            rows.x_hat, weight, rows.targets, rows.target_z, *parts,
            rows.count, *weight.shape, row_blocks, tiles.count, tiles.splits, tiles.group,
            rows.x_hat.shape[1], weight.stride(0), stride_of(rows.targets),
            HAS_TARGETS=rows.targets is not None, UPCAST=options.interpreted,
            BLOCK_M=config.block_m, BLOCK_V=tiles.width, BLOCK_K=config.block_k,
            num_warps=tiles.num_warps, num_stages=tiles.num_stages,
        )  # fmt: skip

    # In a context of its own: the allocator of the caller's other kernels stays theirs.
    contextvars.copy_context().run(launch)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
