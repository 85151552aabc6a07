"""A run on disk: manifest, Parquet parts and their schema. Every file appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from .errors import InputError

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
TABLES = ("trajectories.parquet", "summary.csv", "inverted_u.csv")
FIGURES = ("depth.png", "accuracy.png", "layers.png")
OUTPUTS = (MANIFEST, "predictions", *TABLES, *FIGURES)
TEMPORARY = [f".{name}.tmp" for name in OUTPUTS]
MANIFEST_KEYS = {"schema_version", "status", "arguments", "seed", "model", "task", "counts"}

KEYS = [
    ("question_id", pa.int64()),  # 0-based line of the task file
    ("documents", pa.int32()),  # documents in the context, the gold one included
    ("gold_position", pa.int32()),  # 0-based
    ("answer_token", pa.int32()),  # 0-based token of the answer
    ("lens", pa.string()),  # plain, or the name of a lens
]
# One row per question x context size x gold position x answer token x lens; lists run over layers 0 .. n_layers.
PREDICTIONS = pa.schema(
    [
        *KEYS,
        ("n_tokens", pa.int32()),  # tokens of the context, answer tokens but the last included
        ("gold_start", pa.int32()),  # tokens of the gold document, end exclusive; null if unknown
        ("gold_end", pa.int32()),
        ("answer_id", pa.int64()),
        ("answer_text", pa.string()),
        ("target_id", pa.int64()),  # the answer token, or the model's own prediction
        ("target_text", pa.string()),
        ("argmax", pa.list_(pa.int64())),
        ("argmax_text", pa.list_(pa.string())),
        ("target_rank", pa.list_(pa.int64())),  # 0-based
        ("target_logprob", pa.list_(pa.float32())),  # nats
        ("max_logprob", pa.list_(pa.float32())),  # nats
        ("entropy", pa.list_(pa.float32())),  # nats
        ("kl", pa.list_(pa.float32())),  # nats, KL(p_final || p_layer)
    ]
)
# One row per prediction and threshold.
TRAJECTORIES = pa.schema(
    [
        *KEYS,
        ("top", pa.int32()),  # correct means rank 1 to this
        ("first_correct", pa.int32()),
        ("settle", pa.int32()),  # null where censored
        ("depth", pa.int32()),  # null where censored
        ("flips", pa.int32()),
        ("final_correct", pa.bool_()),  # the target is correct at the output; false is censored
        ("answer_correct", pa.bool_()),  # the model's own prediction is the answer token
        ("largest_gain", pa.int32()),  # layer whose rank improves most on the layer before; null if none improves
        ("logprob_gain", pa.list_(pa.float32())),  # nats, of layers 1 .. n_layers over the layer before
    ]
)


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @property
    def manifest(self) -> dict:
        """The manifest as written last."""
        return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))

    @property
    def parts_path(self) -> Path:
        """Folder of the parts."""
        return self.path / "predictions"

    def part_path(self, index: int) -> Path:
        """File of one part."""
        return self.parts_path / f"part-{index:05d}.parquet"

    def write_manifest(self, manifest: dict) -> None:
        """Replace the manifest."""
        write_whole(self.path / MANIFEST, lambda path: path.write_text(_json(manifest), encoding="utf-8"))

    def write_part(self, index: int, rows: list[dict]) -> None:
        """Write one part of the predictions."""
        write_whole(self.part_path(index), lambda path: _write_rows(rows, path))

    def write_trajectories(self, tables: Iterable[pa.Table]) -> None:
        """Write the trajectories of the whole run, a table at a time."""

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, TRAJECTORIES, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)

        write_whole(self.path / "trajectories.parquet", write)

    def parts(self, columns: list[str]) -> Iterator[pa.Table]:
        """The finished parts in order, a few columns of each."""
        for path in sorted(self.parts_path.glob("part-*.parquet")):
            yield _read(path, columns)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path}: expected a whole Parquet file of a run, got: {error}") from None


def open_run(path: str | Path) -> Run:
    """An existing run.

    Raises:
        InputError: The folder does not hold a run, or one of another schema version.
    """
    run = Run(Path(path))
    manifest = _read_manifest(run.path)
    if manifest["schema_version"] != SCHEMA_VERSION:
        written = manifest.get("refinelens_version", "another version")
        raise InputError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {manifest['schema_version']}; make the run again "
            f"with a sweep, or read it with the refinelens that wrote it ({written})"
        )
    return run


def _read_manifest(path: Path) -> dict:
    try:
        manifest = Run(path).manifest
        complete = isinstance(manifest, dict) and MANIFEST_KEYS <= manifest.keys()
        complete = complete and all(isinstance(manifest[key], dict) for key in ("arguments", "model", "task", "counts"))
    except FileNotFoundError:
        raise InputError(f"{path}: expected a run folder with {MANIFEST}, got none; make one with a sweep") from None
    except OSError as error:
        raise InputError(f"{path}/{MANIFEST}: expected a readable file, got: {error.strerror}") from None
    except ValueError:
        complete = False
    if not complete:
        raise InputError(f"{path}/{MANIFEST}: expected the manifest of a run, got something else")
    return manifest


def check_output(path: str | Path, overwrite: bool, arguments: dict) -> None:
    """Refuse an output folder that would lose something.

    Raises:
        InputError: The folder exists and ``overwrite`` is not set, or it holds anything that is not a run's.
    """
    path = Path(path)
    try:
        if not path.exists():
            return
        names = sorted(p.name for p in path.iterdir())
    except OSError as error:
        raise disk_error(path, error) from None
    foreign = [name for name in names if name not in OUTPUTS and name not in TEMPORARY]
    if foreign or (names and MANIFEST not in names):
        other = (foreign + names)[0]
        raise InputError(f"--out {path}: expected a new folder or a run to overwrite, got other files, such as {other}")
    if not names:
        return
    manifest = _read_manifest(path)  # a run of another schema version may be overwritten too
    if overwrite:
        return
    old = manifest["arguments"]
    changed = [f"{k} {old.get(k)!r} there, {v!r} here" for k, v in arguments.items() if old.get(k) != v]
    same = f"other arguments ({'; '.join(changed)})" if changed else "the same arguments; see it with refinelens show"
    raise InputError(
        f"--out {path}: expected a new folder, got a run ({manifest['status']}) of {same}; "
        "choose another folder or pass --overwrite"
    )


def check_disk(path: str | Path, needed: int) -> None:
    """Refuse to start a run that will not fit.

    Raises:
        InputError: Less than ``needed`` bytes are free where ``path`` will be.
    """
    existing = next(p for p in [Path(path).absolute(), *Path(path).absolute().parents] if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: expected a folder that can be written, got no permission for {existing}")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"--out {path}: expected {needed / 1e6:.1f} MB of free disk, got {free / 1e6:.1f} MB; free some"
        )


def begin_run(run: Run, manifest: dict, rows: list[dict], overwrite: bool) -> None:
    """Make the folder of a run with its manifest and its first part.

    A run that is there is replaced once the new files lie beside it whole; only its own files go.

    Raises:
        InputError: What `check_output` refuses came into being meanwhile.
    """
    check_output(run.path, overwrite, manifest["arguments"])
    made = [path for path in (run.parts_path, run.path) if not path.exists()]
    run.parts_path.mkdir(parents=True, exist_ok=True)
    temporary = [_temporary(run.path / MANIFEST), _temporary(run.part_path(0))]
    try:
        _flushed(temporary[0], lambda path: path.write_text(_json(manifest), encoding="utf-8"))
        _flushed(temporary[1], lambda path: _write_rows(rows, path))
    except BaseException:
        for path in temporary:
            path.unlink(missing_ok=True)
        for path in made:
            path.rmdir()
        raise
    for name in OUTPUTS:
        if name != run.parts_path.name:
            (run.path / name).unlink(missing_ok=True)
    for part in run.parts_path.glob("part-*.parquet"):
        part.unlink()
    temporary[0].replace(run.path / MANIFEST)
    temporary[1].replace(run.part_path(0))


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, flush to disk, rename: the file is there whole or not at all."""
    temporary = _temporary(path)
    try:
        _flushed(temporary, write)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _flushed(path: Path, write: Callable[[Path], object]) -> None:
    write(path)
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _json(manifest: dict) -> str:
    return json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def _write_rows(rows: list[dict], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=PREDICTIONS), path, compression="zstd")


def disk_error(path: str | Path, error: OSError) -> InputError:
    """One line for a failed write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return InputError(f"--out {path}: no free disk left; parts that were written stay readable; free some")
    return InputError(f"--out {path}: expected a folder that can be written, got: {error.strerror or error}")
