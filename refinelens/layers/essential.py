"""Which layers an answer needs: by the lens, and by every intervention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..report.bootstrap import FEW_QUESTIONS, LEVEL, ratio, t_quantile
from .statistics import COST, EVERY_POSITION, GAIN, Measured

NOTICEABLE = 0.01  # nats, a hundredth of the probability: less is no essential layer, however sure


@dataclass(frozen=True)
class Essential:
    """Layers whose mean lies above a threshold for sure, by lens and intervention."""

    documents: int
    intervention: str
    both: tuple[int, ...]
    lens_only: tuple[int, ...]
    intervention_only: tuple[int, ...]


def essential_threshold(noise: float) -> float:
    """What the mean of an essential layer lies above for sure: the largest change by the control, or `NOTICEABLE`."""
    return max(noise, NOTICEABLE)


def essential_layers(lens: Measured, costs: list[Measured], threshold: float) -> list[Essential]:
    """Layers whose mean gain under the lens, and whose mean cost, have a `lower_bounds` above the threshold.

    Args:
        lens: What the lens says; context sizes with fewer than `FEW_QUESTIONS` questions have no verdict, and no row.
        costs: Of the interventions to compare.
        threshold: Nats.
    """
    by_lens = _above(lens, GAIN, threshold)
    by_cost = {cost.of: _above(cost, COST, threshold) for cost in costs}
    rows = []
    for documents, gaining in by_lens.items():
        for name, of_size in by_cost.items():
            costly = of_size[documents]
            sets = (gaining & costly, gaining - costly, costly - gaining)
            rows.append(Essential(documents, name, *(tuple(sorted(layers)) for layers in sets)))
    return rows


def lower_bounds(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bounds below the means of several statistics, ``[n_statistics]``, that hold for all of them at once.

    With a probability of `LEVEL`: one-sided t bounds at a Bonferroni level, with the standard error of a mean over
    questions with different numbers of values (Cochran 1977, Sampling Techniques, 6.4).

    Args:
        sums: ``[n_questions, n_statistics]``, the sum of a question's values; 2 questions or more have some.
        counts: Same shape, how many values the question has; a statistic without any has NaN for a bound.
    """
    means, questions = ratio(sums.sum(0), counts.sum(0)), (counts > 0).sum(0)
    squares = ((sums - means * counts) ** 2).sum(0) * questions / (questions - 1)
    errors = ratio(np.sqrt(squares), counts.sum(0))
    return means - t_quantile((1 - LEVEL) / (questions > 0).sum(), questions) * errors


def _above(measured: Measured, name: str, threshold: float) -> dict[int, set[int]]:
    """Layers above the threshold by context size, all gold positions together."""
    found = {}
    for documents, position, inside in measured.cells():
        if position is EVERY_POSITION and len(np.unique(measured.question_id[inside])) >= FEW_QUESTIONS:
            low = lower_bounds(*measured.sums(inside, (name,)))
            found[documents] = set((measured.first_layer + np.flatnonzero(low > threshold)).tolist())
    return found
