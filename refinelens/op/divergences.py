"""How far every layer's prediction is from the output's: KL and Jensen-Shannon divergence, without stored logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.mean_unembedding_reference import mean_unembedding_reference
from ..kernels.reference import LensHead, LensStats, Norm, apply_norm, row_chunk, soft_cap, z_chunks
from . import gpu
from .backends import checked_operands, choose_backend

_CPP_ROWS = 2048  # of all layers, normed and in the order of positions, beside which the unembedding is read once


@torch.no_grad()
def kl_to_final(
    hidden: Tensor,
    stats: LensStats,
    unembedding: Tensor | nn.Linear | LensHead,
    norm: Norm | nn.Module = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    last_is_normed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """KL divergence of every layer's prediction from the last layer's, ``KL(p_final || p_layer)``, in nats.

    With ``p`` the final prediction, ``KL = sum_v p_v (log p_v - l_v + logsumexp(l))`` for the logits
    ``l = s * (x_hat . w + b)`` of a layer, and ``sum_v p_v l_v = s * (x_hat . u + sum_v p_v b_v)`` with
    ``u = sum_v p_v w_v``. So all layers cost two matrix products over the rows of the last one. A softcap is
    not linear: then the logits of every layer are formed once more, as in `jsd_to_final`.

    Args:
        hidden: ``[n_layers + 1, ..., d_model]``, the last layer last.
        stats: ``fused_lens`` of ``hidden`` with the arguments that follow.
        unembedding: As in ``fused_lens``, and so the next four.
        last_is_normed: The last layer's states are behind norm (and projection) already, and so are its statistics.
        backend: As in ``fused_lens``.

    Returns:
        ``[n_layers + 1, ...]`` fp32, not negative; the rounding of logits of size ``m`` is about ``1e-7 * m``. By
        Triton states are rounded behind the norm as the lens's are, and in bfloat16 probabilities to 2^-18 of each.

    Raises:
        InputError: As ``fused_lens``, and statistics of another shape than ``hidden``.

    In fp32, by the backend: Triton, C++ or plain torch.
    """
    hidden, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    _check_stats(hidden, stats)
    if gpu.runs_by_triton(hidden, backend):
        expected = gpu.expected_logits(hidden, stats.logsumexp, head, last_is_normed)
    elif head.softcap is None:
        expected = _against_final(
            hidden, stats, head, last_is_normed, partial(_expected_linear, backend), row_chunk(hidden.device)
        )
    elif _runs_cpp(hidden, backend):
        found = _against_final(hidden, stats, head, last_is_normed, partial(_side_by_side, "kl"), _group_rows(hidden))
        return found.clamp_(min=0.0)
    else:
        expected = _against_final(hidden, stats, head, last_is_normed, _expected_capped)
    # Both terms carry the same rounding of p, which the difference takes away; the last layer's is 0.
    log_p = expected - stats.logsumexp
    return (log_p[-1] - log_p).clamp(min=0.0)


@torch.no_grad()
def jsd_to_final(
    hidden: Tensor,
    stats: LensStats,
    unembedding: Tensor | nn.Linear | LensHead,
    norm: Norm | nn.Module = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    last_is_normed: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Jensen-Shannon divergence between every layer's prediction and the last layer's, in nats: 0 to ln 2.

    ``JSD = (KL(p || m) + KL(q || m)) / 2`` of a layer's p and the final q, with ``m = (p + q) / 2``: symmetric, and
    finite where one of them is 0. The logits of every layer are formed once more, beside those of the last one, a chunk
    of the vocabulary at a time: a product like that of the lens.

    Args:
        hidden: As in `kl_to_final`, and so all others.

    Returns:
        ``[n_layers + 1, ...]`` fp32; the last layer's is 0.

    Raises:
        InputError: As `kl_to_final`.

    In fp32, by the backend: Triton, C++ or plain torch.
    """
    hidden, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    _check_stats(hidden, stats)
    if gpu.runs_by_triton(hidden, backend):
        found = gpu.jensen_shannon(hidden, stats.logsumexp, head, last_is_normed)
    elif _runs_cpp(hidden, backend):
        found = _against_final(hidden, stats, head, last_is_normed, partial(_side_by_side, "jsd"), _group_rows(hidden))
    else:
        found = _against_final(hidden, stats, head, last_is_normed, _jensen_shannon)
    found = found.clamp_(0.0, math.log(2.0))
    found[-1] = 0.0
    return found


