"""Which layers an answer needs: by the lens, and by every intervention.

Means per layer over examples, with intervals over questions; how far lens and interventions agree on the order of the
layers; what is lost by stopping at a layer and taking what the lens reads there; from which layer on a state that is
patched in brings the answer with it, or takes it away.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..op.ranks import kendall_tau_b, spearman
from ..report.rows import (
    COST,
    EVERY_POSITION,
    FEW_LAYERS,
    GAIN,
    KEPT,
    LENS,
    Agreement,
    EarlyExit,
    Essential,
    LayerStatistic,
    Patching,
)
from ..stats import (
    FEW_QUESTIONS,
    MEAN,
    NO_ESTIMATE,
    SHARE,
    SHARE_CHANGE,
    correlation_estimate,
    lower_bounds,
    mean_estimates,
    resampled_means,
    sums_and_counts,
)
from ..store.layers import RESTORE
from ..store.trajectory import trajectories
from .examples import RunExamples

CHANGES = ("correct_change", "first_correct_change", "settle_change", "depth_change")
VALUES = ("target_logprob", "target_rank", "correct", "logprob_change", "rank_change", *CHANGES)
COLUMNS = ("question_id", "documents", "gold_position", "intervention", "source_position", *VALUES)
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
        wide = {name: table[name].cast(pa.float64()).to_numpy().reshape(-1, n_layers) for name in VALUES}
        names = ("question_id", "documents", "gold_position")
        keys = [table[name].to_numpy()[::n_layers].astype(np.int64) for name in names]
        return cls(intervention, 1, *keys, wide, table["source_position"].cast(pa.float64()).to_numpy()[::n_layers])

    def __getitem__(self, name: str) -> np.ndarray:
        """One of the values, ``[n, layers]``."""
        return self.values[name]

    def __len__(self) -> int:
        return len(self.question_id)

    def cells(self) -> Iterator[tuple[int, int | None, np.ndarray]]:
        """(documents, gold position, which examples): all gold positions of a size together, then each."""
        for documents in np.unique(self.documents).tolist():
            inside = self.documents == documents
            yield documents, EVERY_POSITION, inside
            for position in np.unique(self.gold_position[inside]).tolist():
                yield documents, position, inside & (self.gold_position == position)

    def sums(self, inside: np.ndarray, names: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Sums and counts ``[questions, statistics x layers]``, for the bootstrap."""
        stacked = np.concatenate([self.values[name][inside] for name in names], 1)
        ids, owner = np.unique(self.question_id[inside], return_inverse=True)
        return sums_and_counts(stacked, owner, len(ids))


def measure_lens(examples: RunExamples) -> LayerMetrics:
    """What the lens says of layers ``0 .. n_layers``; layer 0 gains nothing over a layer before."""
    layers, top = examples.layers, examples.top
    found = trajectories(layers["target_rank"], top, axis=-1)
    numbers = np.arange(examples.n_layers + 1)
    argmax = layers["argmax"]
    values = {
        "first_correct_share": (found.first_correct[:, None] == numbers).astype(float),
        "settle_share": (found.settle[:, None] == numbers).astype(float),
        GAIN: _gain(layers["target_logprob"].astype(float)),
        "log_rank_gain": -_gain(np.log1p(layers["target_rank"].astype(float))),
        "entropy_drop": -_gain(layers["entropy"].astype(float)),
        "exit_accuracy": (argmax == examples.answer_id[:, None]).astype(float),
        "exit_agreement": (argmax == argmax[:, -1:]).astype(float),
    }
    return LayerMetrics(LENS, 0, *examples.keys.values(), values)


def measure_ablations(stored: LayerMetrics) -> LayerMetrics:
    """What an intervention costs at layers ``1 .. n_layers``, of what was stored of it."""
    clean_rank = stored["target_rank"] - stored["rank_change"]
    values = {
        COST: -stored["logprob_change"],
        "log_rank_cost": np.log1p(stored["target_rank"]) - np.log1p(clean_rank),
        "accuracy": stored["correct"],
        **{name: stored[name] for name in CHANGES},
    }
    return replace(stored, values=values)


def layer_statistics(measured: LayerMetrics, seed: int) -> list[LayerStatistic]:
    """Every statistic of every layer, by context size and gold position, see `stats.mean_estimates`."""
    rows, names = [], tuple(measured.values)
    n = measured[names[0]].shape[1]
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
    for cost in (cost for cost in costs if cost[COST].shape[1] >= FEW_LAYERS):
        for documents, position, inside in cost.cells():
            questions = len(np.unique(cost.question_id[inside]))
            costly = resampled_means(*cost.sums(inside, (COST,)), seed)
            gains = np.split(resampled_means(*lens.sums(of_lens[documents, position], GAINS), seed), len(GAINS), 1)
            for name, gain in zip(GAINS, gains, strict=True):
                for coefficient, compare in COEFFICIENTS.items():
                    value = correlation_estimate(gain[:, -costly.shape[1] :], costly, compare, questions)
                    rows.append(Agreement(documents, position, cost.of, name, coefficient, value))
    return rows


def early_exits(statistics: list[LayerStatistic]) -> list[EarlyExit]:
    """One per context size and gold position.

    Args:
        statistics: Of the lens, see `measure_lens`.
    """
    cells: dict[tuple, dict[str, list[LayerStatistic]]] = {}
    for row in statistics:
        if row.of == LENS:
            cell = cells.setdefault((row.documents, row.gold_position), {})
            cell.setdefault(row.statistic, []).append(row)
    return [_exit(*key, cell["exit_accuracy"], cell["exit_agreement"]) for key, cell in cells.items()]


def _exit(documents, position, accuracy: list[LayerStatistic], agreement: list[LayerStatistic]) -> EarlyExit:
    whole = accuracy[-1].value
    if whole.value == 0:
        return EarlyExit(documents, position, accuracy[-1].questions, whole, None, NO_ESTIMATE, NO_ESTIMATE)
    layer = next(row.layer for row in accuracy if row.value.value >= KEPT * whole.value)
    there = (accuracy[layer].value, agreement[layer].value)
    return EarlyExit(documents, position, accuracy[-1].questions, whole, layer, *there)


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
    done = stored["correct"] == (1.0 if stored.of == RESTORE else 0.0)
    stays = np.logical_and.accumulate(done[:, ::-1], axis=1).sum(1)
    from_layer = replace(stored, values={"from_layer": (done.shape[1] + 1.0 - stays)[:, None]})
    rows = []
    for *pair, inside in _pairs(stored):
        sums, counts = from_layer.sums(inside, ("from_layer",))
        (value,) = mean_estimates(sums, counts, seed)
        rows.append(Patching(stored.of, *pair, len(sums), int(inside.sum()), value))
    return rows


def _pairs(stored: LayerMetrics) -> Iterator[tuple[int, int | None, int | None, np.ndarray]]:
    for documents in np.unique(stored.documents).tolist():
        of_size = stored.documents == documents
        yield documents, None, None, of_size
        pairs = np.stack([stored.gold_position, stored.source_position.astype(int)], 1)
        for position, source in np.unique(pairs[of_size], axis=0).tolist():
            yield documents, position, source, of_size & (pairs == (position, source)).all(1)
