"""What the fused lens computes, in plain torch: its norms, its result, and the reference of every other backend.

Imports no Triton: the lens on a CPU, and tests on any machine, use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

LOWEST = -3e38  # finite stand-in for -inf: 0 * -inf would be NaN


@dataclass(frozen=True, eq=False)  # tensors have no one answer to ==
class LayerNorm:
    """Layer normalisation: ``(x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    Args:
        weight: ``[d_model]`` floating, or None for ones.
        bias: ``[d_model]`` floating, or None for zeros.
        eps: Added to the (biased) variance.

    Source: Ba, Kiros and Hinton 2016, arXiv 1607.06450, equation 4. Squares are fp32 in plain torch and Triton, as in
    models themselves: they overflow beyond 1.8e19, and such a row becomes zeros.
    """

    kind: ClassVar[str] = "layer"
    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-5

    @property
    def offset(self) -> float:
        """Always 0: layer norms scale by the stored weight itself."""
        return 0.0


@dataclass(frozen=True, eq=False)
class RMSNorm:
    """Root-mean-square normalisation: ``x / sqrt(mean(x^2) + eps) * (offset + weight)``.

    Args:
        weight: ``[d_model]`` floating, or None for ones (then ``offset`` is not used).
        eps: Added to the mean square.
        offset: Added to the stored weight: 0 for Llama, 1 for Gemma.

    Source: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4. For squares see `LayerNorm`.
    """

    kind: ClassVar[str] = "rms"
    weight: Tensor | None
    eps: float = 1e-6
    offset: float = 0.0

    @property
    def bias(self) -> None:
        """Always None: the norm has no bias."""
        return None


Norm = LayerNorm | RMSNorm | None


def kind_of(norm: Norm) -> str:
    """``"layer"``, ``"rms"`` or ``"none"``: a norm's name where only numbers and tensors can be handed on."""
    return "none" if norm is None else norm.kind


def norm_from(kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float) -> Norm:
    """The norm of a name from `kind_of` and its fields."""
    if kind == "none":
        return None
    return LayerNorm(weight, bias, eps) if kind == "layer" else RMSNorm(weight, eps, offset)


def apply_norm(hidden: Tensor, norm: Norm, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normalise ``hidden`` ``[..., d_model]`` in ``dtype`` and return it in ``dtype``, unrounded."""
    x = hidden.to(dtype)
    if norm is None:
        return x
    if isinstance(norm, LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    if norm.weight is not None:
        x = x * (norm.weight.to(dtype) + norm.offset)
    if norm.bias is not None:
        x = x + norm.bias.to(dtype)
    return x


class LensOutput(NamedTuple):
    """What every backend returns for ``R`` rows; the last two are None without targets.

    Logits are ``softcap * tanh(z / softcap)`` (or ``z`` without softcap) of
    ``z = logit_scale * (x_hat . w_v + bias_v)``. The cap is strictly increasing, so argmax and rank
    are decided on ``z``, where fp32 does not saturate.
    """

    argmax: Tensor  # [R] int64, lowest id among equals
    max_logit: Tensor  # [R] float
    logsumexp: Tensor  # [R] float, nats
    entropy: Tensor  # [R] float, nats
    target_logit: Tensor | None  # [R] float
    target_rank: Tensor | None  # [R] int64, number of tokens that beat the target


def soft_cap(z: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(z / softcap)``, or ``z`` unchanged (Gemma 2, arXiv 2408.00118, section 2)."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


# Rows at a time, and logits: on a CPU 4 MiB of them in fp32 are read back from cache, a GPU takes more to be busy.
_ROW_CHUNK, _CHUNK_LOGITS = 512, 1 << 20
_ROW_CHUNK_CUDA, _CHUNK_LOGITS_CUDA = 8192, 1 << 24
MAX_CHUNK = 8192


def row_chunk(device: torch.device) -> int:
    """Rows that plain torch takes at a time."""
    return _ROW_CHUNK_CUDA if device.type == "cuda" else _ROW_CHUNK


def z_chunks(
    x_hat: Tensor, unembedding: Tensor, bias: Tensor | None, logit_scale: float
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The vocabulary in chunks: first id, weights ``[C, d_model]`` and ``z`` ``[R, C]`` in the dtype of ``x_hat``.

    The caller may overwrite ``z``; the next chunk does.
    """
    n_rows, n_vocab = x_hat.shape[0], unembedding.shape[0]
    most = _CHUNK_LOGITS_CUDA if x_hat.is_cuda else _CHUNK_LOGITS
    width = max(1, min(most // max(n_rows, 1), MAX_CHUNK, n_vocab))
    buffer = x_hat.new_empty(n_rows * width)
    for first in range(0, n_vocab, width):
        weights = unembedding[first : first + width].to(x_hat.dtype)
        z = buffer[: n_rows * len(weights)].view(n_rows, len(weights))
        torch.mm(x_hat, weights.T, out=z)
        if bias is not None:
            z += bias[first : first + width].to(x_hat.dtype)
        if logit_scale != 1.0:
            z *= logit_scale
        yield first, weights, z


def linear_logits(x_hat: Tensor, unembedding: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """``logit_scale * (x_hat @ unembedding.T + bias)`` in the dtype of ``x_hat``: ``[R, V]``."""
    z = x_hat @ unembedding.to(x_hat.dtype).T
    if bias is not None:
        z += bias.to(x_hat.dtype)
    return z * logit_scale if logit_scale != 1.0 else z


def settle_ties(argmax: Tensor, max_logit: Tensor, targets: Tensor, logit: Tensor, rank: Tensor):
    """Make rank 0 hold exactly when the argmax is the target.

    A target's logit computed apart from the main product may differ from its own column there by
    rounding; the main product, which decided the argmax, decides here too.
    """
    is_top = argmax == targets
    rank = torch.where(is_top, 0, rank.clamp(min=1))
    return torch.where(is_top, max_logit, logit), rank


def lens_output(
    argmax: Tensor,
    best: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    targets: Tensor | None,
    t_z: Tensor | None,
    rank: Tensor | None,
    softcap: float | None,
) -> LensOutput:
    """The result from uncapped maxima and target logits; ``t_z`` and ``rank`` are not read without targets."""
    max_logit = soft_cap(best, softcap)
    if targets is None:
        return LensOutput(argmax, max_logit, logsumexp, entropy, None, None)
    t_logit, rank = settle_ties(argmax, max_logit, targets, soft_cap(t_z, softcap), rank)
    return LensOutput(argmax, max_logit, logsumexp, entropy, t_logit, rank)


def in_row_blocks(
    reduce: Callable[[Tensor, Tensor | None], LensOutput], hidden: Tensor, targets: Tensor | None, size: int
) -> LensOutput:
    """``reduce(hidden, targets)`` on at most ``size`` rows at a time, put together again."""
    starts = range(0, max(len(hidden), 1), size)
    blocks = [
        reduce(hidden[start : start + size], None if targets is None else targets[start : start + size])
        for start in starts
    ]
    fields = (None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True))
    return type(blocks[0])(*fields)


def fused_lens_reference(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    dtype: torch.dtype = torch.float32,
) -> LensOutput:
    """Lens statistics of ``hidden`` ``[R, d_model]`` by running reductions over vocabulary chunks.

    Args:
        hidden: ``[R, d_model]`` floating.
        unembedding: ``[V, d_model]`` floating.
        norm: Final norm, or None.
        targets: ``[R]`` int64 in ``[0, V)``, or None.
        bias: ``[V]`` floating, or None.
        softcap: Positive cap of the logits, or None.
        logit_scale: Positive factor of the logits, applied before the cap.
        dtype: Dtype of the whole computation; float64 gives the truth of the tests.

    Memory: two buffers of a chunk's logits and ``row_chunk`` normed rows, whatever ``R`` and ``V``.

    Source of the running sums: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """

    def reduce(rows: Tensor, row_targets: Tensor | None) -> LensOutput:
        x_hat = apply_norm(rows, norm, dtype)
        return _reduce_block(x_hat, unembedding, row_targets, bias, softcap, logit_scale)

    return in_row_blocks(reduce, hidden, targets, row_chunk(hidden.device))


def _reduce_block(x_hat, unembedding, targets, bias, softcap, logit_scale) -> LensOutput:
    best = x_hat.new_full((len(x_hat),), float("-inf"))  # largest z so far
    argmax = torch.zeros(len(x_hat), dtype=torch.int64, device=x_hat.device)
    peak = best.clone()  # largest capped logit so far
    total = torch.zeros_like(best)  # sum of exp(l - peak)
    weighted = torch.zeros_like(best)  # sum of (l - peak) exp(l - peak)
    t_z = None if targets is None else _target_z(x_hat, unembedding, targets, bias, logit_scale)
    rank = torch.zeros_like(argmax)
    buffer = None
    for first, _, z in z_chunks(x_hat, unembedding, bias, logit_scale):
        buffer = z.new_empty(z.numel()) if buffer is None else buffer
        work = buffer[: z.numel()].view_as(z)
        chunk_best = z.amax(-1)
        (rising,) = (chunk_best > best).nonzero(as_tuple=True)  # after the first chunks, few rows
        argmax[rising] = first + z[rising].argmax(-1)  # documented to return the first among equals
        best = torch.maximum(best, chunk_best)
        if targets is not None:
            rank += _count_beating(z, t_z, targets - first, work)
        new_peak = torch.maximum(peak, soft_cap(chunk_best, softcap))
        total, weighted = _rescale(total, weighted, peak - new_peak)
        # A token of logit -inf has probability 0 and adds nothing, also where there is nothing else yet.
        shift = new_peak.masked_fill(new_peak == float("-inf"), 0.0)[:, None]
        shifted = torch.sub(soft_cap(z, softcap), shift, out=z)
        weight = torch.exp(shifted, out=work)
        total = total + weight.sum(-1)
        weighted = weighted + weight.mul_(shifted.clamp_(min=LOWEST)).sum(-1)
        peak = new_peak
    logsumexp = peak + total.log()
    entropy = total.log() - weighted / total
    return lens_output(argmax, best, logsumexp, entropy, targets, t_z, rank, softcap)


def _target_z(
    x_hat: Tensor, unembedding: Tensor, targets: Tensor, bias: Tensor | None, logit_scale: float
) -> Tensor:
    """The targets' own ``z``, ``[R]``, by one dot product a row in the dtype of ``x_hat``."""
    z = (x_hat * unembedding[targets].to(x_hat.dtype)).sum(-1)
    if bias is not None:
        z = z + bias[targets].to(x_hat.dtype)
    return z * logit_scale


def _count_beating(z: Tensor, t_z: Tensor, own: Tensor, work: Tensor) -> Tensor:
    """Columns of ``z`` that beat a target at column ``own``, which may lie outside; ``work`` is overwritten.

    An equal logit beats the target from a lower id only, so left of the target one comparison with the
    next lower float does; the target's own column is left out, whatever it holds. There is no float below
    -inf: such a target is compared as if its column were here.
    """
    width, floor = z.shape[-1], t_z.new_full((), float("-inf"))
    is_left = (own >= width) & (t_z > floor)
    bar = torch.where(is_left, torch.nextafter(t_z, floor), t_z)
    count = torch.gt(z, bar[:, None], out=work).sum(-1).to(torch.int64)  # exact: fewer than 2^24 ones
    (here,) = ((own >= 0) & ~is_left).nonzero(as_tuple=True)
    z, t, own, ids = z[here], t_z[here, None], own[here, None], torch.arange(width, device=z.device)
    count[here] += ((z == t) & (ids < own)).sum(-1) - ((z > t) & (ids == own)).sum(-1)
    return count


def _rescale(total: Tensor, weighted: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Move the sums to a new peak; ``shift = old - new <= 0``, not finite while there is nothing to move."""
    shift = torch.where(total == 0, 0.0, shift)
    factor = shift.exp()
    return total * factor, (weighted + shift * total) * factor
