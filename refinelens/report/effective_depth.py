"""Effective depth: up to which layer a model works on its prediction, told from mean curves over layers.

The definitions are those of the code of Hu et al. 2025 (arXiv 2512.14064), who follow Csordas et al. 2025 (arXiv
2505.13898); the ratio is the layer's share of ``n_layers``.

- ``cosine``: the last layer whose block still takes away, on average, from the direction of the stream, where the next
  one adds to it: the mean of the three cosines (attention, feed-forward part, whole block) is below 0 there and 0 or
  above at the next.
- ``kl``: the first layer whose KL(final || layer) is below `KL_SHARE` of the largest of any layer.
- ``top5``: the first layer of whose five likeliest tokens a larger share than `OVERLAP` is among the output's.

Both thresholds are those of their table (the defaults of their functions are 0.1 and 0.2). At the output KL is 0 and
the overlap 1, so that these two methods always have a layer, which is ``n_layers`` where none before will do; their
code leaves out the last layers and gives a ratio of 0 there. Three more things differ: their KL is KL(layer || final);
the stream that they read for an index is that before its block, so that the ratio of a state by KL or overlap,
(index + 1) / blocks, is larger by ``1 / n_layers`` than here; and they read every token of a text, where a sweep reads
those before an answer. By cosine the index is that of the block, and their ratio is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import numpy as np

from ..config import TOP5
from ..placement import condition_name
from ..stats import Estimate, estimate, resampled_means, sums_and_counts
from ..store.trajectory import first_layer
from .further_rows import EffectiveDepth, MeasuredCell
from .rows import EVERY_POSITION, Report, format_estimate

KL_SHARE = 0.5  # of the largest KL
OVERLAP = 0.3
ROUNDING = 1e-6  # of means of shares in fp32
COSINES = ("attn_cosine", "mlp_cosine", "block_cosine")


def cosine_layers(curves: np.ndarray) -> np.ndarray:
    """Effective depth by cosine of curves ``[n, n_layers + 1]``, whose layer 0 is not looked at; NaN where none is."""
    turns = (curves[:, 1:-1] < 0) & (curves[:, 2:] >= 0)
    last = (turns * np.arange(1, 1 + turns.shape[1])).max(1, initial=0)
    return np.where(last > 0, last, np.nan)


def kl_layers(curves: np.ndarray) -> np.ndarray:
    """Effective depth by KL of curves ``[n, n_layers + 1]``, nats; NaN where the divergence is 0 everywhere."""
    return first_layer(curves < KL_SHARE * curves.max(1, keepdims=True))


def overlap_layers(curves: np.ndarray) -> np.ndarray:
    """Effective depth by the overlap of the likeliest tokens, curves ``[n, n_layers + 1]`` of shares."""
    return first_layer(curves > OVERLAP + ROUNDING)


METHODS: dict[str, tuple[tuple[str, ...], Callable[[np.ndarray], np.ndarray]]] = {
    "cosine": (COSINES, cosine_layers),  # of the mean of these measures
    "kl": (("kl",), kl_layers),
    TOP5: ((TOP5,), overlap_layers),
}


def effective_depths(cells: list[MeasuredCell], seed: int) -> list[EffectiveDepth]:
    """By every method whose measures are there: all gold positions of a context size together, then each.

    Args:
        cells: By lens, context size and gold position; those of one size stand together.
        seed: Seed of the bootstrap, which takes the mean curve of every resample of the questions.
    """
    rows = []
    for _, group in groupby(cells, lambda cell: (cell.lens, cell.documents)):
        own = list(group)
        for cell in (MeasuredCell.of_all_positions(own), *own):
            for method, (names, layers) in METHODS.items():
                if cell.values.keys() >= set(names):
                    curves = np.mean([cell.values[name] for name in names], axis=0, dtype=float)
                    rows.append(_row(cell, method, curves, layers, seed))
    return rows


def _row(cell: MeasuredCell, method: str, curves: np.ndarray, layers: Callable, seed: int) -> EffectiveDepth:
    ids, owner = np.unique(cell.question_id, return_inverse=True)
    found = layers(resampled_means(*sums_and_counts(curves, owner, len(ids)), seed))
    exists = not np.isnan(found[1:]).all()
    layer = estimate(found[0], found[1:], len(ids) if exists else 0)
    ratio = Estimate(*(value / (curves.shape[1] - 1) for value in vars(layer).values()))
    return EffectiveDepth(cell.lens, cell.documents, cell.gold_position, method, len(ids), layer, ratio)


def _words(row: EffectiveDepth) -> str:
    if np.isnan(row.layer.value):
        return f"{row.method} none"
    return f"{row.method} {format_estimate(row.layer, 1, interval=True)} ({format_estimate(row.ratio, 2)})"


def effective_depth_lines(report: Report) -> list[str]:
    """A line per lens, over all gold positions of every context size."""
    rows = [row for row in report.effective if row.gold_position is EVERY_POSITION]
    n_layers, lines = report.manifest["model"]["n_layers"], []
    for lens, own in groupby(rows, lambda row: row.lens):
        sizes = []
        for documents, methods in groupby(own, lambda row: row.documents):
            sizes.append(f"{condition_name(documents)} {', '.join(map(_words, methods))}")
        lines.append(
            f"Effective depth, lens {lens}, layer of {n_layers} (share): {'; '.join(sizes)}; by gold position in "
            "effective_depth.csv."
        )
    return lines
