"""Rank comparisons against SciPy and numpy: `python benchmarks/ranks.py`.

Every result is checked against the other's first. Then all take turns; medians of process CPU time, one thread.
Two sizes: 1,000 pairs of rows of 1,000 numbers each, and 31 layers with each other over 2,000 questions, whose ranks
come to 0 layer by layer as a lens's do, so that many tie. SciPy's Kendall is called for one triangle of the layers.
stats is scipy.stats; numpy is refinelens's own reference. Set OMP_NUM_THREADS=1, because process CPU time adds up
threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import numpy as np
import scipy
from harness import machine, turns
from scipy import stats

from refinelens import __version__
from refinelens.bench.measure import torch_threads
from refinelens.bench.table import aligned
from refinelens.op.ranks import between_layers, kendall_tau_b, spearman, top_k_overlap, top_k_overlap_numpy
from refinelens.store.trajectory import summarise_numpy, trajectories

ROUNDS = 7
PAIRS, LENGTH = 1000, 1000
N_POINTS, QUESTIONS = 31, 2000
EXAMPLES = 200_000
TOP = 10


@dataclass(frozen=True)
class Contest:
    """One task, done by refinelens and by something else; both return fp64 or integers of one shape."""

    task: str
    other: str
    ours: Callable[[], np.ndarray]
    theirs: Callable[[], np.ndarray]


def lens_ranks(generator: np.random.Generator, examples: int) -> np.ndarray:
    """Ranks ``[examples, N_POINTS]`` that fall from the whole vocabulary of GPT-2 towards 0."""
    exponents = np.linspace(1, 0.1, N_POINTS) * generator.random((examples, N_POINTS))
    return np.floor(50257**exponents - 1).astype(np.int64)


def contests() -> list[Contest]:
    """What is compared."""
    generator = np.random.default_rng(0)
    a, b = generator.random((2, PAIRS, LENGTH))
    ranks = lens_ranks(generator, QUESTIONS)
    many = lens_ranks(generator, EXAMPLES)
    rows, layers = f"{PAIRS} pairs of {LENGTH}", f"{N_POINTS} x {N_POINTS} layers, {QUESTIONS} questions"
    top_k = partial(top_k_overlap, k=TOP)
    every_pair = ranks.T[:, None], ranks.T[None]
    kendall, rho, best = "stats.kendalltau", "stats.spearmanr", f"Top-{TOP}, {layers}"
    return [
        Contest(f"Kendall, {rows}", kendall, partial(kendall_tau_b, a, b), partial(_by_pair, stats.kendalltau, a, b)),
        Contest(f"Kendall, {layers}", kendall, partial(between_layers, ranks), partial(_kendall_layers, ranks)),
        Contest(f"Spearman, {rows}", rho, partial(spearman, a, b), partial(_by_pair, stats.spearmanr, a, b)),
        Contest(f"Spearman, {rows}", "stats.rankdata", partial(spearman, a, b), partial(_spearman_by_rankdata, a, b)),
        Contest(f"Spearman, {layers}", rho, partial(between_layers, ranks, spearman),
                lambda: stats.spearmanr(ranks).statistic),
        Contest(best, "numpy", partial(between_layers, ranks, top_k), partial(top_k_overlap_numpy, *every_pair, TOP)),
        Contest(f"Trajectories, {EXAMPLES} examples", "numpy", partial(_columns, many),
                lambda: np.stack(summarise_numpy(many, 1))),
    ]  # fmt: skip


def _by_pair(correlation: Callable, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.array([correlation(x, y).statistic for x, y in zip(a, b, strict=True)])


def _kendall_layers(ranks: np.ndarray) -> np.ndarray:
    out = np.eye(N_POINTS)
    for i, j in zip(*np.triu_indices(N_POINTS, 1), strict=True):
        out[i, j] = out[j, i] = stats.kendalltau(ranks[:, i], ranks[:, j]).statistic
    return out


def _spearman_by_rankdata(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    x, y = (stats.rankdata(values, axis=-1) - (LENGTH + 1) / 2 for values in (a, b))
    return (x * y).sum(-1) / np.sqrt((x * x).sum(-1) * (y * y).sum(-1))


def _columns(ranks: np.ndarray) -> np.ndarray:
    result = trajectories(ranks, axis=-1)
    return np.stack([result.first_correct, result.settle, result.flips, result.largest_gain])


def largest_difference(contest: Contest) -> float:
    """Of a contest's two results; ends the program where it is above 1e-12."""
    difference = float(np.abs(contest.ours() - contest.theirs()).max())
    if not difference <= 1e-12:
        raise SystemExit(f"{contest.task}: expected {contest.other} within 1e-12, got a difference of {difference}")
    return difference


def main() -> None:
    """Compare, then time, and print both."""
    entered = contests()
    differences = list(map(largest_difference, entered))
    calls = {(i, side): getattr(contest, side) for i, contest in enumerate(entered) for side in ("ours", "theirs")}
    seconds = turns(calls, ROUNDS)
    print(f"{machine()}, refinelens {__version__}, SciPy {scipy.__version__}, numpy {np.__version__}.")
    print(f"Time: process CPU time; medians of {ROUNDS} rounds in which all take turns.\n")
    rows = [["", "refinelens ms", "other ms", "other", "faster", "difference"]]
    for i, (contest, difference) in enumerate(zip(entered, differences, strict=True)):
        ours, theirs = (median(seconds[i, side]) * 1e3 for side in ("ours", "theirs"))
        numbers = (f"{ours:.2f}", f"{theirs:.2f}", contest.other, f"{theirs / ours:.1f} x", f"{difference:.0e}")
        rows.append([contest.task, *numbers])
    print("\n".join(aligned(rows)))


if __name__ == "__main__":
    with torch_threads(1):
        main()
