"""Differences between gold positions, paired over questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa

from ..conditions import ORACLE, condition_name
from .bootstrap import Estimate, mean_estimates
from .summary import Cell, reading_cells


@dataclass(frozen=True)
class PairedDifference:
    """Statistics with the gold document at one position less those at an earlier one, means over questions.

    A question counts where it has the statistic at both positions. The accuracies are the model's own, the same for
    every lens and threshold.
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
        seed: Seed of the bootstrap over questions.
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
        f"{d.gold_position} - {d.less_position}: {d.accuracy.value:+.2f} [{d.accuracy.low:.2f},{d.accuracy.high:.2f}]"
        for d in pairs
    ]
    return f"Accuracy, gold at one position less at another, {condition_name(documents)}: {'; '.join(words)}."


def _pairs(cell: Cell, seed: int) -> Iterator[tuple]:
    positions = np.unique(cell["gold_position"]).tolist()
    ids, row = np.unique(cell["question_id"], return_inverse=True)
    column = np.searchsorted(positions, cell["gold_position"])
    first = cell["answer_token"] == 0  # what is said of a whole context counts once
    statistics = {
        "accuracy": np.where(first, cell["answer_correct"], np.nan),
        "accuracy_all": np.where(first, cell["all_correct"], np.nan),
        "accuracy_generated": np.where(first, cell["generated_correct"], np.nan),
        "depth": np.where(cell["final_correct"], cell["depth"].astype(float), np.nan),
    }
    shape = (len(ids), len(positions))
    means = {name: _means(values, (row, column), shape) for name, values in statistics.items()}
    pairs = list(combinations(range(len(positions)), 2))
    if not pairs:
        return
    differences = {name: np.stack([m[:, b] - m[:, a] for a, b in pairs], 1) for name, m in means.items()}
    stacked = np.concatenate(list(differences.values()), 1)  # [questions, statistics x pairs]
    exists = ~np.isnan(stacked)
    estimates = mean_estimates(np.where(exists, stacked, 0.0), exists.astype(float), seed)
    counts = exists.sum(0).tolist()
    for index, (a, b) in enumerate(pairs):
        own = slice(index, None, len(pairs))
        accuracy, accuracy_all, accuracy_generated, depth = estimates[own]
        questions, *_, settled = counts[own]
        yield positions[b], positions[a], questions, accuracy, accuracy_all, accuracy_generated, settled, depth


def _means(values: np.ndarray, place: tuple[np.ndarray, np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """``[questions, positions]``: mean of the values of each, NaN where there is none."""
    exists = ~np.isnan(values)
    sums, counts = np.zeros(shape), np.zeros(shape)
    np.add.at(sums, place, np.where(exists, values, 0.0))
    np.add.at(counts, place, exists)
    return np.divide(sums, counts, out=np.full(shape, np.nan), where=counts > 0)
