"""What people use instead of the op, each as its users write it.

Every function takes a `Problem` and returns those of the statistics it computes, under the names of `LensStats`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.norms import LayerNorm, Norm
from .problem import Problem

Statistics = dict[str, Tensor]
ROW_CHUNK = 256
VOCAB_CHUNK = 4096


def final_norm(hidden: Tensor, norm: Norm) -> Tensor:
    """The norm as torch has it, in the dtype of ``hidden``."""
    shape = hidden.shape[-1:]
    if norm is None:
        return hidden
    if isinstance(norm, LayerNorm):
        return F.layer_norm(hidden, shape, norm.weight, norm.bias, norm.eps)
    return F.rms_norm(hidden, shape, norm.weight + norm.offset if norm.offset else norm.weight, norm.eps)


def naive(problem: Problem) -> Statistics:
    """All logits, then one reduction after the other."""
    return _whole_logits(problem.hidden, problem.unembedding, problem.norm, problem.targets)


def _whole_logits(hidden: Tensor, unembedding: Tensor, norm: Norm, targets: Tensor) -> Statistics:
    logits = (final_norm(hidden, norm) @ unembedding.T).float()
    maximum = logits.max(-1)
    target_logit = logits.gather(-1, targets[:, None])
    logsumexp = logits.logsumexp(-1)
    log_p = logits - logsumexp[:, None]
    return {
        "argmax": maximum.indices,
        "max_logit": maximum.values,
        "logsumexp": logsumexp,
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "target_logit": target_logit[:, 0],
        "target_rank": (logits > target_logit).sum(-1),
    }


@cache
def _compiled():
    return torch.compile(_whole_logits, dynamic=False)


def compiled(problem: Problem) -> Statistics:
    """The naive expression under `torch.compile`."""
    return _compiled()(problem.hidden, problem.unembedding, problem.norm, problem.targets)


def row_chunks(problem: Problem) -> Statistics:
    """The naive expression on some rows at a time."""
    rows = zip(problem.hidden.split(ROW_CHUNK), problem.targets.split(ROW_CHUNK), strict=True)
    chunks = [_whole_logits(hidden, problem.unembedding, problem.norm, targets) for hidden, targets in rows]
    return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}


def vocab_chunks(problem: Problem) -> Statistics:
    """Some tokens at a time, with running reductions."""
    x_hat, targets = final_norm(problem.hidden, problem.norm), problem.targets[:, None]
    target_logit = (x_hat.float() * problem.unembedding[problem.targets].float()).sum(-1, keepdim=True)
    best = torch.full_like(target_logit, float("-inf"))
    total, weighted = torch.zeros_like(best), torch.zeros_like(best)
    argmax, rank = torch.zeros_like(targets), torch.zeros_like(targets)
    first = 0
    for weights in problem.unembedding.split(VOCAB_CHUNK):
        logits = (x_hat @ weights.T).float()
        maximum = logits.max(-1, keepdim=True)
        argmax = torch.where(maximum.values > best, maximum.indices + first, argmax)
        # The target's own column may beat the dot product above by rounding; it does not count.
        own = targets - first
        is_here = (own >= 0) & (own < len(weights))
        beats_itself = is_here & (logits.gather(-1, own.clamp(0, len(weights) - 1)) > target_logit)
        rank += (logits > target_logit).sum(-1, keepdim=True) - beats_itself.long()
        old, best = best, torch.maximum(best, maximum.values)
        p = (logits - best).exp()
        shift = (old - best).exp()
        total = total * shift + p.sum(-1, keepdim=True)
        weighted = weighted * shift + (p * logits).sum(-1, keepdim=True)
        first += len(weights)
    logsumexp = best + total.log()
    found = {
        "argmax": argmax,
        "max_logit": best,
        "logsumexp": logsumexp,
        "entropy": logsumexp - weighted / total,
        "target_logit": target_logit,
        "target_rank": rank,
    }
    return {name: value[:, 0] for name, value in found.items()}


def two_argsorts(problem: Problem) -> Statistics:
    """All log-probabilities, and their ranks by sorting twice, as the package tuned-lens finds them.

    On a CPU in numpy, as there; on a GPU in torch, where numpy would wait for the copy.
    """
    logits = (final_norm(problem.hidden, problem.norm) @ problem.unembedding.T).float()
    log_p = logits.log_softmax(-1)
    if log_p.is_cuda:
        order = log_p.argsort(-1, descending=True)
        ranks = order.argsort(-1)
    else:
        order = np.argsort(-log_p.numpy(), axis=-1)
        ranks = torch.from_numpy(np.argsort(order, axis=-1))
        order = torch.from_numpy(order)
    targets = problem.targets[:, None]
    return {
        "argmax": order[:, 0].clone(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "target_logprob": log_p.gather(-1, targets)[:, 0],
        "target_rank": ranks.gather(-1, targets)[:, 0],
    }


def liger(problem: Problem) -> Statistics:
    """Liger's fused linear cross-entropy, forward only: the loss of every row."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    x_hat = final_norm(problem.hidden, problem.norm)
    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")(problem.unembedding, x_hat, problem.targets)
    return {"target_logprob": -loss}


def cut_cross_entropy(problem: Problem) -> Statistics:
    """Apple's cut cross-entropy, forward only: the loss of every row."""
    from cut_cross_entropy import linear_cross_entropy

    x_hat = final_norm(problem.hidden, problem.norm)
    return {"target_logprob": -linear_cross_entropy(x_hat, problem.unembedding, problem.targets, reduction="none")}
