"""The plain-torch twin of the fused lens: the definition the other backends are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .lens_common import LensOutput, in_row_blocks, lens_output, linear_logits, soft_cap, target_z
from .norms import Norm, apply_norm

VOCAB_CHUNK = 2048
ROW_CHUNK = 512
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

    Memory: ``ROW_CHUNK * VOCAB_CHUNK`` logits at a time, whatever ``R`` and ``V``.
    """

    def reduce(rows: Tensor, row_targets: Tensor | None) -> LensOutput:
        x_hat = apply_norm(rows, norm, dtype)
        return _reduce_block(x_hat, unembedding, row_targets, bias, softcap, logit_scale)

    return in_row_blocks(reduce, hidden, targets, ROW_CHUNK)


def _reduce_block(x_hat, unembedding, targets, bias, softcap, logit_scale) -> LensOutput:
    n_rows, n_vocab = x_hat.shape[0], unembedding.shape[0]
    best = x_hat.new_full((n_rows,), float("-inf"))  # largest z so far
    argmax = torch.zeros(n_rows, dtype=torch.int64, device=x_hat.device)
    peak = best.clone()  # largest capped logit so far
    total = torch.zeros_like(best)  # sum of exp(l - peak)
    weighted = torch.zeros_like(best)  # sum of (l - peak) exp(l - peak)
    t_z = None if targets is None else target_z(x_hat, unembedding, targets, bias, logit_scale)
    rank = torch.zeros_like(argmax)
    for first in range(0, n_vocab, VOCAB_CHUNK):
        columns = slice(first, min(first + VOCAB_CHUNK, n_vocab))
        z = linear_logits(x_hat, unembedding[columns], None if bias is None else bias[columns], logit_scale)
        chunk_best, chunk_arg = _lowest_argmax(z)
        argmax = torch.where(chunk_best > best, chunk_arg + first, argmax)
        best = torch.maximum(best, chunk_best)
        if targets is not None:
            ids = torch.arange(columns.start, columns.stop, device=z.device)
            beats = (z > t_z[:, None]) | ((z == t_z[:, None]) & (ids < targets[:, None]))
            rank += (beats & (ids != targets[:, None])).sum(-1)
        logits = soft_cap(z, softcap)
        new_peak = torch.maximum(peak, soft_cap(chunk_best, softcap))
        total, weighted = _rescale(total, weighted, peak - new_peak)
        # A token of logit -inf has probability 0 and adds nothing, also where there is nothing else yet.
        shifted = logits - new_peak.masked_fill(new_peak == float("-inf"), 0.0)[:, None]
        weight = shifted.exp()
        total = total + weight.sum(-1)
        weighted = weighted + weight.mul_(shifted.clamp_(min=LOWEST)).sum(-1)
        peak = new_peak
    logsumexp = peak + total.log()
    entropy = total.log() - weighted / total
    return lens_output(argmax, best, logsumexp, entropy, targets, t_z, rank, softcap)


def _lowest_argmax(z: Tensor) -> tuple[Tensor, Tensor]:
    """Row maximum and its lowest index; torch promises no order among equals."""
    best = z.amax(-1)
    ids = torch.arange(z.shape[-1], device=z.device)
    return best, torch.where(z == best[:, None], ids, z.shape[-1]).amin(-1)


def _rescale(total: Tensor, weighted: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Move the sums to a new peak; ``shift = old - new <= 0``, not finite while there is nothing to move."""
    shift = torch.where(total == 0, 0.0, shift)
    factor = shift.exp()
    return total * factor, (weighted + shift * total) * factor
