"""The lens's own product with a logsumexp alone: what argmax, rank and entropy are held against on a GPU.

The tiles and the order of programs are the main kernel's, the loop is that of `kernel`: on Hopper, where the main
kernel loads by TMA and hides the start of a tile, this one does not. Only whole tiles are read, by both sides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from refinelens.kernels.config import LensConfig, LensOptions, processor_count, tile_ranges
from refinelens.kernels.kernel import add_product, block_and_split
from refinelens.kernels.reference import LensHead

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["n_rows", "row_blocks", "n_tiles", "n_splits", "group"])
def _logsumexp_kernel(
    x_ptr, w_ptr, best_ptr, total_ptr,
    n_rows, d_model, row_blocks, n_tiles, n_splits, group, width, stride_wv, stride_wd,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block, split = block_and_split(tl.program_id(0), row_blocks, n_splits, group)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    best = tl.full([BLOCK_M], -1.0e38, tl.float32)  # in units of log 2
    total = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(split * n_tiles // n_splits, (split + 1) * n_tiles // n_splits):
        rows_w = (tile * BLOCK_V + tl.arange(0, BLOCK_V)).to(tl.int64)
        w_ptrs = w_ptr + rows_w[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, False, INTERPRETED, PRECISION, BLOCK_K)
        new_best = tl.maximum(best, tl.max(z, 1) * _LOG2E)
        total = total * tl.exp2(best - new_best) + tl.sum(tl.exp2(z * _LOG2E - new_best[:, None]), 1)
        best = new_best
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=offs_m < n_rows)
    tl.store(total_ptr + out, total, mask=offs_m < n_rows)


def launch_logsumexp(x_hat: Tensor, n_rows: int, unembedding: Tensor, config: LensConfig) -> tuple[Tensor, Tensor]:
    """Peak (in units of log 2) and sum of exponentials of every split: each ``[splits, n_rows]`` fp32.

    Args:
        x_hat: ``[padded R, padded d_model]`` normed states, as ``norm_kernel.normed_rows`` makes them.
        n_rows: Rows that count.
        unembedding: ``[V, d_model]`` of the dtype of ``x_hat``; tokens past the last whole tile are not read.
        config: As for the main kernel.
    """
    row_blocks = triton.cdiv(n_rows, config.block_m)
    row_bytes = x_hat.shape[1] * x_hat.element_size()
    tiles = tile_ranges(len(unembedding), row_blocks, row_bytes, config, processor_count(x_hat.device), by_tma=False)[0]
    best, total = torch.empty((2, tiles.splits, n_rows), dtype=torch.float32, device=x_hat.device)
    _logsumexp_kernel[(row_blocks * tiles.splits,)](
        x_hat, unembedding, best, total,
        n_rows, unembedding.shape[1], row_blocks, tiles.count, tiles.splits, tiles.group,
        x_hat.shape[1], *unembedding.stride(),
        **LensOptions(LensHead(unembedding), config).product_flags(),
        BLOCK_M=config.block_m, BLOCK_V=tiles.width, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return best, total
