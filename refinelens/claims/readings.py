"""Every reading of a sentence about depth, from the rows of one run.

"The layers between the first correct and the finally correct prediction" leaves open what is predicted (the answer, or
what the model itself says), at which token of the answer, what is correct, through which lens, and what becomes of
examples that are never settled. A `Reading` decides; `values_of` gives what it finds in every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..config import PLAIN, PREDICTION
from ..report.rows import lens_names
from ..report.summary import middle_positions, question_means
from ..stats import groups
from ..store.results import Run
from ..store.trajectory import choose_tokens, list_matrix, trajectories

TARGETS = ("answer", PREDICTION)  # whose rank: the answer's token, or the model's own at the output
TOKENS = ("first", "each", "whole")  # the first answer token; every one; all of them at once
CENSORED = ("out", "after")  # examples not correct at the output: left out, or settled at the layer after it
STATISTICS = ("depth", "first_correct", "settle", "accuracy", "accuracy_all", "accuracy_generated")


@dataclass(frozen=True)
class Reading:
    """One reading of a sentence about where an answer is predicted."""

    statistic: str = "depth"
    lens: str = PLAIN
    documents: int = 10
    top: int = 1  # correct is rank 1 to this
    target: str = "answer"
    tokens: str = "first"
    censored: str = "out"


@dataclass(frozen=True)
class Examples:
    """Rows of a run's answers, ``[rows]`` or ``[rows, n_layers + 1]`` each; the tokens of an answer stand together."""

    columns: dict[str, np.ndarray]
    lenses: tuple[str, ...]

    @classmethod
    def read(cls, run: Run) -> Examples:
        """All rows of a finished run; ``prediction_rank`` where it was measured."""
        keys = ("question_id", "documents", "gold_position", "answer_token", "answer_id")
        lists = ["target_rank", "argmax", *(["prediction_rank"] if PREDICTION in run.extras else [])]
        names = lens_names(run.manifest)
        parts = [choose_tokens(part, "all") for part in run.parts([*keys, "lens", "generated_correct", *lists])]
        table = pa.concat_tables(parts)
        columns = {name: table[name].to_numpy() for name in keys} | {name: list_matrix(table[name]) for name in lists}
        columns["lens"] = np.asarray([names.index(name) for name in table["lens"].to_pylist()])
        columns["generated"] = table["generated_correct"].cast(pa.float64()).fill_null(np.nan).to_numpy()
        return cls(columns, names)

    def of(self, reading: Reading) -> dict[str, np.ndarray]:
        """The rows of a lens and a context size."""
        inside = self.columns["lens"] == self.lenses.index(reading.lens)
        inside &= self.columns["documents"] == reading.documents
        return {name: column[inside] for name, column in self.columns.items()}


def values_of(examples: Examples, reading: Reading) -> dict[str, np.ndarray]:
    """``question_id``, ``gold_position`` and ``value`` of every example, fp64, NaN where it has none.

    An accuracy is of a whole context, and so of one example; ranks of ``whole`` are the largest of the answer's tokens.
    """
    rows = examples.of(reading)
    starts = np.flatnonzero(rows["answer_token"] == 0)  # of the answers
    keys = {name: rows[name][starts] for name in ("question_id", "gold_position")}
    if reading.statistic.startswith("accuracy"):
        right = rows["argmax"][:, -1] == rows["answer_id"]
        values = {
            "accuracy": right[starts],
            "accuracy_all": np.logical_and.reduceat(right, starts) if len(starts) else right,
            "accuracy_generated": rows["generated"][starts],
        }
        return keys | {"value": values[reading.statistic].astype(float)}
    ranks = rows["target_rank" if reading.target == "answer" else "prediction_rank"]
    if reading.tokens == "first":
        ranks = ranks[starts]
    elif reading.tokens == "whole":
        ranks = np.maximum.reduceat(ranks, starts, axis=0) if len(starts) else ranks
    else:
        keys = {name: rows[name] for name in keys}
    return keys | {"value": _trajectory_values(ranks, reading)}


def _trajectory_values(ranks: np.ndarray, reading: Reading) -> np.ndarray:
    found = trajectories(ranks, reading.top, axis=-1)
    first = np.where(found.first_correct < 0, np.nan, found.first_correct.astype(float))
    settle = np.where(found.censored, np.nan, found.settle.astype(float))
    if reading.censored == "after":
        settle = np.where(found.censored, float(ranks.shape[1]), settle)  # n_layers + 1
    values = {"first_correct": np.where(np.isnan(settle), np.nan, first), "settle": settle, "depth": settle - first}
    return values[reading.statistic]


def by_position(examples: Examples, reading: Reading) -> list[tuple[int, np.ndarray]]:
    """Of every gold position the mean of each question that has a value there, fp64 ``[questions]``."""
    cell = values_of(examples, reading)
    found = []
    for position, _ in groups(cell["gold_position"]):
        means = question_means(cell, [cell["value"]], [[position]])[:, 0, 0]
        found.append((position, means[~np.isnan(means)]))
    return found


def contrasts(examples: Examples, reading: Reading, middle_above: bool) -> dict[str, np.ndarray]:
    """Differences of every question between the middle third of the positions and each end, by name, fp64 ``[n]``.

    Nothing where the middle or an end was not asked.

    Args:
        examples: Of the run.
        reading: What is compared.
        middle_above: The middle less an end; else an end less the middle.
    """
    cell = values_of(examples, reading)
    asked, last = set(cell["gold_position"].tolist()), reading.documents - 1
    middle = [position for position in middle_positions(reading.documents) if position in asked]
    if not middle or not asked.issuperset({0, last}):
        return {}
    means = question_means(cell, [cell["value"]], [middle, [0], [last]])[..., 0]
    sign, names = (1.0, ("middle less first", "middle less last"))
    if not middle_above:
        sign, names = (-1.0, ("first less middle", "last less middle"))
    return {name: sign * (means[:, 0] - means[:, place]) for place, name in enumerate(names, 1)}


def every_reading(primary: Reading, dimensions: dict[str, Sequence]) -> list[Reading]:
    """Every combination of some dimensions but the primary one, in their order; what they leave is the primary's.

    Where nothing is censored, as of the model's own prediction, one of `CENSORED` stands for both.
    """
    found = [primary]
    for name, values in dimensions.items():
        found = [replaced(one, name, value) for one in found for value in values]
    unique = {canonical(one): one for one in reversed(found)}
    return [one for one in reversed(unique.values()) if canonical(one) != canonical(primary)]


def canonical(reading: Reading) -> Reading:
    """The reading with what it does not depend on as it is by default, so that equal ones compare so."""
    if reading.statistic.startswith("accuracy"):
        return Reading(reading.statistic, documents=reading.documents)
    return replaced(reading, "censored", "out") if reading.target == PREDICTION else reading


def replaced(reading: Reading, name: str, value: object) -> Reading:
    """The reading with another value of one field."""
    return Reading(**{**vars(reading), name: value})
