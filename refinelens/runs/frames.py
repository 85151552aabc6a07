"""A run as pandas data frames."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import InputError
from .layers_folder import ROWS, LayersFolder
from .results import LAYERS, PREDICTIONS, TRAJECTORIES, Run, open_run
from .trajectory_table import trajectory_tables

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class LoadedRun:
    """A run folder; every frame is read when it is asked for."""

    run: Run

    @property
    def manifest(self) -> dict:
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
        from .export import LONG, long_tables

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
