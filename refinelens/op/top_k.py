"""The k most likely tokens of every hidden row, by a path of its own: a list costs more than a maximum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.lens_common import row_chunk, soft_cap, z_chunks
from ..kernels.norms import Norm, apply_norm
from .operands import check_operands


@dataclass(frozen=True)
class TopK:
    """The largest logits of every hidden row, each of shape ``[*hidden.shape[:-1], k]``, best first."""

    ids: Tensor  # int64, lower id first among equal logits
    logits: Tensor  # fp32, nats

    def __post_init__(self):
        if self.ids.shape != self.logits.shape:
            raise InputError(f"logits: expected shape {tuple(self.ids.shape)}, got {tuple(self.logits.shape)}")


@torch.no_grad()
def lens_top_k(
    hidden: Tensor,
    unembedding: Tensor,
    k: int,
    norm: Norm = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> TopK:
    """The ``k`` tokens with the largest logits, without storing the logits.

    Args:
        k: From 1 to ``vocab_size``. The other arguments are those of ``fused_lens``.

    Returns:
        TopK, in the order that ``fused_lens`` ranks: ``ids[..., 0]`` is its argmax but for rounding
        between two different matrix products, and the token at place ``i`` has rank ``i``.

    Raises:
        InputError: As ``fused_lens``, and a ``k`` outside the vocabulary.

    Plain torch on every device, in fp32, one chunk of the vocabulary at a time.
    """
    check_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    if not 1 <= k <= len(unembedding):
        raise InputError(f"k: expected 1 to {len(unembedding)}, the size of the vocabulary, got {k}")
    blocks = [
        _block_top_k(apply_norm(rows, norm), unembedding, k, bias, logit_scale)
        for rows in hidden.reshape(-1, hidden.shape[-1]).split(row_chunk(hidden.device))
    ]
    z, ids = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    broken = ~z[:, 0].isfinite()
    if broken.any():
        row = int(broken.nonzero()[0])
        raise InputError(f"hidden: expected finite logits, got a largest logit of {float(z[row, 0])} in row {row}")
    shape = (*hidden.shape[:-1], k)
    return TopK(ids.view(shape), soft_cap(z, softcap).view(shape))


def _block_top_k(x_hat, unembedding, k, bias, logit_scale) -> tuple[Tensor, Tensor]:
    z = x_hat.new_empty(len(x_hat), 0)
    ids = torch.empty(len(x_hat), 0, dtype=torch.int64, device=x_hat.device)
    for first, _, chunk in z_chunks(x_hat, unembedding, bias, logit_scale):
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
