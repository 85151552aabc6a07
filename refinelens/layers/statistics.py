"""Means per layer over examples, with intervals over questions: of the lens, and of each intervention."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..report.bootstrap import Estimate, mean_estimates, ratio, sums_and_counts
from ..report.shares import paired_estimate, share_estimate
from ..runs.trajectory import trajectories
from .examples import RunExamples
from .scanned import Scanned

LENS = "lens"
EVERY_POSITION = None  # in place of a gold position: all of a context size together
SHARES = ("first_correct_share", "settle_share", "exit_accuracy", "exit_agreement", "accuracy")
SHARE_CHANGE = "correct_change"  # a share less another one of the same examples
CHANGES = (SHARE_CHANGE, "first_correct_change", "settle_change", "depth_change")
GAINS = ("logprob_gain", "log_rank_gain", "entropy_drop")
GAIN, COST = GAINS[0], "logprob_cost"  # nats of target log-probability: by the lens, by an intervention


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
class Measured:
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


def measure_lens(examples: RunExamples) -> Measured:
    """What the lens says of layers ``0 .. n_layers``; layer 0 gains nothing over a layer before."""
    layers, top = examples.layers, examples.top
    found = trajectories(layers["target_rank"], top)
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
    return Measured(LENS, 0, *examples.keys.values(), values)


def measure_scanned(scanned: Scanned) -> Measured:
    """What an intervention costs at layers ``1 .. n_layers``."""
    keys = (scanned.question_id, scanned.documents, scanned.gold_position)
    clean_rank = scanned["target_rank"] - scanned["rank_change"]
    values = {
        COST: -scanned["logprob_change"],
        "log_rank_cost": np.log1p(scanned["target_rank"]) - np.log1p(clean_rank),
        "accuracy": scanned["correct"],
        **{name: scanned[name] for name in CHANGES},
    }
    return Measured(scanned.intervention, 1, *keys, values)


def layer_statistics(measured: Measured, seed: int) -> list[LayerStatistic]:
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
