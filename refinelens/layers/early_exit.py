"""What is lost by stopping at a layer and taking what the lens reads there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..report.bootstrap import Estimate
from .statistics import LENS, LayerStatistic

NOWHERE = Estimate(math.nan, math.nan, math.nan)
KEPT = 0.95  # of the accuracy at the output


@dataclass(frozen=True)
class EarlyExit:
    """The lowest layer at which the lens is right at least `KEPT` times as often as the output."""

    documents: int
    gold_position: int | None  # None for all of them together
    questions: int
    accuracy: Estimate  # at the output
    layer: int | None  # None where the output is never right
    accuracy_there: Estimate
    agreement_there: Estimate  # share of examples whose prediction is that of the output


def early_exits(statistics: list[LayerStatistic]) -> list[EarlyExit]:
    """One per context size and gold position.

    Args:
        statistics: Of the lens, see `statistics.measure_lens`.
    """
    cells: dict[tuple, dict[str, list[LayerStatistic]]] = {}
    for row in statistics:
        if row.of == LENS:
            cell = cells.setdefault((row.documents, row.gold_position), {})
            cell.setdefault(row.statistic, []).append(row)
    return [_exit(*key, cell["exit_accuracy"], cell["exit_agreement"]) for key, cell in cells.items()]


def _exit(documents, position, accuracy: list[LayerStatistic], agreement: list[LayerStatistic]) -> EarlyExit:
    whole = accuracy[-1].value
    if whole.value == 0:
        return EarlyExit(documents, position, accuracy[-1].questions, whole, None, NOWHERE, NOWHERE)
    layer = next(row.layer for row in accuracy if row.value.value >= KEPT * whole.value)
    there = (accuracy[layer].value, agreement[layer].value)
    return EarlyExit(documents, position, accuracy[-1].questions, whole, layer, *there)
