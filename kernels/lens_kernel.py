"""The main kernel of the fused lens: products and running statistics over one part of the vocabulary.

Tiles are loaded by pointers: cp.async feeds the tensor cores without spills in every Triton supported, for
any strides, and needs no allocator for descriptors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import LensOptions, LensRows, stride_of
from .lens_tile import add_product, add_tile
from .running_sums import Parts
from .schedule import TileRange, block_and_split

UNALIGNED = ["bias_ptr", "targets_ptr", "t_ptr", "best_ptr", "argmax_ptr", "rank_ptr", "total_ptr", "weighted_ptr"]


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


def launch_tiles(rows: LensRows, parts: Parts, options: LensOptions, tiles: TileRange, same_bits: bool) -> None:
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
