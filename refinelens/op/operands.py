"""What may go into a lens: shapes, dtypes and devices that fit together."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.norms import LayerNorm, Norm, RMSNorm

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Raise ``InputError``, showing both values, unless these operands make logits together."""
    for name, value in (("hidden", hidden), ("unembedding", unembedding)):
        if not isinstance(value, Tensor):
            raise InputError(f"{name}: expected a tensor, got {type(value).__name__}")
    if hidden.dim() < 1 or unembedding.dim() != 2 or hidden.shape[-1] != unembedding.shape[1]:
        raise InputError(
            "hidden and unembedding: expected shapes [..., d_model] and [vocab_size, d_model], got "
            f"{list(hidden.shape)} and {list(unembedding.shape)}"
        )
    if unembedding.shape[0] == 0 or unembedding.shape[1] == 0:
        raise InputError(f"unembedding: expected at least one token and one dimension, got {list(unembedding.shape)}")
    if hidden.dtype not in DTYPES or hidden.dtype != unembedding.dtype:
        raise InputError(
            "hidden and unembedding: expected one dtype of float32, float16, bfloat16, got "
            f"{hidden.dtype} and {unembedding.dtype}"
        )
    if not isinstance(norm, LayerNorm | RMSNorm | None):
        raise InputError(
            "norm: expected refinelens.LayerNorm, refinelens.RMSNorm or None, got "
            f"{type(norm).__module__}.{type(norm).__qualname__}; make one of its weight, bias and eps"
        )
    vectors = {"bias": (bias, unembedding.shape[0])}
    if norm is not None:
        vectors |= {"norm.weight": (norm.weight, hidden.shape[-1]), "norm.bias": (norm.bias, hidden.shape[-1])}
    for name, (vector, length) in vectors.items():
        if vector is None:
            continue
        if vector.shape != (length,) or not vector.is_floating_point():
            raise InputError(
                f"{name}: expected a floating tensor of shape [{length}], got {vector.dtype} {list(vector.shape)}"
            )
    tensors = {"unembedding": unembedding} | {name: v for name, (v, _) in vectors.items() if v is not None}
    for name, tensor in tensors.items():
        if tensor.device != hidden.device:
            raise InputError(f"{name}: expected device {hidden.device} of hidden, got {tensor.device}")
    if softcap is not None and not _is_positive(softcap):
        raise InputError(f"softcap: expected a positive number of float32 or None, got {softcap}")
    if not _is_positive(logit_scale):
        raise InputError(f"logit_scale: expected a positive number of float32, got {logit_scale}")


def _is_positive(number: float) -> bool:
    """Also once it is rounded to float32, in which the kernels have it."""
    limits = torch.finfo(torch.float32)
    return limits.smallest_normal <= number <= limits.max
