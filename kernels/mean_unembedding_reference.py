"""The unembedding averaged under the prediction of each row, in plain torch: what divergences and gradients need."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import LensHead, row_chunk, z_chunks


def mean_unembedding_reference(
    x_hat: Tensor, head: LensHead, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the unembedding's rows and of the bias under the softmax of each row's logits.

    With ``l_v = scale * (x_hat . w_v + b_v)`` and ``p = softmax(l)`` these are ``sum_v p_v w_v`` and ``sum_v p_v b_v``:
    attention with ``w`` as keys and as values. The gradient of logsumexp by ``x_hat`` is ``scale`` times the first.

    Args:
        x_hat: ``[R, d_embed]`` floating, behind the norm; the computation is in fp64 where it is, else in fp32.
        head: Unembedding ``[V, d_embed]``, bias and scale; its norm and projection are not applied.
        logsumexp: ``[R]``, of the logits, where it is known; None finds it on the way.

    Returns:
        Mean weights ``[R, d_embed]``, mean bias ``[R]`` (0 without one; a token of bias -inf has probability 0 and adds
        nothing) and logsumexp ``[R]``, in the dtype of the computation.

    Raises:
        ValueError: A softcap: then the logits are not linear, and no average of weights gives theirs.

    Memory: a chunk's logits and ``row_chunk`` rows of the result, whatever ``R`` and ``V``.

    Source of the running sums: Rabe and Staats 2021, arXiv 2112.05682, section 2.
    """
    if head.softcap is not None:
        raise ValueError(f"softcap: expected None, got {head.softcap}")
    x_hat = x_hat.to(torch.promote_types(x_hat.dtype, torch.float32))
    blocks = [_block(rows, head) for rows in x_hat.split(row_chunk(x_hat.device))]
    weights, bias, found = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return weights, bias, found if logsumexp is None else logsumexp


def _block(x_hat: Tensor, head: LensHead) -> tuple[Tensor, Tensor, Tensor]:
    mean_weights = torch.zeros_like(x_hat)
    mass, mean_bias = x_hat.new_zeros(2, len(x_hat))
    peak = x_hat.new_full((len(x_hat),), float("-inf"))
    for first, weights, z in z_chunks(x_hat, head):
        new_peak = torch.maximum(peak, z.amax(-1))
        # Before there is a logit that is finite, there is nothing to move.
        factor = torch.where(peak == float("-inf"), 0.0, (peak - new_peak).exp())
        p = z.sub_(new_peak.masked_fill(new_peak == float("-inf"), 0.0)[:, None]).exp_()
        mean_weights.mul_(factor[:, None]).addmm_(p, weights)
        mass = mass * factor + p.sum(-1)
        if head.bias is not None:
            chunk = head.bias[first : first + len(weights)].to(p.dtype)
            mean_bias = mean_bias * factor + p @ chunk.masked_fill(chunk == float("-inf"), 0.0)
        peak = new_peak
    return mean_weights / mass[:, None], mean_bias / mass, peak + mass.log()
