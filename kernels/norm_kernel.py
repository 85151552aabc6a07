"""The final norm on a GPU: the pre-pass of the fused lens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import WIDTH_MULTIPLE
from .kernel import stride_of
from .launches import empty, launch
from .reference import LayerNorm, Norm

PROGRAM_ELEMENTS = 1024  # of a program, unless a row has more


@triton.jit(do_not_specialize=["n_rows", "padded_rows"])
def _norm_kernel(
    hidden_ptr, weight_ptr, bias_ptr, x_ptr,  # [R, d_model], [d_model], [d_model], [padded R, width]
    n_rows, padded_rows, d_model, width, stride_hr, stride_hd, stride_w, stride_b, eps, offset,
    HAS_NORM: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program: whole rows, in one block of columns."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = (offs_d < d_model)[None, :]
    mask = (offs_m < n_rows)[:, None] & mask_d
    ptrs = hidden_ptr + offs_m.to(tl.int64)[:, None] * stride_hr + offs_d.to(tl.int64)[None, :] * stride_hd
    x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
    if HAS_MEAN:
        x = tl.where(mask_d, x - (tl.sum(x, 1) / d_model)[:, None], 0.0)
    if HAS_NORM:
        x = x * tl.rsqrt(tl.sum(x * x, 1) / d_model + eps)[:, None]
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_d.to(tl.int64) * stride_w, mask=offs_d < d_model, other=0.0)
        x = x * (weight.to(tl.float32) + offset)[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_d.to(tl.int64) * stride_b, mask=offs_d < d_model, other=0.0)
        x = x + bias.to(tl.float32)[None, :]
    # Rows and columns of the padding become zeros, so that the products need no mask on this operand.
    x = tl.where(mask, x, 0.0)
    out = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_d[None, :]
    tl.store(out, x.to(x_ptr.dtype.element_ty), mask=(offs_m < padded_rows)[:, None] & (offs_d < width)[None, :])


def normed_rows(hidden: Tensor, norm: Norm, row_multiple: int, out: Tensor | None = None) -> Tensor:
    """``norm(hidden)`` computed in fp32 and rounded once, padded with zeros to whole row blocks.

    Args:
        hidden: ``[R, d_model]`` floating, any strides.
        norm: Final norm, or None to copy.
        row_multiple: Rows of the result are a multiple of this.
        out: What an earlier call returned for at least as many rows, to write over; None makes a new one.

    Returns:
        ``[padded R, padded_width(d_model)]`` of the dtype of ``hidden``.
    """
    n_rows, d_model = hidden.shape
    shape = (triton.cdiv(n_rows, row_multiple) * row_multiple, padded_width(d_model))
    # The interpreter truncates to bfloat16 where a GPU rounds: there torch does the one rounding.
    stored = torch.float32 if triton.knobs.runtime.interpret else hidden.dtype
    is_fit = out is not None and out.dtype == stored
    x_hat = out[: shape[0]] if is_fit else empty(shape, stored, hidden.device)
    weight, bias = (None, None) if norm is None else (norm.weight, norm.bias)
    eps, offset = (0.0, 0.0) if norm is None else (norm.eps, norm.offset)
    flags = norm_flags(norm, shape[1])
    strides = (*hidden.stride(), stride_of(weight), stride_of(bias))
    args = (hidden, weight, bias, x_hat, n_rows, shape[0], d_model, shape[1], *strides, eps, offset)
    launch(_norm_kernel, triton.cdiv(shape[0], flags["BLOCK_M"]), args, flags)
    return x_hat.to(hidden.dtype)


def padded_width(d_model: int) -> int:
    """Columns of the normed states, padding included."""
    return triton.cdiv(d_model, WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def norm_flags(norm: Norm, width: int) -> dict:
    """What `normed_rows` compiles the kernel for, with padded rows of ``width``."""
    block_d = triton.next_power_of_2(width)
    block_m = max(1, PROGRAM_ELEMENTS // block_d)
    return dict(
        HAS_NORM=norm is not None,
        HAS_MEAN=isinstance(norm, LayerNorm),
        HAS_WEIGHT=norm is not None and norm.weight is not None,
        HAS_BIAS=norm is not None and norm.bias is not None,
        BLOCK_M=block_m,
        BLOCK_D=block_d,
        num_warps=min(16, block_m * block_d // 256),  # 8 elements a thread, as far as there are warps
    )
