"""Differences between gold positions, paired over questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa

from ..conditions import ORACLE, condition_name
from .bootstrap import Estimate, mean_estimates, ratio, sums_and_counts
from .shares import paired_estimate
from .summary import Cell, reading_cells
from .words import format_estimate


@dataclass(frozen=True)
class PairedDifference:
    """Statistics with the gold document at one position less those at an earlier one, means over questions.

    A question counts where it has the statistic at both positions. The accuracies are the model's own, the same for
    every lens and threshold; their intervals are those of paired shares, that of depth is a bootstrap over questions.
    """

    lens: str
    top: int
    documents: int
    gold_position: int
    less_position: int  # the earlier one, whose statistics are subtracted
    questions: int
    accuracy: Estimate
    accuracy_all: Estimate
    accuracy_generated: Estimate
    questions_settled: int  # that have a depth at both positions
    depth: Estimate  # layers


def paired_differences(
    table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...], seed: int
) -> list[PairedDifference]:
    """Every pair of gold positions of every lens, threshold and context size.

    Args:
        table: Trajectories without lists, of the examples that the run's tables are about.
        lenses: Names of the lenses, in the order wanted.
        tops: Thresholds, in the order wanted.
        seed: Seed of the bootstrap of depth over questions.
    """
    return [
        PairedDifference(lens, top, documents, *values)
        for lens, top, documents, cell in reading_cells(table, lenses, tops)
        if documents > ORACLE
        for values in _pairs(cell, seed)
    ]


def paired_line(differences: list[PairedDifference]) -> str:
    """The accuracies of one context size compared: gold in the middle and last against first, and each other."""
    documents = differences[0].documents
    wanted = {0, (documents - 1) // 2, documents - 1}
    pairs = [d for d in differences if {d.gold_position, d.less_position} <= wanted]
    words = [
        f"{d.gold_position} - {d.less_position}: {format_estimate(d.accuracy, 2, interval=True, sign=True)}"
        for d in pairs
    ]
    return f"Accuracy, gold at one position less at another, {condition_name(documents)}: {'; '.join(words)}."


def _pairs(cell: Cell, seed: int) -> Iterator[tuple]:
    positions = np.unique(cell["gold_position"]).tolist()
    ids, row = np.unique(cell["question_id"], return_inverse=True)
    pairs = list(combinations(range(len(positions)), 2))
    if not pairs:
        return
    first = cell["answer_token"] == 0  # what is said of a whole context counts once
    values = [np.where(first, cell[name], np.nan) for name in ("answer_correct", "all_correct", "generated_correct")]
    depth = np.where(cell["final_correct"], cell["depth"].astype(float), np.nan)
    place = row * len(positions) + np.searchsorted(positions, cell["gold_position"])
    sums, counts = sums_and_counts(np.stack([*values, depth], 1), place, len(ids) * len(positions))
    means = ratio(sums, counts).reshape(len(ids), len(positions), -1)  # [questions, positions, statistics]
    earlier, later = np.array(pairs).T
    *accuracies, depths = np.moveaxis(means[:, later] - means[:, earlier], -1, 0)  # [questions, pairs] each
    exists = ~np.isnan(depths)
    estimates = mean_estimates(np.where(exists, depths, 0.0), exists.astype(float), seed)
    for index, (a, b) in enumerate(pairs):
        shares = [paired_estimate(differences[:, index]) for differences in accuracies]
        questions = int((~np.isnan(accuracies[0][:, index])).sum())
        yield positions[b], positions[a], questions, *shares, int(exists[:, index].sum()), estimates[index]
