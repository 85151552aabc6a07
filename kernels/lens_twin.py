"""The plain-torch twin of the fused lens: the definition the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .lens_common import LensOutput, in_row_blocks, lens_output, row_chunk, soft_cap, z_chunks
from .norms import Norm, apply_norm

LOWEST = -3e38  # finite stand-in for -inf: 0 * -inf would be NaN


def fused_lens_twin(
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
