"""From which layer on a state that is carried over brings the answer with it, or takes it away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..report.bootstrap import Estimate, mean_estimates, sums_and_counts
from ..runs.layers_schema import RESTORE
from .scanned import Scanned


@dataclass(frozen=True)
class Patching:
    """One pair of gold positions of one context size, or all pairs together."""

    intervention: str  # restore, or destroy
    documents: int
    gold_position: int | None  # of the run that is patched; None for all pairs together
    source_position: int | None  # of the run that the state is from
    questions: int
    examples: int
    from_layer: Estimate  # mean over examples of the lowest layer from which every patch has the effect


def patchings(scanned: Scanned, seed: int) -> list[Patching]:
    """All pairs together first, then each.

    Args:
        scanned: Of `layers_schema.RESTORE` or `layers_schema.DESTROY`.
        seed: Seed of the bootstrap over questions.
    """
    done = scanned["correct"] == (1.0 if scanned.intervention == RESTORE else 0.0)
    stays = np.logical_and.accumulate(done[:, ::-1], axis=1).sum(1)
    from_layer = done.shape[1] + 1.0 - stays
    return [
        Patching(scanned.intervention, *pair, *_mean(scanned.question_id[inside], from_layer[inside], seed))
        for *pair, inside in _pairs(scanned)
    ]


def _pairs(scanned: Scanned) -> Iterator[tuple[int, int | None, int | None, np.ndarray]]:
    for documents in np.unique(scanned.documents).tolist():
        of_size = scanned.documents == documents
        yield documents, None, None, of_size
        pairs = np.stack([scanned.gold_position, scanned.source_position.astype(int)], 1)
        for position, source in np.unique(pairs[of_size], axis=0).tolist():
            yield documents, position, source, of_size & (pairs == (position, source)).all(1)


def _mean(question_id: np.ndarray, values: np.ndarray, seed: int) -> tuple[int, int, Estimate]:
    ids, owner = np.unique(question_id, return_inverse=True)
    return len(ids), len(values), mean_estimates(*sums_and_counts(values[:, None], owner, len(ids)), seed)[0]
