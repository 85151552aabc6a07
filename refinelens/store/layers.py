"""The folder of an analysis of layers: one part per question, and the mean contributions; no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from .folder import Folder
from .process import LOCK, RunLock

CONTROL = "control"  # an intervention that has no effect but rounding
RESTORE, DESTROY = "restore", "destroy"  # patches, from where the model succeeds and from where it fails
# Layer i is struck at its block, the i-th, counted from 1. Changes are the value under the intervention less the clean
# one. First-correct, settle and depth are of what remains: layers below the struck one are those of the clean run.
LAYER_ROWS = pa.schema(
    [
        ("question_id", pa.int64()),
        ("documents", pa.int32()),
        ("gold_position", pa.int32()),
        ("intervention", pa.string()),  # skip, mean, attn, mlp, restore, destroy, control
        ("at", pa.string()),  # all, or answer: the token that the answer follows
        ("layer", pa.int32()),  # 1 .. n_layers
        ("source_position", pa.int32()),  # of patches: gold position of the run that the state is from
        ("lens", pa.string()),
        ("target_id", pa.int64()),
        ("target_logprob", pa.float32()),  # nats, at the output
        ("target_rank", pa.int64()),  # 0-based, at the output
        ("correct", pa.bool_()),
        ("first_correct", pa.int32()),  # null where there is none, and of patches
        ("settle", pa.int32()),
        ("depth", pa.int32()),
        ("logprob_change", pa.float32()),
        ("rank_change", pa.int64()),
        ("correct_change", pa.int32()),  # -1, 0 or 1
        ("first_correct_change", pa.int32()),  # null where either does not exist
        ("settle_change", pa.int32()),
        ("depth_change", pa.int32()),
    ]
)
# And of analyses that silence attention or feed-forward part: nats that this part of the block adds to the target's
# logit in the clean run, null of other interventions.
ATTRIBUTION = pa.field("attribution", pa.float32())
HALVES = ("attn", "mlp")  # interventions on a part of a block
KEYS = ("question_id", "documents", "gold_position")
SCHEMA_VERSION = 1
PARTS = "parts"
MEANS = "means.safetensors"
ROWS = "layers.parquet"
TABLES = ("layers.csv", "patching.csv", "agreement.csv", "essential.csv", "early_exit.csv")
FIGURE = "layers.png"
SHAPE = {
    "schema_version": int,
    "run_id": str,
    "status": str,
    "arguments": {"interventions": list, "at": str},
    "lens": str,
    "seconds": float,
    "resumed": list,
    "questions": [int],
    "parts": list,
}


@dataclass(frozen=True)
class QuestionPart:
    """The rows of one question as the manifest names them."""

    question_id: int
    file: str
    rows: int
    sha256: str

    @property
    def first(self) -> int:
        """What orders parts."""
        return self.question_id


def rows_schema(interventions: Collection[str]) -> pa.Schema:
    """Columns of the rows of an analysis."""
    return LAYER_ROWS.append(ATTRIBUTION) if set(HALVES) & set(interventions) else LAYER_ROWS


def write_rows(rows: pa.Table, path: Path) -> None:
    """Write the rows of a question as Parquet."""
    pq.write_table(rows, path, compression="zstd")


class LayersFolder(Folder):
    """An analysis on disk."""

    NAME = "an analysis"
    MAKE = "make one with refinelens layers"
    REMAKE = "make the analysis again with ``overwrite=True``"
    REPAIR = "refinelens layers computes it again"
    VERSION = SCHEMA_VERSION
    KEYS = {"schema_version": int, "run_id": str, "status": str}
    SHAPE = SHAPE
    PART = QuestionPart
    PARTS = PARTS
    NAMED = {MEANS: "means_sha256"}
    DERIVED = (ROWS, *TABLES, FIGURE)

    def rows(self, manifest: dict) -> Iterator[pa.Table]:
        """The rows question by question; what an older version did not store of them is null.

        Raises:
            InputError: A part that is not as it was written.
        """
        schema = rows_schema(manifest["arguments"]["interventions"])
        for part in self.parts_of(manifest):
            yield pa.concat_tables([schema.empty_table(), self.read_part(part)], promote_options="default").cast(schema)

    def remove_unless_of(self, run_id: str) -> None:
        """Remove an analysis of another run with its folder.

        What is no analysis stays as it is, and so does one that another process writes.
        """
        if self._is_of_another_run(run_id):
            with suppress(InputError), RunLock(self.path):
                self.remove()
            with suppress(OSError):  # something is left in it
                self.path.rmdir()

    def _is_of_another_run(self, run_id: str) -> bool:
        """Whether it is an analysis of another run, or the last that is left of one."""
        try:
            self.check_foreign()
            return {path.name for path in self.path.iterdir()} <= {LOCK} or self.any_manifest()["run_id"] != run_id
        except (InputError, OSError):
            return False
