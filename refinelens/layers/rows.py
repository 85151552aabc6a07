"""Rows of `layers_schema.LAYER_ROWS` from what was read of one context."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..runs.layers_schema import LAYER_ROWS
from ..runs.trajectory import NONE, trajectories
from .reading import Reading


@dataclass(frozen=True)
class Asked:
    """A context and what is looked for in it."""

    question_id: int
    documents: int
    gold_position: int
    target: int  # token id
    lens: str


def ablation_rows(asked: Asked, intervention: str, at: str, reading: Reading, top: int) -> pa.Table:
    """One row per struck block, with the trajectory of what remains."""
    found = trajectories(reading.ranks, top)
    columns = {}
    for name in ("first_correct", "settle", "depth"):
        values = getattr(found, name)
        columns[name] = pa.array(values[1:], mask=values[1:] == NONE)
        missing = (values[1:] == NONE) | (values[0] == NONE)
        columns[f"{name}_change"] = pa.array(values[1:] - values[0], mask=missing)
    return _table(asked, intervention, at, None, reading, top, columns)


def patch_rows(asked: Asked, intervention: str, source_position: int, reading: Reading, top: int) -> pa.Table:
    """One row per layer that was carried over, without trajectories."""
    return _table(asked, intervention, "answer", source_position, reading, top, {})


def _table(
    asked: Asked, intervention: str, at: str, source: int | None, reading: Reading, top: int, columns: dict
) -> pa.Table:
    ranks, logprobs = reading.ranks[:, -1], reading.logprobs[:, -1]
    correct = ranks < top
    columns = columns | {
        "layer": np.arange(1, len(ranks)),
        "target_logprob": logprobs[1:],
        "target_rank": ranks[1:],
        "correct": correct[1:],
        "logprob_change": logprobs[1:] - logprobs[0],
        "rank_change": ranks[1:] - ranks[0],
        "correct_change": correct[1:].astype(int) - int(correct[0]),
    }
    constants = {
        "question_id": asked.question_id,
        "documents": asked.documents,
        "gold_position": asked.gold_position,
        "intervention": intervention,
        "at": at,
        "source_position": source,
        "lens": asked.lens,
        "target_id": asked.target,
    }
    n = len(ranks) - 1
    for field in LAYER_ROWS:
        if field.name not in columns:
            columns[field.name] = pa.array([constants.get(field.name)] * n, field.type)
    return pa.table([columns[name] for name in LAYER_ROWS.names], LAYER_ROWS.names).cast(LAYER_ROWS)
