"""The softmax average of the unembedding's rows in plain torch: the reference of every other backend of it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .reference import LensHead, fused_lens_reference, z_chunks


def mean_unembedding_reference(
    x_hat: Tensor, head: LensHead, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of the unembedding averaged under each row's prediction: attention whose keys are its values, too.

    Args:
        x_hat: ``[R, d_embed]`` floating, normed states.
        head: Unembedding ``[V, d_embed]``, bias and scale; its norm and projection are not used.
        logsumexp: ``[R]`` of the rows' logits in nats; None finds it.

    Returns:
        ``sum_v p_v w_v`` ``[R, d_embed]``, ``sum_v p_v b_v`` ``[R]`` and logsumexp ``[R]``, in fp64 where ``x_hat`` is,
        else in fp32. A token that cannot occur (bias -inf) has p 0 and adds nothing. Sums are divided by that of p.

    Raises:
        ValueError: A softcap: then the logits are not linear, and no average of weights gives theirs.

    Memory: a chunk of logits, whatever ``V``.
    """
    if head.softcap is not None:
        raise ValueError(f"softcap: expected None, got {head.softcap}")
    x_hat = x_hat.to(torch.promote_types(x_hat.dtype, torch.float32))
    if logsumexp is None:
        own = replace(head, norm=None, projection=None)
        logsumexp = fused_lens_reference(x_hat, own, dtype=x_hat.dtype).logsumexp
    mean_weights = torch.zeros_like(x_hat)
    mass, mean_bias = x_hat.new_zeros(2, len(x_hat), 1)
    for first, weights, z in z_chunks(x_hat, head):
        p = z.sub_(logsumexp.to(z.dtype)[:, None]).exp_()
        mean_weights.addmm_(p, weights)
        mass += p.sum(-1, keepdim=True)
        if head.bias is not None:
            bias = head.bias[first : first + len(weights)].to(p.dtype)
            mean_bias += p @ bias.masked_fill(bias == float("-inf"), 0.0)[:, None]
    return mean_weights / mass, (mean_bias / mass)[:, 0], logsumexp
