"""Tokens whose logit equals that of a target in the same tile, which only their columns tell apart.

Rare: duplicate rows of an unembedding, or logits that round to the same float. `lens_tma` marks the ranks of such rows
and leaves them to this kernel, whose products have the bits of the main kernel's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .launch import LensOptions, LensRows, stride_of
from .lens_tile import add_product
from .target_logits import TARGET_ROWS, TARGET_WARPS

TIED = tl.constexpr(2**30)  # added to a rank whose ties are not in it yet; more than any vocabulary has tokens


@triton.jit(
    do_not_specialize=["n_rows", "n_vocab"],
    do_not_specialize_on_alignment=["targets_ptr", "t_ptr", "rank_ptr", "stride_t"],
)
def _ties_kernel(
    x_ptr, w_ptr, targets_ptr, t_ptr, rank_ptr, n_rows, n_vocab, d_model, width, stride_wv, stride_wd, stride_t,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BLOCK_M
    offs_m = first_row + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    ranks = tl.load(rank_ptr + offs_m, mask=offs_m < n_rows, other=0)
    if tl.max(ranks, 0) >= TIED:
        x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
        for row in range(first_row, tl.minimum(first_row + BLOCK_M, n_rows)):
            rank = tl.load(rank_ptr + row)
            if rank >= TIED:
                target = tl.load(targets_ptr + tl.cast(row, tl.int64) * stride_t).to(tl.int32)
                t = tl.load(t_ptr + row)
                for first_id in range(target // TILE * TILE, target, BLOCK_M):
                    ids = first_id + tl.arange(0, BLOCK_M)
                    rows_w = tl.minimum(ids, n_vocab - 1).to(tl.int64)
                    w_ptrs = w_ptr + rows_w[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
                    z = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
                    z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, False, UPCAST, PRECISION, BLOCK_K)
                    counts = (offs_m == row)[:, None] & (ids < target)[None, :] & (z == t)
                    rank += tl.sum(tl.sum(counts.to(tl.int64), 1), 0)
                tl.store(rank_ptr + row, rank - TIED)


def add_ties(rows: LensRows, rank: Tensor, options: LensOptions) -> None:
    """Resolve the marks in ``rank`` ``[R]`` int64: add the equal tokens before each target in its tile.

    ``rows`` has whole blocks of ``TARGET_ROWS``, and targets' logits with the bits of the main product.
    """
    weight = options.unembedding
    _ties_kernel[(triton.cdiv(rows.count, TARGET_ROWS),)](
        rows.x_hat, weight, rows.targets, rows.target_z, rank,
        rows.count, *weight.shape, rows.x_hat.shape[1], *weight.stride(), stride_of(rows.targets), **tie_flags(options),
    )  # fmt: skip


def tie_flags(options: LensOptions) -> dict:
    """What `add_ties` compiles the kernel for."""
    flags = {name: options.product_flags()[name] for name in ("UPCAST", "PRECISION", "BLOCK_K")}
    launch = dict(num_warps=TARGET_WARPS, num_stages=options.config.num_stages)
    return dict(TILE=options.config.block_v, BLOCK_M=TARGET_ROWS, **flags, **launch)
