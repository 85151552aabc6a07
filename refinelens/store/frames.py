"""A run for other programs: pandas data frames; a row for every layer as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ..config import STATES
from ..errors import InputError
from .files import write_output
from .layers import ROWS, LayersFolder
from .results import LAYERS, NOT_OVER_LAYERS, TRAJECTORIES, Run, open_run, predictions_schema
from .trajectory import trajectory_tables

if TYPE_CHECKING:
    import pandas as pd

STATES_OF = (
    "question_id",
    "documents",
    "gold_position",
    "decoy_position",
    "answer_id",
)  # columns that tell whose states they are


def long_schema(run: Run) -> pa.Schema:
    """Columns of `long_tables`: those of the predictions, ``layer`` (0 .. n_layers) behind those that layers share.

    Lists over anything but layers are left out.
    """
    whole = _by_layer(run)
    shared = [field for field in whole if not pa.types.is_list(field.type)]
    lists = [(field.name, field.type.value_type) for field in whole if pa.types.is_list(field.type)]
    return pa.schema([*shared, ("layer", pa.int32()), *lists])


def _by_layer(run: Run) -> pa.Schema:
    """Of the predictions what a layer has a value of."""
    return pa.schema([field for field in predictions_schema(run.extras) if field.name not in NOT_OVER_LAYERS])


def long_tables(run: Run) -> Iterator[pa.Table]:
    """The predictions part by part with a row for every layer; columns as in `long_schema`."""
    whole, long = _by_layer(run), long_schema(run)
    lists = [field.name for field in whole if pa.types.is_list(field.type)]
    for part in run.parts(whole.names):
        if not len(part):
            continue
        lengths = pc.list_value_length(part[lists[0]].combine_chunks()).to_numpy()
        layers = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        rows = pa.array(np.repeat(np.arange(len(part)), lengths))
        columns = {name: part[name].combine_chunks().take(rows) for name in whole.names if name not in lists}
        columns |= {"layer": layers} | {name: part[name].combine_chunks().flatten() for name in lists}
        yield pa.table([columns[name] for name in long.names], long.names).cast(long)


def export_run(run: Run, path: Path, kind: str) -> int:
    """Write the predictions to a file, whole or not at all, a part in memory at a time; the number of rows.

    Args:
        run: The run.
        path: The file, which must not be there.
        kind: ``csv``, ``jsonl`` or ``parquet``.

    Raises:
        InputError: The file is there, cannot be written, or the run is damaged.
        FaultError: No free disk.
    """
    check_new_file(path)
    rows, schema = 0, long_schema(run)

    def write(temporary: Path) -> None:
        nonlocal rows
        with WRITERS[kind](temporary, schema) as writer:
            for table in long_tables(run):
                writer.write_table(table)
                rows += len(table)

    write_output(path, write)
    return rows


def check_new_file(path: Path, name: str = "out") -> None:
    """Refuse to write over a file, or into no folder; ``name`` is that of the parameter.

    Raises:
        InputError: Says which.
    """
    if path.exists():
        raise InputError(f"``{name}`` {path}: expected a new file, got one that is there; choose another")
    if not path.absolute().parent.is_dir():
        raise InputError(f"``{name}`` {path}: expected a file in a folder that is there")


class _JsonLinesWriter:
    """Writes a line of JSON per row, as pyarrow's writers write other formats."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._file = path.open("w", encoding="utf-8")

    def __enter__(self) -> _JsonLinesWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write_table(self, table: pa.Table) -> None:
        for batch in table.to_batches(max_chunksize=4096):
            self._file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())


