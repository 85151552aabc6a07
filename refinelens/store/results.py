"""A run on disk: manifest, Parquet parts and their schema, and what may be replaced where it is written.

Every file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError, resume_call
from .folder import LOCK, check_shape, disk_error, temporary_of, write_whole

SCHEMA_VERSION = 6
MANIFEST = "manifest.json"
TABLES = ("trajectories.parquet", "summary.csv", "paired.csv", "inverted_u.csv")
FIGURES = ("depth.png", "accuracy.png", "layers.png")
DERIVED = (*TABLES, *FIGURES)  # written from the predictions
LAYERS = "layers"  # folder of what `refinelens layers` makes of the run
OUTPUTS = (MANIFEST, "predictions", *DERIVED, LAYERS, LOCK)
# What tables and figures read of a manifest: types, objects with entries, lists of one thing or more.
SHAPE = {
    "status": str,
    "seed": int,
    "lenses": [{"name": str, "kind": str}],
    "arguments": {"model": str, "target": str, "positions": str, "answer_tokens": str, "generate": int, "top": [int]},
    "model": {
        "name": str,
        "n_layers": int,
        "backend": str,
        "dtype": str,
        "device": str,
        "parity": {"max_difference": float, "tolerance": float, "logit_range": float},
    },
    "task": {"name": str},
    "counts": {"questions": int, "left_out": dict},
}
MANIFEST_REMEDY = "bring it back, or remove the folder and make the run again with a sweep"
MANIFEST_KEYS = {"schema_version", "status", "arguments", "seed", "model", "task", "counts"}

NO_ANSWER_TOKEN = -1  # of a token of the prompt that another one follows
KEYS = [
    ("question_id", pa.int64()),  # 0-based line of the task file
    ("documents", pa.int32()),  # documents in the context, the gold one included; 0 closed-book
    ("gold_position", pa.int32()),  # 0-based; -1 closed-book
    ("answer_token", pa.int32()),  # 0-based token of the answer that follows; NO_ANSWER_TOKEN before the answer
    ("lens", pa.string()),  # plain, or the name of a lens
]
# One row per question x context size x gold position x lens x token: of the answer or, with positions='all', of the
# whole context. The tokens of a context stand together, in order. Lists run over layers 0 .. n_layers.
PREDICTIONS = pa.schema(
    [
        *KEYS,
        ("source_id", pa.string()),  # what the task file calls the question; null if it does not
        ("position", pa.int32()),  # 0-based place in the context of the token that is read
        ("n_tokens", pa.int32()),  # tokens of the context, answer tokens but the last included
        ("gold_start", pa.int32()),  # tokens of the gold document, end exclusive; null if unknown or there is none
        ("gold_end", pa.int32()),
        ("alias", pa.int32()),  # 0-based place of the answer among the question's answers
        ("alias_why", pa.string()),  # why it was taken
        ("answer_id", pa.int64()),
        ("answer_text", pa.string()),
        ("covers_before", pa.string()),  # of the answer's first token: what it covers of the text before the answer
        ("target_id", pa.int64()),  # the answer token, or the model's own prediction
        ("target_text", pa.string()),
        ("generated", pa.string()),  # first line of what the model writes after the prompt; null if not asked for
        ("generated_correct", pa.bool_()),  # it contains an answer (best_subspan_em)
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
        ("all_correct", pa.bool_()),  # so it is for every token of this answer, after the true ones before it
        ("generated_correct", pa.bool_()),  # as in the predictions
        ("largest_gain", pa.int32()),  # layer whose rank improves most on the layer before; null if none improves
        ("logprob_gain", pa.list_(pa.float32())),  # nats, of layers 1 .. n_layers over the layer before
    ]
)


@dataclass(frozen=True)
class Part:
    """One file of predictions as the manifest names it: all rows of a range of the questions drawn."""

    file: str | None  # name in the folder of the parts; None where no question of the range could be asked
    questions: tuple[int, int]  # 0-based places among the questions drawn, end exclusive
    rows: int
    sha256: str | None  # of the file
    counts: dict[str, int] = field(default_factory=dict)  # of contexts and the like, for the sums in the manifest
    left_out: dict[str, list[int]] = field(default_factory=dict)  # reason: question ids


@dataclass(frozen=True)
class QuestionResult:
    """All that came of one question: the unit of work of a sweep, a function of the manifest and the question."""

    rows: pa.Table  # of PREDICTIONS
    counts: dict[str, int]  # see Part
    left_out: dict[str, list[int]]
    notes: dict[str, object]  # entries for the manifest, such as whether prefixes were shared and why
    warnings: tuple[str, ...]  # lines to be said: what went wrong and was put right


@dataclass(frozen=True)
class Run:
    """A run folder."""

    path: Path

    @property
    def manifest(self) -> dict:
        """The manifest as written last."""
        return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the model, None where the manifest does not say."""
        size = self.manifest["model"].get("vocab_size")
        return size if type(size) is int else None

    @property
    def parts_path(self) -> Path:
        """Folder of the parts."""
        return self.path / "predictions"

    def part_path(self, index: int) -> Path:
        """File of one part."""
        return self.parts_path / f"part-{index:05d}.parquet"

    def write_manifest(self, manifest: dict) -> None:
        """Replace the manifest. Parts stand in a line each: there can be thousands."""
        parts = ",\n".join(f"    {json.dumps(part, ensure_ascii=False)}" for part in manifest["parts"])
        text = json.dumps(manifest | {"parts": []}, indent=2, ensure_ascii=False)
        text = text.replace('\n  "parts": []', f'\n  "parts": [\n{parts}\n  ]') + "\n"
        write_whole(self.path / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    def write_trajectories(self, tables: Iterable[pa.Table]) -> None:
        """Write the trajectories of the whole run, a table at a time."""

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, TRAJECTORIES, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)

        write_whole(self.path / "trajectories.parquet", write)

    def parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The parts that the manifest names in order, a few columns of each.

        Raises:
            InputError: Names a part that is not there or not as it was written, and how it comes back.
        """
        for part in parts_of(self.manifest):
            if part.file is not None:
                yield self.read_part(part, columns)

    def read_part(self, part: Part, columns: list[str] | None = None) -> pa.Table:
        """One part, its checksum compared first; for the errors see `parts`."""
        path = self.parts_path / part.file
        try:
            data = path.read_bytes()
        except OSError as error:
            raise _damaged(self, path, f"a file that can be read, got: {error.strerror or error}") from None
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != part.sha256:
            raise _damaged(self, path, f"sha256 {str(part.sha256)[:12]}, got {sha256[:12]} ({len(data)} bytes)")
        return pq.read_table(pa.BufferReader(data), columns=columns)


def write_rows(rows: list[pa.Table], path: Path) -> None:
    """Write predictions as Parquet: the same bytes however the rows are divided, and whether or not they were read."""
    whole = pa.concat_tables(table.cast(PREDICTIONS) for table in rows)  # Parquet renames the items of lists
    pq.write_table(whole.combine_chunks(), path, compression="zstd")


def parts_of(manifest: dict) -> list[Part]:
    """The parts that a manifest names, in the order of their questions."""
    parts = [Part(**entry | {"questions": tuple(entry["questions"])}) for entry in manifest["parts"]]
    return sorted(parts, key=lambda part: part.questions)


def _damaged(run: Run, path: Path, got: str) -> InputError:
    return InputError(f"{path}: expected {got}; {resume_call(run.path)} computes it again")


def _no_manifest(path: str | Path, got: str) -> InputError:
    return InputError(f"{path}/{MANIFEST}: expected the manifest of a run, got {got}; {MANIFEST_REMEDY}")


def open_run(path: str | Path) -> Run:
    """An existing run.

    Raises:
        InputError: The folder does not hold a run, or one of another schema version.
    """
    run = Run(Path(path))
    manifest = read_manifest(run.path)
    if manifest["schema_version"] != SCHEMA_VERSION:
        written = manifest.get("refinelens_version", "another version")
        raise InputError(
            f"{path}: expected schema version {SCHEMA_VERSION}, got {manifest['schema_version']}; make the run again "
            f"with a sweep, or read it with the refinelens that wrote it ({written})"
        )
    try:
        parts_of(manifest)
    except (KeyError, TypeError):
        raise _no_manifest(path, "one without its parts") from None
    try:
        check_shape(manifest, SHAPE, f"{path}/{MANIFEST}")
    except InputError as error:
        raise InputError(f"{error}; {MANIFEST_REMEDY}") from None
    return run


def read_manifest(path: Path) -> dict:
    """The manifest in a folder, also one of another schema version.

    Raises:
        InputError: The folder does not hold a run.
    """
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
        raise _no_manifest(path, "something else")
    return manifest


def check_folder(path: str | Path) -> None:
    """Refuse an output folder that holds anything that is not a run's.

    Raises:
        InputError: Names a file that a run does not have, or that is there without the manifest of its run.
    """
    path = Path(path)
    try:
        names = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise disk_error(path, error, begun=False) from None
    left_by_a_kill = {LOCK, *(temporary_of(path / name).name for name in OUTPUTS)}
    names = [name for name in names if name not in left_by_a_kill]
    foreign = [name for name in names if name not in OUTPUTS]
    if foreign or (names and MANIFEST not in names):
        other = (foreign + names)[0]
        raise InputError(
            f"``out`` {path}: expected a new folder or a run to overwrite, got other files, such as {other}"
        )
    if names:
        read_manifest(path)  # a run of another schema version may be overwritten too


def check_overwrite(path: str | Path, overwrite: bool, arguments: dict) -> None:
    """Refuse to replace a run that is there, in a folder that is held here, unless that was asked for.

    Raises:
        InputError: A run is there and ``overwrite`` is not set; says how its arguments differ.
    """
    path = Path(path)
    if overwrite or not (path / MANIFEST).exists():
        return
    manifest = read_manifest(path)
    old = manifest["arguments"]
    changed = [f"{k} {old.get(k)!r} there, {v!r} here" for k, v in arguments.items() if old.get(k) != v]
    finished = manifest["status"] == "finished"
    command = f"see it with refinelens show {path}" if finished else f"go on with {resume_call(path)}"
    command = "" if changed else f"{command}, "
    what = f"other arguments ({'; '.join(changed)})" if changed else "the same arguments"
    raise InputError(
        f"``out`` {path}: expected a new folder, got a run of {what} that is {status_words(manifest, held=False)}; "
        f"{command}choose another folder or pass ``overwrite=True``"
    )


def status_words(manifest: dict, held: bool) -> str:
    """``finished``, or how far a run is: it is ``running`` only while a process holds its folder."""
    status, counts = manifest["status"], manifest["counts"]
    if status == "finished" or (status == "running" and held):
        return status
    word = "unfinished" if status == "running" else status  # whatever ended it left no time to say so
    return f"{word} ({counts.get('done', 0)} of {counts.get('questions', 0)} questions)"


def check_disk(path: str | Path, needed: int) -> None:
    """Refuse to start a run that will not fit.

    Raises:
        InputError: Less than ``needed`` bytes are free where ``path`` will be.
    """
    existing = next(p for p in [Path(path).absolute(), *Path(path).absolute().parents] if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"``out`` {path}: expected a folder that can be written, got no permission for {existing}")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"``out`` {path}: expected {needed / 1e6:.1f} MB of free disk, got {free / 1e6:.1f} MB; free some"
        )
