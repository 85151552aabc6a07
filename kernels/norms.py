"""The final norms a lens applies before the unembedding, and their plain-torch form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


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
