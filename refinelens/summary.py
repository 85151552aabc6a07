"""From the predictions of a run to its trajectories and its summary with intervals."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .results import KEYS, TRAJECTORIES, Run
from .trajectory import NONE, trajectories

RESAMPLES = 2000
LEVEL = 0.95
RESAMPLED_VALUES = 1 << 16  # held at a time, so that memory does not grow with the number of questions


@dataclass(frozen=True)
class Estimate:
    """A statistic with its bootstrap interval; NaN where it does not exist."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SummaryRow:
    """One context size and gold position. Means and medians of depth, first-correct and settle are over
    the examples that have them; n counts questions."""

    documents: int
    gold_position: int
    n: int
    accuracy: Estimate
    share_censored: Estimate  # not correct at the output
    mean_depth: Estimate
    median_depth: Estimate
    mean_first_correct: Estimate
    mean_settle: Estimate


ESTIMATES = [name for name, kind in SummaryRow.__annotations__.items() if kind == "Estimate"]


def trajectory_table(run: Run, top: int) -> pa.Table:
    """First-correct, settle, depth and flips of every row of a run, read part by part."""
    keys = [name for name, _ in KEYS]
    tables = []
    for part in run.parts([*keys, "answer_id", "argmax", "target_rank"]):
        ranks = layer_matrix(part["target_rank"])
        result = trajectories(ranks, top)
        values = {
            "first_correct": _nullable(result.first_correct),
            "settle": _nullable(result.settle),
            "depth": _nullable(result.depth),
            "flips": _nullable(result.flips),
            "final_correct": pa.array(~result.censored),
            "answer_correct": pa.array(layer_matrix(part["argmax"])[:, -1] == part["answer_id"].to_numpy()),
        }
        columns = [part[name] for name in keys] + list(values.values())
        tables.append(pa.table(columns, names=TRAJECTORIES.names).cast(TRAJECTORIES))
    return pa.concat_tables(tables) if tables else TRAJECTORIES.empty_table()


def choose_tokens(table: pa.Table, answer_tokens: str) -> pa.Table:
    """The trajectories a summary is about: of the ``first`` answer token of each question, or of ``all``."""
    return table.filter(pc.equal(table["answer_token"], 0)) if answer_tokens == "first" else table


def summarise(table: pa.Table, seed: int = 0) -> list[SummaryRow]:
    """Statistics per context size and gold position, with bootstrap intervals over questions.

    Args:
        table: Trajectories; where a question has several answer tokens, they are resampled together.
        seed: Seed of the bootstrap (percentile method, Efron 1979).
    """
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in TRAJECTORIES.names}
    cells = sorted(set(zip(columns["documents"].tolist(), columns["gold_position"].tolist(), strict=True)))
    rows = []
    for documents, position in cells:
        inside = (columns["documents"] == documents) & (columns["gold_position"] == position)
        cell = {name: column[inside] for name, column in columns.items()}
        rows.append(_summarise_cell(documents, position, cell, seed))
    return rows


def _summarise_cell(documents: int, position: int, cell: dict[str, np.ndarray], seed: int) -> SummaryRow:
    ids, owner = np.unique(cell["question_id"], return_inverse=True)

    def estimate(values: np.ndarray, reduce=np.nanmean) -> Estimate:
        by_question = np.full((len(ids), np.bincount(owner).max()), np.nan)
        slot = cell["answer_token"] - cell["answer_token"].min()
        by_question[owner, slot] = values
        return _bootstrap(by_question, reduce, seed)

    depth, first, settle = (cell[name].astype(float) for name in ("depth", "first_correct", "settle"))
    return SummaryRow(
        documents=documents,
        gold_position=position,
        n=len(ids),
        accuracy=estimate(cell["answer_correct"].astype(float)),
        share_censored=estimate(1.0 - cell["final_correct"].astype(float)),
        mean_depth=estimate(depth),
        median_depth=estimate(depth, np.nanmedian),
        mean_first_correct=estimate(first),
        mean_settle=estimate(settle),
    )


def _bootstrap(by_question: np.ndarray, reduce, seed: int) -> Estimate:
    """``by_question`` is [question, token] with NaN for values that do not exist."""
    if np.isnan(by_question).all():
        return Estimate(np.nan, np.nan, np.nan)
    generator = np.random.default_rng(seed)
    block = max(1, RESAMPLED_VALUES // by_question.size)
    values = []
    for start in range(0, RESAMPLES, block):
        draws = generator.integers(0, len(by_question), size=(min(block, RESAMPLES - start), len(by_question)))
        resampled = by_question[draws].reshape(len(draws), -1)
        values.append(reduce(resampled[~np.isnan(resampled).all(axis=1)], axis=1))
    low, high = np.quantile(np.concatenate(values), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(reduce(by_question)), float(low), float(high))


def layer_matrix(lists: pa.ChunkedArray) -> np.ndarray:
    """``[rows, layers]`` of a list column whose lists all have the same length."""
    flat = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(lists), -1)


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=values == NONE)
