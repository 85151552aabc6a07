"""What the fused lens computes, in plain torch: norms and head, the statistics, the reference of every other backend.

In reading order: the norms; the head, from residual stream to logits; the statistics; the reference, a chunk of the
vocabulary at a time, in the names of `kernel` but for sums of ``exp``. Imports no Triton: the lens on a CPU uses it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

LOWEST = -3e38  # finite stand-in for -inf: 0 * -inf would be NaN


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


_NORMS = "LayerNorm or RMSNorm, of refinelens or torch.nn, or None"


def norm_of_module(module: nn.Module) -> Norm:
    """The norm that one of torch's own computes, with its tensors.

    Raises:
        ValueError: Another module, or a norm over several dimensions.
    """
    if not isinstance(module, nn.LayerNorm | nn.RMSNorm):
        got = f"{type(module).__module__}.{type(module).__qualname__}"
        raise ValueError(f"norm: expected {_NORMS}, got {got}; make one of its weight, bias and eps")
    if len(module.normalized_shape) != 1:
        raise ValueError(f"norm: expected one over the last dimension, got one over {len(module.normalized_shape)}")
    weight = None if module.weight is None else module.weight.detach()
    if isinstance(module, nn.LayerNorm):
        return LayerNorm(weight, None if module.bias is None else module.bias.detach(), module.eps)
    # Without a number torch takes that of the input's dtype, which is the weight's where there is one.
    dtype = torch.float32 if weight is None else weight.dtype
    return RMSNorm(weight, torch.finfo(dtype).eps if module.eps is None else module.eps)


@dataclass(frozen=True, eq=False)
class LensHead:
    """From the residual stream to logits: norm, projection, unembedding and bias, scale, softcap.

    Logits are ``softcap * tanh(z / softcap)`` (``z`` itself without a softcap) of
    ``z = scale * (norm(hidden) @ weight.T + bias)``. The cap is strictly increasing, so that argmax and ranks are
    decided on ``z``, where fp32 does not saturate.

    Args:
        weight: The unembedding, ``[vocab_size, d_embed]`` floating; or an ``nn.Linear``, with its bias.
        norm: `LayerNorm`, `RMSNorm` or torch's own; None for none.
        bias: ``[vocab_size]`` floating, or None.
        softcap: Positive cap of the logits, or None.
        scale: Positive factor of the logits.
        projection: ``[d_embed, d_model]`` between norm and unembedding, or None where ``d_embed`` is ``d_model``.

    Raises:
        ValueError: Shapes that do not fit, or a norm of another kind.
    """

    weight: Tensor
    norm: Norm = None
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    projection: Tensor | None = None

    if TYPE_CHECKING:  # the fields are what became of the arguments

        def __init__(
            self,
            weight: Tensor | nn.Linear,
            norm: Norm | nn.Module = None,
            bias: Tensor | None = None,
            softcap: float | None = None,
            scale: float = 1.0,
            projection: Tensor | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        if isinstance(self.weight, nn.Linear):
            linear = self.weight
            if linear.bias is not None:
                if self.bias is not None:
                    raise ValueError("bias: expected None beside an nn.Linear that has its own, got another one")
                object.__setattr__(self, "bias", linear.bias.detach())
            object.__setattr__(self, "weight", linear.weight.detach())
        if isinstance(self.norm, nn.Module):
            object.__setattr__(self, "norm", norm_of_module(self.norm))
        elif not isinstance(self.norm, LayerNorm | RMSNorm | None):
            raise ValueError(f"norm: expected {_NORMS}, got {type(self.norm).__name__}")
        if not isinstance(self.weight, Tensor) or self.weight.dim() != 2:
            got = list(self.weight.shape) if isinstance(self.weight, Tensor) else type(self.weight).__name__
            raise ValueError(f"unembedding: expected a tensor [vocab_size, d_model] or an nn.Linear, got {got}")
        if self.projection is not None and self.projection.shape[:-1] != self.weight.shape[1:]:
            raise ValueError(
                f"projection: expected shape [{self.weight.shape[1]}, d_model], got {list(self.projection.shape)}"
            )

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return (self.weight if self.projection is None else self.projection).shape[1]

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding."""
        return self.weight.shape[0]

    def projected(self, hidden: Tensor) -> tuple[Tensor, LensHead]:
        """States ``[..., d_embed]`` and the rest of the head, which has no projection: what the backends take.

        Without projection these are ``hidden`` and the head itself. With one, ``hidden`` is normed and projected in
        fp32, whatever the model's dtype, and rounded once, to that of the unembedding: what a model itself rounds
        between norm and projection is an error, not a part of its prediction.
        """
        if self.projection is None:
            return hidden, self
        states = apply_norm(hidden, self.norm) @ self.projection.float().T
        return states.to(self.weight.dtype), replace(self, norm=None, projection=None)

    def z(self, x_hat: Tensor) -> Tensor:
        """Logits before the softcap of normed states ``[R, d_embed]``, in their dtype: ``[R, vocab_size]``."""
        z = x_hat @ self.weight.to(x_hat.dtype).T
        if self.bias is not None:
            z += self.bias.to(x_hat.dtype)
        return z * self.scale if self.scale != 1.0 else z

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits of a few rows ``[R, d_model]`` as plain formulas in fp32, ``[R, vocab_size]``."""
        states, head = self.projected(hidden)
        return soft_cap(head.z(apply_norm(states, head.norm)), head.softcap)


@dataclass(frozen=True, eq=False)
class LensStats:
    """Statistics of every hidden row over the whole vocabulary, each of shape ``hidden.shape[:-1]``.

    Logits, log-probabilities and entropies are in nats and fp32 (in fp64 where the reference computes in it). Those of
    a target are None without targets, the last two unless the precision ``"certified"`` was asked for.
    """

    argmax: Tensor  # int64, lowest id among equals
    max_logit: Tensor  # fp32
    logsumexp: Tensor  # fp32
    entropy: Tensor  # fp32
    target_logit: Tensor | None = None  # fp32
    target_rank: Tensor | None = None  # int64, number of tokens that beat the target
    logsumexp_bound: Tensor | None = None  # fp32, distance to the logsumexp of exact logits at most
    fell_back: Tensor | None = None  # bool, rows whose logits were all computed in fp64

    def __post_init__(self) -> None:
        shape = self.argmax.shape
        for name, value in self.items():
            if value.shape != shape:
                raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")

    @property
    def max_logprob(self) -> Tensor:
        """Log-probability of the argmax, fp32, not above 0."""
        return _logprob(self.max_logit, self.logsumexp)

    @property
    def target_logprob(self) -> Tensor | None:
        """Log-probability of the target, fp32, not above 0; None without targets."""
        return None if self.target_logit is None else _logprob(self.target_logit, self.logsumexp)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and values of the statistics that are there."""
        for name in self.__dataclass_fields__:
            if (value := getattr(self, name)) is not None:
                yield name, value

    def map(self, function: Callable[[Tensor], Tensor]) -> LensStats:
        """``function`` of every statistic that is there."""
        return LensStats(**{name: function(value) for name, value in self.items()})

    def to(self, device: torch.device | str) -> LensStats:
        """The same statistics on another device."""
        return self.map(lambda value: value.to(device))

    @staticmethod
    def cat(blocks: list[LensStats], dim: int = 0) -> LensStats:
        """Statistics of neighbouring rows as one."""
        if len(blocks) == 1:
            return blocks[0]
        return LensStats(**{name: torch.cat([getattr(b, name) for b in blocks], dim) for name, _ in blocks[0].items()})


