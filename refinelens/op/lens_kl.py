"""`lens_kl`: the divergence of a layer's prediction from the output's, with its gradient by the layer's states.

For whoever trains something in front of the lens, such as the translators of a tuned lens. One frozen unembedding reads
layers and output, so that the gradient needs no more than its mean under either prediction: rows x d_model numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.reference import LensHead, apply_norm, fused_lens_reference, row_chunk, z_chunks
from .backends import backend_function, choose_backend
from .divergences import mean_unembedding


def lens_kl(
    states: Tensor,
    final_states: Tensor,
    head: LensHead,
    *,
    final_is_normed: bool = False,
    backend: str = "auto",
    check_values: bool = True,
) -> Tensor:
    """KL divergence of the lens's predictions from the output's, ``KL(p_final || p_layer)``, differentiable.

    With ``x_hat`` a normed state, ``l`` its logits and ``u = sum_v p_v w_v`` the unembedding averaged under the final
    prediction, ``KL = (logsumexp(l) - E_final[l]) - (logsumexp(l_final) - E_final[l_final])`` where ``E_final[l]`` is
    linear in ``u``; and its gradient by ``x_hat`` is ``scale * (u_layer - u)``: the cross-entropy's, with the labels'
    mean in the place of a label. So a call costs two matrix products over the rows of ``states`` and two over those of
    ``final_states``, forward and backward together, and stores rows x d_model numbers for the backward pass.

    Args:
        states: ``[..., d_model]`` floating: what the lens reads; gradients go to these alone.
        final_states: Of the last layer, broadcastable to the shape of ``states``, such as ``[n, d_model]`` beside
            ``[n_layers, n, d_model]``; each of its rows is computed once.
        head: Norm and unembedding, which stay as they are. Its weight may have another dtype than the states.
        final_is_normed: The final states are behind norm (and projection) already.
        backend: As in ``fused_lens``.
        check_values: False spares a GPU the wait for the result: then a row that is not finite gives NaN.

    Returns:
        ``states.shape[:-1]``, fp32 (fp64 for fp64 states), nats, not negative. Rounding of logits of size ``m`` is
        about ``1e-7 * m``, and the gradient carries none of it.

    Raises:
        InputError: Shapes or devices that do not fit, or a row that is not finite.

    Computes in fp32, of fp64 states in fp64. By Triton normed states are rounded to the dtype of the weight first, as
    the lens's are, so that beside one of half precision divergence and gradient have its rounding. A softcap makes the
    logits no longer linear in ``x_hat``: then both predictions are formed once more side by side, a chunk of the
    vocabulary at a time, in plain torch.

    Source of the objective: Belrose et al. 2023, arXiv 2303.08112, section 3.
    """
    _check(states, final_states, head, final_is_normed)
    dtype = torch.float64 if states.dtype == torch.float64 else torch.float32
    plain = replace(head, norm=None, projection=None)
    run = _Linear if head.softcap is None else _Capped
    with torch.autocast(states.device.type, enabled=False):  # the products are in ``dtype``
        x_hat = _normed(states, head, dtype)
        with torch.no_grad():
            final = final_states.to(dtype) if final_is_normed else _normed(final_states, head, dtype)
        kl = run.apply(x_hat, final, plain, backend)
    if check_values and not bool(kl.detach().isfinite().all()):
        rows = (~kl.detach().isfinite()).nonzero()
        raise InputError(
            f"states and final_states: expected finite values, got a divergence of {float(kl[tuple(rows[0])])} at "
            f"{rows[0].tolist()}; {len(rows)} rows are affected"
        )
    return kl


def _check(states: Tensor, final_states: Tensor, head: LensHead, final_is_normed: bool) -> None:
    if not isinstance(head, LensHead):
        raise InputError(f"head: expected a LensHead, got {type(head).__name__}; make one of unembedding and norm")
    for name, tensor in (("states", states), ("final_states", final_states)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise InputError(f"{name}: expected a floating tensor, got {got}")
        if tensor.device != head.weight.device:
            raise InputError(f"{name}: expected device {head.weight.device} of the unembedding, got {tensor.device}")
    widths = {"states": head.d_model, "final_states": head.weight.shape[1] if final_is_normed else head.d_model}
    for (name, width), tensor in zip(widths.items(), (states, final_states), strict=True):
        if tensor.dim() < 1 or tensor.shape[-1] != width:
            raise InputError(f"{name}: expected shape [..., {width}], got {list(tensor.shape)}")
    try:
        fits = torch.broadcast_shapes(states.shape[:-1], final_states.shape[:-1]) == states.shape[:-1]
    except RuntimeError:
        fits = False
    if not fits:
        raise InputError(
            f"final_states: expected a shape that broadcasts to {list(states.shape)}, got {list(final_states.shape)}"
        )


def _normed(states: Tensor, head: LensHead, dtype: torch.dtype) -> Tensor:
    """Behind norm and projection, in ``dtype``; differentiable in the states alone."""
    norm = head.norm
    if norm is not None:
        vectors = {name: own.detach() for name in ("weight", "bias") if (own := getattr(norm, name)) is not None}
        norm = replace(norm, **vectors)
    x_hat = apply_norm(states, norm, dtype)
    return x_hat if head.projection is None else x_hat @ head.projection.detach().to(dtype).T


class _Linear(torch.autograd.Function):
    """Of normed states; without a softcap."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, final: Tensor, head: LensHead, backend: str) -> Tensor:
        x_hat, final = _operands(x_hat, head, backend), _operands(final, head, backend)
        mean, bias, final_logsumexp = _mean_rows(final, head, backend)
        if ctx.needs_input_grad[0]:
            own_mean, _, logsumexp = _mean_rows(x_hat, head, backend)
            ctx.save_for_backward(own_mean.sub_(mean).mul_(head.scale))
        else:
            logsumexp = _logsumexp(x_hat, head, backend)
        expected = head.scale * (torch.linalg.vecdot(x_hat.to(mean.dtype), mean) + bias)
        final_expected = head.scale * (torch.linalg.vecdot(final.to(mean.dtype), mean) + bias)
        return ((logsumexp - expected) - (final_logsumexp - final_expected)).clamp(min=0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():  # `once_differentiable` does not see that what was saved depends on the states
            raise InputError("create_graph: expected False, lens_kl has a first derivative alone")
        (gradient,) = ctx.saved_tensors
        return grad[..., None] * gradient, None, None, None


class _Capped(torch.autograd.Function):
    """The same with a softcap: ``d l / d z = 1 - (l / softcap)^2``."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, final: Tensor, head: LensHead, backend: str) -> Tensor:
        width, shape = x_hat.shape[-1], x_hat.shape[:-1]
        if final.shape[:-1] != shape[len(shape) - final.dim() + 1 :]:  # not one for all: one beside each
            final = final.expand_as(x_hat)
        final = final.reshape(-1, width)
        x = x_hat.reshape(math.prod(shape) // max(len(final), 1), len(final), width)
        own = choose_backend(x.device.type, backend)[0]
        own = "cpp" if own == "cpp" else "reference"  # of the same fp32 logits as below: Triton would round the states
        sums = _logsumexp(x, head, own), _logsumexp(final, head, own)
        kl, gradient = x.new_zeros(x.shape[:-1]), torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        step = max(1, row_chunk(x.device) // (len(x) + 1))
        for first in range(0, len(final), step):
            at = slice(first, first + step)
            own = None if gradient is None else gradient[:, at]
            _add_capped(x[:, at], final[at], sums[0][:, at], sums[1][at], head, kl[:, at], own)
        if gradient is not None:
            ctx.save_for_backward(gradient.view_as(x_hat))
        return kl.view(shape).clamp(min=0.0)

    backward = _Linear.backward


def _add_capped(
    x: Tensor, final: Tensor, logsumexp: Tensor, final_logsumexp: Tensor, head: LensHead, kl: Tensor,
    gradient: Tensor | None,
) -> None:  # fmt: skip
    """Add divergences ``[L, n]`` and their gradients ``[L, n, d_model]`` into the last two."""
    cap, (n_layers, n_rows, width) = head.softcap, x.shape
    assert cap is not None
    own_sums = torch.zeros_like(x)
    for _, weights, z in z_chunks(torch.cat([final, x.flatten(0, 1)]), head):
        logits = z.div_(cap).tanh_().view(n_layers + 1, n_rows, -1)  # in units of the cap
        log_p = logits * cap
        log_p[0].sub_(final_logsumexp[:, None])
        log_p[1:].sub_(logsumexp[..., None])
        p = log_p.exp()
        # Under a softcap even a bias of -inf leaves a finite logit, so that no product here is 0 * inf.
        kl += (p[0] * log_p[0]).sum(-1) - torch.einsum("nv,lnv->ln", p[0], log_p[1:])
        if gradient is not None:
            slope = logits[1:].square_().neg_().add_(1.0)
            own = p[1:].sub_(p[0]).mul_(slope)
            own_sums.view(-1, width).addmm_(own.view(-1, own.shape[-1]), weights)
    if gradient is not None:
        gradient += own_sums.mul_(head.scale)


def _operands(x_hat: Tensor, head: LensHead, backend: str) -> Tensor:
    """As the products take them: Triton multiplies in the dtype of the weights, but for fp64, the reference's."""
    by_triton = x_hat.dtype != torch.float64 and choose_backend(x_hat.device.type, backend)[0] == "triton"
    return x_hat.to(head.weight.dtype) if by_triton else x_hat


def _mean_rows(x_hat: Tensor, head: LensHead, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """`mean_unembedding` of rows of any shape."""
    shape = x_hat.shape
    weights, bias, logsumexp = mean_unembedding(x_hat.reshape(-1, shape[-1]), head, backend=backend)
    return weights.view(shape), bias.view(shape[:-1]), logsumexp.view(shape[:-1])


def _logsumexp(x_hat: Tensor, head: LensHead, backend: str) -> Tensor:
    rows = x_hat.reshape(-1, x_hat.shape[-1])
    if rows.dtype == torch.float64 or not len(rows):
        found = fused_lens_reference(rows, head, dtype=rows.dtype)
    else:
        found = backend_function(choose_backend(rows.device.type, backend)[0])(rows, head)
    return found.logsumexp.view(x_hat.shape[:-1])
