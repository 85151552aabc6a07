"""Which layers an answer needs, by the lens and by every intervention: what an analysis of layers says and writes.

Means per layer over examples, with intervals over questions; how far lens and interventions agree on the order of the
layers; what is lost by stopping at a layer and taking what the lens reads there; from which layer on a state that is
patched in brings the answer with it, or takes it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from heapq import merge
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..config import PATCH
from ..op.ranks import kendall_tau_b, spearman
from ..report.figures import draw_layers
from ..report.rows import (
    ATTRIBUTED,
    COST,
    EVERY_POSITION,
    FEW_LAYERS,
    GAIN,
    KEPT,
    LENS,
    Agreement,
    EarlyExit,
    Essential,
    LayersReport,
    LayerStatistic,
    Patching,
    essential_threshold,
    layer_curves,
)
from ..report.tables import write_tables
from ..stats import (
    FEW_QUESTIONS,
    MEAN,
    NO_ESTIMATE,
    SHARE,
    SHARE_CHANGE,
    correlation_estimate,
    groups,
    lower_bounds,
    mean_estimates,
    resampled_means,
    sums_and_counts,
)
from ..store.files import write_whole
from ..store.layers import (
    CONTROL,
    DESTROY,
    FIGURE,
    HALVES,
    KEYS,
    RESTORE,
    ROWS,
    LayersFolder,
    rows_schema,
)
from ..store.trajectory import NONE, trajectories
from .examples import RunExamples

CHANGES = ("correct_change", "first_correct_change", "settle_change", "depth_change")
VALUES = ("target_logprob", "target_rank", "correct", "logprob_change", "rank_change", *CHANGES)
COLUMNS = (*KEYS, "intervention", "source_position", *VALUES)
SHARES = ("first_correct_share", "settle_share", "exit_accuracy", "exit_agreement", "accuracy")
KINDS = {**dict.fromkeys(SHARES, SHARE), "correct_change": SHARE_CHANGE}  # all else are means
GAINS = (GAIN, "log_rank_gain", "entropy_drop")
COEFFICIENTS = {"spearman": spearman, "kendall": kendall_tau_b}


@dataclass(frozen=True)
class LayerMetrics:
    """Values per example and layer, NaN where there is none; of patches an example is a context with one source."""

    of: str  # `LENS`, or an intervention
    first_layer: int
    question_id: np.ndarray  # [n]
    documents: np.ndarray  # [n]
    gold_position: np.ndarray  # [n]
    values: dict[str, np.ndarray]  # [n, layers]
    source_position: np.ndarray | None = None  # [n], of patches

    @classmethod
    def of_rows(cls, rows: pa.Table, intervention: str, n_layers: int) -> LayerMetrics:
        """`VALUES` of one intervention as they were stored; the layers of an example stand together, in order."""
        table = rows.filter(pc.equal(rows["intervention"], intervention))
        own, names = ATTRIBUTED, VALUES
        if intervention in HALVES and table[own].null_count < len(table):  # of an older version there are none
            names = (*VALUES, own)
        wide = {name: table[name].cast(pa.float64()).to_numpy().reshape(-1, n_layers) for name in names}
        keys = [table[name].to_numpy()[::n_layers].astype(np.int64) for name in KEYS]
        return cls(intervention, 1, *keys, wide, table["source_position"].cast(pa.float64()).to_numpy()[::n_layers])

    def __len__(self) -> int:
        return len(self.question_id)

    def cells(self, *by: np.ndarray) -> Iterator[tuple]:
        """(documents, values of ``by``, which examples): a context size as a whole, without values, then its cells.

        Args:
            by: Integers ``[n]``, by default gold positions.
        """
        by = by or (self.gold_position,)
        whole = ((documents, *[EVERY_POSITION for _ in by], inside) for documents, inside in groups(self.documents))
        return merge(whole, groups(self.documents, *by), key=itemgetter(0))

    def sums(self, inside: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Sums and counts ``[questions, statistics x layers]``, for the bootstrap."""
        stacked = np.concatenate([self.values[name][inside] for name in names], 1)
        ids, owner = np.unique(self.question_id[inside], return_inverse=True)
        return sums_and_counts(stacked, owner, len(ids))


def measure_lens(examples: RunExamples) -> LayerMetrics:
    """What the lens says of layers ``0 .. n_layers``; layer 0 gains nothing over a layer before."""
    columns = examples.columns
    found = trajectories(columns["target_rank"], examples.top, axis=-1)
    numbers = np.arange(examples.n_layers + 1)
    argmax = columns["argmax"]
    values = {
        "first_correct_share": (found.first_correct[:, None] == numbers).astype(float),
        "settle_share": (found.settle[:, None] == numbers).astype(float),
        GAIN: _gain(columns["target_logprob"].astype(float)),
        "log_rank_gain": -_gain(np.log1p(columns["target_rank"].astype(float))),
        "entropy_drop": -_gain(columns["entropy"].astype(float)),
        "exit_accuracy": (argmax == columns["answer_id"][:, None]).astype(float),
        "exit_agreement": (argmax == argmax[:, -1:]).astype(float),
    }
    return LayerMetrics(LENS, 0, *(columns[name] for name in KEYS), values)


