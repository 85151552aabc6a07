"""Which of two answers wins where the documents of a context disagree: by order, distance and layer.

Both answers are ranked at the token before the first answer token, from one product with the unembedding. The gold
answer is ahead of the decoys' at a layer where its rank is the lower one. A lead is decided at the lowest layer from
which the answer that is ahead at the output stays ahead. Leads among ranks that nobody would read are noise: changes
are counted from the first layer on at which either answer is correct, that is of rank 1 to k.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from ..placement import NO_POSITION
from ..stats import MEAN, SHARE, SHARE_CHANGE, groups, mean_estimates, ratio, sums_and_counts
from ..store.results import Run
from ..store.trajectory import NONE, choose_tokens, list_matrix, trajectories
from .further_rows import EITHER, CueDifference, CueLayer, CueRow
from .rows import lens_names

GOLD_FIRST, DECOY_FIRST, NO_DECOY = "gold first", "decoy first", "no decoy"
ORDERS = (GOLD_FIRST, DECOY_FIRST, NO_DECOY)
KEYS = ("question_id", "documents", "gold_position", "decoy_position")
Cell = dict[str, np.ndarray]  # of one lens and context size; [examples] or [examples, n_layers + 1]


def cue_rows(run: Run, tops: tuple[int, ...]) -> tuple[list[CueRow], list[CueLayer], list[CueDifference]]:
    """What came of the contexts with decoys, and of those of the same run without; nothing of a run without decoys.

    Args:
        run: The run.
        tops: Correct means rank 1 to k, for each of these.

    Returns:
        Rows by lens, threshold, context size, order and distance; by layer; and differences between the orders.
    """
    rows: list[CueRow] = []
    layers: list[CueLayer] = []
    differences: list[CueDifference] = []
    if not run.n_decoys:
        return rows, layers, differences
    seed = run.manifest["seed"]
    for lens, documents, cell in _cells(run):
        for top in tops:
            values = _values(cell, top)
            for order, distance, inside in _conditions(cell):
                found = _estimates(values, cell["question_id"], inside, seed)
                counts = (len(np.unique(cell["question_id"][inside])), int(inside.sum()))
                rows.append(CueRow(lens, top, documents, order, distance, *counts, **found))
            differences += _differences(values, cell, seed, (lens, top, documents))
        for order, distance, inside in _conditions(cell):
            if distance is None:
                layers += _layers(cell, inside, seed, (lens, documents, order))
    return rows, layers, differences


def _cells(run: Run) -> Iterator[tuple[str, int, Cell]]:
    """Of every lens and context size the examples, with ranks and log-probabilities of both answers by layer."""
    arguments, lenses = run.manifest["arguments"], lens_names(run.manifest)
    lists = ("target_rank", "decoy_rank", "target_logprob", "decoy_logprob")
    parts = [choose_tokens(part, "first") for part in run.parts(["lens", "answer_token", *KEYS, *lists])]
    table = pa.concat_tables(parts)
    lens = np.asarray([lenses.index(name) for name in table["lens"].to_pylist()])
    columns = {name: list_matrix(table[name]) for name in lists} | {name: table[name].to_numpy() for name in KEYS}
    gold, decoy = columns["gold_position"], columns["decoy_position"]
    # Documents from the last one of the earlier kind to the first one of the later; 1 of neighbours.
    apart = np.where(gold < decoy, decoy - gold - (arguments.get("golds", 1) - 1), gold - decoy - (run.n_decoys - 1))
    order = np.where(decoy == NO_POSITION, 2, np.where(gold < decoy, 0, 1))
    columns |= {"order": order, "distance": apart}
    for which, documents, inside in groups(lens, columns["documents"]):
        yield lenses[which], documents, {name: column[inside] for name, column in columns.items()}


def _conditions(cell: Cell) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """Orders with all their distances and each, and all examples with decoys together: bool ``[examples]`` of each."""
    with_decoy = cell["order"] != ORDERS.index(NO_DECOY)
    if with_decoy.any():
        yield EITHER, None, with_decoy
    for order, inside in groups(cell["order"]):
        yield ORDERS[order], None, inside
        if ORDERS[order] != NO_DECOY:
            for distance, same in groups(cell["distance"]):
                if (inside & same).any():
                    yield ORDERS[order], distance, inside & same


def _values(cell: Cell, top: int) -> dict[str, tuple[str, np.ndarray]]:
    """Kind and values ``[examples]`` of the estimates of a `CueRow`, NaN where an example has none."""
    gold, decoy = (trajectories(cell[name], top, axis=-1) for name in ("target_rank", "decoy_rank"))
    ahead = cell["target_rank"] < cell["decoy_rank"]  # [examples, n_layers + 1]
    same = ahead == ahead[:, -1:]
    seen = np.minimum(cell["target_rank"], cell["decoy_rank"]) < top
    after = np.logical_or.accumulate(seen, axis=1)
    changes = ((ahead[:, 1:] != ahead[:, :-1]) & after[:, :-1]).sum(1)
    loser = np.where(ahead[:, -1], decoy.first_correct, gold.first_correct)
    return {
        "gold_ahead": (SHARE, ahead[:, -1]),
        "gold_correct": (SHARE, ~gold.censored),
        "decoy_correct": (SHARE, ~decoy.censored),
        "mean_decided": (MEAN, trajectories((~same).astype(int), 1, axis=-1).settle),
        "share_switched": (SHARE, np.where(after[:, -1], changes > 0, np.nan)),
        "share_loser_seen": (SHARE, loser != NONE),
        **_depths("gold", gold),
        **_depths("decoy", decoy),
    }


def _depths(name: str, found) -> dict[str, tuple[str, np.ndarray]]:
    """Of the examples in which this answer is correct at the output."""
    columns = {"first_correct": found.first_correct, "settle": found.settle, "depth": found.depth}
    return {f"{name}_{of}": (MEAN, np.where(found.censored, np.nan, values)) for of, values in columns.items()}


def _estimates(values: dict[str, tuple[str, np.ndarray]], question: np.ndarray, inside: np.ndarray, seed: int) -> dict:
    ids, owner = np.unique(question[inside], return_inverse=True)
    stacked = np.stack([value[inside].astype(float) for _, value in values.values()], axis=1)
    found = mean_estimates(*sums_and_counts(stacked, owner, len(ids)), seed, [kind for kind, _ in values.values()])
    return dict(zip(values, found, strict=True))


def _layers(cell: Cell, inside: np.ndarray, seed: int, key: tuple[str, int, str]) -> list[CueLayer]:
    own = {name: cell[name][inside] for name in ("target_rank", "decoy_rank", "target_logprob", "decoy_logprob")}
    values = {
        "gold_ahead": own["target_rank"] < own["decoy_rank"],
        "gold_best": own["target_rank"] == 0,
        "decoy_best": own["decoy_rank"] == 0,
        "lead": own["target_logprob"].astype(float) - own["decoy_logprob"],
    }
    ids, owner = np.unique(cell["question_id"][inside], return_inverse=True)
    n_layers = own["target_rank"].shape[1]
    stacked = np.concatenate([value.astype(float) for value in values.values()], axis=1)
    kinds = [kind for kind in (SHARE, SHARE, SHARE, MEAN) for _ in range(n_layers)]
    found = mean_estimates(*sums_and_counts(stacked, owner, len(ids)), seed, kinds)
    return [
        CueLayer(*key, layer, len(ids), *(found[place * n_layers + layer] for place in range(len(values))))
        for layer in range(n_layers)
    ]


def _differences(
    values: dict[str, tuple[str, np.ndarray]], cell: Cell, seed: int, key: tuple[str, int, int]
) -> list[CueDifference]:
    """With the decoy first less with the gold document first, of the questions that have both."""
    ids, owner = np.unique(cell["question_id"], return_inverse=True)
    names = ("gold_ahead", "gold_correct", "decoy_correct", "mean_decided", "gold_depth")
    stacked = np.stack([values[name][1].astype(float) for name in names], axis=1)
    means = []
    for order in (DECOY_FIRST, GOLD_FIRST):
        inside = (cell["order"] == ORDERS.index(order))[:, None]
        means.append(ratio(*sums_and_counts(np.where(inside, stacked, np.nan), owner, len(ids))))
    found = means[0] - means[1]  # [questions, statistics]
    both = ~np.isnan(found)
    if not both[:, 0].any():
        return []
    kinds = [SHARE_CHANGE if np.isin(found[both[:, i], i], (-1, 0, 1)).all() else MEAN for i in range(3)] + [MEAN] * 2
    estimates = mean_estimates(np.where(both, found, 0.0), both.astype(float), seed, kinds)
    return [CueDifference(*key, int(both[:, 0].sum()), *estimates)]
