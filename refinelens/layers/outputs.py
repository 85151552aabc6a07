"""The files that an analysis leaves beside its parts: all rows, aggregates, the figure."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from ..report.derived import write_csv
from ..runs.durable import write_whole
from ..runs.layers_folder import FIGURE, ROWS, LayersFolder
from ..runs.layers_schema import LAYER_ROWS
from .agreement import Agreement
from .early_exit import EarlyExit
from .essential import Essential
from .figure import draw_layers
from .patching import Patching
from .report import LayersReport
from .statistics import LayerStatistic


def write_outputs(folder: LayersFolder, report: LayersReport) -> None:
    """Write ``layers.parquet``, the tables and ``layers.png``."""

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, LAYER_ROWS, compression="zstd") as writer:
            for rows in folder.rows(report.manifest):
                writer.write_table(rows)

    write_whole(folder.path / ROWS, write)
    write_csv(folder.path / "layers.csv", LayerStatistic, report.statistics)
    write_csv(folder.path / "agreement.csv", Agreement, report.agreements)
    write_csv(folder.path / "essential.csv", Essential, report.essentials)
    write_csv(folder.path / "early_exit.csv", EarlyExit, report.exits)
    write_csv(folder.path / "patching.csv", Patching, report.patchings)
    draw_layers(folder.path / FIGURE, report)
