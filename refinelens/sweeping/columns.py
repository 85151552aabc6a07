"""Columns of a context's rows that a run was asked for beside measures of every layer, see `store.results.EXTRAS`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..config import GENERATED_SETTLE
from ..lens.runner import ModelStates


@dataclass(frozen=True)
class FurtherColumns:
    """Makes the columns of the rows of one context and lens."""

    extras: Sequence[str]  # names of `EXTRAS`; measures of every layer are made elsewhere

    def of(self, ran: ModelStates, lens: str, n_rows: int) -> dict[str, pa.Array]:
        """Columns by name.

        Args:
            ran: What came of the context.
            lens: Name of the lens that it was read through.
            n_rows: Positions that were read.
        """
        columns = {}
        if GENERATED_SETTLE in self.extras:
            layers = pa.array(ran.written.settled[lens], pa.int32())
            columns[GENERATED_SETTLE] = lists_of([layers] * n_rows, pa.int32())
        return columns


def lists_of(lists: Sequence[pa.Array | None], kind: pa.DataType) -> pa.ListArray:
    """A column of lists of any lengths, null where there is none."""
    offsets = np.cumsum([0, *(0 if one is None else len(one) for one in lists)])
    values = pa.concat_arrays([pa.array([], kind), *(one for one in lists if one is not None)])
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()), values, mask=pa.array([one is None for one in lists])
    )
