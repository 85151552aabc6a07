"""Divergences of every layer's prediction from the last layer's on a GPU, without stored logits.

Where logits are linear, those of all layers averaged under the final prediction follow from the average of the
unembedding's rows, a product over the rows of the last layer alone. A softcap, or the Jensen-Shannon divergence, needs
the logits of every layer once more: the final log-probabilities of a chunk of positions and of the vocabulary are left
in a scratch buffer of bounded size, and a second product forms the logits of all layers beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import X_HAT_BYTES, LensOptions
from .kernel import UNALIGNED, VARYING, log2_logits, stride_of
from .mean_unembedding import launch_probabilities, mean_unembedding_triton
from .norm_kernel import PROGRAM_ELEMENTS, normed_rows, padded_width
from .reference import LOWEST, LensHead
from .tiles import SCRATCH_BYTES, even_chunks, plain_options, z_tile

NARROW = 64  # tokens of a tile
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LOWEST = tl.constexpr(LOWEST)
_SMALLEST = tl.constexpr(2.0**-126)
_NOT_COMPILED_FOR = [*VARYING, "n_positions"]
_UNALIGNED = [*UNALIGNED, "sums_ptr", "mass_ptr", "mean_bias_ptr", "expected_ptr"]


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _divergence_kernel(
    x_ptr, w_ptr, bias_ptr, logsumexp_ptr, log_q_ptr,  # x_hat, w, [n_vocab], [R] fp32, [padded N, stride_q] fp32
    sums_ptr, mass_ptr,  # [n_tiles, R] fp32
    n_rows, n_positions, n_vocab, d_model, row_blocks, first_tile,
    width, stride_wv, stride_wd, stride_b, stride_q, scale, softcap,
    JENSEN_SHANNON: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: one tile. Row ``r`` is a layer of position ``r % n_positions``, whose log2 probabilities are there."""
    block = tl.program_id(0) % row_blocks  # neighbours read the same tile of the unembedding
    tile = tl.program_id(0) // row_blocks
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_rows
    offs_v = tl.arange(0, BLOCK_V)
    ids = (first_tile + tile) * BLOCK_V + offs_v
    mask_v = (ids < n_vocab)[None, :]
    token = tl.minimum(ids, n_vocab - 1).to(tl.int64)
    z = z_tile(
        x_ptr, w_ptr, bias_ptr, offs_m, token, d_model, width, stride_wv, stride_wd, stride_b, scale,
        HAS_BIAS, HAS_SCALE, INTERPRETED, PRECISION, BLOCK_M, BLOCK_V, BLOCK_K,
    )  # fmt: skip
    logits = log2_logits(z, softcap, HAS_SOFTCAP)
    position = (offs_m % n_positions).to(tl.int64)
    log_q = tl.load(log_q_ptr + position[:, None] * stride_q + (tile * BLOCK_V + offs_v)[None, :])
    q = tl.where(mask_v, tl.exp2(log_q), 0.0)
    out = tile.to(tl.int64) * n_rows + offs_m
    if JENSEN_SHANNON:
        logsumexp = tl.load(logsumexp_ptr + offs_m, mask=mask_m, other=0.0) * _LOG2E
        log_p = logits - logsumexp[:, None]
        p = tl.where(mask_v, tl.exp2(log_p), 0.0)
        # A token that cannot be has probability 0 and has to add 0: both logarithms stay finite.
        log_mean = tl.log2(tl.maximum(p + q, _SMALLEST)) - 1.0
        terms = p * (tl.maximum(log_p, _LOWEST) - log_mean) + q * (tl.maximum(log_q, _LOWEST) - log_mean)
        tl.store(sums_ptr + out, tl.sum(terms, 1) * (0.5 * _LN2), mask=mask_m)
    else:
        tl.store(sums_ptr + out, tl.sum(q * tl.maximum(logits, _LOWEST), 1) * _LN2, mask=mask_m)
        tl.store(mass_ptr + out, tl.sum(q, 1), mask=mask_m)


