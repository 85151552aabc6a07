"""Training translators to predict what the model predicts: the tuned lens, from the linear lens on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..lenses.logit_lens import LogitLens
from ..lenses.translators import Translators
from ..model.parts import LensParts
from .statistics import Statistics

ROWS = 128  # tokens of a step, drawn from one sequence
RATE = 0.0025  # of both optimisers, in units of the spread of the last layer's states
SMALLEST = 1e-4  # variance a direction is taken to have at least, as a share of the mean


def train(
    logit_lens: LogitLens,
    start: Translators,
    statistics: Statistics,
    sequences: Callable[[], Iterator[Tensor]],
    steps: int,
    seed: int,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Translators:
    """Lower ``KL(p_final || p_layer)`` by Muon (Jordan 2024), from the translators of ridge regression on.

    The objective of Belrose et al. 2023 ("Eliciting Latent Predictions from Transformers with the Tuned Lens",
    section 3). A translator's correction acts on whitened states, so that one rate fits all directions: of a
    residual stream a few carry nearly all variance.

    Args:
        logit_lens: The model; its norm and unembedding stay as they are.
        start: Where to begin, fp32.
        statistics: Of the tokens that are trained on.
        sequences: Yields their states ``[n_layers + 1, tokens, d_model]``, again at every call.
        steps: Optimiser steps, one sequence each.
        seed: Of the tokens drawn.
        report: Called with steps done and their total.

    Memory: about ``16 * n_layers * d_model**2`` bytes, the unembedding in fp32, and logits of `ROWS` tokens with
    their gradients.
    """
    corrections = [_Correction(layer, start, statistics, steps) for layer in range(start.n_layers)]
    parts = replace(logit_lens.parts, unembedding=logit_lens.parts.unembedding.float())
    generator = torch.Generator().manual_seed(seed)
    for step, hidden in enumerate(_endless(sequences)):
        report(step, steps)
        if step == steps:
            break
        rows = torch.randperm(hidden.shape[1], generator=generator)[:ROWS].to(hidden.device)
        final = parts.logits(hidden[-1, rows].float()).log_softmax(-1)
        for layer, correction in enumerate(corrections):
            correction.step(parts, hidden[layer, rows].float(), final)
    weight, bias = zip(*(correction.folded() for correction in corrections), strict=True)
    return Translators(torch.stack(weight), torch.stack(bias))


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
            torch.optim.Muon([self._maps], lr=RATE * spread, weight_decay=0.0),
            torch.optim.Adam([self._shift], lr=RATE * spread),
        )
        self._schedules = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, steps) for o in self._optimisers]

    def step(self, parts: LensParts, x: Tensor, final: Tensor) -> None:
        """One step on the states ``[rows, d_model]`` towards the log-probabilities ``[rows, vocab_size]``."""
        translated = torch.addmm(self._bias, x, self._weight.T) + x
        translated = translated + (x - self._mean) @ self._whiten @ self._maps + self._shift
        own = parts.logits(translated).log_softmax(-1)
        torch.nn.functional.kl_div(own, final, reduction="batchmean", log_target=True).backward()
        for optimiser, schedule in zip(self._optimisers, self._schedules, strict=True):
            optimiser.step()
            schedule.step()
            optimiser.zero_grad()

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the correction in them."""
        with torch.no_grad():
            added = (self._whiten @ self._maps).T
            return self._weight + added, self._bias + self._shift - added @ self._mean


def _endless(sequences: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    while True:
        yield from sequences()