WRITERS: dict[str, Any] = {
    "csv": pyarrow.csv.CSVWriter,
    "jsonl": _JsonLinesWriter,
    "parquet": partial(pq.ParquetWriter, compression="zstd"),
}


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run folder; every frame is read when it is asked for, and needs pandas."""

    run: Run

    def __repr__(self) -> str:
        manifest, counts = self.manifest, self.manifest["counts"]
        lenses = ", ".join(entry["name"] for entry in manifest["lenses"])
        states = f", {STATES}" if STATES in self.run.extras else ""
        return (
            f"Run {self.run.path}: {manifest['model']['name']} on {manifest['task']['name']}, {manifest['status']}, "
            f"{counts['done']} of {counts['questions']} questions; lenses {lenses}\n"
            f"  frames: summary, paired, trajectories, predictions, layers, interventions{states}"
        )

    @property
    def manifest(self) -> dict[str, Any]:
        """All that is needed to repeat the run."""
        return self.run.manifest

    @property
    def predictions(self) -> pd.DataFrame:
        """A row per question, context size, gold position, answer token and lens; lists over layers as arrays.

        Without the states, see `states`.
        """
        schema = pa.schema([field for field in predictions_schema(self.run.extras) if field.name != STATES])
        return _frame(self.run.parts(schema.names), schema)

    @property
    def states(self) -> pd.DataFrame:
        """Of every context the residual stream at the token before the answer, float16 ``[n_layers + 1, d_model]``.

        Raises:
            InputError: A run that was not asked for ``measures='states'``.
        """
        if STATES not in self.run.extras:
            raise InputError(f"{self.run.path}: expected a run with ``measures='states'``, got one without them")
        schema = predictions_schema(self.run.extras)
        names = [name for name in (*STATES_OF, STATES) if name in schema.names]
        parts = (part.filter(pc.is_valid(part[STATES])).select(names) for part in self.run.parts(names))
        frame = _frame(parts, pa.schema([schema.field(name) for name in names]))
        n_layers = self.manifest["model"]["n_layers"]
        return frame.assign(states=[flat.reshape(n_layers + 1, -1) for flat in frame[STATES]])

    @property
    def layers(self) -> pd.DataFrame:
        """The predictions with a row for every layer, as `refinelens export` writes them."""
        return _frame(long_tables(self.run), long_schema(self.run))

    @property
    def interventions(self) -> pd.DataFrame:
        """What `refinelens layers` wrote into the run: a row per example, layer and intervention.

        Raises:
            InputError: It has not been run, was stopped, or the run was replaced since.
        """
        return LoadedLayers(LayersFolder(self.run.path / LAYERS), self.manifest["run_id"]).rows

    @property
    def trajectories(self) -> pd.DataFrame:
        """A row per prediction and threshold of the run; missing where a value does not exist."""
        tops = tuple(self.manifest["arguments"]["top"])
        return _frame(trajectory_tables(self.run, tops), TRAJECTORIES, nullable=True)

    @property
    def summary(self) -> pd.DataFrame:
        """``summary.csv``: a row per lens, threshold, context size and gold position."""
        return _read_csv(self.run.path / "summary.csv")

    @property
    def paired(self) -> pd.DataFrame:
        """``paired.csv``: a row per lens, threshold, context size and pair of gold positions."""
        return _read_csv(self.run.path / "paired.csv")

    @property
    def cues(self) -> pd.DataFrame:
        """``cues.csv`` of a run with decoys: a row per lens, threshold, context size, order and distance.

        Raises:
            InputError: The run has none.
        """
        if not self.run.n_decoys:
            raise InputError(f"{self.run.path}: expected a run with ``decoys``, got one without; sweep the task cues")
        return _read_csv(self.run.path / "cues.csv")


@dataclass(frozen=True, repr=False)
class LoadedLayers:
    """The folder of an analysis of layers; every frame is read when it is asked for, and needs pandas."""

    folder: LayersFolder
    run_id: str | None = None  # of the run that it must be of, None for any

    def __repr__(self) -> str:
        manifest = self.manifest
        done = ", ".join(manifest["arguments"]["interventions"]) or "none"
        return (
            f"Layers {self.folder.path}: {manifest['status']}, {len(manifest['questions'])} questions, interventions "
            f"{done}\n  frames: layers, essential, patching, agreement, early_exit, rows"
        )

    @property
    def manifest(self) -> dict[str, Any]:
        """What it is of and how it was made.

        Raises:
            InputError: There is none that is finished, or it is of another run.
        """
        found = self.folder.manifest if self.folder.exists else None
        if found is None or found["status"] != "finished" or self.run_id not in (None, found["run_id"]):
            got = "none" if found is None else f"one of run {found['run_id']} that is {found['status']}"
            wanted = "" if self.run_id is None else f" of run {self.run_id}"
            raise InputError(
                f"{self.folder.path}: expected a finished analysis{wanted}, got {got}; make one with refinelens layers"
            )
        return found

    @property
    def rows(self) -> pd.DataFrame:
        """A row per example, layer and intervention."""
        _ = self.manifest  # that it is finished
        table = pq.read_table(self.folder.path / ROWS)
        return _frame([table], table.schema, nullable=True)

    @property
    def layers(self) -> pd.DataFrame:
        """``layers.csv``: a row per layer, gold position and what was measured, with intervals over questions."""
        return self._table("layers.csv")

    @property
    def essential(self) -> pd.DataFrame:
        """``essential.csv``: a row per condition, with the layers that an answer cannot do without."""
        return self._table("essential.csv")

    @property
    def patching(self) -> pd.DataFrame:
        """``patching.csv``: from which layer on a state that is patched in brings the answer, or takes it away."""
        return self._table("patching.csv")

    @property
    def agreement(self) -> pd.DataFrame:
        """``agreement.csv``: how far lens and interventions agree on the order of the layers."""
        return self._table("agreement.csv")

    @property
    def early_exit(self) -> pd.DataFrame:
        """``early_exit.csv``: what is lost by stopping at a layer and taking what the lens reads there."""
        return self._table("early_exit.csv")

    def _table(self, name: str) -> pd.DataFrame:
        _ = self.manifest  # that it is finished
        return _read_csv(self.folder.path / name)


def load_run(path: str | Path) -> LoadedRun:
    """A run folder as data frames.

    Raises:
        InputError: No run there, one of another schema version, or pandas is not installed.
    """
    _pandas("load_run")
    return LoadedRun(open_run(path))


def _pandas(what: str = "frames") -> ModuleType:
    try:
        import pandas
    except ImportError:
        raise InputError(
            f"{what}: expected the package pandas, which is not installed; pip install 'refinelens[frames]'"
        ) from None
    return pandas


def _read_csv(path: Path) -> pd.DataFrame:
    # A lens may be called "7" or "NA".
    return _pandas().read_csv(path, dtype={"lens": str}, keep_default_na=False, na_values=[""])


def _frame(tables: Iterable[pa.Table], schema: pa.Schema, nullable: bool = False) -> pd.DataFrame:
    """Tables one below the other; with ``nullable`` integers stay integers, also where some are missing."""
    pandas = _pandas()
    table = pa.concat_tables([schema.empty_table(), *tables])
    return table.to_pandas(types_mapper={pa.int32(): pandas.Int32Dtype()}.get if nullable else None)
