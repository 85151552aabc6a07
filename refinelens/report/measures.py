"""What a sweep measured of every layer beside ranks, by lens, context size and gold position.

Settling by divergence is that of Chen et al. 2026 (arXiv 2602.13517), see `store.trajectory.settle_by_divergence`; the
share of tokens that settle in the last layers is the deep-thinking ratio, of answer tokens and of generated ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from ..config import GENERATED_SETTLE, JSD, SUBLAYERS, TOP5
from ..stats import MEAN, SHARE, groups, mean_estimates, sums_and_counts
from ..store.results import Run
from ..store.trajectory import choose_tokens, is_deep, list_matrix, settle_by_divergence
from .effective_depth import effective_depths
from .further_rows import EffectiveDepth, MeasuredCell, MeasuredLayer, SettlingRow, measured_layer
from .rows import lens_names

ALWAYS = ("entropy", "kl")  # of every layer, in every run
KEYS = ("lens", "documents", "gold_position")


def measured_rows(run: Run) -> tuple[list[MeasuredLayer], list[SettlingRow], list[EffectiveDepth]]:
    """What was measured, over the answer tokens of the tables; nothing of a run that was asked for no measures.

    Returns:
        Means of every measure of every layer over questions, with intervals; where predictions settle by divergence,
        none without ``jsd``; and effective depth, none without ``top5`` or ``sublayers``.
    """
    if not run.has_measures:
        return [], [], []
    names, seed = (*ALWAYS, *run.measures), run.manifest["seed"]
    written = _ratios_of_generated(run)
    layers: list[MeasuredLayer] = []
    settling: list[SettlingRow] = []
    every = list(cells(run, names))
    for cell in every:
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
            settle = settle_by_divergence(values[JSD])
            stacked = np.stack([settle, is_deep(settle, n_layers - 1)], axis=1).astype(float)
            found = mean_estimates(*sums_and_counts(stacked, owner, n), seed, [MEAN, SHARE])
            found += mean_estimates(*written[key], seed) if key in written else []
            settling.append(SettlingRow(*key, n, *found))
    wanted = {TOP5, SUBLAYERS}.intersection(run.extras)
    return layers, settling, effective_depths(every, seed) if wanted else []


def _ratios_of_generated(run: Run) -> dict[tuple, tuple[np.ndarray, np.ndarray]]:
    """Deep-thinking ratios of generated texts by lens, context size and gold position: sums and counts of questions.

    Each text counts once, as in the paper, however many tokens it or its answer has.
    """
    if GENERATED_SETTLE not in run.extras:
        return {}
    n_layers, found = run.manifest["model"]["n_layers"], dict[tuple, list[tuple[int, float]]]()
    for part in run.parts([*KEYS, "question_id", "answer_token", GENERATED_SETTLE]):
        part = choose_tokens(part, "first")
        keys = zip(*(part[name].to_pylist() for name in KEYS), strict=True)
        for key, id, settle in zip(keys, part["question_id"].to_pylist(), part[GENERATED_SETTLE], strict=True):
            found.setdefault(key, []).append((id, float(is_deep(settle.values.to_numpy(), n_layers).mean())))
    return {key: _sums_of_questions(*np.asarray(of).T) for key, of in found.items()}


def _sums_of_questions(ids: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of a statistic, ``[questions, 1]``."""
    owner = np.unique(ids, return_inverse=True)[1]
    return sums_and_counts(values[:, None], owner, int(owner.max()) + 1)


def cells(run: Run, names: tuple[str, ...]) -> Iterator[MeasuredCell]:
    """Lists over layers of a run's answer tokens, by lens, context size and gold position."""
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
