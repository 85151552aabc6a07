"""How frequent the tokens are that layers predict, by the buckets of Gupta et al. 2025 (arXiv 2510.18871).

Their finding: early layers promote frequent tokens, of which most give way to others before the output ("guess, then
refine"), and a frequent token is the model's own prediction at an earlier layer than a rare one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from ..config import FREQUENCY
from ..placement import ORACLE, condition_name
from ..stats import SHARE, mean_estimates, sums_and_counts
from ..store.results import BUCKET_ENDS, Run
from ..store.trajectory import first_layer
from .further_rows import BUCKETS, FrequencyRow, MeasuredCell, PredictionDepth
from .measures import cells
from .rows import EVERY_POSITION, Report, format_estimate

COLUMNS = ("argmax_bucket", "argmax", "target_rank")
Values = dict[str, np.ndarray]  # of `COLUMNS`, ``[examples, n_layers + 1]`` each


def frequency_rows(run: Run, tops: Sequence[int]) -> tuple[list[FrequencyRow], list[PredictionDepth]]:
    """Buckets of best tokens, layer by layer, and where the model's own prediction comes up; none if not asked for.

    Args:
        run: The run.
        tops: Thresholds at which a prediction has come up.
    """
    if FREQUENCY not in run.extras:
        return [], []
    layers: list[FrequencyRow] = []
    depths: list[PredictionDepth] = []
    for cell in _levels(run):
        ids, owner = np.unique(cell.question_id, return_inverse=True)
        where, n, seed = (cell.lens, cell.documents, cell.gold_position), len(ids), run.manifest["seed"]
        layers += _by_layer(where, cell.values, owner, n, seed)
        depths += _depths(where, cell.values, owner, n, seed, tops)
    return layers, depths


def _levels(run: Run) -> Iterator[MeasuredCell]:
    """Examples of every lens and context size, at all gold positions, then at each where there are several."""
    for _, group in groupby(cells(run, COLUMNS), lambda cell: (cell.lens, cell.documents)):
        of_size = list(group)
        yield MeasuredCell.of_all_positions(of_size)
        if len(of_size) > 1:
            yield from of_size


def _by_layer(where: tuple, values: Values, owner: np.ndarray, n: int, seed: int) -> Iterator[FrequencyRow]:
    buckets, best = values["argmax_bucket"], values["argmax"]
    is_own = buckets[:, None] == np.arange(len(BUCKETS))[None, :, None]  # [examples, buckets, n_layers + 1]
    differs = np.where(is_own, (best != best[:, -1:])[:, None], np.nan)
    stacked = np.stack([is_own, differs], axis=1).astype(float).reshape(len(best), -1)
    kinds = [SHARE] * stacked.shape[1]
    found = np.empty(stacked.shape[1], object)
    found[:] = mean_estimates(*sums_and_counts(stacked, owner, n), seed, kinds)
    shares, flipped = found.reshape(2, len(BUCKETS), -1)
    for layer in range(best.shape[1]):
        for bucket, name in enumerate(BUCKETS):
            yield FrequencyRow(*where, layer, name, n, shares[bucket, layer], flipped[bucket, layer])


def _depths(
    where: tuple, values: Values, owner: np.ndarray, n: int, seed: int, tops: Sequence[int]
) -> Iterator[PredictionDepth]:
    """Ranks are those of the target: of the model's own prediction where it is the target, at rank 1 always."""
    best, ranks = values["argmax"], values["target_rank"]
    there = [best == best[:, -1:] if top == 1 else ranks < top for top in tops]
    first = np.stack([first_layer(of_top) for of_top in there], axis=1)
    is_prediction = ranks[:, -1] == 0
    first[~is_prediction[:, None] & (np.asarray(tops) != 1)] = np.nan
    is_own = values["argmax_bucket"][:, -1:] == np.arange(len(BUCKETS))  # [examples, buckets], of the prediction
    stacked = np.where(is_own[:, :, None], first[:, None], np.nan).reshape(len(best), -1)
    sums, counts = sums_and_counts(stacked, owner, n)
    estimates = iter(mean_estimates(sums, counts, seed))
    examples, questions = (number.astype(int).tolist() for number in (counts.sum(0), (counts > 0).sum(0)))
    places = ((name, top) for name in BUCKETS for top in tops)
    for place, (name, top) in enumerate(places):
        yield PredictionDepth(*where, name, top, questions[place], examples[place], next(estimates))


def frequency_lines(report: Report) -> list[str]:
    """A line per context size with documents: how many best tokens are among the most frequent ones, and where."""
    lines = []
    own = [row for row in report.frequency if (row.lens, row.gold_position) == (report.lenses[0], EVERY_POSITION)]
    for documents in sorted({row.documents for row in own if row.documents > ORACLE}):
        rows = [row for row in own if (row.documents, row.bucket) == (documents, BUCKETS[0])]
        most = max(rows[1:-1] or rows, key=lambda row: row.share.value)
        lines.append(
            f"Frequent tokens, {condition_name(documents)}, lens {most.lens}: among the {BUCKET_ENDS[0]} most frequent "
            f"are {format_estimate(most.share, 2, interval=True)} of the best tokens of layer {most.layer}, the most "
            f"between embedding and output ({format_estimate(most.flipped, 2, interval=True)} of those are "
            f"not the output's), and {format_estimate(rows[-1].share, 2, interval=True)} at the output; frequency.csv "
            "has all layers."
        )
    return lines


def frequency_curves(report: Report) -> list[dict]:
    """What a page draws of all gold positions together: by lens, context size and bucket a number per layer."""
    curves: dict[tuple, dict] = {}
    for row in report.frequency:
        if row.gold_position is EVERY_POSITION:
            own = {"lens": row.lens, "documents": row.documents, "bucket": row.bucket, "share": [], "flipped": []}
            curve = curves.setdefault((row.lens, row.documents, row.bucket), own)
            curve["share"].append(row.share)
            curve["flipped"].append(row.flipped)
    return list(curves.values())
