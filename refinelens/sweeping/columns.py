"""Columns of a context's rows that a run was asked for beside measures of every layer, see `store.results.EXTRAS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from torch import Tensor

from ..config import FREQUENCY, GENERATED_SETTLE, STATES
from ..errors import InputError
from .generate import Generation


@dataclass(frozen=True)
class FurtherColumns:
    """Makes the columns of the rows of one context and lens."""

    extras: Sequence[str]  # names of `EXTRAS`; measures of whole distributions are made elsewhere
    lenses: Sequence[str]  # names of the lenses, in order
    buckets: np.ndarray | None  # int8 [vocab_size], how frequent every token is, see `BUCKET_ENDS`; None unless asked

    def of(
        self,
        before_answer: Tensor | None,
        written: Generation | None,
        lens: str,
        argmax: np.ndarray,
        target_ids: np.ndarray,
        answer_token: np.ndarray,
    ) -> dict[str, pa.Array]:
        """Columns by name.

        Args:
            before_answer: ``[n_layers + 1, d_model]``, the state at the token before the answer, if it is kept.
            written: What the model wrote, if it was asked to.
            lens: Name of the lens that it was read through.
            argmax: ``[n_positions, n_layers + 1]`` the best token of every layer.
            target_ids: ``[n_positions]``
            answer_token: ``[n_positions]``, 0 at the token before the answer.

        Raises:
            InputError: A state that float16 cannot hold.
        """
        columns, n_rows = {}, len(argmax)
        if FREQUENCY in self.extras:
            columns["argmax_bucket"] = lists_of([pa.array(row) for row in self.buckets[argmax]], pa.int8())
            columns["target_bucket"] = pa.array(self.buckets[target_ids])
        if STATES in self.extras:
            here = answer_token == 0 if lens == self.lenses[0] else np.zeros(n_rows, bool)
            states = [pa.array(_half(before_answer)) if own else None for own in here]
            columns[STATES] = lists_of(states, pa.float16())
        if GENERATED_SETTLE in self.extras:
            layers = pa.array(written.settled[lens], pa.int32())
            columns[GENERATED_SETTLE] = lists_of([layers] * n_rows, pa.int32())
        return columns


def _half(hidden: Tensor) -> np.ndarray:
    """The residual stream ``[n_layers + 1, d_model]`` of one token as float16 ``[(n_layers + 1) * d_model]``."""
    exact = hidden.float().cpu().numpy()
    with np.errstate(over="ignore"):
        state = exact.astype(np.float16)
    if not np.isfinite(state).all():
        raise InputError(
            f"``measures='states'``: expected states up to {np.finfo(np.float16).max:.0f}, which float16 holds, got "
            f"{np.abs(exact).max():.6g} at layer {int(np.abs(exact).max(1).argmax())}; leave them out"
        )
    return state.ravel()


def lists_of(lists: Sequence[pa.Array | None], kind: pa.DataType) -> pa.ListArray:
    """A column of lists of any lengths, null where there is none."""
    offsets = np.cumsum([0, *(0 if one is None else len(one) for one in lists)])
    values = pa.concat_arrays([pa.array([], kind), *(one for one in lists if one is not None)])
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values, mask=pa.array([one is None for one in lists])
    )
