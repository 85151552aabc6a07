"""The folder of an analysis of layers: its manifest, one part per question, and the mean contributions; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from .folder import LOCK, RunLock, check_shape, read_json_object, sha256_of, temporary_of, write_whole

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
KEYS = ("question_id", "documents", "gold_position")
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PARTS = "parts"
MEANS = "means.safetensors"
ROWS = "layers.parquet"
TABLES = ("layers.csv", "patching.csv", "agreement.csv", "essential.csv", "early_exit.csv")
FIGURE = "layers.png"
NAMES = (MANIFEST, PARTS, MEANS, ROWS, *TABLES, FIGURE, LOCK)
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


@dataclass(frozen=True)
class LayersFolder:
    """An analysis on disk. A file is there whole before the manifest names it with its checksum."""

    path: Path

    def manifest(self) -> dict | None:
        """The manifest, None where there is none.

        Raises:
            InputError: Another file, or one of another schema version.
        """
        if not (self.path / MANIFEST).exists():
            return None
        try:
            manifest = self._read()
        except (InputError, OSError) as error:
            raise InputError(f"{self.path}: {error}; ``overwrite=True`` makes the analysis again") from None
        if manifest["schema_version"] != SCHEMA_VERSION:
            raise InputError(
                f"{self.path}: expected schema version {SCHEMA_VERSION}, got {manifest['schema_version']}; "
                "``overwrite=True`` makes the analysis again"
            )
        return manifest

    def _read(self) -> dict:
        manifest = read_json_object(self.path / MANIFEST)
        check_shape(manifest, SHAPE, MANIFEST)
        return manifest

    def write_manifest(self, manifest: dict) -> None:
        """Replace the manifest."""
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.path / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    def write_part(self, place: int, question_id: int, rows: pa.Table) -> QuestionPart:
        """Write the rows of the question at a place among those asked."""
        (self.path / PARTS).mkdir(exist_ok=True)
        path = self.path / PARTS / f"part-{place:05d}.parquet"
        write_whole(path, lambda temporary: pq.write_table(rows, temporary, compression="zstd"))
        return QuestionPart(question_id, path.name, len(rows), sha256_of(path))

    def read_part(self, part: QuestionPart) -> pa.Table | None:
        """The rows of a part; None where it is absent or not as it was written."""
        try:
            data = (self.path / PARTS / part.file).read_bytes()
        except OSError:
            return None
        whole = hashlib.sha256(data).hexdigest() == part.sha256
        return pq.read_table(pa.BufferReader(data)).cast(LAYER_ROWS) if whole else None

    def rows(self, manifest: dict) -> Iterator[pa.Table]:
        """The rows question by question.

        Raises:
            InputError: A part that is not as it was written.
        """
        for part in parts_of(manifest):
            rows = self.read_part(part)
            if rows is None:
                raise InputError(f"{self.path / PARTS / part.file}: expected the part as it was written, got another")
            yield rows

    def clear(self) -> None:
        """Remove all that an analysis wrote, the manifest first."""
        self._remove(MANIFEST)
        self._clear_results()

    def clear_unless_of(self, run_id: str) -> None:
        """Remove an analysis of another run with its folder, the manifest last: what is left by a kill can be told.

        What is no analysis stays as it is, and so does one that another process writes.
        """
        if self._is_of_another_run(run_id):
            with suppress(InputError), RunLock(self.path):
                self._clear_results()
                self._remove(MANIFEST)
            with suppress(OSError):  # something is left in it
                self.path.rmdir()

    def _is_of_another_run(self, run_id: str) -> bool:
        """Whether it is an analysis of another run, or the last that is left of one."""
        try:
            self.check_foreign()
            return {path.name for path in self.path.iterdir()} <= {LOCK} or self._read()["run_id"] != run_id
        except (InputError, OSError):
            return False

    def _clear_results(self) -> None:
        self._remove(MEANS, ROWS, *TABLES, FIGURE)
        for path in [*(self.path / PARTS).glob("part-*.parquet"), *(self.path / PARTS).glob(".part-*.tmp")]:
            path.unlink()
        with suppress(OSError):  # there is none
            (self.path / PARTS).rmdir()

    def _remove(self, *names: str) -> None:
        for path in (self.path / name for name in names):
            path.unlink(missing_ok=True)
            temporary_of(path).unlink(missing_ok=True)

    def check_foreign(self) -> None:
        """Refuse a folder that holds anything that is not an analysis's.

        Raises:
            InputError: Names a few of its files.
        """
        names = (path.name for path in self.path.iterdir()) if self.path.is_dir() else ()
        known = {*NAMES, *(temporary_of(self.path / name).name for name in NAMES)}
        foreign = ", ".join(sorted(set(names) - known)[:3])
        if foreign:
            raise InputError(f"``out`` {self.path}: expected a new folder or an analysis, got other files: {foreign}")


def parts_of(manifest: dict) -> list[QuestionPart]:
    """The parts that a manifest names, in the order of their questions."""
    parts = [QuestionPart(**entry) for entry in manifest["parts"]]
    return sorted(parts, key=lambda part: part.question_id)


def entries_of(parts: list[QuestionPart]) -> list[dict]:
    """Parts as a manifest holds them."""
    return [asdict(part) for part in parts]
