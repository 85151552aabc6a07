"""What a sweep measured of every layer beside ranks, by lens, context size and gold position.

Settling by divergence follows Chen et al. 2026 (arXiv 2602.13517): the lowest layer from which the Jensen-Shannon
divergence from the output stays at `SETTLED` or below; a token settles late where that layer lies in the last
``1 - LATE`` of the layers, and the share of such tokens is its deep-thinking ratio. Only the abstract was at hand: both
numbers, and that a layer counts from which the divergence *stays* low, are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from ..config import JSD, SUBLAYERS, TOP5
from ..stats import MEAN, SHARE, groups, mean_estimates, sums_and_counts
from ..store.results import Run
from ..store.trajectory import choose_tokens, list_matrix, trajectories
from .effective_depth import effective_depths
from .rows import EffectiveDepth, MeasuredCell, MeasuredLayer, SettlingRow, lens_names, measured_layer

SETTLED = 0.5 * math.log(2.0)  # nats: half of the largest divergence
LATE = 0.85  # of the layers
ALWAYS = ("entropy", "kl")  # of every layer, in every run
KEYS = ("lens", "documents", "gold_position")


def measured_rows(run: Run) -> tuple[list[MeasuredLayer], list[SettlingRow], list[EffectiveDepth]]:
    """What was measured, over the answer tokens of the tables; nothing of a run that was asked for no measures.

    Returns:
        Means of every measure of every layer over questions, with intervals; where predictions settle by divergence,
        none without ``jsd``; and effective depth, none without ``top5`` or ``sublayers``.
    """
    if not run.measures:
        return [], [], []
    names, seed = (*ALWAYS, *run.measures), run.manifest["seed"]
    layers: list[MeasuredLayer] = []
    settling: list[SettlingRow] = []
    cells = list(_cells(run, names))
    for cell in cells:
        key, ids, values = (cell.lens, cell.documents, cell.gold_position), cell.question_id, cell.values
        n_layers = values[names[0]].shape[1]
        owner = np.unique(ids, return_inverse=True)[1]
        n = int(owner.max()) + 1  # questions
        stacked = np.concatenate([values[name] for name in names], axis=1)  # [examples, measures x layers]
        found = mean_estimates(*sums_and_counts(stacked, owner, n), seed)
        for layer in range(n_layers):
            own = {name: found[place * n_layers + layer] for place, name in enumerate(names)}
            layers.append(measured_layer(run.measures)(*key, layer, n, **own))
        if JSD in values:
            settle = trajectories((values[JSD] > SETTLED).astype(int), 1, axis=-1).settle
            stacked = np.stack([settle, settle > LATE * (n_layers - 1)], axis=1).astype(float)
            found = mean_estimates(*sums_and_counts(stacked, owner, n), seed, [MEAN, SHARE])
            settling.append(SettlingRow(*key, n, *found))
    wanted = {TOP5, SUBLAYERS}.intersection(run.extras)
    return layers, settling, effective_depths(cells, seed) if wanted else []


def _cells(run: Run, names: tuple[str, ...]) -> Iterator[MeasuredCell]:
    """The measures of a run, by lens, context size and gold position."""
    lenses = lens_names(run.manifest)
    ids: dict[tuple, list[np.ndarray]] = {}
    values: dict[tuple, list[dict[str, np.ndarray]]] = {}
    for part in run.parts([*KEYS, "question_id", "answer_token", *names]):
        part = choose_tokens(part, run.manifest["arguments"]["answer_tokens"])
        for key, inside, own in cells_of(part, lenses, names):
            ids.setdefault(key, []).append(part["question_id"].to_numpy()[inside])
            values.setdefault(key, []).append(own)
    for key in sorted(ids):
        whole = {name: np.concatenate([one[name] for one in values[key]]) for name in names}
        yield MeasuredCell(lenses[key[0]], *key[1:], np.concatenate(ids[key]), whole)


def cells_of(
    part: pa.Table, lenses: Sequence[str], names: Sequence[str]
) -> Iterator[tuple[tuple, np.ndarray, dict[str, np.ndarray]]]:
    """Predictions by lens (its place among ``lenses``), context size and gold position, ascending.

    Yields the three, bool ``[rows]`` which of the part they are, and lists by name, ``[examples, n_layers + 1]``.
    """
    if not len(part):
        return
    matrices = {name: list_matrix(part[name]) for name in names}
    lens = np.asarray([lenses.index(name) for name in part["lens"].to_pylist()])
    for *where, inside in groups(lens, part["documents"].to_numpy(), part["gold_position"].to_numpy()):
        yield tuple(where), inside, {name: matrix[inside] for name, matrix in matrices.items()}