def measure_ablations(stored: LayerMetrics) -> LayerMetrics:
    """What an intervention costs at layers ``1 .. n_layers``, of what was stored of it."""
    found = stored.values
    clean_rank = found["target_rank"] - found["rank_change"]
    values = {
        COST: -found["logprob_change"],
        "log_rank_cost": np.log1p(found["target_rank"]) - np.log1p(clean_rank),
        "accuracy": found["correct"],
        **{name: found[name] for name in (*CHANGES, ATTRIBUTED) if name in found},
    }
    return replace(stored, values=values)


def layer_statistics(measured: LayerMetrics, seed: int) -> list[LayerStatistic]:
    """Every statistic of every layer, by context size and gold position, see `stats.mean_estimates`."""
    rows, names = [], tuple(measured.values)
    n = measured.values[names[0]].shape[1]
    kinds = [KINDS.get(name, MEAN) for name in names for _ in range(n)]
    for documents, position, inside in measured.cells():
        sums, counts = measured.sums(inside, names)
        estimates, questions = mean_estimates(sums, counts, seed, kinds), (counts > 0).sum(0).tolist()
        for place, (n_questions, value) in enumerate(zip(questions, estimates, strict=True)):
            layer, name = measured.first_layer + place % n, names[place // n]
            rows.append(LayerStatistic(measured.of, documents, position, layer, name, n_questions, value))
    return rows


def _gain(values: np.ndarray) -> np.ndarray:
    """What each layer adds to the one before, ``[n, n_layers + 1]``, NaN at layer 0."""
    return np.diff(values, axis=1, prepend=np.nan)


def agreements(lens: LayerMetrics, costs: list[LayerMetrics], seed: int) -> list[Agreement]:
    """Every lens statistic against the cost of every intervention, over layers ``1 .. n_layers``.

    There is no agreement of fewer than `FEW_LAYERS` layers. Of each resample of the questions the means of both and
    their correlation are taken anew, see `stats.correlation_estimate`.
    """
    of_lens = {(documents, position): inside for documents, position, inside in lens.cells()}
    rows = []
    for cost in (cost for cost in costs if cost.values[COST].shape[1] >= FEW_LAYERS):
        for documents, position, inside in cost.cells():
            questions = len(np.unique(cost.question_id[inside]))
            costly = resampled_means(*cost.sums(inside, (COST,)), seed)
            gains = np.split(resampled_means(*lens.sums(of_lens[documents, position], GAINS), seed), len(GAINS), 1)
            for name, gain in zip(GAINS, gains, strict=True):
                for coefficient, compare in COEFFICIENTS.items():
                    value = correlation_estimate(gain[:, -costly.shape[1] :], costly, compare, questions)
                    rows.append(Agreement(documents, position, cost.of, name, coefficient, value))
    return rows


def attribution_agreements(costs: list[LayerMetrics], seed: int) -> list[Agreement]:
    """What a part of a block adds to the target's logit against the cost of silencing it, as `agreements`.

    There is none of interventions on whole blocks, nor of examples that an older version stored without attributions.
    """
    rows, name = [], ATTRIBUTED
    for cost in (cost for cost in costs if name in cost.values and cost.values[COST].shape[1] >= FEW_LAYERS):
        for documents, position, inside in cost.cells():
            inside = inside & ~np.isnan(cost.values[name]).any(1)
            if not inside.any():
                continue
            both = resampled_means(*cost.sums(inside, (name, COST)), seed)
            questions = len(np.unique(cost.question_id[inside]))
            for coefficient, compare in COEFFICIENTS.items():
                value = correlation_estimate(*np.split(both, 2, 1), compare, questions)
                rows.append(Agreement(documents, position, cost.of, name, coefficient, value))
    return rows


def early_exits(statistics: list[LayerStatistic]) -> list[EarlyExit]:
    """One per context size and gold position.

    Args:
        statistics: Of the lens, see `measure_lens`.
    """
    curves, exits = layer_curves(statistics), []
    cells = dict.fromkeys((row.documents, row.gold_position) for row in statistics if row.of == LENS)
    for cell in cells:
        accuracy, agreement = (curves[LENS, *cell, name] for name in ("exit_accuracy", "exit_agreement"))
        output, layer, there = accuracy[-1], None, (NO_ESTIMATE, NO_ESTIMATE)
        if output.value.value > 0:
            layer = next(row.layer for row in accuracy if row.value.value >= KEPT * output.value.value)
            there = (accuracy[layer].value, agreement[layer].value)
        exits.append(EarlyExit(*cell, output.questions, output.value, layer, *there))
    return exits


def essential_layers(lens: LayerMetrics, costs: list[LayerMetrics], threshold: float) -> list[Essential]:
    """Layers whose mean gain under the lens, and whose mean cost, have a `lower_bounds` above the threshold.

    Args:
        lens: What the lens says; context sizes with fewer than `FEW_QUESTIONS` questions have no verdict, and no row.
        costs: Of the interventions to compare.
        threshold: Nats.
    """
    by_lens = _above(lens, GAIN, threshold)
    by_cost = {cost.of: _above(cost, COST, threshold) for cost in costs}
    rows = []
    for documents, gaining in by_lens.items():
        for name, of_size in by_cost.items():
            costly = of_size[documents]
            sets = (gaining & costly, gaining - costly, costly - gaining)
            rows.append(Essential(documents, name, *(tuple(sorted(layers)) for layers in sets)))
    return rows


def _above(measured: LayerMetrics, name: str, threshold: float) -> dict[int, set[int]]:
    """Layers above the threshold by context size, all gold positions together."""
    found = {}
    for documents, position, inside in measured.cells():
        if position is EVERY_POSITION and len(np.unique(measured.question_id[inside])) >= FEW_QUESTIONS:
            low = lower_bounds(*measured.sums(inside, (name,)))
            found[documents] = set((measured.first_layer + np.flatnonzero(low > threshold)).tolist())
    return found


def patchings(stored: LayerMetrics, seed: int) -> list[Patching]:
    """All pairs of gold positions together first, then each.

    Args:
        stored: Of `store.layers.RESTORE` or `store.layers.DESTROY`.
        seed: Seed of the bootstrap over questions.
    """
    done = stored.values["correct"] == (1.0 if stored.of == RESTORE else 0.0)
    settle = trajectories((~done).astype(np.int64), axis=-1).settle  # 0-based among the layers 1 .. n_layers
    lowest = np.where(settle == NONE, done.shape[1], settle) + 1.0
    from_layer = replace(stored, values={"from_layer": lowest[:, None]})
    rows = []
    for *pair, inside in stored.cells(stored.gold_position, stored.source_position.astype(int)):
        sums, counts = from_layer.sums(inside, ("from_layer",))
        (value,) = mean_estimates(sums, counts, seed)
        rows.append(Patching(stored.of, *pair, len(sums), int(inside.sum()), value))
    return rows


def read_report(folder: LayersFolder, manifest: dict, examples: RunExamples) -> LayersReport:
    """Summarise the questions that an analysis has.

    Args:
        folder: The analysis.
        manifest: Of the analysis.
        examples: Of the run.
    """
    schema = rows_schema(manifest["arguments"]["interventions"])
    columns = [name for name in schema.names if name in (*COLUMNS, ATTRIBUTED)]
    parts = (table.select(columns) for table in folder.rows(manifest))
    rows = pa.concat_tables([schema.empty_table().select(columns), *parts])
    if manifest["parts"]:
        examples = examples.of_questions([part["question_id"] for part in manifest["parts"]])
    seed, n_layers = examples.manifest["seed"], examples.n_layers
    ablations = [name for name in manifest["arguments"]["interventions"] if name != PATCH]
    stored = {name: LayerMetrics.of_rows(rows, name, n_layers) for name in (*ablations, CONTROL, RESTORE, DESTROY)}
    lens = measure_lens(examples)
    costs = [measure_ablations(stored[name]) for name in ablations]
    patched = [measure_ablations(stored[name]) for name in (RESTORE, DESTROY) if len(stored[name])]
    statistics = [row for measured in (lens, *costs, *patched) for row in layer_statistics(measured, seed)]
    noise = float(np.abs(stored[CONTROL].values["logprob_change"]).max(initial=0.0))
    return LayersReport(
        manifest=manifest,
        run=examples.manifest,
        ablations=ablations,
        noise=noise,
        largest_difference=_difference(stored[ablations[0]], examples) if ablations else 0.0,
        statistics=statistics,
        agreements=[*agreements(lens, costs, seed), *attribution_agreements(costs, seed)],
        essentials=essential_layers(lens, costs, essential_threshold(noise)),
        exits=early_exits(statistics),
        patchings=[row for name in (RESTORE, DESTROY) for row in patchings(stored[name], seed)],
    )


def _difference(ablated: LayerMetrics, examples: RunExamples) -> float:
    """Largest difference of a clean log-probability at the output to what the run has."""
    in_run = examples.by_key(examples.columns["target_logprob"][:, -1].astype(float))
    clean = (ablated.values["target_logprob"] - ablated.values["logprob_change"])[:, 0].tolist()
    keys = zip(ablated.question_id.tolist(), ablated.documents.tolist(), ablated.gold_position.tolist(), strict=True)
    return max((abs(value - in_run[key]) for key, value in zip(keys, clean, strict=True)), default=0.0)


def write_outputs(folder: LayersFolder, report: LayersReport) -> None:
    """Write ``layers.parquet``, the tables and ``layers.png``."""

    def write(path: Path) -> None:
        schema = rows_schema(report.manifest["arguments"]["interventions"])
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for rows in folder.rows(report.manifest):
                writer.write_table(rows)

    write_whole(folder.path / ROWS, write)
    write_tables(folder.path, report)
    draw_layers(folder.path / FIGURE, report)
