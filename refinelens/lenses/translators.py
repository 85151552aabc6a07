"""Translators: affine maps that carry each layer's residual stream into the basis of the last one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Translators:
    """One affine map per layer below the output, applied to the residual stream before the final norm.

    A state ``x`` of layer l in ``0 .. n_layers - 1`` becomes ``x + x @ weight[l].T + bias[l]`` (the residual
    form of Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", section
    3). Layer ``n_layers`` stays as it is, so that there every lens is the model's own prediction.
    """

    weight: Tensor  # [n_layers, d_model, d_model] floating
    bias: Tensor  # [n_layers, d_model] floating
    made_for: dict | None = None  # what a lens on disk says of its model; None for maps of one's own

    def __post_init__(self):
        shape = tuple(self.weight.shape)
        if len(shape) != 3 or shape[1] != shape[2] or tuple(self.bias.shape) != shape[:2]:
            raise InputError(
                "translators: expected a weight [n_layers, d_model, d_model] and a bias [n_layers, d_model], got "
                f"{list(shape)} and {list(self.bias.shape)}"
            )
        if self.weight.dtype not in DTYPES or self.weight.dtype != self.bias.dtype:
            raise InputError(
                f"translators: expected weight and bias in one floating dtype, got {self.weight.dtype} and "
                f"{self.bias.dtype}"
            )
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            bad = (~torch.isfinite(tensor).flatten(1).all(1)).nonzero()
            if len(bad):
                raise InputError(
                    f"translators: expected finite numbers, got NaN or infinity in the {name} of layer {int(bad[0])}"
                )

    @property
    def n_layers(self) -> int:
        """Layers that are translated; the output comes after them."""
        return len(self.weight)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[2]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Translators:
        """The same maps on another device and in another dtype."""
        return Translators(self.weight.to(device, dtype), self.bias.to(device, dtype), self.made_for)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Translate all layers, ``[n_layers + 1, N, d_model]``, in the dtype of ``hidden``.

        Raises:
            InputError: Another shape, or another dtype or device than the maps'.
        """
        wanted = (self.n_layers + 1, self.d_model, self.weight.dtype, self.weight.device)
        if hidden.dim() != 3 or (len(hidden), hidden.shape[2], hidden.dtype, hidden.device) != wanted:
            raise InputError(
                f"hidden: expected shape [{wanted[0]}, N, {wanted[1]}] in {wanted[2]} on {wanted[3]} like the "
                f"translators, got {list(hidden.shape)} in {hidden.dtype} on {hidden.device}"
            )
        translated = torch.empty_like(hidden)
        torch.baddbmm(self.bias[:, None], hidden[:-1], self.weight.mT, out=translated[:-1])
        translated[:-1] += hidden[:-1]
        translated[-1] = hidden[-1]
        return translated

    def one(self, layer: int, states: Tensor) -> Tensor:
        """Translate the states ``[N, d_model]`` of one layer below the output."""
        return torch.addmm(self.bias[layer], states, self.weight[layer].mT) + states
