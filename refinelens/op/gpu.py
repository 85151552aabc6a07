"""What goes over the vocabulary besides the lens, by Triton: states of any shape for the kernels, which take rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.lists_reference import MOST_LISTED
from ..kernels.reference import LensHead, LensStats
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


def keeps_lists(hidden: Tensor, k: int, backend: str) -> bool:
    """Whether Triton makes lists of so many tokens of these states.

    Raises:
        InputError: As `choose_backend`.
    """
    return runs_by_triton(hidden, backend) and k <= MOST_LISTED


def top_k(hidden: Tensor, head: LensHead, k: int) -> tuple[Tensor, Tensor]:
    """Lists alone, z before the softcap and ids, ``[R, k]``."""
    from ..kernels.fused_more import fused_lens_more_triton

    return fused_lens_more_triton(hidden.reshape(-1, hidden.shape[-1]), head, None, k, with_stats=False)[3:]


def in_one_product(by_triton: bool) -> Callable:
    """What makes several targets and lists beside the statistics, by Triton or C++, as `cpu.fused_lens_and_more`."""
    if by_triton:
        from ..kernels.fused_more import fused_lens_more_triton

        return fused_lens_more_triton
    from .cpu import fused_lens_and_more

    return fused_lens_and_more


def argmax_first(ids: Tensor, logits: Tensor, stats: LensStats, check_values: bool) -> tuple[Tensor, Tensor]:
    """Lists ``[R, k]`` that begin with the argmax of the statistics ``[R]``, as nearly all do.

    A list takes the logits of its tokens from a product of their own. Where a device gives these other bits than those
    of the one over the vocabulary, two nearly equal logits may change places. ``check_values`` allows to wait for the
    device, to see that none did.
    """
    argmax, places = stats.argmax[:, None], torch.arange(ids.shape[1], device=ids.device)
    if check_values and torch.equal(ids[:, :1], argmax):
        return ids, logits
    here = ids == argmax
    at = torch.where(here.any(1, keepdim=True), here.int().argmax(1, keepdim=True), ids.shape[1] - 1)
    source = torch.where(places <= at, (places - 1).clamp(min=0), places)
    ids, logits = ids.gather(1, source), logits.gather(1, source).minimum(stats.max_logit[:, None])
    ids[:, 0], logits[:, 0] = stats.argmax, stats.max_logit
    return ids, logits


def _layers(hidden: Tensor, logsumexp: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.reshape(len(hidden), -1, hidden.shape[-1]), logsumexp.reshape(len(hidden), -1).to(torch.float32)
