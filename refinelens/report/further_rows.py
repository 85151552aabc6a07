"""What tables hold of a run that was asked for more: measures of every layer, and documents that disagree.

A class is a CSV file, as in `report.rows`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from ..stats import NO_ESTIMATE, Estimate
from ..store.results import BUCKET_ENDS

BUCKETS = (*(f"{above + 1}-{end}" for above, end in pairwise((0, *BUCKET_ENDS))), "rest")  # by frequency rank
EITHER = "either"  # in place of an order: both together


@dataclass(frozen=True)
class MeasuredLayer:
    """One lens, context size, gold position and layer: means over the answer tokens that tables are about."""

    lens: str
    documents: int
    gold_position: int
    layer: int
    questions: int
    entropy: Estimate  # nats
    kl: Estimate  # nats, KL(final || layer)
    jsd: Estimate = NO_ESTIMATE  # nats, Jensen-Shannon divergence from the output; none where it was not measured
    top5: Estimate = NO_ESTIMATE  # share of the five likeliest tokens that are the output's


@lru_cache
def measured_layer(names: tuple[str, ...]) -> type[MeasuredLayer]:
    """`MeasuredLayer` with a field more for every measure that it lacks, so that other tables stay as they were."""
    known = {one.name for one in fields(MeasuredLayer)}
    more = [(name, "Estimate", NO_ESTIMATE) for name in names if name not in known]
    return make_dataclass("MeasuredLayer", more, bases=(MeasuredLayer,), frozen=True) if more else MeasuredLayer


@dataclass(frozen=True)
class MeasuredCell:
    """What was measured of the examples of one lens, context size and gold position."""

    lens: str
    documents: int
    gold_position: int | None
    question_id: np.ndarray  # [examples]
    values: dict[str, np.ndarray]  # [examples, n_layers + 1] by measure

    @classmethod
    def of_all_positions(cls, cells: Sequence[MeasuredCell]) -> MeasuredCell:
        """Those of one lens and context size together."""
        first = cells[0]
        values = {name: np.concatenate([cell.values[name] for cell in cells]) for name in first.values}
        return cls(first.lens, first.documents, None, np.concatenate([cell.question_id for cell in cells]), values)


@dataclass(frozen=True)
class EffectiveDepth:
    """Up to which layer the model works on its prediction, by one method, see `report.effective_depth`."""

    lens: str
    documents: int
    gold_position: int | None  # None for all of them together
    method: str  # cosine, kl or top5
    questions: int
    layer: Estimate  # of the mean curve; NaN where the curve has no such layer
    ratio: Estimate  # layer / n_layers


@dataclass(frozen=True)
class SettlingRow:
    """One lens, context size and gold position: where the prediction settles by its divergence from the output."""

    lens: str
    documents: int
    gold_position: int
    questions: int
    mean_settle_jsd: Estimate  # lowest layer at which the divergence is low
    deep_thinking: Estimate  # share of tokens for which that layer is among the last
    deep_thinking_generated: Estimate = NO_ESTIMATE  # the same of the tokens of a generated text, mean over texts


@dataclass(frozen=True)
class FrequencyRow:
    """One lens, context size, layer and bucket of tokens by their frequency rank, over examples as in `SettlingRow`."""

    lens: str
    documents: int
    gold_position: int | None  # None for all of them together
    layer: int
    bucket: str  # one of `BUCKETS`
    questions: int
    share: Estimate  # of the layer's best tokens that are in the bucket
    flipped: Estimate  # of these, that are not the output's best token


@dataclass(frozen=True)
class PredictionDepth:
    """One lens, context size, bucket and threshold: where the model's own predictions of the bucket come up."""

    lens: str
    documents: int
    gold_position: int | None  # None for all of them together
    bucket: str  # of the output's best token
    top: int  # rank 1 to this; of more than 1 over the examples whose target is the output's best token
    questions: int
    examples: int
    mean_first: Estimate  # lowest layer at which the output's best token has such a rank


@dataclass(frozen=True)
class ProbeRow:
    """One context size and layer: a linear probe of the gold position, beside lens and model."""

    documents: int
    gold_position: int | None  # None for all of them together; of one the accuracy is its recall
    layer: int
    questions: int
    chance: float  # accuracy of guessing: the share of the most frequent position
    accuracy: Estimate  # of the probe, share of held-out contexts
    lens_accuracy: Estimate  # the first answer token is the best token of the layer, through the first lens
    output_accuracy: Estimate  # the same at the output


@dataclass(frozen=True)
class CueRow:
    """One lens, threshold, context size, order and distance of gold documents and decoys.

    Depths are over the examples in which that answer is correct at the output. Shares and means are over examples,
    their intervals over questions.
    """

    lens: str
    top: int
    documents: int
    order: str  # gold first, decoy first, either, or no decoy
    distance: int | None  # documents from the one kind to the other, 1 of neighbours; None for all together
    questions: int
    examples: int
    gold_ahead: Estimate  # the gold answer has the lower rank at the output
    gold_correct: Estimate  # it is of rank 1 to k there
    decoy_correct: Estimate  # so is the decoys' answer
    mean_decided: Estimate  # layer from which the answer that is ahead at the output stays ahead
    share_switched: Estimate  # the lead changes after the first layer at which either is correct, if there is one
    share_loser_seen: Estimate  # the answer that is behind at the output is correct at some layer
    gold_first_correct: Estimate
    gold_settle: Estimate
    gold_depth: Estimate
    decoy_first_correct: Estimate
    decoy_settle: Estimate
    decoy_depth: Estimate


@dataclass(frozen=True)
class CueLayer:
    """One lens, context size, order and layer, all distances together."""

    lens: str
    documents: int
    order: str
    layer: int
    questions: int
    gold_ahead: Estimate  # share of examples
    gold_best: Estimate  # share whose best token is the gold answer's
    decoy_best: Estimate
    lead: Estimate  # nats, log-probability of the gold answer less that of the decoys'


@dataclass(frozen=True)
class CueDifference:
    """With the decoy first less with the gold document first, means of questions that have both."""

    lens: str
    top: int
    documents: int
    questions: int
    gold_ahead: Estimate  # above 0: what comes last wins
    gold_correct: Estimate
    decoy_correct: Estimate
    mean_decided: Estimate  # layers
    gold_depth: Estimate  # layers
