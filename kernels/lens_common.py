"""What every backend of the fused lens shares: its result, the logits' definition, rows taken in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class LensOutput(NamedTuple):
    """What every backend returns for ``R`` rows; the last two are None without targets.

    Logits are ``softcap * tanh(z / softcap)`` (or ``z`` without softcap) of
    ``z = logit_scale * (x_hat . w_v + bias_v)``. The cap is strictly increasing, so argmax and rank
    are decided on ``z``, where fp32 does not saturate.
    """

    argmax: Tensor  # [R] int64, lowest id among equals
    max_logit: Tensor  # [R] float
    logsumexp: Tensor  # [R] float, nats
    entropy: Tensor  # [R] float, nats
    target_logit: Tensor | None  # [R] float
    target_rank: Tensor | None  # [R] int64, number of tokens that beat the target


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


def z_chunks(
    x_hat: Tensor, unembedding: Tensor, bias: Tensor | None, logit_scale: float
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The vocabulary in chunks: first id, weights ``[C, d_model]`` and ``z`` ``[R, C]`` in the dtype of ``x_hat``.

    The caller may overwrite ``z``; the next chunk does.
    """
    n_rows, n_vocab = x_hat.shape[0], unembedding.shape[0]
    most = _CHUNK_LOGITS_CUDA if x_hat.is_cuda else _CHUNK_LOGITS
    width = max(1, min(most // max(n_rows, 1), MAX_CHUNK, n_vocab))
    buffer = x_hat.new_empty(n_rows * width)
    for first in range(0, n_vocab, width):
        weights = unembedding[first : first + width].to(x_hat.dtype)
        z = buffer[: n_rows * len(weights)].view(n_rows, len(weights))
        torch.mm(x_hat, weights.T, out=z)
        if bias is not None:
            z += bias[first : first + width].to(x_hat.dtype)
        if logit_scale != 1.0:
            z *= logit_scale
        yield first, weights, z


def linear_logits(x_hat: Tensor, unembedding: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    """``logit_scale * (x_hat @ unembedding.T + bias)`` in the dtype of ``x_hat``: ``[R, V]``."""
    z = x_hat @ unembedding.to(x_hat.dtype).T
    if bias is not None:
        z += bias.to(x_hat.dtype)
    return z * logit_scale if logit_scale != 1.0 else z


def settle_ties(argmax: Tensor, max_logit: Tensor, targets: Tensor, logit: Tensor, rank: Tensor):
    """Make rank 0 hold exactly when the argmax is the target.

    A target's logit computed apart from the main product may differ from its own column there by
    rounding; the main product, which decided the argmax, decides here too.
    """
    is_top = argmax == targets
    rank = torch.where(is_top, 0, rank.clamp(min=1))
    return torch.where(is_top, max_logit, logit), rank


def lens_output(
    argmax: Tensor,
    best: Tensor,
    logsumexp: Tensor,
    entropy: Tensor,
    targets: Tensor | None,
    t_z: Tensor | None,
    rank: Tensor | None,
    softcap: float | None,
) -> LensOutput:
    """The result from uncapped maxima and target logits; ``t_z`` and ``rank`` are not read without targets."""
    max_logit = soft_cap(best, softcap)
    if targets is None:
        return LensOutput(argmax, max_logit, logsumexp, entropy, None, None)
    t_logit, rank = settle_ties(argmax, max_logit, targets, soft_cap(t_z, softcap), rank)
    return LensOutput(argmax, max_logit, logsumexp, entropy, t_logit, rank)


def in_row_blocks(
    reduce: Callable[[Tensor, Tensor | None], LensOutput], hidden: Tensor, targets: Tensor | None, size: int
) -> LensOutput:
    """``reduce(hidden, targets)`` on at most ``size`` rows at a time, put together again."""
    starts = range(0, max(len(hidden), 1), size)
    blocks = [
        reduce(hidden[start : start + size], None if targets is None else targets[start : start + size])
        for start in starts
    ]
    fields = (None if parts[0] is None else torch.cat(parts) for parts in zip(*blocks, strict=True))
    return type(blocks[0])(*fields)