def _logprob(logit: Tensor, logsumexp: Tensor) -> Tensor:
    """Both are rounded, so that their difference could be above 0."""
    return (logit - logsumexp).clamp(max=0.0)


def soft_cap(z: Tensor, softcap: float | None) -> Tensor:
    """``softcap * tanh(z / softcap)``, or ``z`` unchanged (Gemma 2, arXiv 2408.00118, section 2)."""
    return z if softcap is None else softcap * torch.tanh(z / softcap)


# Rows at a time, and logits: on a CPU 4 MiB of them in fp32 are read back from cache, a GPU takes more to be busy.
_ROW_CHUNK, _CHUNK_LOGITS = 512, 1 << 20
_ROW_CHUNK_CUDA, _CHUNK_LOGITS_CUDA = 8192, 1 << 24
MAX_CHUNK = 8192


def row_chunk(device: torch.device) -> int:
    """Rows that plain torch takes at a time."""
    return _ROW_CHUNK_CUDA if device.type == "cuda" else _ROW_CHUNK


def z_chunks(x_hat: Tensor, head: LensHead) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The vocabulary in chunks: first id, weights ``[C, d_embed]`` and ``z`` ``[R, C]`` in the dtype of ``x_hat``.

    The caller may overwrite ``z``; the next chunk does.
    """
    n_rows, n_vocab = len(x_hat), head.vocab_size
    most = _CHUNK_LOGITS_CUDA if x_hat.is_cuda else _CHUNK_LOGITS
    width = max(1, min(most // max(n_rows, 1), MAX_CHUNK, n_vocab))
    buffer = x_hat.new_empty(n_rows * width)
    for first in range(0, n_vocab, width):
        weights = head.weight[first : first + width].to(x_hat.dtype)
        z = buffer[: n_rows * len(weights)].view(n_rows, len(weights))
        torch.mm(x_hat, weights.T, out=z)
        if head.bias is not None:
            z += head.bias[first : first + width].to(x_hat.dtype)
        if head.scale != 1.0:
            z *= head.scale
        yield first, weights, z


def lens_stats(
    head: LensHead,
    argmax: Tensor,
    best: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    targets: Tensor | None,
    target_z: Tensor | None,
    rank: Tensor | None,
) -> LensStats:
    """The statistics from uncapped maxima and target logits; the last two are not read without targets.

    A target's logit computed apart from the main product may differ from its own column there by rounding. The main
    product decided the argmax, and decides here too: rank is 0 exactly where the argmax is the target.
    """
    max_logit = soft_cap(best, head.softcap)
    if targets is None:
        return LensStats(argmax, max_logit, logsumexp, entropy)
    assert target_z is not None and rank is not None
    is_top = argmax == targets
    target_logit = torch.where(is_top, max_logit, soft_cap(target_z, head.softcap))
    return LensStats(argmax, max_logit, logsumexp, entropy, target_logit, torch.where(is_top, 0, rank.clamp(min=1)))


def in_row_blocks(
    reduce: Callable[[Tensor, Tensor | None], LensStats], hidden: Tensor, targets: Tensor | None, size: int
) -> LensStats:
    """``reduce(hidden, targets)`` on at most ``size`` rows at a time, put together again."""
    parts = (slice(start, start + size) for start in range(0, max(len(hidden), 1), size))
    return LensStats.cat([reduce(hidden[part], None if targets is None else targets[part]) for part in parts])


def fused_lens_reference(
    hidden: Tensor, head: LensHead, targets: Tensor | None = None, *, dtype: torch.dtype = torch.float32
) -> LensStats:
    """Lens statistics of ``hidden`` ``[R, d_model]`` by running reductions over vocabulary chunks.

    Args:
        hidden: ``[R, d_model]`` floating.
        head: Norm and unembedding ``[V, d_model]``, without a projection.
        targets: ``[R]`` int64 in ``[0, V)``, or None.
        dtype: Dtype of the whole computation; float64 gives the truth of the tests.

    Memory: two buffers of a chunk's logits and ``row_chunk`` normed rows, whatever ``R`` and ``V``.

    Source of the running sums: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """

    def reduce(rows: Tensor, row_targets: Tensor | None) -> LensStats:
        return _reduce_block(apply_norm(rows, head.norm, dtype), head, row_targets)

    return in_row_blocks(reduce, hidden, targets, row_chunk(hidden.device))


def _reduce_block(x_hat: Tensor, head: LensHead, targets: Tensor | None) -> LensStats:
    best = x_hat.new_full((len(x_hat),), float("-inf"))  # [R] largest z so far
    argmax = torch.zeros(len(x_hat), dtype=torch.int64, device=x_hat.device)
    peak = best.clone()  # largest capped logit so far
    total = torch.zeros_like(best)  # sum of exp(l - peak)
    weighted = torch.zeros_like(best)  # sum of (l - peak) exp(l - peak)
    target_z = None if targets is None else _target_z(x_hat, head, targets)
    rank = torch.zeros_like(argmax)
    buffer = None
    for first_id, _, z in z_chunks(x_hat, head):  # z [R, C]
        buffer = z.new_empty(z.numel()) if buffer is None else buffer
        work = buffer[: z.numel()].view_as(z)
        chunk_best = z.amax(-1)
        (rising,) = (chunk_best > best).nonzero(as_tuple=True)  # after the first chunks, few rows
        argmax[rising] = first_id + z[rising].argmax(-1)  # documented to return the first among equals
        best = torch.maximum(best, chunk_best)
        if targets is not None and target_z is not None:
            rank += _count_better(z, targets - first_id, target_z, work)
        new_peak = torch.maximum(peak, soft_cap(chunk_best, head.softcap))
        total, weighted = _rescale(total, weighted, peak - new_peak)
        # A token of logit -inf has probability 0 and adds nothing, also where there is nothing else yet.
        shift = new_peak.masked_fill(new_peak == float("-inf"), 0.0)[:, None]
        shifted = torch.sub(soft_cap(z, head.softcap), shift, out=z)
        p = torch.exp(shifted, out=work)
        total = total + p.sum(-1)
        weighted = weighted + p.mul_(shifted.clamp_(min=LOWEST)).sum(-1)
        peak = new_peak
    log_total = total.log()
    return lens_stats(
        head, argmax, best, peak + log_total, log_total - weighted / total, targets, target_z, rank
    )


def _target_z(x_hat: Tensor, head: LensHead, targets: Tensor) -> Tensor:
    """The targets' own ``z``, ``[R]``, by one dot product a row in the dtype of ``x_hat``."""
    z = (x_hat * head.weight[targets].to(x_hat.dtype)).sum(-1)
    if head.bias is not None:
        z = z + head.bias[targets].to(x_hat.dtype)
    return z * head.scale


