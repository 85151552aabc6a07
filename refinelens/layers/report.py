"""What an analysis of layers says, summarised once and written into its folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import PATCH
from ..report.figures import draw_layers
from ..report.rows import LayersReport, essential_threshold
from ..report.tables import write_tables
from ..store.files import write_whole
from ..store.layers import CONTROL, DESTROY, FIGURE, LAYER_ROWS, RESTORE, ROWS, LayersFolder
from .examples import RunExamples
from .measures import (
    COLUMNS,
    LayerMetrics,
    agreements,
    early_exits,
    essential_layers,
    layer_statistics,
    measure_ablations,
    measure_lens,
    patchings,
)


def read_report(folder: LayersFolder, manifest: dict, examples: RunExamples) -> LayersReport:
    """Summarise the questions that an analysis has.

    Args:
        folder: The analysis.
        manifest: Of the analysis.
        examples: Of the run.
    """
    parts = (table.select(COLUMNS) for table in folder.rows(manifest))
    rows = pa.concat_tables([LAYER_ROWS.empty_table().select(COLUMNS), *parts])
    if manifest["parts"]:
        examples = examples.of_questions([part["question_id"] for part in manifest["parts"]])
    seed, n_layers = examples.manifest["seed"], examples.n_layers
    ablations = [name for name in manifest["arguments"]["interventions"] if name != PATCH]
    stored = {name: LayerMetrics.of_rows(rows, name, n_layers) for name in (*ablations, CONTROL, RESTORE, DESTROY)}
    lens = measure_lens(examples)
    costs = [measure_ablations(stored[name]) for name in ablations]
    patched = [measure_ablations(stored[name]) for name in (RESTORE, DESTROY) if len(stored[name])]
    statistics = [row for measured in (lens, *costs, *patched) for row in layer_statistics(measured, seed)]
    noise = float(np.abs(stored[CONTROL]["logprob_change"]).max(initial=0.0))
    return LayersReport(
        manifest=manifest,
        run=examples.manifest,
        ablations=ablations,
        noise=noise,
        largest_difference=_difference([stored[name] for name in ablations[:1]], examples),
        statistics=statistics,
        agreements=agreements(lens, costs, seed),
        essentials=essential_layers(lens, costs, essential_threshold(noise)),
        exits=early_exits(statistics),
        patchings=[row for name in (RESTORE, DESTROY) for row in patchings(stored[name], seed)],
    )


def _difference(ablated: list[LayerMetrics], examples: RunExamples) -> float:
    """Largest difference of a clean log-probability at the output to what the run has."""
    in_run = examples.by_key(examples.layers["target_logprob"][:, -1].astype(float))
    found = [0.0]
    for one in ablated:
        clean = (one["target_logprob"] - one["logprob_change"])[:, 0]
        keys = zip(one.question_id.tolist(), one.documents.tolist(), one.gold_position.tolist(), strict=True)
        found += [abs(value - in_run[key]) for key, value in zip(keys, clean, strict=True)]
    return float(max(found))


def write_outputs(folder: LayersFolder, report: LayersReport) -> None:
    """Write ``layers.parquet``, the tables and ``layers.png``."""

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, LAYER_ROWS, compression="zstd") as writer:
            for rows in folder.rows(report.manifest):
                writer.write_table(rows)

    write_whole(folder.path / ROWS, write)
    write_tables(folder.path, report)
    draw_layers(folder.path / FIGURE, report)
