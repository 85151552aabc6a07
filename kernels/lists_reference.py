"""The likeliest tokens of every row in plain torch: the reference of every other backend of the lists."""

from __future__ import annotations

import torch
from torch import Tensor

from .reference import LensHead, z_chunks

MOST_LISTED = 32  # tokens of a list that the kernel keeps


def top_k_reference(x_hat: Tensor, head: LensHead, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` tokens with the largest logits, a chunk of the vocabulary at a time.

    Args:
        x_hat: ``[R, d_embed]`` floating, normed states.
        head: Unembedding ``[V, d_embed]``, bias and scale; its norm and projection are not used.
        k: From 1 to V.

    Returns:
        z (the logit before the softcap) in the dtype of ``x_hat`` and ids int64, ``[R, k]``, best first, equal ones in
        the order of ids.
    """
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
