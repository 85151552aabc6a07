"""Sufficient statistics of the regression of the last layer's residual stream on every layer's, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Sums over the tokens seen so far: all that ridge regression needs, whatever the amount of text.

    With x the states of a layer and y those of the last one, all fp64:
    """

    count: int  # tokens
    sum_x: Tensor  # [n_layers, d_model]
    sum_y: Tensor  # [d_model]
    xx: Tensor  # [n_layers, d_model, d_model], sum of x x^T
    xy: Tensor  # [n_layers, d_model, d_model], sum of x y^T
    yy: Tensor  # [d_model], sum of y * y

    @classmethod
    def empty(cls, n_layers: int, d_model: int, device: torch.device | str = "cpu") -> Statistics:
        """Statistics of no tokens."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        square = (n_layers, d_model, d_model)
        return cls(0, zeros(n_layers, d_model), zeros(d_model), zeros(*square), zeros(*square), zeros(d_model))

    def add(self, hidden: Tensor) -> None:
        """Take the states of some tokens, ``[n_layers + 1, tokens, d_model]``, all layers."""
        y = hidden[-1].double()
        self.count += len(y)
        self.sum_y += y.sum(0)
        self.yy += (y * y).sum(0)
        for layer, states in enumerate(hidden[:-1]):  # one layer in fp64 at a time
            x = states.double()
            self.sum_x[layer] += x.sum(0)
            self.xx[layer].addmm_(x.T, x)
            self.xy[layer].addmm_(x.T, y)

    def centred(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Second moments of a layer about the means: ``xx``, ``xy`` and the diagonal of ``yy``."""
        mean_x, mean_y = self.sum_x[layer] / self.count, self.sum_y / self.count
        return (
            self.xx[layer] - self.count * torch.outer(mean_x, mean_x),
            self.xy[layer] - self.count * torch.outer(mean_x, mean_y),
            self.yy - self.count * mean_y * mean_y,
        )
