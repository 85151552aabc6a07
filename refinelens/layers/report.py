"""What an analysis says, summarised once. Reads results only; no torch, no model."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..runs.layers_folder import LayersFolder
from ..runs.layers_schema import CONTROL, DESTROY, LAYER_ROWS, RESTORE
from .agreement import Agreement, agreements
from .early_exit import EarlyExit, early_exits
from .essential import Essential, essential_layers, essential_threshold
from .examples import RunExamples
from .options import PATCH
from .patching import Patching, patchings
from .scanned import COLUMNS, Scanned
from .statistics import LayerStatistic, layer_statistics, measure_lens, measure_scanned


@dataclass(frozen=True)
class LayersReport:
    """What table, figure and files of an analysis say."""

    manifest: dict  # of the analysis
    run: dict  # manifest of the run
    ablations: list[str]
    noise: float  # nats: the largest change by a control that changes nothing; 0 where nothing was intervened in
    largest_difference: float  # nats: of the clean log-probabilities here and in the run
    statistics: list[LayerStatistic]
    agreements: list[Agreement]
    essentials: list[Essential]
    exits: list[EarlyExit]
    patchings: list[Patching]

    @property
    def threshold(self) -> float:
        """Nats that the mean of an essential layer lies above for sure."""
        return essential_threshold(self.noise)

    @property
    def n_layers(self) -> int:
        """The layer of the output."""
        return self.run["model"]["n_layers"]


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
    scanned = {name: Scanned.of(rows, name, n_layers) for name in (*ablations, CONTROL, RESTORE, DESTROY)}
    lens = measure_lens(examples)
    costs = [measure_scanned(scanned[name]) for name in ablations]
    patched = [measure_scanned(scanned[name]) for name in (RESTORE, DESTROY) if len(scanned[name])]
    statistics = [row for measured in (lens, *costs, *patched) for row in layer_statistics(measured, seed)]
    noise = float(np.abs(scanned[CONTROL]["logprob_change"]).max(initial=0.0))
    return LayersReport(
        manifest=manifest,
        run=examples.manifest,
        ablations=ablations,
        noise=noise,
        largest_difference=_difference([scanned[name] for name in ablations[:1]], examples),
        statistics=statistics,
        agreements=agreements(lens, costs, seed),
        essentials=essential_layers(lens, costs, essential_threshold(noise)),
        exits=early_exits(statistics),
        patchings=[row for name in (RESTORE, DESTROY) for row in patchings(scanned[name], seed)],
    )


def _difference(scanned: list[Scanned], examples: RunExamples) -> float:
    """Largest difference of a clean log-probability at the output to what the run has."""
    stored = examples.by_key(examples.layers["target_logprob"][:, -1].astype(float))
    found = [0.0]
    for one in scanned:
        clean = (one["target_logprob"] - one["logprob_change"])[:, 0]
        keys = zip(one.question_id.tolist(), one.documents.tolist(), one.gold_position.tolist(), strict=True)
        found += [abs(value - stored[key]) for key, value in zip(keys, clean, strict=True)]
    return float(max(found))
