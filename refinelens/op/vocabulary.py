"""What goes over the whole vocabulary beside the statistics: several targets, likeliest tokens.

None stores logits. By C++ and by Triton several targets and lists come from the product of the lens itself; by plain
torch lists cost a product of their own, and each target one of the lens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.lists_reference import top_k_reference
from ..kernels.reference import LensHead, LensStats, Norm, apply_norm, row_chunk, soft_cap
from . import gpu
from .backends import checked_operands, choose_backend, choose_precision
from .fused_lens import broadcast_ids, check_result, check_targets, flatten_targets, fused_lens, integer_ids

MOST_TARGETS = 8  # of a row, beside the one of the statistics
MOST_LISTED = 128  # tokens of a list that the lens keeps by itself; a longer one is sorted out afterwards


@dataclass(frozen=True)
class TopK:
    """The largest logits of every hidden row, each of shape ``[*hidden.shape[:-1], k]``, best first."""

    ids: Tensor  # int64, lower id first among equal logits
    logits: Tensor  # fp32, nats

    def __post_init__(self) -> None:
        if self.ids.shape != self.logits.shape:
            raise InputError(f"logits: expected shape {tuple(self.ids.shape)}, got {tuple(self.logits.shape)}")


@dataclass(frozen=True, eq=False)
class TargetStats:
    """Several targets of every hidden row, each of shape ``[*hidden.shape[:-1], T]``, in the order given."""

    ids: Tensor  # int64
    logit: Tensor  # fp32
    rank: Tensor  # int64, number of tokens that beat the target
    logprob: Tensor  # fp32, nats, not above 0

    @staticmethod
    def of(stats: LensStats, ids: Tensor, logit: Tensor, rank: Tensor) -> TargetStats:
        """Of rows with these statistics; the others have any shape that ends in T."""
        ids, logit, rank = (value.reshape(*stats.argmax.shape, ids.shape[-1]) for value in (ids, logit, rank))
        return TargetStats(ids, logit, rank, (logit - stats.logsumexp[..., None]).clamp(max=0.0))

    def map(self, function: Callable[[Tensor], Tensor]) -> TargetStats:
        """``function`` of each; it must leave the last axis alone."""
        return TargetStats(function(self.ids), function(self.logit), function(self.rank), function(self.logprob))

    @staticmethod
    def cat(blocks: Sequence[TargetStats], dim: int) -> TargetStats:
        """Of neighbouring rows as one; ``dim`` counts from the front."""
        parts = [(block.ids, block.logit, block.rank, block.logprob) for block in blocks]
        return TargetStats(*(torch.cat(values, dim) for values in zip(*parts, strict=True)))


@torch.no_grad()
def lens_top_k(
    hidden: Tensor,
    unembedding: Tensor | nn.Linear | LensHead,
    k: int,
    norm: Norm | nn.Module = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
) -> TopK:
    """The ``k`` tokens with the largest logits, without storing the logits.

    Args:
        k: From 1 to ``vocab_size``. The other arguments are those of ``fused_lens``.

    Returns:
        TopK: in the order that ``fused_lens`` ranks, ``ids[..., 0]`` being its argmax but for rounding
        between two different matrix products, and the token at place ``i`` has rank ``i``.

    Raises:
        InputError: As ``fused_lens``, and a ``k`` outside the vocabulary.

    In fp32: by C++ on a CPU, where that runs; by Triton up to 32 tokens; else by plain torch, a chunk of the vocabulary
    at a time.
    """
    hidden, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    _check_k(k, head)
    if gpu.keeps_lists(hidden, k, backend):
        z, ids = gpu.top_k(hidden, head, k)
    elif _keeps_lists(hidden, k, backend):
        return _in_one_product(hidden, head, None, None, k, backend, True)[2]  # type: ignore[return-value]
    else:
        rows = hidden.reshape(-1, hidden.shape[-1]).split(row_chunk(hidden.device))
        blocks = [top_k_reference(apply_norm(block, head.norm), head, k) for block in rows]
        z, ids = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    broken = ~z[:, 0].isfinite()
    if broken.any():
        row = int(broken.nonzero()[0])
        raise InputError(f"hidden: expected finite logits, got a largest logit of {float(z[row, 0])} in row {row}")
    shape = (*hidden.shape[:-1], k)
    return TopK(ids.view(shape), soft_cap(z, head.softcap).view(shape))


@torch.no_grad()
def fused_lens_top_k(
    hidden: Tensor,
    head: LensHead,
    k: int,
    targets: Tensor | int | None = None,
    backend: str = "auto",
    check_values: bool = True,
) -> tuple[LensStats, TopK]:
    """`fused_lens` and `lens_top_k` of the same rows, where that can be from one product, in fp32.

    Then each list has the argmax first. The arguments are those of the two.

    Raises:
        InputError: As they do.
    """
    _check_k(k, head)
    stats, _, top = fused_lens_with(hidden, head, targets, None, k, backend, check_values)
    return stats, top  # type: ignore[return-value]


@torch.no_grad()
def fused_lens_targets(
    hidden: Tensor,
    head: LensHead,
    alternatives: Tensor | Sequence[int],
    targets: Tensor | int | None = None,
    backend: str = "auto",
    check_values: bool = True,
) -> tuple[LensStats, TargetStats]:
    """`fused_lens`, and logits and ranks of several more targets a row, by C++ and Triton from the same product.

    Each has the rank and logit that `fused_lens` gives with that target alone, bit for bit; by Triton sums may differ
    from its own in their last bits. In plain torch, and where the precision of C++ is ``"certified"`` (as ``"auto"``
    chooses for many rows on processors with AMX), it is called for each; certified sums then differ within their bound
    from those of other targets.

    Args:
        alternatives: Integer ids, broadcastable to ``[*hidden.shape[:-1], T]`` with ``T`` from 1 to `MOST_TARGETS`;
            duplicates are allowed. The other arguments are those of `fused_lens`.

    Raises:
        InputError: As `fused_lens`, more targets than that, or one outside the vocabulary, whatever ``check_values``.
    """
    stats, several, _ = fused_lens_with(hidden, head, targets, alternatives, 0, backend, check_values)
    return stats, several  # type: ignore[return-value]


@torch.no_grad()
def fused_lens_with(
    hidden: Tensor,
    head: LensHead,
    targets: Tensor | int | None = None,
    alternatives: Tensor | Sequence[int] | None = None,
    k: int = 0,
    backend: str = "auto",
    check_values: bool = True,
) -> tuple[LensStats, TargetStats | None, TopK | None]:
    """`fused_lens` with what `fused_lens_targets` and `fused_lens_top_k` add, from one product where they can.

    No alternatives and a ``k`` of 0 add nothing. Beside lists from that product everything is in fp32.

    Raises:
        InputError: As they do.
    """
    states, head = checked_operands(hidden, head, None, None, None, 1.0)
    if k:
        _check_k(k, head)
    several = None if alternatives is None else _several_targets(alternatives, states, head)
    keeps_lists = k != 0 and _keeps_lists(states, k, backend)
    in_one = _is_fp32_by_cpp(states, backend) or gpu.runs_by_triton(states, backend)
    if keeps_lists or (several is not None and in_one):
        own = None if targets is None else flatten_targets(targets, states)
        kept = k if keeps_lists else 0
        stats, more, top = _in_one_product(states, head, own, several, kept, backend, check_values)
    else:
        stats, more, top = *_one_by_one(states, head, targets, several, backend, check_values), None
    return stats, more, lens_top_k(states, head, k, backend=backend) if k and top is None else top


def _one_by_one(
    states: Tensor, head: LensHead, targets: Tensor | int | None, several: Tensor | None, backend: str, check: bool
) -> tuple[LensStats, TargetStats | None]:
    """A call of `fused_lens` for each target."""
    run = partial(fused_lens, states, head, backend=backend, check_values=check)
    if several is None:
        return run(targets=targets), None
    each = [run(targets=ids.view(states.shape[:-1])) for ids in several.unbind(-1)]
    stats = replace(each[0], target_logit=None, target_rank=None) if targets is None else run(targets=targets)
    logit, rank = (torch.stack([getattr(one, f"target_{name}") for one in each], -1) for name in ("logit", "rank"))
    return stats, TargetStats.of(stats, several, logit, rank)


def _several_targets(alternatives: Tensor | Sequence[int], states: Tensor, head: LensHead) -> Tensor:
    """Of every row, ``[N, T]`` int64."""
    ids = integer_ids("alternatives", alternatives, states.device)
    if ids.dim() == 0 or not 1 <= ids.shape[-1] <= MOST_TARGETS:
        raise InputError(f"alternatives: expected 1 to {MOST_TARGETS} ids on the last axis, got {list(ids.shape)}")
    ids = broadcast_ids("alternatives", ids, (*states.shape[:-1], ids.shape[-1])).reshape(-1, ids.shape[-1])
    check_targets(ids, head.vocab_size, "alternatives")
    return ids


def _check_k(k: int, head: LensHead) -> None:
    if not 1 <= k <= head.vocab_size:
        raise InputError(f"k: expected 1 to {head.vocab_size}, the size of the vocabulary, got {k}")


def _keeps_lists(hidden: Tensor, k: int, backend: str) -> bool:
    by_cpp = k <= MOST_LISTED and hidden.numel() > 0 and choose_backend(hidden.device.type, backend)[0] == "cpp"
    return by_cpp or gpu.keeps_lists(hidden, k, backend)


def _is_fp32_by_cpp(hidden: Tensor, backend: str) -> bool:
    device, rows = hidden.device.type, math.prod(hidden.shape[:-1])
    if rows == 0 or choose_backend(device, backend)[0] != "cpp":
        return False
    return choose_precision("cpp", device, rows=rows, d_model=hidden.shape[-1])[0] == "fp32"


def _in_one_product(
    hidden: Tensor,
    head: LensHead,
    targets: Tensor | None,
    several: Tensor | None,
    k: int,
    backend: str,
    check_values: bool,
) -> tuple[LensStats, TargetStats | None, TopK | None]:
    """By C++ or Triton, of targets ``[N]`` and more of them ``[N, T]``."""
    by_triton = gpu.runs_by_triton(hidden, backend)
    run = gpu.in_one_product(by_triton)
    rows, shape = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
    if not by_triton:  # which reads no id outside, so that one wait for the device tells of ids and results
        check_targets(targets, head.vocab_size)
    columns = [ids for ids in (None if targets is None else targets[:, None], several) if ids is not None]
    stats, logit, rank, z, ids = run(rows, head, torch.cat(columns, 1) if columns else None, k)
    if targets is not None:
        stats = replace(stats, target_logit=logit[:, 0].contiguous(), target_rank=rank[:, 0].contiguous())
        logit, rank = logit[:, 1:].contiguous(), rank[:, 1:].contiguous()
    if check_values or not by_triton:
        check_result(stats, rows, targets, head.vocab_size, head.norm is None and head.softcap is not None)
    top = None
    if k:
        logits = soft_cap(z, head.softcap)
        ids, logits = gpu.argmax_first(ids, logits, stats, check_values) if by_triton else (ids, logits)
        top = TopK(ids.view(*shape, k), logits.view(*shape, k))
    stats = stats.map(lambda value: value.view(shape))
    return stats, None if several is None else TargetStats.of(stats, several, logit, rank), top
