"""The softmax average of the unembedding's rows on a GPU: attention over the vocabulary, its keys the values, too.

Two products, a chunk of rows and of the vocabulary at a time: one makes logits and leaves probabilities in a scratch
buffer of bounded size, one multiplies these by the same weights. A row of accumulators as wide as the model, which one
kernel for both would need, does not fit the registers. Beside weights of half precision a probability is the sum of two
numbers of theirs: rounded to one, up to 2^-9 of its weight in an average would be lost.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LensOptions, processor_count
from .fused_lens import fused_lens_triton
from .kernel import UNALIGNED, VARYING, log2_logits, stride_of
from .norm_kernel import normed_rows, padded_width
from .reference import LensHead
from .tiles import SCRATCH_BYTES, even_chunks, plain_options, z_tile

MAX_ROWS = 2048  # of a chunk; more would leave too few tokens to a chunk
_LOG2E = tl.constexpr(1.4426950408889634)
# Probabilities are stored times 2**15, so that those of rare tokens are normal numbers of float16; it cancels.
_RAISED = tl.constexpr(15.0)
_NOT_COMPILED_FOR = [*VARYING, "col_blocks", "n_steps", "first_id", "padded_rows"]
_UNALIGNED = [*UNALIGNED, "mass_ptr", "mean_bias_ptr"]


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _probability_kernel(
    x_ptr, w_ptr, bias_ptr, logsumexp_ptr,  # x_hat, w, [n_vocab], [R] fp32
    p_ptr, mass_ptr, mean_bias_ptr,  # [padded R, stride_p], [n_tiles, R] fp32, [n_tiles, R] fp32
    n_rows, n_vocab, d_model, row_blocks, first_tile,
    width, stride_wv, stride_wd, stride_b, stride_p, second, scale, softcap,
    AS_LOGS: tl.constexpr, IN_TWO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: one tile. Columns past the vocabulary get probability 0.

    With ``IN_TWO`` what rounding took from a probability is stored, too, ``second`` columns to the right; with
    ``AS_LOGS`` log2 of probabilities, and no sums.
    """
    block = tl.program_id(0) % row_blocks  # neighbours read the same tile of the unembedding
    tile = tl.program_id(0) // row_blocks
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_rows
    offs_v = tl.arange(0, BLOCK_V)
    ids = (first_tile + tile) * BLOCK_V + offs_v
    token = tl.minimum(ids, n_vocab - 1).to(tl.int64)
    z = z_tile(
        x_ptr, w_ptr, bias_ptr, offs_m, token, d_model, width, stride_wv, stride_wd, stride_b, scale,
        HAS_BIAS, HAS_SCALE, INTERPRETED, PRECISION, BLOCK_M, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    # Rows of the padding get probability 0.
    logsumexp = tl.load(logsumexp_ptr + offs_m, mask=mask_m, other=float("inf")) * _LOG2E
    log_p = log2_logits(z, softcap, HAS_SOFTCAP) - logsumexp[:, None]
    p_ptrs = p_ptr + offs_m.to(tl.int64)[:, None] * stride_p + (tile * BLOCK_V + offs_v)[None, :]
    if AS_LOGS:
        tl.store(p_ptrs, log_p)
    else:
        p = tl.where((ids < n_vocab)[None, :], tl.exp2(log_p + _RAISED), 0.0)
        stored = p.to(p_ptr.dtype.element_ty)
        tl.store(p_ptrs, stored)
        if IN_TWO:
            tl.store(p_ptrs + second, (p - stored.to(tl.float32)).to(p_ptr.dtype.element_ty))
        out = tile.to(tl.int64) * n_rows + offs_m
        tl.store(mass_ptr + out, tl.sum(p, 1), mask=mask_m)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + token * stride_b).to(tl.float32)
            bias = tl.where(bias == float("-inf"), 0.0, bias)
            tl.store(mean_bias_ptr + out, tl.sum(p * bias[None, :], 1), mask=mask_m)