def jensen_shannon_options(options: LensOptions) -> LensOptions:
    """With tiles of half as many tokens: beside two logarithms and two probabilities a logit they spill."""
    width = min(options.config.block_v, NARROW)
    return replace(options, config=replace(options.config, block_v=width, tail_v=width))


def divergence_flags(options: LensOptions, jensen_shannon: bool) -> dict:
    """What the kernel of divergences is compiled for."""
    config = options.config
    flags = options.product_flags() | options.logit_flags() | dict(HAS_SOFTCAP=options.head.softcap is not None)
    launch = dict(num_warps=config.num_warps, num_stages=config.num_stages)
    return dict(JENSEN_SHANNON=jensen_shannon, BLOCK_M=config.block_m, BLOCK_V=config.block_v, **flags, **launch)


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _expected_kernel(
    x_ptr, mean_ptr, mean_bias_ptr, expected_ptr,  # x_hat, [N, d_model] fp32, [N] fp32, [R] fp32
    n_rows, n_positions, d_model, width, scale, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program: whole rows times the average of the unembedding at their positions."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < n_rows
    mask = mask_m[:, None] & (offs_d < d_model)[None, :]
    position = (offs_m % n_positions).to(tl.int64)
    x = tl.load(x_ptr + offs_m.to(tl.int64)[:, None] * width + offs_d[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + position[:, None] * d_model + offs_d[None, :], mask=mask, other=0.0)
    mean_bias = tl.load(mean_bias_ptr + position, mask=mask_m, other=0.0)
    tl.store(expected_ptr + offs_m, scale * (tl.sum(x * mean, 1) + mean_bias), mask=mask_m)


def expected_flags(width: int) -> dict:
    """What the kernel of expected logits is compiled for, with padded rows of ``width``."""
    block_d = triton.next_power_of_2(width)
    block_m = max(1, PROGRAM_ELEMENTS // block_d)
    return dict(BLOCK_M=block_m, BLOCK_D=block_d, num_warps=min(16, block_m * block_d // 256))


def expected_logits_triton(
    hidden: Tensor, logsumexp: Tensor, head: LensHead, last_is_normed: bool = False
) -> Tensor:
    """Every layer's logits averaged under the final prediction, ``[n_layers + 1, N]`` fp32.

    The normed states are rounded once, to the operands' dtype, as those of the lens are.

    Args:
        hidden: ``[n_layers + 1, N, d_model]`` bfloat16, float16 or float32, any strides, the last layer last.
        logsumexp: ``[n_layers + 1, N]`` fp32 of the same rows, in nats; the last layer's is read.
        head: Norm and unembedding ``[V, d_model]`` of the dtype of ``hidden``, any strides; without a projection.
        last_is_normed: The last layer's states are behind the norm already.

    Memory: 25 MiB of normed states (at least those of one position) and that of `mean_unembedding_triton`, or, with a
    softcap, of `jensen_shannon_triton`.
    """
    if head.softcap is not None:
        return _over_vocabulary(hidden, logsumexp, head, last_is_normed, jensen_shannon=False)
    options = plain_options(head)
    found = torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for part, x_hat, final in _normed_layers(hidden, last_is_normed, options):
            n_positions, (n_rows, width) = len(final), x_hat.shape
            n_rows = len(hidden) * n_positions
            mean, mean_bias, _ = mean_unembedding_triton(final[:, : head.d_model], head, logsumexp[-1, part])
            expected = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
            flags = expected_flags(width)
            _expected_kernel[(triton.cdiv(n_rows, flags["BLOCK_M"]),)](
                x_hat, mean, mean_bias, expected, n_rows, n_positions, head.d_model, width, options.scale, **flags
            )
            found[:, part] = expected.view(len(hidden), -1)
    return found


def jensen_shannon_triton(
    hidden: Tensor, logsumexp: Tensor, head: LensHead, last_is_normed: bool = False
) -> Tensor:
    """The Jensen-Shannon divergence of every layer's prediction from the last one's, ``[n_layers + 1, N]`` fp32, nats.

    ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``; rounding may leave it outside of 0 to ln 2. The
    arguments are those of `expected_logits_triton`, of whose logsumexps all are read.

    Memory: 25 MiB of normed states (at least those of one position), 32 MiB of final log-probabilities and a quarter
    MiB of sums for every layer, whatever the positions and ``V``.
    """
    return _over_vocabulary(hidden, logsumexp, head, last_is_normed, jensen_shannon=True)


def _over_vocabulary(
    hidden: Tensor, logsumexp: Tensor, head: LensHead, last_is_normed: bool, jensen_shannon: bool
) -> Tensor:
    """Sums over the vocabulary beside the final prediction, ``[n_layers + 1, N]``."""
    options = plain_options(head)
    options = jensen_shannon_options(options) if jensen_shannon else options
    found = torch.empty(hidden.shape[:2], dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        for part, x_hat, final in _normed_layers(hidden, last_is_normed, options):
            own = logsumexp[:, part].to(torch.float32).contiguous()
            sums, mass = _sums(x_hat, final, own, options, jensen_shannon)
            found[:, part] = (sums if jensen_shannon else sums / mass).view(len(hidden), -1)
    return found


def _sums(
    x_hat: Tensor, final: Tensor, logsumexp: Tensor, options: LensOptions, jensen_shannon: bool
) -> tuple[Tensor, Tensor]:
    """Sums ``[R]`` of layers ``x_hat`` over the vocabulary, and of the final probabilities where they are needed."""
    head, config, device = options.head, options.config, x_hat.device
    n_rows, n_positions, block_v = logsumexp.numel(), logsumexp.shape[1], config.block_v
    padded, n_tiles = triton.cdiv(n_positions, config.block_m) * config.block_m, triton.cdiv(head.vocab_size, block_v)
    tiles = even_chunks(n_tiles, SCRATCH_BYTES // (4 * padded * block_v))
    scratch = torch.empty(padded * tiles * block_v, dtype=torch.float32, device=device)
    parts = torch.empty(2, tiles, n_rows, dtype=torch.float32, device=device)
    sums, mass = torch.zeros(2, n_rows, dtype=torch.float32, device=device)
    row_blocks = triton.cdiv(n_rows, config.block_m)
    teacher = normed_rows(final, None, config.block_m)
    for first in range(0, n_tiles, tiles):
        own = range(first, min(first + tiles, n_tiles))
        log_q = scratch[: padded * len(own) * block_v].view(padded, -1)
        launch_probabilities(teacher, logsumexp[-1], log_q, None, own, options)
        _divergence_kernel[(row_blocks * len(own),)](
            x_hat, head.weight, head.bias, logsumexp, log_q, parts[0], parts[1],
            n_rows, n_positions, *head.weight.shape, row_blocks, first, x_hat.shape[1], *head.weight.stride(),
            stride_of(head.bias), log_q.stride(0), options.scale, options.softcap,
            **divergence_flags(options, jensen_shannon),
        )  # fmt: skip
        sums += parts[0, : len(own)].sum(0)
        if not jensen_shannon:
            mass += parts[1, : len(own)].sum(0)
    return sums, mass


def _normed_layers(
    hidden: Tensor, last_is_normed: bool, options: LensOptions
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Normed states a chunk of positions at a time: the positions, all layers ``[padded R, width]``, the last one.

    Row ``l * n + i`` is layer ``l`` of position ``i`` of ``n``.
    """
    n_layers, n_positions, d_model = hidden.shape
    norm, block_m = options.head.norm, options.config.block_m
    position_bytes = n_layers * padded_width(d_model) * hidden.element_size()
    step = even_chunks(n_positions, max(1, X_HAT_BYTES // position_bytes))
    for start in range(0, n_positions, step):
        part = slice(start, start + step)
        block = hidden[:, part]
        x_hat = normed_rows(block.reshape(-1, d_model), norm, block_m)
        final = slice((n_layers - 1) * block.shape[1], n_layers * block.shape[1])
        if last_is_normed:
            x_hat[final, :d_model] = block[-1]
        yield part, x_hat, x_hat[final]