def _count_better(z: Tensor, target_col: Tensor, target_z: Tensor, work: Tensor) -> Tensor:
    """Tokens of each row of ``z`` that beat its target, whose column may lie outside; ``work`` is overwritten.

    An equal logit beats the target from a lower id only, so left of the target one comparison with the next lower float
    does; the target's own column is left out, whatever it holds. There is no float below -inf: such a target is
    compared as if its column were here.
    """
    width, floor = z.shape[-1], target_z.new_full((), float("-inf"))
    is_left = (target_col >= width) & (target_z > floor)
    bar = torch.where(is_left, torch.nextafter(target_z, floor), target_z)
    count = torch.gt(z, bar[:, None], out=work).sum(-1).to(torch.int64)  # exact: fewer than 2^24 ones
    (here,) = ((target_col >= 0) & ~is_left).nonzero(as_tuple=True)
    z, t, col, cols = z[here], target_z[here, None], target_col[here, None], torch.arange(width, device=z.device)
    count[here] += ((z == t) & (cols < col)).sum(-1) - ((z > t) & (cols == col)).sum(-1)
    return count


def _rescale(total: Tensor, weighted: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Move the sums to a new peak; ``shift = old - new <= 0``, not finite while there is nothing to move."""
    shift = torch.where(total == 0, 0.0, shift)
    factor = shift.exp()
    return total * factor, (weighted + shift * total) * factor
