"""Prediction rows: what the lenses read of a context, as a table."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from ..lenses.logit_lens import LayerReading
from ..runs.results import NO_ANSWER_TOKEN, PREDICTIONS
from ..tasks.question import Alias
from ..tasks.scoring import best_subspan_em
from .readings import ContextReading

STATISTICS = ("argmax", "target_rank", "target_logprob", "max_logprob", "entropy")


def prediction_table(read: ContextReading, alias: Alias, text: Callable[[int], str]) -> pa.Table:
    """Rows of `PREDICTIONS`, lens by lens, one per position.

    Args:
        read: A context.
        alias: The answer of its question that is the target.
        text: The text of a token id.
    """
    shared = _shared_columns(read, alias, text)
    tables = [_table(shared, lens, reading, text) for lens, reading in read.readings.items()]
    return pa.concat_tables(tables)


def _table(shared: dict, lens: str, reading: LayerReading, text: Callable[[int], str]) -> pa.Table:
    lists = {name: getattr(reading.stats, name).T.numpy() for name in STATISTICS} | {"kl": reading.kl.T.numpy()}
    lists["argmax_text"] = _texts(lists["argmax"], text)
    n = len(lists["kl"])
    columns = shared | {"lens": pa.array([lens] * n)} | {name: _lists(values) for name, values in lists.items()}
    return pa.table([columns[name] for name in PREDICTIONS.names], PREDICTIONS.names).cast(PREDICTIONS)


def _shared_columns(read: ContextReading, alias: Alias, text: Callable[[int], str]) -> dict:
    """Columns that all lenses have alike."""
    context, n = read.context, len(read.span.next_ids)
    start, end = context.gold_span or (None, None)
    written = None if read.generation is None else read.generation.text
    target_ids, next_ids = read.target_ids.numpy(), np.array(read.span.next_ids)
    constants = {
        "question_id": context.question.id,
        "source_id": context.question.source_id,
        "documents": context.n_documents,
        "gold_position": context.gold_position,
        "n_tokens": len(context.input_ids),
        "gold_start": start,
        "gold_end": end,
        "alias": alias.index,
        "alias_why": alias.why,
        "generated": written,
        "generated_correct": None if written is None else best_subspan_em(written, context.question.answers),
    }
    positions = np.array(read.span.positions)
    answer_token = np.maximum(positions - (context.prompt_length - 1), NO_ANSWER_TOKEN)
    return {name: pa.array([value] * n, PREDICTIONS.field(name).type) for name, value in constants.items()} | {
        "position": positions,
        "answer_token": answer_token,
        "covers_before": pa.array([context.covers_before if place == 0 else None for place in answer_token]),
        "answer_id": next_ids,
        "answer_text": _texts(next_ids, text),
        "target_id": target_ids,
        "target_text": _texts(target_ids, text),
    }


def _texts(ids: np.ndarray, text: Callable[[int], str]) -> np.ndarray:
    """Texts of ids of any shape."""
    unique, inverse = np.unique(ids, return_inverse=True)
    return np.array([text(id) for id in unique.tolist()], dtype=object)[inverse].reshape(ids.shape)


def _lists(values: np.ndarray) -> pa.ListArray:
    """A list of every row ``[n, length]``."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))
