"""Which layers an answer needs: by the lens, and by every intervention.

Means per layer over examples, with intervals over questions; how far lens and interventions agree on the order of the
layers; what is lost by stopping at a layer and taking what the lens reads there; from which layer on a state that is
patched in brings the answer with it, or takes it away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..op.ranks import kendall_tau_b, spearman
from ..stats import (
    FEW_QUESTIONS,
    LEVEL,
    Estimate,
    mean_estimates,
    paired_estimate,
    ratio,
    reflected_estimate,
    resampled_means,
    share_estimate,
    sums_and_counts,
    t_quantile,
)
from ..store.layers import RESTORE
from ..store.trajectory import trajectories
from .examples import RunExamples

VALUES = (
    *("target_logprob", "target_rank", "correct", "logprob_change", "rank_change", "correct_change"),
    *("first_correct_change", "settle_change", "depth_change"),
)
COLUMNS = ("question_id", "documents", "gold_position", "intervention", "source_position", *VALUES)
LENS = "lens"
EVERY_POSITION = None  # in place of a gold position: all of a context size together
SHARES = ("first_correct_share", "settle_share", "exit_accuracy", "exit_agreement", "accuracy")
SHARE_CHANGE = "correct_change"  # a share less another one of the same examples
CHANGES = (SHARE_CHANGE, "first_correct_change", "settle_change", "depth_change")
GAINS = ("logprob_gain", "log_rank_gain", "entropy_drop")
GAIN, COST = GAINS[0], "logprob_cost"  # nats of target log-probability: by the lens, by an intervention
COEFFICIENTS = {"spearman": spearman, "kendall": kendall_tau_b}
FEW_LAYERS = 5  # fewer are in the same order, or in the reverse one, by chance: 4 once in 12 times, 3 once in 3
NOWHERE = Estimate(math.nan, math.nan, math.nan)
KEPT = 0.95  # of the accuracy at the output
NOTICEABLE = 0.01  # nats, a hundredth of the probability: less is no essential layer, however sure


@dataclass(frozen=True)
class AblationResults:
    """One intervention; of patches an example is a context with one source."""

    intervention: str
    question_id: np.ndarray  # [n]
    documents: np.ndarray  # [n]
    gold_position: np.ndarray  # [n]
    source_position: np.ndarray  # [n], NaN but for patches
    values: dict[str, np.ndarray]  # by VALUES, fp64 [n, n_layers]; NaN for null

    @classmethod
    def of(cls, rows: pa.Table, intervention: str, n_layers: int) -> AblationResults:
        """The rows of one intervention; the layers of an example stand together, in order."""
        table = rows.filter(pc.equal(rows["intervention"], intervention))
        wide = {name: table[name].cast(pa.float64()).to_numpy().reshape(-1, n_layers) for name in VALUES}
        names = ("question_id", "documents", "gold_position")
        keys = [table[name].to_numpy()[::n_layers].astype(np.int64) for name in names]
        source = table["source_position"].cast(pa.float64()).to_numpy()[::n_layers]
        return cls(intervention, *keys, source, wide)

    def __getitem__(self, name: str) -> np.ndarray:
        """One of `VALUES`, ``[n, n_layers]``."""
        return self.values[name]

    def __len__(self) -> int:
        return len(self.question_id)


@dataclass(frozen=True)
class LayerStatistic:
    """One statistic of one layer."""

    of: str  # lens, or an intervention
    documents: int
    gold_position: int | None  # None for all of them together
    layer: int
    statistic: str
    questions: int  # that have it
    value: Estimate


@dataclass(frozen=True)
class LayerMetrics:
    """Statistics per example and layer, NaN where one does not exist."""

    of: str
    first_layer: int
    question_id: np.ndarray  # [n]
    documents: np.ndarray  # [n]
    gold_position: np.ndarray  # [n]
    values: dict[str, np.ndarray]  # [n, layers]

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


def measure_ablations(scanned: AblationResults) -> LayerMetrics:
    """What an intervention costs at layers ``1 .. n_layers``."""
    keys = (scanned.question_id, scanned.documents, scanned.gold_position)
    clean_rank = scanned["target_rank"] - scanned["rank_change"]
    values = {
        COST: -scanned["logprob_change"],
        "log_rank_cost": np.log1p(scanned["target_rank"]) - np.log1p(clean_rank),
        "accuracy": scanned["correct"],
        **{name: scanned[name] for name in CHANGES},
    }
    return LayerMetrics(scanned.intervention, 1, *keys, values)


def layer_statistics(measured: LayerMetrics, seed: int) -> list[LayerStatistic]:
    """Every statistic of every layer, by context size and gold position.

    A share of questions with one example each, and a difference of two, have the intervals of `report.shares`, all
    else a bootstrap over questions.
    """
    rows, names = [], tuple(measured.values)
    for documents, position, inside in measured.cells():
        sums, counts = measured.sums(inside, names)
        estimates, questions = mean_estimates(sums, counts, seed), (counts > 0).sum(0).tolist()
        n = measured.values[names[0]].shape[1]
        for place, (n_questions, value) in enumerate(zip(questions, estimates, strict=True)):
            layer, name = measured.first_layer + place % n, names[place // n]
            if counts[:, place].max() <= 1 and name in (*SHARES, SHARE_CHANGE):
                value = _share(name, ratio(sums[:, place], counts[:, place]), n_questions)
            rows.append(LayerStatistic(measured.of, documents, position, layer, name, n_questions, value))
    return rows


def _share(name: str, values: np.ndarray, n: int) -> Estimate:
    """Of 0 and 1 of each question, or -1, 0 and 1 of a difference; NaN where it has none."""
    return share_estimate(int((values == 1).sum()), n) if name in SHARES else paired_estimate(values)


def _gain(values: np.ndarray) -> np.ndarray:
    """What each layer adds to the one before, ``[n, n_layers + 1]``, NaN at layer 0."""
    return np.diff(values, axis=1, prepend=np.nan)


@dataclass(frozen=True)
class Agreement:
    """Rank correlation over the layers of what the lens says and what an intervention costs, both means."""

    documents: int
    gold_position: int | None  # None for all of them together
    intervention: str
    lens_statistic: str
    coefficient: str  # spearman, or kendall (tau-b)
    value: Estimate  # with its interval over questions


def agreements(lens: LayerMetrics, costs: list[LayerMetrics], seed: int) -> list[Agreement]:
    """Every lens statistic against the cost of every intervention, over layers ``1 .. n_layers``.

    There is no agreement of fewer than `FEW_LAYERS` layers.

    Of each resample of the questions the means of both and their correlation are taken anew. The noise of the means
    moves a correlation towards 0, and that of resampled means, which have it twice, further: so that the interval of
    the resamples is reflected at the correlation.
    """
    of_lens = {(documents, position): inside for documents, position, inside in lens.cells()}
    rows = []
    for cost in (cost for cost in costs if cost.values[COST].shape[1] >= FEW_LAYERS):
        for documents, position, inside in cost.cells():
            questions = len(np.unique(cost.question_id[inside]))
            costly = _means(cost, inside, (COST,), seed)[0]
            gains = _means(lens, of_lens[documents, position], GAINS, seed)
            for name, gain in zip(GAINS, gains, strict=True):
                for coefficient, compare in COEFFICIENTS.items():
                    found = compare(gain[:, -costly.shape[1] :], costly)
                    value = reflected_estimate(found[0], found[1:], questions, limit=1.0)
                    rows.append(Agreement(documents, position, cost.of, name, coefficient, value))
    return rows


def _means(measured: LayerMetrics, inside: np.ndarray, names: tuple[str, ...], seed: int) -> list[np.ndarray]:
    """Of each statistic ``[1 + RESAMPLES, layers]``: the means of all questions first, then those of the resamples."""
    means, resampled = resampled_means(*measured.sums(inside, names), seed)
    return np.split(np.concatenate([means[None], resampled]), len(names), 1)


@dataclass(frozen=True)
class EarlyExit:
    """The lowest layer at which the lens is right at least `KEPT` times as often as the output."""

    documents: int
    gold_position: int | None  # None for all of them together
    questions: int
    accuracy: Estimate  # at the output
    layer: int | None  # None where the output is never right
    accuracy_there: Estimate
    agreement_there: Estimate  # share of examples whose prediction is that of the output


def early_exits(statistics: list[LayerStatistic]) -> list[EarlyExit]:
    """One per context size and gold position.

    Args:
        statistics: Of the lens, see `statistics.measure_lens`.
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
        return EarlyExit(documents, position, accuracy[-1].questions, whole, None, NOWHERE, NOWHERE)
    layer = next(row.layer for row in accuracy if row.value.value >= KEPT * whole.value)
    there = (accuracy[layer].value, agreement[layer].value)
    return EarlyExit(documents, position, accuracy[-1].questions, whole, layer, *there)


