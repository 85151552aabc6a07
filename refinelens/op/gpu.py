"""What goes over the vocabulary besides the lens, by Triton: states of any shape for the kernels, which take rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.reference import LensHead
from .backends import choose_backend


def runs_by_triton(hidden: Tensor, backend: str) -> bool:
    """Whether these states go through Triton, where there are any.

    Raises:
        InputError: As `choose_backend`.
    """
    return choose_backend(hidden.device.type, backend)[0] == "triton" and hidden.numel() > 0


def expected_logits(hidden: Tensor, logsumexp: Tensor, head: LensHead, last_is_normed: bool) -> Tensor:
    """`expected_logits_triton` of ``[n_layers + 1, ..., d_model]``, in the shape of ``logsumexp``."""
    from ..kernels.divergences import expected_logits_triton

    return expected_logits_triton(*_layers(hidden, logsumexp), head, last_is_normed).view(logsumexp.shape)


def jensen_shannon(hidden: Tensor, logsumexp: Tensor, head: LensHead, last_is_normed: bool) -> Tensor:
    """`jensen_shannon_triton` of ``[n_layers + 1, ..., d_model]``, in the shape of ``logsumexp``."""
    from ..kernels.divergences import jensen_shannon_triton

    return jensen_shannon_triton(*_layers(hidden, logsumexp), head, last_is_normed).view(logsumexp.shape)


def _layers(hidden: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(len(hidden), -1, hidden.shape[-1]), logsumexp.reshape(len(hidden), -1).to(torch.float32)
