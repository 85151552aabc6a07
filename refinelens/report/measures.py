"""What a sweep measured of every layer beside ranks, by lens, context size and gold position.

Settling by divergence follows Chen et al. 2026 (arXiv 2602.13517): the lowest layer from which the Jensen-Shannon
divergence from the output stays at `SETTLED` or below; a token settles late where that layer lies in the last
``1 - LATE`` of the layers, and the share of such tokens is its deep-thinking ratio. Only the abstract was at hand: both
numbers, and that a layer counts from which the divergence *stays* low, are our choice.
"""

from __future__ import annotations

import math

import numpy as np

from ..config import JSD
from ..stats import MEAN, SHARE, groups, mean_estimates, sums_and_counts
from ..store.results import Run
from ..store.trajectory import choose_tokens, list_matrix, trajectories
from .rows import MeasuredLayer, SettlingRow, lens_names

SETTLED = 0.5 * math.log(2.0)  # nats: half of the largest divergence
LATE = 0.85  # of the layers
ALWAYS = ("entropy", "kl")  # of every layer, in every run
KEYS = ("lens", "documents", "gold_position")


def measured_layers(run: Run) -> list[MeasuredLayer]:
    """Means over questions of every measure of every layer, with intervals; of the answer tokens of the tables."""
    names, rows = (*ALWAYS, *run.measures), []
    for key, ids, values in _cells(run, names):
        owner = np.unique(ids, return_inverse=True)[1]
        stacked = np.concatenate([values[name] for name in names], axis=1)  # [examples, measures x layers]
        found = mean_estimates(*sums_and_counts(stacked, owner, owner.max() + 1), run.manifest["seed"])
        n_layers = values[names[0]].shape[1]
        for layer in range(n_layers):
            own = {name: found[place * n_layers + layer] for place, name in enumerate(names)}
            rows.append(MeasuredLayer(*key, layer, int(owner.max()) + 1, **own))
    return rows


def settling_rows(run: Run) -> list[SettlingRow]:
    """Where predictions settle by divergence; none of a run without ``jsd``."""
    rows = []
    for key, ids, values in _cells(run, (JSD,) if JSD in run.measures else ()):
        n_layers = values[JSD].shape[1] - 1
        settle = trajectories((values[JSD] > SETTLED).astype(int), 1, axis=-1).settle
        owner = np.unique(ids, return_inverse=True)[1]
        stacked = np.stack([settle, settle > LATE * n_layers], axis=1).astype(float)
        sums = sums_and_counts(stacked, owner, owner.max() + 1)
        mean, late = mean_estimates(*sums, run.manifest["seed"], [MEAN, SHARE])
        rows.append(SettlingRow(*key, int(owner.max()) + 1, mean, late))
    return rows


def _cells(run: Run, names: tuple[str, ...]):
    """Of every lens, context size and gold position: key, question ids, and measures ``[examples, n_layers + 1]``."""
    if not names:
        return
    order = list(lens_names(run.manifest))
    ids: dict[tuple, list[np.ndarray]] = {}
    values: dict[tuple, list[dict[str, np.ndarray]]] = {}
    for part in run.parts([*KEYS, "question_id", "answer_token", *names]):
        part = choose_tokens(part, run.manifest["arguments"]["answer_tokens"])
        if not len(part):
            continue
        lens = np.asarray([order.index(name) for name in part["lens"].to_pylist()])
        matrices = {name: list_matrix(part[name]) for name in names}
        places = part["documents"].to_numpy(), part["gold_position"].to_numpy()
        for *where, inside in groups(lens, *places):
            key = tuple(where)
            ids.setdefault(key, []).append(part["question_id"].to_numpy()[inside])
            values.setdefault(key, []).append({name: matrix[inside] for name, matrix in matrices.items()})
    for key in sorted(ids):
        whole = {name: np.concatenate([one[name] for one in values[key]]) for name in names}
        yield (order[key[0]], *key[1:]), np.concatenate(ids[key]), whole