@dataclass(frozen=True)
class Essential:
    """Layers whose mean lies above a threshold for sure, by lens and intervention."""

    documents: int
    intervention: str
    both: tuple[int, ...]
    lens_only: tuple[int, ...]
    intervention_only: tuple[int, ...]


def essential_threshold(noise: float) -> float:
    """What the mean of an essential layer lies above for sure: the largest change by the control, or `NOTICEABLE`."""
    return max(noise, NOTICEABLE)


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


def lower_bounds(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bounds below the means of several statistics, ``[n_statistics]``, that hold for all of them at once.

    With a probability of `LEVEL`: one-sided t bounds at a Bonferroni level, with the standard error of a mean over
    questions with different numbers of values (Cochran 1977, Sampling Techniques, 6.4).

    Args:
        sums: ``[n_questions, n_statistics]``, the sum of a question's values; 2 questions or more have some.
        counts: Same shape, how many values the question has; a statistic without any has NaN for a bound.
    """
    means, questions = ratio(sums.sum(0), counts.sum(0)), (counts > 0).sum(0)
    squares = ((sums - means * counts) ** 2).sum(0) * questions / (questions - 1)
    errors = ratio(np.sqrt(squares), counts.sum(0))
    return means - t_quantile((1 - LEVEL) / (questions > 0).sum(), questions) * errors


def _above(measured: LayerMetrics, name: str, threshold: float) -> dict[int, set[int]]:
    """Layers above the threshold by context size, all gold positions together."""
    found = {}
    for documents, position, inside in measured.cells():
        if position is EVERY_POSITION and len(np.unique(measured.question_id[inside])) >= FEW_QUESTIONS:
            low = lower_bounds(*measured.sums(inside, (name,)))
            found[documents] = set((measured.first_layer + np.flatnonzero(low > threshold)).tolist())
    return found


@dataclass(frozen=True)
class Patching:
    """One pair of gold positions of one context size, or all pairs together."""

    intervention: str  # restore, or destroy
    documents: int
    gold_position: int | None  # of the run that is patched; None for all pairs together
    source_position: int | None  # of the run that the state is from
    questions: int
    examples: int
    from_layer: Estimate  # mean over examples of the lowest layer from which every patch has the effect


def patchings(scanned: AblationResults, seed: int) -> list[Patching]:
    """All pairs together first, then each.

    Args:
        scanned: Of `store.layers.RESTORE` or `store.layers.DESTROY`.
        seed: Seed of the bootstrap over questions.
    """
    done = scanned["correct"] == (1.0 if scanned.intervention == RESTORE else 0.0)
    stays = np.logical_and.accumulate(done[:, ::-1], axis=1).sum(1)
    from_layer = done.shape[1] + 1.0 - stays
    return [
        Patching(scanned.intervention, *pair, *_mean(scanned.question_id[inside], from_layer[inside], seed))
        for *pair, inside in _pairs(scanned)
    ]


def _pairs(scanned: AblationResults) -> Iterator[tuple[int, int | None, int | None, np.ndarray]]:
    for documents in np.unique(scanned.documents).tolist():
        of_size = scanned.documents == documents
        yield documents, None, None, of_size
        pairs = np.stack([scanned.gold_position, scanned.source_position.astype(int)], 1)
        for position, source in np.unique(pairs[of_size], axis=0).tolist():
            yield documents, position, source, of_size & (pairs == (position, source)).all(1)


def _mean(question_id: np.ndarray, values: np.ndarray, seed: int) -> tuple[int, int, Estimate]:
    ids, owner = np.unique(question_id, return_inverse=True)
    return len(ids), len(values), mean_estimates(*sums_and_counts(values[:, None], owner, len(ids)), seed)[0]
