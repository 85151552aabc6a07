"""Ridge regression of the last layer's residual stream on every layer's: the linear lens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..lenses.translators import Translators
from .statistics import Statistics

STRENGTHS = tuple(10.0**power for power in range(-8, 2))  # as shares of the mean variance of a layer's states


def solve(fit: Statistics, held_out: Statistics) -> tuple[Translators, list[float]]:
    """The translators of least squared error with an intercept, and the ridge strength of each layer.

    Linear shortcuts of Din et al. 2023 ("Jump to Conclusions: Short-Cutting Transformers With Linear
    Transformations", section 3), with the penalty ``strength * mean variance * |A|^2``; the strength of a layer
    is the one of `STRENGTHS` whose error on the held-out tokens is least.

    Args:
        fit: Statistics of the tokens the maps are made of.
        held_out: Statistics of other tokens.

    Returns:
        Translators in fp32, and ``n_layers`` strengths.
    """
    n_layers, d_model = fit.sum_x.shape
    weight = fit.xx.new_empty(n_layers, d_model, d_model, dtype=torch.float32)
    bias, strengths = fit.xx.new_empty(n_layers, d_model, dtype=torch.float32), []
    identity = torch.eye(d_model, dtype=fit.xx.dtype, device=fit.xx.device)
    for layer in range(n_layers):
        maps, bias[layer], strength = _solve_layer(layer, fit, held_out)
        weight[layer] = maps.T - identity
        strengths.append(strength)
    return Translators(weight, bias), strengths


def _solve_layer(layer: int, fit: Statistics, held_out: Statistics) -> tuple[Tensor, Tensor, float]:
    """(map ``[d_model in, d_model out]``, intercept, strength), all strengths from one eigendecomposition."""
    mean_x, mean_y = fit.means(layer)
    xx, xy, _ = fit.moments(layer, mean_x, mean_y)
    other_xx, other_xy, _ = held_out.moments(layer, mean_x, mean_y)
    values, basis = torch.linalg.eigh(xx)
    noise = fit.noise(layer)
    values, basis = values[values > noise], basis[:, values > noise]  # along the others there is nothing to map
    xy, other_xx, other_xy = basis.T @ xy, basis.T @ other_xx @ basis, basis.T @ other_xy
    scale = values.sum() / len(xx)
    best = None
    for strength in STRENGTHS:
        maps = xy / (values + strength * scale)[:, None]
        error = float((maps * (other_xx @ maps - 2 * other_xy)).sum())  # less the variance of y
        if best is None or error < best[0]:
            best = (error, maps, strength)
    maps = basis @ best[1]
    return maps, mean_y - mean_x @ maps, best[2]
