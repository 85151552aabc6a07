"""The targets' own logits on a GPU, by the main product's order over K."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import LensOptions, LensRows, stride_of
from .lens_tile import add_product

TARGET_ROWS = 64  # the fewest a warp group multiplies at once
TARGET_WARPS = 4
TARGET_STAGES = 6  # a program is over before latency is hidden by anything else


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
