"""Who takes part in a benchmark: the op's own paths, what people use instead, and the bare products.

Every function takes a `Problem` and returns those of the statistics it computes, under the names of `LensStats`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import InputError
from ..kernels.reference import LayerNorm, Norm
from ..op import backends
from ..op.fused_lens import fused_lens
from .problem import Problem

Statistics = dict[str, Tensor]
ROW_CHUNK = 256
VOCAB_CHUNK = 4096
NAIVE = "naive"  # what every other is compared with
OURS, BASELINE, PRODUCT = "ours", "baseline", "product"


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
def _compiled(mode: str | None):
    return torch.compile(_whole_logits, dynamic=False, mode=mode)


def compiled(problem: Problem, mode: str | None = None) -> Statistics:
    """The naive expression under `torch.compile`."""
    return _compiled(mode)(problem.hidden, problem.unembedding, problem.norm, problem.targets)


def row_chunks(problem: Problem, size: int = ROW_CHUNK) -> Statistics:
    """The naive expression on some rows at a time."""
    rows = zip(problem.hidden.split(size), problem.targets.split(size), strict=True)
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
        order = torch.from_numpy(np.argsort(-log_p.numpy(), axis=-1))
        ranks = torch.from_numpy(np.argsort(order.numpy(), axis=-1))
    targets = problem.targets[:, None]
    return {
        "argmax": order[:, 0].clone(),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "target_logprob": log_p.gather(-1, targets)[:, 0],
        "target_rank": ranks.gather(-1, targets)[:, 0],
    }


def transformer_lens(problem: Problem) -> Statistics:
    """TransformerLens's own function on a bridge of this norm and unembedding: 64 rows at a time, its default."""
    from transformer_lens.tools.analysis.logit_lens import logit_readout

    found = logit_readout(_bridge(problem), problem.hidden, targets=problem.targets, return_type="log_probs")
    return {
        "entropy": found.entropy,
        "target_logprob": found.values[:, 0],
        "target_rank": found.target_ranks[:, 0],
    }


def _bridge(problem: Problem) -> SimpleNamespace:
    """As much of a TransformerBridge as its readout asks for."""
    norm = problem.norm
    return SimpleNamespace(
        cfg=SimpleNamespace(d_model=problem.hidden.shape[1], normalization_type=norm and "LN"),
        ln_final=_FinalNorm(norm).eval(),
        unembed=True,
        W_U=problem.unembedding.T,
        b_U=problem.unembedding.new_zeros(len(problem.unembedding)),
    )


class _FinalNorm(torch.nn.Module):
    def __init__(self, norm: Norm):
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return final_norm(hidden, self.norm)


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


@dataclass(frozen=True)
class Competitor:
    """One way to compute the statistics, or a bare matrix product, which computes none."""

    name: str
    title: str  # as the table calls it
    run: Callable[[Problem], Statistics]
    group: str  # OURS, BASELINE or PRODUCT
    logit_bytes: int = 0  # bytes held at once for every logit of the problem
    compiles: bool = False  # the first call with a shape takes seconds
    keeps: str | None = None  # what the first call with an unembedding makes for later ones
    obstacle: Callable[[Problem], str | None] = lambda problem: None  # why it cannot run on a problem

    def logits_of_a_row(self, problem: Problem) -> int:
        """Bytes held at once for every row."""
        return self.logit_bytes * len(problem.unembedding)


def _fused(**options) -> Callable[[Problem], Statistics]:
    def run(problem: Problem) -> Statistics:
        stats = fused_lens(problem.hidden, problem.unembedding, problem.norm, problem.targets, **options)
        return dict(stats.items()) | {"target_logprob": stats.target_logprob}

    return run


def _torch_product(problem: Problem) -> Statistics:
    torch.mm(problem.hidden, problem.unembedding.T)
    return {}


def _own_product(problem: Problem) -> Statistics:
    from ..op.cpu import product_only

    product_only(problem.hidden, problem.unembedding)
    return {}


