"""What a lens is fitted to: the last layer's states by ridge regression, or the model's predictions by training.

Sufficient statistics of the regression of the last layer's residual stream on every layer's are summed in fp64. The
tuned lens starts from the linear one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ..lens.logit_lens import LogitLens
from ..lens.translators import Translators
from ..model.head import LensHead
from ..op.lens_kl import lens_kl
from ..op.vocabulary import lens_top_k

STRENGTHS = tuple(10.0**power for power in range(-8, 2))  # as shares of the mean variance of a layer's states
ROWS = 256  # tokens of a step, drawn from one sequence
STEPS_PER_SEQUENCE = 2  # with other tokens each: the model's own pass would cost more than they do
LIKELIEST, OTHERS = 20, 2048  # of the vocabulary in a step: every token's likeliest ones, and a sample of the rest
RATE = 0.0025  # of both optimisers, in units of the spread of the last layer's states
NEWTON_SCHULZ = 4  # iterations of Muon; a fifth changes nothing but the time
SMALLEST = 1e-4  # variance a direction is taken to have at least, as a share of the mean


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
        """The sums themselves by name, for a file and to be filled from one."""
        return {f"{prefix}.{field.name}": getattr(self, field.name) for field in fields(self)}


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


def train(
    logit_lens: LogitLens,
    start: Translators,
    statistics: Statistics,
    sequences: Callable[[], Iterator[Tensor]],
    steps: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Translators:
    """Lower ``KL(p_final || p_layer)`` by Muon (Jordan 2024), from the translators of ridge regression on.

    The objective of Belrose et al. 2023 ("Eliciting Latent Predictions from Transformers with the Tuned Lens",
    section 3). A translator's correction acts on whitened states, so that one rate fits all directions: of a
    residual stream a few carry nearly all variance. A step takes a part of the vocabulary, see `sampled_head`; what is
    measured afterwards takes all of it.

    Args:
        logit_lens: The model; its norm and unembedding stay as they are.
        start: Where to begin, fp32.
        statistics: Of the tokens that are trained on.
        sequences: Yields their states ``[n_layers + 1, tokens, d_model]``, again at every call; they stay as they are.
        steps: Optimiser steps, `STEPS_PER_SEQUENCE` of each sequence.
        seed: Of the tokens drawn.
        progress: Called with steps done and their total.

    Memory: about ``16 * n_layers * d_model**2`` bytes, the states of `ROWS` tokens at all layers with their gradients,
    and the part of the unembedding.
    """
    corrections = [_Correction(layer, start, statistics, steps) for layer in range(start.n_layers)]
    generator = torch.Generator().manual_seed(seed)
    for step, hidden in enumerate(_endless(sequences, generator)):
        progress(step, steps)
        if step == steps:
            break
        head, hidden = sampled_head(logit_lens.head, hidden[-1], generator), hidden.float()
        translated = torch.stack([own(states) for own, states in zip(corrections, hidden[:-1], strict=True)])
        lens_kl(translated, hidden[-1], head).mean(-1).sum().backward()
        for correction in corrections:
            correction.update()
    weight, bias = zip(*(correction.folded() for correction in corrections), strict=True)
    return Translators(torch.stack(weight), torch.stack(bias))


def sampled_head(head: LensHead, final_states: Tensor, generator: torch.Generator) -> LensHead:
    """A head of the tokens that matter for some rows and of a random sample of the others, which stands for them.

    The likeliest tokens of every row at the output are all in it; of the ``n`` others `OTHERS` are drawn, each with
    ``log(n / OTHERS)`` added to its logit. So the sums over the vocabulary are right in the mean: importance sampling
    of the partition function (Bengio and Senecal 2003; Jean et al. 2015, arXiv 1412.2007, section 3). What that costs
    and gains beside the whole vocabulary is measured by benchmarks/fit_kl.py.

    Args:
        head: The model's. Small vocabularies stay whole, and those under a softcap, where no bias can stand for others.
        final_states: ``[rows, d_model]``, of the last layer.
        generator: Of the sample.
    """
    likeliest = lens_top_k(final_states, head, min(LIKELIEST, head.vocab_size)).ids.unique()
    n_others = head.vocab_size - len(likeliest)
    if n_others <= OTHERS or head.softcap is not None:
        return head
    is_other = torch.ones(head.vocab_size, dtype=torch.bool)
    is_other[likeliest.cpu()] = False
    (others,) = is_other.nonzero(as_tuple=True)
    drawn = others[torch.randperm(n_others, generator=generator)[:OTHERS]].to(likeliest.device)
    tokens = torch.cat([likeliest, drawn])
    bias = torch.zeros(len(tokens), device=tokens.device) if head.bias is None else head.bias[tokens].float()
    bias[len(likeliest) :] += math.log(n_others / OTHERS) / head.scale
    return replace(head, weight=head.weight[tokens], bias=bias)


class _Correction:
    """What training adds to the translator of one layer: ``(x - mean) @ whiten @ maps + shift``."""

    def __init__(self, layer: int, start: Translators, statistics: Statistics, steps: int):
        mean_x, mean_y = statistics.means(layer)
        xx, _, yy = statistics.moments(layer, mean_x, mean_y)
        values, basis = torch.linalg.eigh(xx / statistics.count)
        varies = values > statistics.noise(layer) / statistics.count
        scale = torch.where(varies, values.clamp(min=SMALLEST * values.mean()).rsqrt(), 0.0)
        self._whiten, self._mean = (basis * scale).float(), mean_x.float()
        self._weight, self._bias = start.weight[layer], start.bias[layer]
        self._maps = torch.zeros_like(self._weight, requires_grad=True)
        self._shift = torch.zeros_like(self._bias, requires_grad=True)
        spread = float((yy / statistics.count).mean().sqrt())
        self._optimisers = (
            torch.optim.Muon([self._maps], lr=RATE * spread, weight_decay=0.0, ns_steps=NEWTON_SCHULZ),
            torch.optim.Adam([self._shift], lr=RATE * spread),
        )
        self._schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, steps) for o in self._optimisers]

    def __call__(self, x: Tensor) -> Tensor:
        """The translated states of ``x``, ``[rows, d_model]`` fp32; differentiable in what is trained."""
        translated = torch.addmm(self._bias, x, self._weight.T) + x
        return translated + (x - self._mean) @ self._whiten @ self._maps + self._shift

    def update(self) -> None:
        """A step along the gradients that are there, which are gone then."""
        for optimiser, schedule in zip(self._optimisers, self._schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the correction in them."""
        with torch.no_grad():
            added = (self._whiten @ self._maps).T
            return self._weight + added, self._bias + self._shift - added @ self._mean


def _endless(sequences: Callable[[], Iterator[Tensor]], generator: torch.Generator) -> Iterator[Tensor]:
    """The states of `ROWS` tokens of a sequence, ``[n_layers + 1, rows, d_model]``, and of others of the same one."""
    while True:
        for hidden in sequences():
            order = torch.randperm(hidden.shape[1], generator=generator).to(hidden.device)
            for rows in order.split(ROWS)[:STEPS_PER_SEQUENCE]:
                yield hidden[:, rows]
