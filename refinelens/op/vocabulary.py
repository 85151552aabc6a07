"""What goes over the whole vocabulary besides the lens: divergences from the output, several targets, likeliest tokens.

None stores logits. On a CPU several targets and lists come from the product of the lens itself, at about a twentieth
more each; elsewhere lists cost a product of their own, and each target one of the lens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.reference import LensHead, LensStats, Norm, apply_norm, row_chunk, soft_cap, z_chunks
from .backends import checked_operands, choose_backend, choose_precision
from .fused_lens import broadcast_ids, check_result, check_targets, flatten_targets, fused_lens, integer_ids

MOST_TARGETS = 8  # of a row, beside the one of the statistics
_CPP_ROWS = 2048  # of all layers, normed and in the order of positions, beside which the unembedding is read once
MOST_LISTED = 128  # tokens of a list that the lens keeps by itself; a longer one is sorted out afterwards


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

    Returns:
        ``[n_layers + 1, ...]`` fp32, not negative; the rounding of logits of size ``m`` is about ``1e-7 * m``.

    Raises:
        InputError: As ``fused_lens``, and statistics of another shape than ``hidden``.

    In fp32: by C++ on a CPU, where that runs (`refinelens.op.cpu`), else by plain torch.
    """
    hidden, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    _check_stats(hidden, stats)
    if head.softcap is None:
        expected = _against_final(hidden, stats, head, last_is_normed, _expected_linear, row_chunk(hidden.device))
    elif _runs_cpp(hidden):
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

    In fp32: by C++ on a CPU, where that runs (`refinelens.op.cpu`), else by plain torch.
    """
    hidden, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    _check_stats(hidden, stats)
    if _runs_cpp(hidden):
        found = _against_final(hidden, stats, head, last_is_normed, partial(_side_by_side, "jsd"), _group_rows(hidden))
    else:
        found = _against_final(hidden, stats, head, last_is_normed, _jensen_shannon)
        found[-1] = 0.0
    return found.clamp_(0.0, math.log(2.0))


def _runs_cpp(hidden: Tensor) -> bool:
    return choose_backend(hidden.device.type)[0] == "cpp"


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


def _expected_linear(x_hat: Tensor, logsumexp: Tensor, head: LensHead) -> Tensor:
    """Every layer's logits averaged under the final prediction, ``[n_layers + 1, N]``; there is no softcap."""
    if _runs_cpp(x_hat):
        from .cpu import mean_unembedding_cpu

        mean_weights, mean_bias, _ = mean_unembedding_cpu(x_hat[-1], head)
    else:
        mean_weights, mean_bias = _mean_unembedding(x_hat[-1], logsumexp[-1], head)
    return head.scale * (torch.einsum("lnd,nd->ln", x_hat, mean_weights) + mean_bias)