def launch_probabilities(
    x_hat: Tensor, logsumexp: Tensor, p: Tensor, sums: tuple[Tensor, Tensor] | None, tiles: range, options: LensOptions
) -> None:
    """Write probabilities of ``tiles`` times ``2**15`` into ``p``, and their sums.

    Args:
        x_hat: ``[padded R, width]``, whole row blocks.
        logsumexp: ``[R]`` fp32.
        p: Contiguous, ``[padded R, tokens]`` fp32, or of half precision ``[padded R, 2 * tokens]`` for two parts.
        sums: For the sums of p and of p times bias over each tile, ``[n_tiles, R]`` fp32; without them ``p`` gets
            log2 of probabilities.
        tiles: Of the vocabulary, as wide as those of ``options``.
        options: Of the head.
    """
    head, row_blocks = options.head, len(x_hat) // options.config.block_m
    mass, mean_bias = sums or (None, None)
    _probability_kernel[(row_blocks * len(tiles),)](
        x_hat, head.weight, head.bias, logsumexp, p, mass, mean_bias,
        len(logsumexp), *head.weight.shape, row_blocks, tiles.start, x_hat.shape[1], *head.weight.stride(),
        stride_of(head.bias), p.stride(0), len(tiles) * options.config.block_v, options.scale, options.softcap,
        **probability_flags(options, as_logs=sums is None),
    )  # fmt: skip


def probability_flags(options: LensOptions, as_logs: bool) -> dict:
    """What `launch_probabilities` compiles the kernel for."""
    config = options.config
    flags = options.product_flags() | options.logit_flags() | dict(HAS_SOFTCAP=options.head.softcap is not None)
    flags |= dict(AS_LOGS=as_logs, IN_TWO=_is_in_two(options) and not as_logs)
    launch = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return dict(BLOCK_M=config.block_m, BLOCK_V=config.block_v, **flags, **launch)


