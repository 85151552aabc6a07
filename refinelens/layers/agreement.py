"""Where lens and interventions agree on which layers matter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..op.rank_agreement import kendall_tau_b, spearman
from ..report.bootstrap import Estimate, estimate, resampled_means
from .statistics import GAINS, LENS, LayerStatistic, Measured

COST = "logprob_cost"
GAIN = GAINS[0]
NOTICEABLE = 0.01  # nats, a hundredth of the probability: less is no essential layer, however sure
COEFFICIENTS = {"spearman": spearman, "kendall": kendall_tau_b}


@dataclass(frozen=True)
class Agreement:
    """Rank correlation over the layers of what the lens says and what an intervention costs, both means."""

    documents: int
    gold_position: int | None  # None for all of them together
    intervention: str
    lens_statistic: str
    coefficient: str  # spearman, or kendall (tau-b)
    value: Estimate  # with its interval over questions


@dataclass(frozen=True)
class Essential:
    """Layers whose interval lies above a threshold, by lens and intervention."""

    documents: int
    intervention: str
    both: tuple[int, ...]
    lens_only: tuple[int, ...]
    intervention_only: tuple[int, ...]


def agreements(lens: Measured, costs: list[Measured], seed: int) -> list[Agreement]:
    """Every lens statistic against the cost of every intervention, over layers ``1 .. n_layers``.

    Of each resample of the questions the means of both and their correlation are taken anew.
    """
    of_lens = {(documents, position): inside for documents, position, inside in lens.cells()}
    rows = []
    for cost in costs:
        for documents, position, inside in cost.cells():
            costly = _means(cost, inside, (COST,), seed)[0]
            gains = _means(lens, of_lens[documents, position], GAINS, seed)
            for name, gain in zip(GAINS, gains, strict=True):
                for coefficient, compare in COEFFICIENTS.items():
                    found = compare(gain[:, -costly.shape[1] :], costly)
                    value = estimate(found[0], found[1:])
                    rows.append(Agreement(documents, position, cost.of, name, coefficient, value))
    return rows


def essential_threshold(noise: float) -> float:
    """What the interval of an essential layer lies above: the largest change by the control, or `NOTICEABLE`."""
    return max(noise, NOTICEABLE)


def essential_layers(statistics: list[LayerStatistic], interventions: list[str], threshold: float) -> list[Essential]:
    """Layers whose mean gain under the lens, and whose mean cost, have an interval above the threshold.

    Args:
        statistics: Of lens and interventions.
        interventions: Those to compare.
        threshold: Nats.
    """
    above: dict[tuple[int, str], set[int]] = {}
    for row in statistics:
        if row.gold_position is None and row.statistic in (GAIN, COST):
            layers = above.setdefault((row.documents, row.of), set())
            layers |= {row.layer} if row.value.low > threshold else set()
    sizes = sorted({documents for documents, _ in above})
    rows = []
    for documents in sizes:
        by_lens = above.get((documents, LENS), set())
        for name in interventions:
            by_cost = above.get((documents, name), set())
            sets = (by_lens & by_cost, by_lens - by_cost, by_cost - by_lens)
            rows.append(Essential(documents, name, *(tuple(sorted(layers)) for layers in sets)))
    return rows


def _means(measured: Measured, inside: np.ndarray, names: tuple[str, ...], seed: int) -> list[np.ndarray]:
    """Of each statistic ``[1 + RESAMPLES, layers]``: the means of all questions first, then those of the resamples."""
    means, resampled = resampled_means(*measured.sums(inside, names), seed)
    return np.split(np.concatenate([means[None], resampled]), len(names), 1)
