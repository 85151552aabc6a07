"""What each lens sees at each layer, over all examples of a run: rank of the target and KL(final || layer)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from ..conditions import CLOSED_BOOK
from ..runs.results import Run
from ..runs.trajectory_table import choose_tokens, list_matrix


@dataclass(frozen=True)
class LayerProfile:
    """One lens; arrays over layers ``0 .. n_layers``."""

    lens: str
    examples: int
    rank_quartiles: np.ndarray  # [3, n_layers + 1], 0-based ranks: lower quartile, median, upper quartile
    mean_kl: np.ndarray  # [n_layers + 1] nats

    def __post_init__(self):
        if self.rank_quartiles.shape != (3, *self.mean_kl.shape):
            raise ValueError(
                f"rank_quartiles: expected shape [3, {len(self.mean_kl)}], got {list(self.rank_quartiles.shape)}"
            )


def layer_profiles(
    run: Run, lenses: tuple[str, ...], answer_tokens: str, closed_book: bool = False
) -> list[LayerProfile]:
    """Profiles of the lenses in their order, read part by part; only the ranks of a run are held whole.

    Args:
        run: The run.
        lenses: Names of the lenses.
        answer_tokens: ``first`` or ``all``.
        closed_book: Read the examples without documents, which otherwise are left out.
    """
    ranks: dict[str, list[np.ndarray]] = {lens: [] for lens in lenses}
    kl: dict[str, list[np.ndarray]] = {lens: [] for lens in lenses}
    for part in run.parts(["documents", "lens", "answer_token", "target_rank", "kl"]):
        part = choose_tokens(part, answer_tokens)
        part = part.filter(pc.equal(pc.equal(part["documents"], CLOSED_BOOK), closed_book))
        names = part["lens"].to_numpy(zero_copy_only=False)
        rank, divergence = list_matrix(part["target_rank"]), list_matrix(part["kl"])
        for lens in set(names.tolist()) & ranks.keys():
            ranks[lens].append(rank[names == lens])
            kl[lens].append(divergence[names == lens].sum(axis=0, dtype=float))
    return [_profile(lens, np.concatenate(ranks[lens]), sum(kl[lens])) for lens in lenses if ranks[lens]]


def _profile(lens: str, ranks: np.ndarray, kl: np.ndarray) -> LayerProfile:
    return LayerProfile(lens, len(ranks), np.quantile(ranks, [0.25, 0.5, 0.75], axis=0), kl / len(ranks))
