"""What the kernels beside the lens share: how they cut rows and vocabulary, and a tile of logits.

They multiply as `kernel` does, in one order over K, so that a logit has the same bits in all of them. What they keep in
memory between two kernels is bounded by `SCRATCH_BYTES`, whatever the rows and the vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from .config import LensConfig, LensOptions, by_pointers, generation_of, is_aligned, limited, sized_config
from .kernel import add_product
from .reference import LensHead

SCRATCH_BYTES = 32 * 2**20
_MANY_ROWS = 1024


def many_rows_config(weight: Tensor) -> LensConfig:
    """The configuration of many rows, from which the tiles beside the lens are made, whose limits are not theirs."""
    return sized_config(weight.dtype, is_aligned(weight), _MANY_ROWS, generation_of(weight.device))


def masked_tiles(pinned: LensConfig) -> LensConfig:
    """The last tiles of ``pinned``, with masks: a processor has room for two programs, one of which can multiply while
    the other reduces. A multiple of ``block_k`` wide, as averages go over the tokens in steps of that."""
    pinned = limited("masked", pinned)
    return replace(pinned, block_v=pinned.tail_v, kind="plain")


def pointer_tiles(pinned: LensConfig) -> LensConfig:
    """The configuration by pointer loads with tiles of ``pinned``, narrower where several targets would spill."""
    return replace(by_pointers(limited("several", pinned)), kind="plain")


def plain_options(head: LensHead) -> LensOptions:
    """Options of the kernels beside the lens."""
    return LensOptions(head, masked_tiles(many_rows_config(head.weight)))


def even_chunks(total: int, most: int) -> int:
    """Size of a chunk, where ``total`` is cut into the fewest of at most ``most`` and about one size."""
    return max(1, triton.cdiv(total, max(1, triton.cdiv(total, max(1, most)))))


@triton.jit
def z_tile(
    x_ptr, w_ptr, bias_ptr, offs_m, token, d_model, width, stride_wv, stride_wd, stride_b, scale,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Logits before the softcap of rows ``offs_m``, for int64 ids ``token`` of the vocabulary: [BLOCK_M, BLOCK_V]."""
    offs_k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    w_ptrs = w_ptr + token[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
    z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + token * stride_b).to(tl.float32)[None, :]
    z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, False, INTERPRETED, PRECISION, BLOCK_K)
    if HAS_SCALE:
        z *= scale
    return z