def _needs_cpp(problem: Problem) -> str | None:
    if backends.choose_backend(problem.hidden.device.type)[0] == "cpp":
        return None
    return "needs a CPU and the C++ extension"


def _needs(
    module: str, package: str, dtypes: tuple[torch.dtype, ...], needs_cuda: bool = True
) -> Callable[[Problem], str | None]:
    def obstacle(problem: Problem) -> str | None:
        if needs_cuda and (reason := _needs_cuda(problem)):
            return reason
        if problem.hidden.dtype not in dtypes:
            return f"does not take {str(problem.hidden.dtype).removeprefix('torch.')}"
        return None if importlib.util.find_spec(module) else f"not installed; pip install {package}"

    return obstacle


def _needs_cuda(problem: Problem) -> str | None:
    return None if problem.hidden.is_cuda else "needs a CUDA device"


def _needs_kernel(problem: Problem) -> str | None:
    backend, why = backends.choose_backend(problem.hidden.device.type)
    return f"no kernel here ({why})" if backend == "reference" else None


HALF = (torch.bfloat16, torch.float16)
ANY = (*HALF, torch.float32)
_ALL = (
    Competitor("fp32", "refinelens, fused kernel", _fused(precision="fp32"), OURS, obstacle=_needs_kernel),
    Competitor("certified", "refinelens, certified", _fused(precision="certified"), OURS,
               keeps="its index of the unembedding", obstacle=_needs_cpp),
    Competitor("reference", "refinelens, plain torch", _fused(backend="reference"), OURS),
    Competitor(NAIVE, "torch, all logits (naive)", naive, BASELINE, logit_bytes=18),
    Competitor("compiled", "torch.compile of naive", compiled, BASELINE, logit_bytes=16, compiles=True),
    Competitor("max-autotune", "torch.compile, max-autotune", partial(compiled, mode="max-autotune"), BASELINE,
               logit_bytes=16, compiles=True, obstacle=_needs_cuda),
    Competitor("row-chunks", f"torch, {ROW_CHUNK} rows at a time", row_chunks, BASELINE),
    Competitor("vocab-chunks", f"torch, {VOCAB_CHUNK} tokens at a time", vocab_chunks, BASELINE),
    Competitor("argsort", "log_softmax, two argsorts", two_argsorts, BASELINE, logit_bytes=34),
    Competitor("transformer-lens", "TransformerLens, logit_readout", transformer_lens, BASELINE,
               obstacle=_needs("transformer_lens", "transformer-lens", ANY, needs_cuda=False)),
    Competitor("liger", "Liger linear cross-entropy", liger, BASELINE,
               obstacle=_needs("liger_kernel", "liger-kernel", ANY)),
    Competitor("cce", "Apple cut cross-entropy", cut_cross_entropy, BASELINE,
               obstacle=_needs("cut_cross_entropy", "cut-cross-entropy", HALF)),
    Competitor("mm", "matrix product: torch.mm", _torch_product, PRODUCT, logit_bytes=4),
    Competitor("product", "matrix product: refinelens", _own_product, PRODUCT, obstacle=_needs_cpp),
)  # fmt: skip
COMPETITORS = {competitor.name: competitor for competitor in _ALL}


def choose(baselines: str, competitors: dict[str, Competitor] = COMPETITORS) -> list[Competitor]:
    """Our own paths, the naive expression, the products, and of the baselines those that were asked for.

    Args:
        baselines: ``all``, ``none`` or names separated by commas.
        competitors: By name.

    Raises:
        InputError: A name that no baseline has.
    """
    known = [c.name for c in competitors.values() if c.group == BASELINE]
    names = {"all": known, "none": []}.get(baselines, baselines.split(","))
    for name in names:
        if name not in known:
            raise InputError(f"``baselines``: expected all, none or some of {','.join(known)}, got {name!r}")
    return [c for c in competitors.values() if c.group != BASELINE or c.name in (NAIVE, *names)]
