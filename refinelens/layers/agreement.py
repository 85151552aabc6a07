"""How far lens and interventions agree on the order of the layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..op.rank_agreement import kendall_tau_b, spearman
from ..report.bootstrap import Estimate, reflected_estimate, resampled_means
from .statistics import COST, GAINS, Measured

COEFFICIENTS = {"spearman": spearman, "kendall": kendall_tau_b}
FEW_LAYERS = 5  # fewer are in the same order, or in the reverse one, by chance: 4 once in 12 times, 3 once in 3


@dataclass(frozen=True)
class Agreement:
    """Rank correlation over the layers of what the lens says and what an intervention costs, both means."""

    documents: int
    gold_position: int | None  # None for all of them together
    intervention: str
    lens_statistic: str
    coefficient: str  # spearman, or kendall (tau-b)
    value: Estimate  # with its interval over questions


def agreements(lens: Measured, costs: list[Measured], seed: int) -> list[Agreement]:
    """Every lens statistic against the cost of every intervention, over layers ``1 .. n_layers``.

    There is no agreement of fewer than `FEW_LAYERS` layers.

    Of each resample of the questions the means of both and their correlation are taken anew. The noise of the means
    moves a correlation towards 0, and that of resampled means, which have it twice, further: so that the interval of
    the resamples is reflected at the correlation.
    """
    of_lens = {(documents, position): inside for documents, position, inside in lens.cells()}
    rows = []
    for cost in (cost for cost in costs if cost.values[COST].shape[1] >= FEW_LAYERS):
        for documents, position, inside in cost.cells():
            questions = len(np.unique(cost.question_id[inside]))
            costly = _means(cost, inside, (COST,), seed)[0]
            gains = _means(lens, of_lens[documents, position], GAINS, seed)
            for name, gain in zip(GAINS, gains, strict=True):
                for coefficient, compare in COEFFICIENTS.items():
                    found = compare(gain[:, -costly.shape[1] :], costly)
                    value = reflected_estimate(found[0], found[1:], questions, limit=1.0)
                    rows.append(Agreement(documents, position, cost.of, name, coefficient, value))
    return rows


def _means(measured: Measured, inside: np.ndarray, names: tuple[str, ...], seed: int) -> list[np.ndarray]:
    """Of each statistic ``[1 + RESAMPLES, layers]``: the means of all questions first, then those of the resamples."""
    means, resampled = resampled_means(*measured.sums(inside, names), seed)
    return np.split(np.concatenate([means[None], resampled]), len(names), 1)
