"""The warp-specialised main kernel: one warp group loads tiles by TMA, two multiply and reduce 64 rows each.

Only on Hopper, and never unless it was found equal to the plain kernel and faster; see ``search``. What keeps
Triton's specialisation in place: 4 warps, ``flatten=False``, descriptors made in the kernel (those of the host
are miscompiled), no branch on a tile, whole tiles only. Registers must suffice without a bias.
"""

from __future__ import annotations

import contextvars

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import LensOptions, LensRows, stride_of
from .lens_kernel import UNALIGNED
from .lens_tile import add_best, add_exponentials, count_better
from .schedule import TileRange, block_and_split


@triton.jit(
    do_not_specialize=["n_rows", "n_vocab", "row_blocks", "n_tiles", "n_splits", "group"],
    do_not_specialize_on_alignment=[*UNALIGNED[1:], "stride_t"],
)
def _specialized_kernel(
    x_ptr, w_ptr, targets_ptr, t_ptr,
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,
    n_rows, n_vocab, d_model, row_blocks, n_tiles, n_splits, group,
    width, stride_wv, stride_t, logit_scale, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SAME_BITS: tl.constexpr,
    UPCAST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
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
    for tile in tl.range(
        split * n_tiles // n_splits, (split + 1) * n_tiles // n_splits, warp_specialize=True, flatten=False
    ):
        first_id = tile * BLOCK_V
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for k in range(0, d_model, BLOCK_K):
            x = x_tiles.load([first_row, k])
            w = w_tiles.load([first_id, k])
            if UPCAST:
                x = x.to(tl.float32)
                w = w.to(tl.float32)
            z = tl.dot(x, w.T, z)
        if HAS_SCALE:
            z *= logit_scale
        old_best = best
        best, argmax = add_best(best, argmax, z, ids[None, :], first_id)
        if HAS_TARGETS:
            target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=row_ok, other=-1).to(tl.int32)
            t = tl.load(t_ptr + offs_m, mask=row_ok, other=0.0)
            rank += count_better(z, ids[None, :], target - first_id, t, SAME_BITS).to(tl.int32)
        total, weighted = add_exponentials(
            total, weighted, old_best, best, z, None, softcap, HAS_SOFTCAP, MASKED=False, MAY_LACK=False
        )
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=row_ok)
    tl.store(argmax_ptr + out, argmax, mask=row_ok)
    tl.store(total_ptr + out, total, mask=row_ok)
    tl.store(weighted_ptr + out, weighted, mask=row_ok)
    if HAS_TARGETS:
        tl.store(rank_ptr + out, rank, mask=row_ok)


def launch_specialized(
    rows: LensRows, parts: tuple[Tensor, ...], options: LensOptions, tiles: TileRange, same_bits: bool
) -> None:
    """As ``lens_kernel.launch_tiles``, for whole tiles, half precision, an aligned unembedding and no bias."""
    config, weight = options.config, options.unembedding
    row_blocks = triton.cdiv(rows.count, config.block_m)
    flags = options.product_flags()

    def launch():
        triton.set_allocator(_descriptor_memory)
        _specialized_kernel[(row_blocks * tiles.splits,)](
            rows.x_hat, weight, rows.targets, rows.target_z, *parts,
            rows.count, *weight.shape, row_blocks, tiles.count, tiles.splits, tiles.group,
            rows.x_hat.shape[1], weight.stride(0), stride_of(rows.targets), options.logit_scale, options.cap,
            HAS_SCALE=flags["HAS_SCALE"], UPCAST=flags["UPCAST"], SAME_BITS=same_bits,
            BLOCK_M=config.block_m, BLOCK_V=tiles.width, BLOCK_K=config.block_k,
            num_warps=tiles.num_warps, num_stages=config.num_stages,
            **options.row_flags(rows.targets is not None),
        )  # fmt: skip

    # In a context of its own: the allocator of the caller's other kernels stays theirs.
    contextvars.copy_context().run(launch)


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
