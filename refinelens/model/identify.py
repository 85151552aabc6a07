"""What a module computes, found by asking it: its output on chosen rows is compared with formulas."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import permutations

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModelError
from ..kernels.norms import LayerNorm, Norm, RMSNorm, apply_norm

ROUNDINGS = 8  # of fp32, in which modules and formulas are compared
SMALL = 1e-4  # magnitude of rows on which an epsilon is measured


def identify_norm(module: nn.Module, d_model: int) -> Norm:
    """The `LayerNorm` or `RMSNorm` that a module computes, with the module's own parameters.

    Neither class nor attribute names count. A norm without parameters is found too, and one that adds 1
    to its stored weight.

    Args:
        module: Maps ``[..., d_model]`` to the same shape.
        d_model: Width of its input.

    Raises:
        UnsupportedModelError: No formula gives the module's output.
    """
    own = [p.detach() for p in module.parameters(recurse=False) if p.shape == (d_model,)]
    ask = _Asking(module)
    x = _rows(d_model, own[0].device if own else None)
    with torch.no_grad():
        for eps in _epsilons(module, ask, x):
            shifted = x + 0.5  # a LayerNorm and an RMSNorm agree on rows of mean 0
            rows = torch.cat([shifted, shifted * eps**0.5])  # the second half so small that a wrong epsilon shows
            wanted = ask(rows)
            for norm, wide in zip(_norms(own, eps), _norms([v.float() for v in own], eps), strict=True):
                if _agree(apply_norm(rows, wide), wanted):
                    return norm
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a LayerNorm or RMSNorm (of the stored weight, or of 1 + weight), "
        "got other values"
    )


def identify_projection(module: nn.Module, d_model: int) -> Tensor:
    """The weight ``[d_embed, d_model]`` of a linear map without bias, as the module stores it or transposed.

    Raises:
        UnsupportedModelError: The module computes something else.
    """
    weights = [p.detach() for p in module.parameters(recurse=False) if p.dim() == 2 and p.is_floating_point()]
    with torch.no_grad():
        for weight in (form for w in weights for form in (w, w.T) if form.shape[1] == d_model):
            x = _rows(d_model, weight.device) + 0.5
            if _agree(x @ weight.float().T, _Asking(module)(x)):
                return weight
    raise UnsupportedModelError(f"{type(module).__name__}: expected a linear map without bias, got {module}")


class _Asking:
    """A module as a function in fp32, so that half precision hides no difference."""

    def __init__(self, module: nn.Module):
        self._name = type(module).__name__
        self._module = copy.deepcopy(module).float()

    def __call__(self, x: Tensor) -> Tensor:
        try:
            return self._module(x)
        except Exception as error:  # anything can come out of a model's own code
            message = f"expected a module that takes rows {list(x.shape)}, got {type(error).__name__}: {error}"
            raise UnsupportedModelError(f"{self._name}: {message}") from error


def _rows(width: int, device: torch.device | None) -> Tensor:
    """Four random rows of mean 0 and mean square 1, ``[4, width]``."""
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = x - x.mean(-1, keepdim=True)
    return (x / x.square().mean(-1, keepdim=True).sqrt()).to(device)


def _epsilons(module: nn.Module, ask: _Asking, x: Tensor) -> Iterator[float]:
    """What may be the norm's epsilon: every small number that the module holds, then what its output tells.

    A norm scales a row of mean square v by ``sqrt(v / (v + eps))`` beside what it does to a large row.
    """
    yield from sorted({v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1})
    bias = ask(torch.zeros_like(x))
    large, small = ask(x / SMALL) - bias, ask(x * SMALL) - bias
    share = float((large * small).sum() / large.square().sum())
    if 0 < share < 1:
        eps = SMALL**2 * (share**-2 - 1)
        yield float(f"{eps:.4g}")  # as a person would have written it, without the rounding of the output
        yield eps


def _norms(vectors: list[Tensor], eps: float) -> Iterator[Norm]:
    """Every norm that these vectors can be the weight and bias of; all of them first, none of them last."""
    for number in range(min(len(vectors), 2), -1, -1):
        for chosen in permutations(vectors, number):
            weight, bias = (*chosen, None, None)[:2]
            yield LayerNorm(weight, bias, eps)
            yield RMSNorm(weight, eps)
            if weight is not None:
                yield RMSNorm(weight, eps, offset=1.0)
                yield LayerNorm(weight + 1.0, bias, eps)  # Nemotron's, summed in the dtype that it sums in


def _agree(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape or not torch.isfinite(wanted).all():
        return False
    return bool((got - wanted).abs().max() <= ROUNDINGS * torch.finfo(torch.float32).eps * wanted.abs().max())
