"""The table of trajectories: every prediction of a run at every threshold."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .results import KEYS, NO_ANSWER_TOKEN, TRAJECTORIES, Run
from .trajectory import NONE, trajectories

COLUMNS = [*(name for name, _ in KEYS), "answer_id", "generated_correct", "argmax", "target_rank", "target_logprob"]
LISTS = ["logprob_gain"]  # the only column that grows with the layers


def trajectory_tables(run: Run, tops: tuple[int, ...]) -> Iterator[pa.Table]:
    """Trajectories of answer tokens, part by part: one row per prediction and threshold, thresholds side by side."""
    for part in run.parts(COLUMNS):
        part = choose_tokens(part, "all")
        tables = _tables(part, tops)
        order = np.arange(len(part) * len(tops)).reshape(len(tops), -1).T.ravel()
        yield pa.concat_tables(tables).combine_chunks().take(order)


def read_trajectories(run: Run, tops: tuple[int, ...]) -> pa.Table:
    """All trajectories of a run without their lists."""
    tables = [table.drop_columns(LISTS) for table in trajectory_tables(run, tops)]
    return pa.concat_tables(tables) if tables else TRAJECTORIES.empty_table().drop_columns(LISTS)


def choose_tokens(table: pa.Table, answer_tokens: str) -> pa.Table:
    """The rows a summary is about: of the ``first`` answer token of each question, or of ``all``."""
    token = table["answer_token"]
    return table.filter(pc.equal(token, 0) if answer_tokens == "first" else pc.greater(token, NO_ANSWER_TOKEN))


def list_matrix(lists: pa.ChunkedArray) -> np.ndarray:
    """``[rows, layers]`` of a list column whose lists all have the same length."""
    flat = lists.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(lists), -1) if len(lists) else flat.reshape(0, 1)


def _tables(part: pa.Table, tops: tuple[int, ...]) -> list[pa.Table]:
    ranks, logprobs = list_matrix(part["target_rank"]), list_matrix(part["target_logprob"])
    gains = np.diff(logprobs, axis=1)
    offsets = np.arange(len(part) + 1, dtype=np.int32) * gains.shape[1]
    correct = list_matrix(part["argmax"])[:, -1] == part["answer_id"].to_numpy()
    shared = {
        "answer_correct": correct,
        "all_correct": _of_whole_answers(correct, part["answer_token"].to_numpy()),
        "generated_correct": part["generated_correct"],
        "logprob_gain": pa.ListArray.from_arrays(offsets, gains.ravel()),
    }
    tables = []
    for top in tops:
        result = trajectories(ranks, top)
        values = {
            **{name: part[name] for name, _ in KEYS},
            "top": np.full(len(part), top),
            "first_correct": _nullable(result.first_correct),
            "settle": _nullable(result.settle),
            "depth": _nullable(result.depth),
            "flips": _nullable(result.flips),
            "final_correct": ~result.censored,
            "largest_gain": _nullable(result.largest_gain),
            **shared,
        }
        tables.append(pa.table([values[name] for name in TRAJECTORIES.names], TRAJECTORIES.names).cast(TRAJECTORIES))
    return tables


def _of_whole_answers(correct: np.ndarray, answer_token: np.ndarray) -> np.ndarray:
    """Per row whether all tokens of its answer are correct; the tokens of an answer stand together, in order."""
    starts = np.diff(answer_token, prepend=answer_token[:1]) <= 0
    return np.logical_and.reduceat(correct, np.flatnonzero(starts))[starts.cumsum() - 1]


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=values == NONE)