def _mean_unembedding(x_hat: Tensor, logsumexp: Tensor, head: LensHead) -> tuple[Tensor, Tensor]:
    """As `refinelens.op.cpu.mean_unembedding_cpu`, of normed rows ``[N, d_model]`` and their logsumexps ``[N]``."""
    mean_weights = torch.zeros_like(x_hat)
    mass, mean_bias = x_hat.new_zeros(2, len(x_hat), 1)
    for first, weights, z in z_chunks(x_hat, head):
        p = z.sub_(logsumexp[:, None]).exp_()
        mean_weights.addmm_(p, weights)
        mass += p.sum(-1, keepdim=True)
        if head.bias is not None:
            # A token that cannot occur (bias -inf) has probability 0 and adds nothing.
            chunk = head.bias[first : first + len(weights)].to(p.dtype)
            mean_bias += p @ chunk.masked_fill(chunk == float("-inf"), 0.0)[:, None]
    return mean_weights / mass, (mean_bias / mass)[:, 0]


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
) -> TopK:
    """The ``k`` tokens with the largest logits, without storing the logits.

    Args:
        k: From 1 to ``vocab_size``. The other arguments are those of ``fused_lens``.

    Returns:
        TopK: in the order that ``fused_lens`` ranks, ``ids[..., 0]`` being its argmax but for rounding
        between two different matrix products, and the token at place ``i`` has rank ``i``.

    Raises:
        InputError: As ``fused_lens``, and a ``k`` outside the vocabulary.

    In fp32: by C++ on a CPU, where that runs, else by plain torch, one chunk of the vocabulary at a time.
    """
    hidden, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    _check_k(k, head)
    if _keeps_lists(hidden, k, "auto"):
        return _in_one_product(hidden, head, None, None, k)[2]  # type: ignore[return-value]
    blocks = [
        _block_top_k(apply_norm(rows, head.norm), head, k)
        for rows in hidden.reshape(-1, hidden.shape[-1]).split(row_chunk(hidden.device))
    ]
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
    """`fused_lens`, and logits and ranks of several more targets a row, on a CPU from the same product.

    Each has the rank and logit that `fused_lens` gives with that target alone, bit for bit. Where the backend is not
    C++, or its precision is ``"certified"`` (as ``"auto"`` chooses for many rows on processors with AMX), it is called
    for each; certified sums then differ within their bound from those of other targets.

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
    if keeps_lists or (several is not None and _is_fp32_by_cpp(states, backend)):
        own = None if targets is None else flatten_targets(targets, states)
        stats, more, top = _in_one_product(states, head, own, several, k if keeps_lists else 0)
    else:
        stats, more, top = *_one_by_one(states, head, targets, several, backend, check_values), None
    return stats, more, lens_top_k(states, head, k) if k and top is None else top


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
    return k <= MOST_LISTED and hidden.numel() > 0 and choose_backend(hidden.device.type, backend)[0] == "cpp"


def _is_fp32_by_cpp(hidden: Tensor, backend: str) -> bool:
    device, rows = hidden.device.type, math.prod(hidden.shape[:-1])
    if rows == 0 or choose_backend(device, backend)[0] != "cpp":
        return False
    return choose_precision("cpp", device, rows=rows, d_model=hidden.shape[-1])[0] == "fp32"


def _in_one_product(
    hidden: Tensor, head: LensHead, targets: Tensor | None, several: Tensor | None, k: int
) -> tuple[LensStats, TargetStats | None, TopK | None]:
    """By C++, of targets ``[N]`` and more of them ``[N, T]``."""
    from .cpu import fused_lens_and_more

    rows, shape = hidden.reshape(-1, hidden.shape[-1]), hidden.shape[:-1]
    check_targets(targets, head.vocab_size)
    columns = [ids for ids in (None if targets is None else targets[:, None], several) if ids is not None]
    stats, logit, rank, z, ids = fused_lens_and_more(rows, head, torch.cat(columns, 1) if columns else None, k)
    if targets is not None:
        stats = replace(stats, target_logit=logit[:, 0].contiguous(), target_rank=rank[:, 0].contiguous())
        logit, rank = logit[:, 1:].contiguous(), rank[:, 1:].contiguous()
    check_result(stats, rows, targets, head.vocab_size, head.norm is None and head.softcap is not None)
    stats = stats.map(lambda value: value.view(shape))
    more = None if several is None else TargetStats.of(stats, several, logit, rank)
    top = TopK(ids.view(*shape, k), soft_cap(z, head.softcap).view(*shape, k)) if k else None
    return stats, more, top


def _block_top_k(x_hat: Tensor, head: LensHead, k: int) -> tuple[Tensor, Tensor]:
    z = x_hat.new_empty(len(x_hat), 0)
    ids = torch.empty(len(x_hat), 0, dtype=torch.int64, device=x_hat.device)
    for first, _, chunk in z_chunks(x_hat, head):
        chunk_z, chunk_ids = _chunk_top_k(chunk, min(k, chunk.shape[1]))
        # Ids ascend from left to right among equal logits, and a stable sort leaves them so.
        z, order = torch.cat([z, chunk_z], 1).sort(descending=True, stable=True)
        z, order = z[:, :k], order[:, :k]
        ids = torch.cat([ids, chunk_ids + first], 1).gather(1, order)
    return z, ids


def _chunk_top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row in descending order, equals in ascending order of column."""
    top, columns = z.topk(k)
    # topk takes any of several columns that equal the last place: those rows are sorted whole.
    (tied,) = ((z >= top[:, -1:]).sum(-1) > k).nonzero(as_tuple=True)
    columns[tied] = z[tied].sort(descending=True, stable=True).indices[:, :k]
    columns = columns.sort().values
    top, order = z.gather(1, columns).sort(descending=True, stable=True)
    return top, columns.gather(1, order)
