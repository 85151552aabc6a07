"""The fused lens on a GPU: every statistic of every row in one pass over the vocabulary.

A chunk of rows goes through four kernels: the final norm, the targets' own logits, the main product with
its running reductions, and the merge over vocabulary splits. Logits only ever exist as tiles in registers.
Tiles are loaded by pointers: cp.async feeds the tensor cores without spills in every Triton supported, for
any strides, and needs no allocator for descriptors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import LensConfig, choose_splits, chunk_blocks, is_aligned, pinned_config, processor_count
from .lens_common import LensOutput, lens_output
from .norms import Norm
from .norms_triton import normed_rows, padded_width
from .running_sums import log2_logits, merge_splits, peak_of, rescale

_LOWEST = tl.constexpr(-3.0e38)
_NO_ID = tl.constexpr(2**31 - 1)
TARGET_WARPS = 4


@triton.jit
def _product(
    acc, x_ptrs, w_ptrs, d_model, stride_wd,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products; one order over K for the targets and for the whole vocabulary."""
    offs_k = tl.arange(0, BLOCK_K)
    for k in range(0, d_model, BLOCK_K):
        x = tl.load(x_ptrs + k)  # zeros past d_model and past the last row: nothing to mask
        w = tl.load(w_ptrs + tl.cast(k, tl.int64) * stride_wd, mask=offs_k[:, None] < d_model - k, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _next_up(t):
    """The float above ``t``: ``z >= _next_up(t)`` is ``z > t``, also at infinities and either zero."""
    bits = t.to(tl.int32, bitcast=True)
    return tl.where(t == 0, 1, tl.where(t > 0, bits + 1, bits - 1)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["n_rows", "n_vocab"])
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
    acc = _product(acc, x_ptrs, w_ptrs, d_model, stride_wd, UPCAST, PRECISION, BLOCK_K)
    ids = tl.arange(0, BLOCK_M)
    z = tl.sum(tl.where(ids[:, None] == ids[None, :], acc, 0.0), 1)
    if HAS_SCALE:
        z *= logit_scale
    tl.store(t_ptr + offs_m, z, mask=row_ok)


@triton.jit(do_not_specialize=["n_rows", "n_vocab", "n_splits"])
def _lens_kernel(
    x_ptr, w_ptr, bias_ptr, targets_ptr, t_ptr,
    best_ptr, argmax_ptr, rank_ptr, total_ptr, weighted_ptr,
    n_rows, n_vocab, d_model, n_splits, width, stride_wv, stride_wd, stride_b, stride_t, logit_scale, softcap,
    HAS_TARGETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # All splits of a row block are neighbours: the programs that run at one time then share few row
    # blocks and, split by split, the same part of the unembedding, which stays in L2.
    split = tl.program_id(0) % n_splits
    offs_m = tl.program_id(0) // n_splits * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    ids = tl.arange(0, BLOCK_V)[None, :]
    row_ok = offs_m < n_rows
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    argmax = tl.zeros([BLOCK_M], tl.int32)
    rank = tl.zeros([BLOCK_M], tl.int32)
    total = tl.zeros([BLOCK_M], tl.float32)
    weighted = tl.zeros([BLOCK_M], tl.float32)
    n_tiles = tl.cdiv(n_vocab, BLOCK_V)
    for tile in range(split * n_tiles // n_splits, (split + 1) * n_tiles // n_splits):
        offs_v = tile * BLOCK_V + tl.arange(0, BLOCK_V)
        col_ok = (offs_v < n_vocab)[None, :]
        # Columns past the end repeat the last one and are struck out below; a mask here costs spills.
        rows_w = tl.minimum(offs_v, n_vocab - 1).to(tl.int64)
        w_ptrs = w_ptr + rows_w[None, :] * stride_wv + offs_k.to(tl.int64)[:, None] * stride_wd
        z = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        if HAS_BIAS:
            z += tl.load(bias_ptr + rows_w * stride_b).to(tl.float32)[None, :]
        z = _product(z, x_ptrs, w_ptrs, d_model, stride_wd, UPCAST, PRECISION, BLOCK_K)
        if HAS_SCALE:
            z *= logit_scale
        z = tl.where(col_ok, z, float("-inf"))
        tile_best = tl.max(z, 1)
        tile_argmax = tl.min(tl.where(z == tile_best[:, None], ids, _NO_ID), 1) + tile * BLOCK_V
        argmax = tl.where(tile_best > best, tile_argmax, argmax)
        old_peak = peak_of(best, softcap, HAS_SOFTCAP)
        best = tl.maximum(best, tile_best)
        if HAS_TARGETS:
            # Loaded again for every tile: registers that stay occupied over the K loop would spill.
            target = tl.load(targets_ptr + offs_m.to(tl.int64) * stride_t, mask=row_ok, other=-1).to(tl.int32)
            t = tl.load(t_ptr + offs_m, mask=row_ok, other=0.0)
            # An equal logit beats the target from a lower id only, and the target never beats itself.
            own = target - tile * BLOCK_V
            bar = tl.where(own >= BLOCK_V, t, _next_up(t))
            rank += tl.sum(tl.where(z >= bar[:, None], 1.0, 0.0), 1).to(tl.int32)
            own = tl.where(own < BLOCK_V, own, -1)
            if tl.max(own, 0) >= 0:
                tied = tl.where((z == t[:, None]) & (ids < own[:, None]), 1.0, 0.0)
                rank += tl.sum(tl.where((z > t[:, None]) & (ids == own[:, None]), -1.0, tied), 1).to(tl.int32)
        logits = log2_logits(z, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            logits = tl.where(col_ok, logits, float("-inf"))
        new_peak = peak_of(best, softcap, HAS_SOFTCAP)
        # A logit of -inf has to add 0 to the entropy: keep it finite, 0 * -inf is NaN.
        shifted = tl.maximum(logits - new_peak[:, None], _LOWEST)
        p = tl.exp2(logits - new_peak[:, None])
        total, weighted = rescale(total, weighted, old_peak - new_peak)
        total += tl.sum(p, 1)
        weighted += tl.sum(p * shifted, 1)
    out = split.to(tl.int64) * n_rows + offs_m
    tl.store(best_ptr + out, best, mask=row_ok)
    tl.store(argmax_ptr + out, argmax, mask=row_ok)
    tl.store(total_ptr + out, total, mask=row_ok)
    tl.store(weighted_ptr + out, weighted, mask=row_ok)
    if HAS_TARGETS:
        tl.store(rank_ptr + out, rank, mask=row_ok)


@dataclass(frozen=True)
class LensOptions:
    """What every chunk of rows shares."""

    unembedding: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    config: LensConfig


def fused_lens_triton(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    config: LensConfig | None = None,
) -> LensOutput:
    """Lens statistics of ``hidden`` ``[R, d_model]`` in one pass over the vocabulary per chunk of rows.

    The normed states are rounded once, to the operands' dtype; everything after is fp32.

    Args:
        hidden: ``[R, d_model]`` bfloat16, float16 or float32, any strides.
        unembedding: ``[V, d_model]`` of the dtype of ``hidden``, any strides.
        norm: Final norm, or None.
        targets: ``[R]`` int64 in ``[0, V)``, or None. Ids outside are not read, their rows are meaningless.
        bias: ``[V]`` floating, or None.
        softcap: Positive cap of the logits, or None.
        logit_scale: Positive factor of the logits, applied before the cap.
        config: Tile sizes; None takes the pinned ones for the dtype and alignment of ``unembedding``.

    Raises:
        ValueError: The dtype is none of the three.

    Memory: at most 25 MiB of normed states and 20 MiB of partials, whatever ``R`` and ``V``.

    Source of the running sums: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """
    config = config or pinned_config(hidden.dtype, is_aligned(unembedding), bias is not None)
    options = LensOptions(unembedding, bias, softcap, float(logit_scale), config)
    n_rows = hidden.shape[0]
    best, target_z, logsumexp, entropy = (_empty(hidden, n_rows, torch.float32) for _ in range(4))
    argmax, rank = (_empty(hidden, n_rows, torch.int64) for _ in range(2))
    row_bytes = padded_width(hidden.shape[1]) * hidden.element_size()
    step = config.block_m * chunk_blocks(n_rows, row_bytes, config.block_m)
    with torch.cuda.device_of(hidden):
        for start in range(0, n_rows, step):
            rows = slice(start, start + step)
            x_hat = normed_rows(hidden[rows], norm, config.block_m)
            part_targets, part_z = (None, None) if targets is None else (targets[rows], target_z[rows])
            if targets is not None:
                _launch_targets(x_hat, part_targets, part_z, options)
            merged = (best[rows], argmax[rows], rank[rows], logsumexp[rows], entropy[rows])
            _launch_lens(x_hat, part_targets, part_z, merged, options)
    return lens_output(argmax, best, logsumexp, entropy, targets, target_z, rank, softcap)


def _empty(like: Tensor, shape, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _stride(vector: Tensor | None) -> int:
    return 0 if vector is None else vector.stride(0)


def product_flags(options: LensOptions) -> dict:
    """Compile-time arguments of both kernels that form logits."""
    return dict(
        HAS_BIAS=options.bias is not None,
        HAS_SCALE=options.logit_scale != 1.0,
        # The interpreter multiplies bfloat16 wrongly; products of fp32 copies are the same numbers.
        UPCAST=triton.knobs.runtime.interpret,
        # "ieee" has no tensor core instruction; three tf32 products keep fp32's accuracy.
        PRECISION="tf32x3" if options.unembedding.dtype == torch.float32 else "tf32",
        BLOCK_K=options.config.block_k,
    )


def row_flags(options: LensOptions, targets: bool) -> dict:
    """Compile-time arguments of both kernels that reduce logits."""
    return dict(HAS_TARGETS=targets, HAS_SOFTCAP=options.softcap is not None)


def target_rows(config: LensConfig) -> int:
    """Rows of a program of the target kernel: the fewest a warp group multiplies at once."""
    return min(64, config.block_m)


def _launch_targets(x_hat: Tensor, targets: Tensor, target_z: Tensor, options: LensOptions) -> None:
    weight, n_rows = options.unembedding, targets.shape[0]
    block_m = target_rows(options.config)
    _target_kernel[(triton.cdiv(n_rows, block_m),)](
        x_hat, weight, options.bias, targets, target_z,
        n_rows, *weight.shape, x_hat.shape[1], *weight.stride(),
        _stride(options.bias), _stride(targets), options.logit_scale,
        BLOCK_M=block_m, num_warps=TARGET_WARPS, num_stages=options.config.num_stages,
        **product_flags(options),
    )  # fmt: skip


def _launch_lens(
    x_hat: Tensor, targets: Tensor | None, target_z: Tensor | None, merged: tuple, options: LensOptions
) -> None:
    config, weight, n_rows = options.config, options.unembedding, merged[0].shape[0]
    row_blocks, tiles = x_hat.shape[0] // config.block_m, triton.cdiv(weight.shape[0], config.block_v)
    splits = config.splits or choose_splits(row_blocks, tiles, processor_count(weight.device))
    best, total, weighted = _empty(x_hat, (3, splits, n_rows), torch.float32)
    argmax, rank = _empty(x_hat, (2, splits, n_rows), torch.int32)
    parts = (best, argmax, rank, total, weighted)
    softcap = float(options.softcap or 0.0)
    flags = row_flags(options, targets is not None)
    _lens_kernel[(row_blocks * splits,)](
        x_hat, weight, options.bias, targets, target_z, *parts,
        n_rows, *weight.shape, splits, x_hat.shape[1], *weight.stride(),
        _stride(options.bias), _stride(targets), options.logit_scale, softcap,
        BLOCK_M=config.block_m, BLOCK_V=config.block_v,
        num_warps=config.num_warps, num_stages=config.num_stages, **flags, **product_flags(options),
    )  # fmt: skip
    merge_splits(parts, merged, softcap, flags)
