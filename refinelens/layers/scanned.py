"""The rows of one intervention as arrays over examples and layers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

VALUES = (
    *("target_logprob", "target_rank", "correct", "logprob_change", "rank_change", "correct_change"),
    *("first_correct_change", "settle_change", "depth_change"),
)
COLUMNS = ("question_id", "documents", "gold_position", "intervention", "source_position", *VALUES)


@dataclass(frozen=True)
class Scanned:
    """One intervention; of patches an example is a context with one source."""

    intervention: str
    question_id: np.ndarray  # [n]
    documents: np.ndarray  # [n]
    gold_position: np.ndarray  # [n]
    source_position: np.ndarray  # [n], NaN but for patches
    values: dict[str, np.ndarray]  # by VALUES, fp64 [n, n_layers]; NaN for null

    @classmethod
    def of(cls, rows: pa.Table, intervention: str, n_layers: int) -> Scanned:
        """The rows of one intervention; the layers of an example stand together, in order."""
        table = rows.filter(pc.equal(rows["intervention"], intervention))
        wide = {name: table[name].cast(pa.float64()).to_numpy().reshape(-1, n_layers) for name in VALUES}
        names = ("question_id", "documents", "gold_position")
        keys = [table[name].to_numpy()[::n_layers].astype(np.int64) for name in names]
        source = table["source_position"].cast(pa.float64()).to_numpy()[::n_layers]
        return cls(intervention, *keys, source, wide)

    def __getitem__(self, name: str) -> np.ndarray:
        """One of `VALUES`, ``[n, n_layers]``."""
        return self.values[name]

    def __len__(self) -> int:
        return len(self.question_id)
