"""Sufficient statistics of the regression of the last layer's residual stream on every layer's, in fp64."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass
class Statistics:
    """Sums over the tokens seen so far: all that ridge regression needs, whatever the amount of text.

    With x the states of a layer and y those of the last one; fp64. The sums are the same in any number of
    sittings, as the tokens come in the same order.
    """

    count: Tensor  # [], tokens
    sum_x: Tensor  # [n_layers, d_model]
    sum_y: Tensor  # [d_model]
    xx: Tensor  # [n_layers, d_model, d_model], sum of x x^T
    xy: Tensor  # [n_layers, d_model, d_model], sum of x y^T
    yy: Tensor  # [d_model], sum of y * y

    @classmethod
    def empty(cls, n_layers: int, d_model: int, device: torch.device | str = "cpu") -> Statistics:
        """Statistics of no tokens."""
        row, square = (n_layers, d_model), (n_layers, d_model, d_model)
        shapes = ((), row, row[1:], square, square, row[1:])
        return cls(*(torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes))

    def add(self, hidden: Tensor) -> None:
        """Take the states of some tokens, ``[n_layers + 1, tokens, d_model]``, the last layer last."""
        y = hidden[-1].double()
        self.count += len(y)
        self.sum_y += y.sum(0)
        self.yy += (y * y).sum(0)
        for layer, states in enumerate(hidden[:-1]):  # one layer in fp64 at a time
            x = states.double()
            self.sum_x[layer] += x.sum(0)
            self.xx[layer].addmm_(x.T, x)
            self.xy[layer].addmm_(x.T, y)

    def means(self, layer: int) -> tuple[Tensor, Tensor]:
        """Mean x of a layer and mean y, ``[d_model]``."""
        return self.sum_x[layer] / self.count, self.sum_y / self.count

    def moments(self, layer: int, about_x: Tensor, about_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of ``x x^T``, ``x y^T`` and ``y * y`` of a layer after taking ``about_x`` and ``about_y`` away."""
        sum_x, n = self.sum_x[layer], self.count
        cross = torch.outer(sum_x, about_x)
        xx = self.xx[layer] - cross - cross.T + n * torch.outer(about_x, about_x)
        xy = self.xy[layer] - torch.outer(sum_x, about_y) - torch.outer(about_x, self.sum_y - n * about_y)
        return xx, xy, self.yy - 2 * about_y * self.sum_y + n * about_y * about_y

    def noise(self, layer: int) -> Tensor:
        """Up to where an eigenvalue of the centred `moments` ``x x^T`` of a layer is rounding and nothing else.

        What is left where two large sums cancel is a few epsilon of those sums, not of the difference: a direction in
        which the states do not vary has an eigenvalue of 0 on one machine, and of either sign on another.
        """
        return len(self.sum_y) * torch.finfo(self.xx.dtype).eps * self.xx[layer].diagonal().mean()

    def tensors(self, prefix: str) -> dict[str, Tensor]:
        """The sums by name, for a file."""
        return {f"{prefix}.{field.name}": getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], prefix: str, device: torch.device | str) -> Statistics:
        """What `tensors` gave."""
        return cls(**{field.name: tensors[f"{prefix}.{field.name}"].to(device) for field in fields(cls)})
