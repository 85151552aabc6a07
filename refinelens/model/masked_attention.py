"""Attention over a cache on a CPU without the keys that the mask hides."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

BLOCK = 256  # queries that share the keys they see


class SkipHiddenKeys(TorchFunctionMode):
    """While the block runs, masked attention of this thread leaves out keys that none of a block of queries sees.

    Torch skips the keys behind a query where it is told ``is_causal``, which it cannot be once a cache comes first:
    then it computes the whole rectangle of queries and keys, and turns the boolean mask into numbers in every layer.
    What a query may see is read off the mask, so that windows and padding are what they are. The result is the same
    softmax over the same keys, to rounding. Anything but boolean masks in fp32 on a CPU goes its ordinary way.
    """

    def __init__(self):
        super().__init__()
        self._seen: _SeenMask | None = None  # all layers of one kind share a mask

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not _is_plain(args, kwargs):
            return func(*args, **kwargs)
        (query, key, value), mask = args, kwargs.pop("attn_mask")
        if self._seen is None or self._seen.mask is not mask:
            self._seen = _SeenMask.look_at(mask)
        blocks = [
            func(query[..., b.queries, :], key[..., b.keys, :], value[..., b.keys, :], attn_mask=b.bias, **kwargs)
            for b in self._seen.blocks
        ]
        return torch.cat(blocks, -2)


@dataclass(frozen=True)
class _Block:
    """Neighbouring queries and all keys that any of them sees."""

    queries: slice
    keys: slice
    bias: Tensor  # [batch, heads or 1, query, key] fp32: 0 where a query sees a key, else -inf


@dataclass(frozen=True)
class _SeenMask:
    mask: Tensor
    blocks: list[_Block]

    @classmethod
    def look_at(cls, mask: Tensor) -> _SeenMask:
        """Cut a mask ``[batch, heads or 1, query, key]`` at multiples of `BLOCK` in the context."""
        n_queries, n_keys = mask.shape[-2:]
        past = n_keys - n_queries
        cuts = [0, *range(BLOCK - past % BLOCK, n_queries, BLOCK), n_queries]
        blocks = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            rows = mask[..., start:end, :]
            seen = rows.flatten(0, -2).any(0).nonzero()
            keys = slice(int(seen[0]), int(seen[-1]) + 1) if rows.any(-1).all() else slice(n_keys)
            bias = torch.zeros(rows[..., keys].shape, dtype=torch.float32).masked_fill_(~rows[..., keys], -torch.inf)
            blocks.append(_Block(slice(start, end), keys, bias))
        return cls(mask, blocks)


def _is_plain(args: tuple, kwargs: dict) -> bool:
    """Three operands in fp32 on a CPU, a boolean mask, and nothing random."""
    mask = kwargs.get("attn_mask")
    return (
        len(args) == 3
        and isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in args)
        and mask.shape[-2:] == (args[0].shape[-2], args[1].shape[-2])
        and not kwargs.get("dropout_p")
        and not kwargs.get("is_causal")
    )
