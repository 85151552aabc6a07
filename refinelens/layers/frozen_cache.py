"""A key-value cache that is read and never written."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache


class FrozenCache(DynamicCache):
    """Keys and values of the first tokens of a clean run; what a block adds it sees itself, and nobody after it.

    So a state that was intervened on leaves nothing behind for another run to read. One row of keys and values serves
    a batch of any size.
    """

    def __init__(self, cache: DynamicCache):
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch, heads, token, width]`` of the first tokens with those of the new ones behind."""
        layer = self.layers[layer_idx]
        return _behind(layer.keys, key_states), _behind(layer.values, value_states)


def _behind(held: Tensor, new: Tensor) -> Tensor:
    return torch.cat([held.expand(len(new), *held.shape[1:]), new], -2)