def _is_in_two(options: LensOptions) -> bool:
    """Whether a probability is the sum of two numbers."""
    return options.head.weight.dtype != torch.float32


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _average_kernel(
    p_ptr, w_ptr, sums_ptr,  # [padded R, stride_p], w, [n_splits, padded R, width] fp32
    n_vocab, d_model, row_blocks, col_blocks, first_id, n_steps, n_splits, padded_rows, width,
    stride_p, second, stride_wv, stride_wd,
    IN_TWO: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: a block of rows and of columns of the sums, over one split of a chunk of the vocabulary."""
    program = tl.program_id(0)
    block = program % row_blocks
    col = program // row_blocks % col_blocks
    split = program // (row_blocks * col_blocks)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = col * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    p_ptrs = p_ptr + offs_m[:, None] * stride_p + offs_k[None, :]  # of bounded size: int32 has room
    w_ptrs = w_ptr + offs_k.to(tl.int64)[:, None] * stride_wv + offs_n.to(tl.int64)[None, :] * stride_wd
    mask_n = (offs_n < d_model)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for step in range(split * n_steps // n_splits, (split + 1) * n_steps // n_splits):
        k = step * BLOCK_K
        p = tl.load(p_ptrs + k)
        mask_k = (offs_k < n_vocab - first_id - k)[:, None]
        w = tl.load(w_ptrs + tl.cast(first_id + k, tl.int64) * stride_wv, mask=mask_k & mask_n, other=0.0)
        if INTERPRETED:
            p = p.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(p, w, acc, input_precision=PRECISION)
        if IN_TWO:
            rest = tl.load(p_ptrs + second + k)
            if INTERPRETED:
                rest = rest.to(tl.float32)
            acc = tl.dot(rest, w, acc, input_precision=PRECISION)
    out = sums_ptr + (split * padded_rows + offs_m).to(tl.int64)[:, None] * width + offs_n[None, :]
    inside = (offs_n < width)[None, :]
    tl.store(out, tl.load(out, mask=inside, other=0.0) + acc, mask=inside)


def add_averages(p: Tensor, sums: Tensor, first_id: int, options: LensOptions) -> None:
    """Add ``p @ weights`` of the tokens from ``first_id`` on to ``sums`` ``[n_splits, padded R, width]`` fp32."""
    head, flags = options.head, average_flags(options)
    n_splits, padded_rows, width = sums.shape
    tokens = p.shape[1] // (2 if flags["IN_TWO"] else 1)
    if tokens % flags["BLOCK_K"]:
        raise ValueError(f"p: expected a multiple of {flags['BLOCK_K']} tokens, got {tokens}")
    row_blocks, col_blocks = padded_rows // flags["BLOCK_M"], triton.cdiv(width, flags["BLOCK_N"])
    _average_kernel[(row_blocks * col_blocks * n_splits,)](
        p, head.weight, sums, *head.weight.shape, row_blocks, col_blocks, first_id, tokens // flags["BLOCK_K"],
        n_splits, padded_rows, width, p.stride(0), tokens, *head.weight.stride(), **flags,
    )  # fmt: skip


def average_flags(options: LensOptions) -> dict:
    """What `add_averages` compiles the kernel for."""
    config = options.config
    launch = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    blocks = dict(BLOCK_M=config.block_m, BLOCK_N=config.block_v, IN_TWO=_is_in_two(options))
    return blocks | options.product_flags() | launch


def mean_unembedding_triton(
    x_hat: Tensor, head: LensHead, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the unembedding averaged under each row's prediction, as `mean_unembedding_reference`, in fp32.

    Beside weights of half precision a probability is rounded to the sum of two numbers of their dtype, of bfloat16 to
    2^-18 of itself, of float16 to fp32's own; averages are divided by the sum of probabilities.

    Args:
        x_hat: ``[R, d_embed]`` bfloat16, float16 or float32, any strides.
        head: Unembedding ``[V, d_embed]`` of the dtype of ``x_hat``, any strides; bias and scale.
        logsumexp: ``[R]`` fp32; None finds it by `fused_lens_triton`.

    Raises:
        ValueError: A softcap, or a dtype that is none of the three.

    Memory: 32 MiB of probabilities and at most as much of sums, whatever ``R`` and ``V``.
    """
    if head.softcap is not None:
        raise ValueError(f"softcap: expected None, got {head.softcap}")
    head = replace(head, norm=None, projection=None)
    if logsumexp is None:
        logsumexp = fused_lens_triton(x_hat, head).logsumexp
    logsumexp = logsumexp.to(torch.float32)
    options = plain_options(head)
    mean_weights = torch.empty(x_hat.shape, dtype=torch.float32, device=x_hat.device)
    mean_bias = torch.zeros(len(x_hat), dtype=torch.float32, device=x_hat.device)
    row_bytes = 4 * padded_width(x_hat.shape[1])
    step = even_chunks(len(x_hat), min(MAX_ROWS, max(options.config.block_m, SCRATCH_BYTES // row_bytes)))
    with torch.cuda.device_of(x_hat):
        for start in range(0, len(x_hat), step):
            chunk = slice(start, start + step)
            rows = normed_rows(x_hat[chunk], None, options.config.block_m)
            sums, mass, with_bias = _sums(rows, logsumexp[chunk].contiguous(), options)
            torch.div(sums[: len(mass), : x_hat.shape[1]], mass[:, None], out=mean_weights[chunk])
            if head.bias is not None:
                torch.div(with_bias, mass, out=mean_bias[chunk])
    return mean_weights, mean_bias, logsumexp


def _sums(x_hat: Tensor, logsumexp: Tensor, options: LensOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the vocabulary of ``p w`` ``[padded R, width]``, of p and of ``p b`` ``[R]``, all times ``2**15``."""
    (padded_rows, width), block_v, device = x_hat.shape, options.config.block_v, x_hat.device
    n_tiles = triton.cdiv(options.head.vocab_size, block_v)
    row_tile = (2 if _is_in_two(options) else 1) * block_v  # numbers of a row of a tile
    tiles = even_chunks(n_tiles, SCRATCH_BYTES // (padded_rows * row_tile * x_hat.element_size()))
    p = torch.empty(padded_rows * tiles * row_tile, dtype=x_hat.dtype, device=device)
    n_splits = _splits(padded_rows, width, options)
    sums = torch.zeros(n_splits, padded_rows, width, dtype=torch.float32, device=device)
    parts = torch.empty(2, tiles, len(logsumexp), dtype=torch.float32, device=device)
    mass, with_bias = torch.zeros(2, len(logsumexp), dtype=torch.float32, device=device)
    for first in range(0, n_tiles, tiles):
        own = range(first, min(first + tiles, n_tiles))
        of_tiles = p[: padded_rows * len(own) * row_tile].view(padded_rows, -1)
        launch_probabilities(x_hat, logsumexp, of_tiles, (parts[0], parts[1]), own, options)
        add_averages(of_tiles, sums, first * block_v, options)
        mass += parts[0, : len(own)].sum(0)
        if options.head.bias is not None:
            with_bias += parts[1, : len(own)].sum(0)
    return sums.sum(0), mass, with_bias


def _splits(padded_rows: int, width: int, options: LensOptions) -> int:
    """Parts of a chunk of the vocabulary that programs sum apart: as many as keep two programs on every processor."""
    blocks = padded_rows // options.config.block_m * triton.cdiv(width, options.config.block_v)
    return max(1, 2 * processor_count(options.head.weight.device) // blocks)
