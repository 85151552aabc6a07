"""The plain-torch twin of the fused lens: the definition the other backends are tested against."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .norms import Norm, apply_norm

VOCAB_CHUNK = 2048
ROW_CHUNK = 512
LOWEST = -3e38  # finite stand-in for -inf: 0 * -inf would be NaN


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
    blocks = []
    for start in range(0, max(hidden.shape[0], 1), ROW_CHUNK):
        rows = slice(start, start + ROW_CHUNK)
        x_hat = apply_norm(hidden[rows], norm, dtype)
        block_targets = None if targets is None else targets[rows]
        blocks.append(_reduce_block(x_hat, unembedding, block_targets, bias, softcap, logit_scale))
    return LensOutput(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True)))


def _reduce_block(x_hat, unembedding, targets, bias, softcap, logit_scale) -> LensOutput:
    n_rows, n_vocab = x_hat.shape[0], unembedding.shape[0]
    best = x_hat.new_full((n_rows,), float("-inf"))  # largest z so far
    argmax = torch.zeros(n_rows, dtype=torch.int64, device=x_hat.device)
    peak = best.clone()  # largest capped logit so far
    total = torch.zeros_like(best)  # sum of exp(l - peak)
    weighted = torch.zeros_like(best)  # sum of (l - peak) exp(l - peak)
    if targets is not None:
        t_bias = None if bias is None else bias[targets].to(x_hat.dtype)
        t_z = (x_hat * unembedding[targets].to(x_hat.dtype)).sum(-1)
        t_z = (t_z if t_bias is None else t_z + t_bias) * logit_scale
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
    max_logit = soft_cap(best, softcap)
    if targets is None:
        return LensOutput(argmax, max_logit, logsumexp, entropy, None, None)
    t_logit, rank = settle_ties(argmax, max_logit, targets, soft_cap(t_z, softcap), rank)
    return LensOutput(argmax, max_logit, logsumexp, entropy, t_logit, rank)


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
