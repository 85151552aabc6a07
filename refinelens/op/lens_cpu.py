"""The fused lens on a CPU: tensors handed to the C++ kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _C
from ..kernels.lens_common import LensOutput
from ..kernels.norms import Norm, kind_of


def fused_lens_cpu(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> LensOutput:
    """Same signature, definition and result as the twin, for CPU tensors; products and logits are fp32.

    fp16 and bf16 are widened on the way, any strides are read in place. A row's result has the same bits
    for any number of threads and whatever rows are beside it. Extra memory: at most 12 MiB of packed
    rows, 2 KiB a row of them, and half a MiB a thread (more in proportion to ``d_model`` beyond 1024).
    """
    weight = norm_bias = None
    if norm is not None and norm.weight is not None:
        weight = _floats(norm.weight.float() + norm.offset)
    if norm is not None and norm.bias is not None:
        norm_bias = _floats(norm.bias)
    out = _C.fused_lens(
        _matrix(hidden),
        _matrix(unembedding),
        kind_of(norm),
        weight,
        norm_bias,
        0.0 if norm is None else norm.eps,
        None if targets is None else targets.contiguous().numpy(),
        None if bias is None else _floats(bias),
        logit_scale,
        softcap or 0.0,
        torch.get_num_threads(),
    )
    return LensOutput(*(None if values is None else torch.from_numpy(values) for values in out))


def product_only(x_hat: Tensor, unembedding: Tensor) -> None:
    """The matrix product of `fused_lens_cpu` alone, its results thrown away: a floor to compare times with."""
    _C.product_only(_matrix(x_hat), _matrix(unembedding), torch.get_num_threads())


def _matrix(tensor: Tensor):
    """The tensor's memory as an array; numpy has no bf16, so its bits travel as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _floats(vector: Tensor):
    return vector.detach().float().contiguous().numpy()
