"""A run for other programs: pandas data frames; a row for every layer as CSV, JSON lines or Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from ..errors import InputError
from .folder import write_output
from .layers import ROWS, LayersFolder
from .results import LAYERS, PREDICTIONS, TRAJECTORIES, Run, open_run
from .trajectory import trajectory_tables

if TYPE_CHECKING:
    import pandas as pd

LISTS = [field.name for field in PREDICTIONS if pa.types.is_list(field.type)]
SCALARS = [field.name for field in PREDICTIONS if field.name not in LISTS]
LONG = pa.schema(
    [
        *(PREDICTIONS.field(name) for name in SCALARS),
        ("layer", pa.int32()),  # 0 .. n_layers
        *((name, PREDICTIONS.field(name).type.value_type) for name in LISTS),
    ]
)


@dataclass(frozen=True)
class Choice:
    """Which context of a run a widget shows, through which lens, and how much of it; None for the run's first."""

    question: int | None = None  # id; None for the first that could be asked at that size
    documents: int | None = None  # None for the smallest size of 2 or more, else oracle, else closed-book
    gold_position: int | None = None
    lens: str | None = None
    tokens: int = 32  # at most, the last ones of the context
    k: int = 5  # most likely next tokens of every layer

    def __post_init__(self) -> None:
        for name, value in (("--tokens", self.tokens), ("--k", self.k)):
            if value < 1:
                raise InputError(f"{name}: expected 1 or more, got {value}")


def long_tables(run: Run) -> Iterator[pa.Table]:
    """The predictions part by part with a row for every layer; columns as in `LONG`."""
    for part in run.parts(PREDICTIONS.names):
        if not len(part):
            continue
        lengths = pc.list_value_length(part[LISTS[0]].combine_chunks()).to_numpy()
        layers = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        rows = np.repeat(np.arange(len(part)), lengths)
        columns = {name: part[name].combine_chunks().take(pa.array(rows)) for name in SCALARS}
        columns |= {"layer": layers} | {name: part[name].combine_chunks().flatten() for name in LISTS}
        yield pa.table([columns[name] for name in LONG.names], LONG.names).cast(LONG)


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
    rows = 0

    def write(temporary: Path) -> None:
        nonlocal rows
        with FORMATS[kind](temporary) as add:
            for table in long_tables(run):
                add(table)
                rows += len(table)

    write_output(path, write)
    return rows


def check_new_file(path: Path) -> None:
    """Refuse to write over a file, or into no folder.

    Raises:
        InputError: Says which.
    """
    if path.exists():
        raise InputError(f"--out {path}: expected a new file, got one that is there; choose another")
    if not path.absolute().parent.is_dir():
        raise InputError(f"--out {path}: expected a file in a folder that is there")


@contextmanager
def _csv(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    with pyarrow.csv.CSVWriter(path, LONG) as writer:
        yield writer.write_table


@contextmanager
def _parquet(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    with pq.ParquetWriter(path, LONG, compression="zstd") as writer:
        yield writer.write_table


@contextmanager
def _jsonl(path: Path) -> Iterator[Callable[[pa.Table], object]]:
    with path.open("w", encoding="utf-8") as file:

        def add(table: pa.Table) -> None:
            for batch in table.to_batches(max_chunksize=4096):
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist())

        yield add


FORMATS = {"csv": _csv, "jsonl": _jsonl, "parquet": _parquet}


@dataclass(frozen=True)
class LoadedRun:
    """A run folder; every frame is read when it is asked for."""

    run: Run

    @property
    def manifest(self) -> dict[str, Any]:
        """All that is needed to repeat the run."""
        return self.run.manifest

    @property
    def predictions(self) -> pd.DataFrame:
        """A row per question, context size, gold position, answer token and lens; lists over layers as arrays."""
        tables = list(self.run.parts(PREDICTIONS.names))
        return (pa.concat_tables(tables) if tables else PREDICTIONS.empty_table()).to_pandas()

    @property
    def layers(self) -> pd.DataFrame:
        """The predictions with a row for every layer, as `refinelens export` writes them."""

        tables = list(long_tables(self.run))
        return (pa.concat_tables(tables) if tables else LONG.empty_table()).to_pandas()

    @property
    def interventions(self) -> pd.DataFrame:
        """What `refinelens layers` wrote into the run: a row per example, layer and intervention.

        Raises:
            InputError: It has not been run, was stopped, or the run was replaced since.
        """
        folder = LayersFolder(self.run.path / LAYERS)
        found = folder.manifest()
        if found is None or found["status"] != "finished" or found["run_id"] != self.manifest["run_id"]:
            got = "none" if found is None else f"one of run {found['run_id']} that is {found['status']}"
            raise InputError(
                f"{folder.path}: expected a finished analysis of run {self.manifest['run_id']}, got {got}; "
                "make one with refinelens layers"
            )
        return _with_integers(pq.read_table(folder.path / ROWS))

    @property
    def trajectories(self) -> pd.DataFrame:
        """A row per prediction and threshold of the run; missing where a value does not exist."""
        tops = tuple(self.manifest["arguments"]["top"])
        tables = list(trajectory_tables(self.run, tops))
        table = pa.concat_tables(tables) if tables else TRAJECTORIES.empty_table()
        return _with_integers(table)

    @property
    def summary(self) -> pd.DataFrame:
        """``summary.csv``: a row per lens, threshold, context size and gold position."""
        return self._table("summary.csv")

    @property
    def paired(self) -> pd.DataFrame:
        """``paired.csv``: a row per lens, threshold, context size and pair of gold positions."""
        return self._table("paired.csv")

    def _table(self, name: str) -> pd.DataFrame:
        import pandas as pd

        # A lens may be called "7" or "NA".
        return pd.read_csv(self.run.path / name, dtype={"lens": str}, keep_default_na=False, na_values=[""])


def load_run(path: str | Path) -> LoadedRun:
    """A run folder as data frames.

    Raises:
        InputError: No run there, one of another schema version, or pandas is not installed.
    """
    try:
        import pandas  # noqa: F401
    except ImportError:
        raise InputError(
            "load_run: expected the package pandas, which is not installed; pip install 'refinelens[frames]'"
        ) from None
    return LoadedRun(open_run(path))


def _with_integers(table: pa.Table) -> pd.DataFrame:
    """Integers stay integers, also where some are missing."""
    import pandas as pd

    return table.to_pandas(types_mapper={pa.int32(): pd.Int32Dtype()}.get)
