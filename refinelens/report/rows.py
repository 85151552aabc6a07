"""What tables and figures are made of: a class per CSV file, its fields the columns, and a whole report of each kind.

An estimate takes three columns, a paired test those of its fields. Whoever measures fills these in; here nothing is
computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..stats import Estimate, PairedTest
from ..store.results import CUE_TABLES
from .further_rows import (
    CueDifference,
    CueLayer,
    CueRow,
    EffectiveDepth,
    FrequencyRow,
    MeasuredLayer,
    PredictionDepth,
    ProbeRow,
    SettlingRow,
)

# Names of statistics of a layer that more than one module looks for.
LENS = "lens"  # what a statistic is of, where it is no intervention
GAIN, COST = "logprob_gain", "logprob_cost"  # nats of target log-probability: by the lens, by an intervention
ATTRIBUTED = "attribution"  # nats that attention or feed-forward part of a block adds to the target's logit
EVERY_POSITION = None  # in place of a gold position: all of a context size together
NOTICEABLE = 0.01  # nats, a hundredth of the probability: less is no essential layer, however sure
FEW_LAYERS = 5  # fewer are in the same order, or in the reverse one, by chance: 4 once in 12 times, 3 once in 3
KEPT = 0.95  # of the accuracy at the output, by an early exit

# By lens and threshold, where more than half of the settled examples settle at the output: how many do, of how many.
Cautions = dict[tuple[str, int], tuple[int, int]]


@dataclass(frozen=True)
class SummaryRow:
    """One lens, threshold, context size and gold position.

    The accuracies are the model's own, the same for every lens and threshold and whichever answer tokens are chosen.
    What stands below ``share_censored`` is over the settled examples, but for the mean layers of the first correct
    prediction of all and of the largest rank improvement. A share of questions with one example each has Wilson's
    interval, all else a bootstrap over the questions that have it.
    """

    lens: str
    top: int
    documents: int
    gold_position: int
    n: int  # questions
    settled: int  # examples correct at the output
    settled_questions: int  # with one or more of them
    accuracy: Estimate  # the first answer token is predicted
    accuracy_all: Estimate  # every answer token is, after the true ones before it
    accuracy_generated: Estimate  # what the model writes contains an answer; none where it writes nothing
    share_censored: Estimate  # not correct at the output
    share_at_output: Estimate  # settle is the output
    share_unseen: Estimate  # not correct at any layer before the output
    mean_depth: Estimate
    median_depth: Estimate
    mean_first_correct: Estimate
    mean_first_correct_all: Estimate  # also over censored examples that are correct on the way
    mean_settle: Estimate
    mean_largest_gain: Estimate  # layer of the largest rank improvement
    left_out: int  # questions that could not be asked at this context size
    left_out_why: str  # how many of them for each reason


@dataclass(frozen=True)
class PairedDifference:
    """Statistics with the gold document at one position less those at an earlier one, means over questions.

    A question counts where it has the statistic at both positions. The accuracies are the model's own, the same for
    every lens and threshold; their intervals are those of paired shares, that of depth is a bootstrap over questions.
    """

    lens: str
    top: int
    documents: int
    gold_position: int
    less_position: int  # the earlier one, whose statistics are subtracted
    questions: int
    accuracy: Estimate
    accuracy_all: Estimate
    accuracy_generated: Estimate
    questions_settled: int  # that have a depth at both positions
    depth: Estimate  # layers


@dataclass(frozen=True)
class InvertedU:
    """Whether depth in the middle is larger than at both ends; NaN where a number does not exist, and the reason."""

    lens: str
    top: int
    documents: int
    middle: tuple[int, ...]  # gold positions
    questions_asked: int
    first: PairedTest  # layers, in the middle less at gold position 0
    last: PairedTest  # less at the last gold position
    p: float  # the larger of both
    p_holm: float  # over the context sizes of this lens and threshold
    method: str  # exact sign-flip, or its resampled form; empty without a test
    reason: str  # why there is no test; empty with one


@dataclass(frozen=True)
class LayerProfile:
    """What one lens sees over all examples; arrays over layers ``0 .. n_layers``."""

    lens: str
    examples: int
    rank_quartiles: np.ndarray  # [3, n_layers + 1], 0-based ranks: lower quartile, median, upper quartile
    mean_kl: np.ndarray  # [n_layers + 1] nats

    def __post_init__(self):
        if self.rank_quartiles.shape != (3, *self.mean_kl.shape):
            raise ValueError(
                f"rank_quartiles: expected shape [3, {len(self.mean_kl)}], got {list(self.rank_quartiles.shape)}"
            )


@dataclass(frozen=True)
class Report:
    """What the tables and figures of a run say of its chosen answer tokens."""

    manifest: dict
    rows: list[SummaryRow]
    differences: list[PairedDifference]
    tests: list[InvertedU]
    cautions: Cautions
    measured: list[MeasuredLayer] = field(default_factory=list)  # none of a run that was asked for no measures
    settling: list[SettlingRow] = field(default_factory=list)
    effective: list[EffectiveDepth] = field(default_factory=list)
    cues: list[CueRow] = field(default_factory=list)  # none of a run without decoys
    cue_layers: list[CueLayer] = field(default_factory=list)
    cue_differences: list[CueDifference] = field(default_factory=list)
    frequency: list[FrequencyRow] = field(default_factory=list)
    frequency_depth: list[PredictionDepth] = field(default_factory=list)
    probe: list[ProbeRow] | None = None  # of a run that keeps states

    @property
    def tables(self) -> dict[str, tuple[type, list]]:
        """Rows and their class by the file that they make."""
        return {
            "summary.csv": (SummaryRow, self.rows),
            "paired.csv": (PairedDifference, self.differences),
            "inverted_u.csv": (InvertedU, self.tests),
            **({"measures.csv": (type(self.measured[0]), self.measured)} if self.measured else {}),
            **({"settling.csv": (SettlingRow, self.settling)} if self.settling else {}),
            **({"effective_depth.csv": (EffectiveDepth, self.effective)} if self.effective else {}),
            **(dict(zip(CUE_TABLES, self._cue_tables, strict=True)) if self.cues else {}),
            **({"frequency.csv": (FrequencyRow, self.frequency)} if self.frequency else {}),
            **({"frequency_depth.csv": (PredictionDepth, self.frequency_depth)} if self.frequency else {}),
            **({"probe.csv": (ProbeRow, self.probe)} if self.probe is not None else {}),
        }

    @property
    def _cue_tables(self) -> list[tuple[type, list]]:
        return [(CueRow, self.cues), (CueLayer, self.cue_layers), (CueDifference, self.cue_differences)]

    @property
    def lenses(self) -> tuple[str, ...]:
        """Names of the lenses, in the order given."""
        return lens_names(self.manifest)

    @property
    def has_generations(self) -> bool:
        """Whether the model wrote texts that are scored."""
        return self.manifest["arguments"]["generate"] > 0

    @property
    def tops(self) -> tuple[int, ...]:
        """Thresholds, in the order given."""
        return tuple(self.manifest["arguments"]["top"])


@dataclass(frozen=True)
class LayerStatistic:
    """One statistic of one layer."""

    of: str  # `LENS`, or an intervention
    documents: int
    gold_position: int | None  # None for all of them together, here and below
    layer: int
    statistic: str
    questions: int  # that have it
    value: Estimate


@dataclass(frozen=True)
class Agreement:
    """Rank correlation over the layers of what the lens says and what an intervention costs, both means.

    Of interventions on a part of the blocks the lens also says what that part adds to the target's logit, `ATTRIBUTED`.
    """

    documents: int
    gold_position: int | None
    intervention: str
    lens_statistic: str
    coefficient: str  # spearman, or kendall (tau-b)
    value: Estimate  # with its interval over questions


@dataclass(frozen=True)
class Essential:
    """Layers whose mean lies above a threshold for sure, by lens and intervention."""

    documents: int
    intervention: str
    both: tuple[int, ...]
    lens_only: tuple[int, ...]
    intervention_only: tuple[int, ...]


@dataclass(frozen=True)
class EarlyExit:
    """The lowest layer at which the lens is right at least `KEPT` times as often as the output."""

    documents: int
    gold_position: int | None
    questions: int
    accuracy: Estimate  # at the output
    layer: int | None  # None where the output is never right
    accuracy_there: Estimate
    agreement_there: Estimate  # share of examples whose prediction is that of the output


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


@dataclass(frozen=True)
class LayersReport:
    """What the tables and the figure of an analysis of layers say."""

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
    def tables(self) -> dict[str, tuple[type, list]]:
        """Rows and their class by the file that they make."""
        return {
            "layers.csv": (LayerStatistic, self.statistics),
            "patching.csv": (Patching, self.patchings),
            "agreement.csv": (Agreement, self.agreements),
            "essential.csv": (Essential, self.essentials),
            "early_exit.csv": (EarlyExit, self.exits),
        }

    @property
    def n_layers(self) -> int:
        """The layer of the output."""
        return self.run["model"]["n_layers"]

    def of_size(self, documents: int) -> LayersReport:
        """What it says of one context size."""
        lists = ("statistics", "agreements", "essentials", "exits", "patchings")
        return replace(
            self, **{name: [row for row in getattr(self, name) if row.documents == documents] for name in lists}
        )


def layer_curves(statistics: list[LayerStatistic]) -> dict[tuple, list[LayerStatistic]]:
    """Rows in the order of their layers by ``(of, documents, gold_position, statistic)``."""
    curves: dict[tuple, list[LayerStatistic]] = {}
    for row in statistics:
        curves.setdefault((row.of, row.documents, row.gold_position, row.statistic), []).append(row)
    return curves


def essential_threshold(noise: float) -> float:
    """What the mean of an essential layer lies above for sure: the largest change by the control, or `NOTICEABLE`."""
    return max(noise, NOTICEABLE)


def format_estimate(estimate: Estimate, digits: int, interval: bool = False, sign: bool = False) -> str:
    """``0.83`` or ``0.83 [0.67,1.00]``; a dash where it does not exist, and no brackets without an interval."""
    if math.isnan(estimate.value):
        return "-"
    text = f"{estimate.value:{'+' if sign else ''}z.{digits}f}"
    with_interval = interval and not math.isnan(estimate.low)
    return f"{text} [{estimate.low:z.{digits}f},{estimate.high:z.{digits}f}]" if with_interval else text


def counted(n: int, noun: str) -> str:
    """``1 question``, ``12 questions``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def lens_names(manifest: dict) -> tuple[str, ...]:
    """Names of a run's lenses, in the order given."""
    return tuple(entry["name"] for entry in manifest["lenses"])


def title(manifest: dict) -> str:
    """Model and task of a run in words; of a path the last part."""
    names = [manifest[what]["name"] for what in ("model", "task")]
    return " on ".join(name if name.count("/") == 1 and name[0] not in "./" else Path(name).name for name in names)