def mean_unembedding(
    x_hat: Tensor, head: LensHead, logsumexp: Tensor | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """`mean_unembedding_reference` by the backend for a device; fp64 is the reference's."""
    by_reference = x_hat.dtype == torch.float64 or not len(x_hat)
    chosen = "reference" if by_reference else choose_backend(x_hat.device.type, backend)[0]
    if chosen == "cpp":
        from .cpu import mean_unembedding_cpu

        return mean_unembedding_cpu(x_hat, head, logsumexp)
    if chosen == "triton":
        from ..kernels.mean_unembedding import mean_unembedding_triton

        return mean_unembedding_triton(x_hat, head, logsumexp)
    return mean_unembedding_reference(x_hat, head, logsumexp)


def _runs_cpp(hidden: Tensor, backend: str) -> bool:
    return choose_backend(hidden.device.type, backend)[0] == "cpp"


def _group_rows(hidden: Tensor) -> int:
    """Positions whose layers C++ takes at a time."""
    return max(1, _CPP_ROWS // len(hidden))


def _side_by_side(kind: str, x_hat: Tensor, logsumexp: Tensor, head: LensHead) -> Tensor:
    from .cpu import divergence_cpu

    return divergence_cpu(x_hat, logsumexp, head, kind)


def _check_stats(hidden: Tensor, stats: LensStats) -> None:
    """Raises InputError where there are no layers, or statistics of other rows."""
    if hidden.dim() < 2 or hidden.shape[0] == 0 or stats.logsumexp.shape != hidden.shape[:-1]:
        raise InputError(
            f"hidden and stats: expected hidden [n_layers + 1, ..., d_model] and its own statistics, got "
            f"{list(hidden.shape)} and statistics of {list(stats.logsumexp.shape)}"
        )


def _against_final(
    hidden: Tensor,
    stats: LensStats,
    head: LensHead,
    last_is_normed: bool,
    sum_of: Callable[[Tensor, Tensor, LensHead], Tensor],
    rows: int | None = None,
) -> Tensor:
    """A sum over the vocabulary for every layer beside the last one, fp32 ``[n_layers + 1, ...]``.

    Args:
        hidden: ``[n_layers + 1, ..., d_model]``.
        stats: Its statistics.
        head: Of the lens.
        last_is_normed: See `kl_to_final`.
        sum_of: Called with normed rows ``[n_layers + 1, n, d_model]``, their logsumexps ``[n_layers + 1, n]`` and the
            head; gives ``[n_layers + 1, n]``.
        rows: At a time; by default as many as keep the logits of all layers to a chunk.
    """
    states = hidden.reshape(hidden.shape[0], -1, hidden.shape[-1])
    logsumexp = stats.logsumexp.reshape(len(hidden), -1)
    rows = max(1, row_chunk(hidden.device) // len(hidden)) if rows is None else rows

    def normed(block: Tensor) -> Tensor:
        if not last_is_normed:
            return apply_norm(block, head.norm)
        return torch.cat([apply_norm(block[:-1], head.norm), apply_norm(block[-1:], None)])

    with torch.autocast(hidden.device.type, enabled=False):  # the products are fp32
        found = [
            sum_of(normed(block), own, head)
            for block, own in zip(states.split(rows, dim=1), logsumexp.split(rows, dim=1), strict=True)
        ]
    return torch.cat(found, 1).view_as(stats.logsumexp)


def _expected_linear(backend: str, x_hat: Tensor, logsumexp: Tensor, head: LensHead) -> Tensor:
    """Every layer's logits averaged under the final prediction, ``[n_layers + 1, N]``; there is no softcap."""
    mean_weights, mean_bias, _ = mean_unembedding(x_hat[-1], head, logsumexp[-1], backend)
    # Row by row and layer by layer: other bits beside other rows a matrix product could give.
    expected = torch.stack([torch.linalg.vecdot(layer, mean_weights) for layer in x_hat])
    return head.scale * (expected + mean_bias)


def _expected_capped(x_hat: Tensor, logsumexp: Tensor, head: LensHead) -> Tensor:
    """The same with a softcap, from the logits of every layer and of the last one, side by side."""
    expected, mass = torch.zeros_like(logsumexp), torch.zeros_like(logsumexp[-1])
    for logits in _logits_of_layers(x_hat, head):
        p = (logits[-1] - logsumexp[-1, :, None]).exp()
        expected += torch.einsum("lnv,nv->ln", logits, p)
        mass += p.sum(-1)
    return expected / mass


def _jensen_shannon(x_hat: Tensor, logsumexp: Tensor, head: LensHead) -> Tensor:
    """``[n_layers + 1, N]``; a token that neither can be adds nothing."""
    found, smallest = torch.zeros_like(logsumexp), torch.finfo(torch.float32).tiny
    for logits in _logits_of_layers(x_hat, head):
        p = logits.sub_(logsumexp[..., None]).exp_()  # [n_layers + 1, N, chunk]
        for layer, own in enumerate(p):
            mean = ((own + p[-1]) / 2).clamp_(min=smallest)
            found[layer] += (torch.xlogy(own, own / mean) + torch.xlogy(p[-1], p[-1] / mean)).sum(-1) / 2
    return found


def _logits_of_layers(x_hat: Tensor, head: LensHead) -> Iterator[Tensor]:
    """Logits of normed rows of all layers, ``[n_layers + 1, N, chunk]``, a chunk of the vocabulary at a time."""
    n_layers, n_rows, _ = x_hat.shape
    for _, _, z in z_chunks(x_hat.flatten(0, 1), head):
        logits = z if head.softcap is None else soft_cap(z, head.softcap)
        yield logits.view(n_layers, n_rows, z.shape[-1])
