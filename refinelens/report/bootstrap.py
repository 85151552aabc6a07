"""Estimates with intervals: bootstrap over questions (percentile method, Efron 1979), and Wilson's for shares."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
DRAWN_VALUES = 1 << 20  # held as fp64 at a time


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval; NaN where it does not exist."""

    value: float
    low: float
    high: float


def mean_estimates(sums: np.ndarray, counts: np.ndarray, seed: int) -> list[Estimate]:
    """Means of several statistics over all their values, resampled by question.

    The draws depend on the seed and the number of questions alone, so that cells of one size are drawn alike.

    Args:
        sums: ``[n_questions, n_statistics]``, the sum of a question's values.
        counts: Same shape, how many values the question has; it may have none.
        seed: Seed of the draws.
    """
    means, resampled = resampled_means(sums, counts, seed)
    return [estimate(*column) for column in zip(means, resampled.T, strict=True)]


def resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The means of `mean_estimates`, ``[n_statistics]``, and those of every resample, ``[RESAMPLES, n_statistics]``."""
    blocks = [_ratio(drawn @ sums, drawn @ counts) for drawn in _blocks(len(sums), seed)]
    return _ratio(sums.sum(0), counts.sum(0)), np.concatenate(blocks)


def share_estimate(hits: float, n: float) -> Estimate:
    """A share of independent questions with the interval of Wilson (1927), which is not empty at 0 and 1 either."""
    if n == 0:
        return Estimate(np.nan, np.nan, np.nan)
    share = hits / n
    centre, half = share + Z**2 / (2 * n), Z * np.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Estimate(float(share), float(low) if hits else 0.0, float(high) if hits < n else 1.0)


def median_estimate(histogram: np.ndarray, seed: int) -> Estimate:
    """Median of small integers, resampled by question.

    Args:
        histogram: ``[n_questions, n_values]``, how often a question has the value ``0 .. n_values - 1``.
        seed: Seed of the draws, the same as those of `mean_estimates`.
    """
    resampled = [_medians(drawn @ histogram) for drawn in _blocks(len(histogram), seed)]
    return estimate(_medians(histogram.sum(0, dtype=float)[None])[0], np.concatenate(resampled))


@lru_cache(maxsize=2)
def _draws(n_questions: int, seed: int) -> np.ndarray:
    """``[RESAMPLES, n_questions]``: how often each resample has each question."""
    generator = np.random.default_rng(seed)
    draws = np.empty((RESAMPLES, n_questions), dtype=np.uint16)
    for row in draws:
        row[:] = np.bincount(generator.integers(0, n_questions, n_questions), minlength=n_questions)
    return draws


def _blocks(n_questions: int, seed: int):
    draws, step = _draws(n_questions, seed), max(1, DRAWN_VALUES // n_questions)
    for start in range(0, RESAMPLES, step):
        yield draws[start : start + step].astype(float)


def _ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)


def _medians(histograms: np.ndarray) -> np.ndarray:
    """Median of each row's values, NaN where it has none."""
    cumulated = histograms.cumsum(axis=1)
    total = cumulated[:, -1:]
    lower = (cumulated <= np.floor((total - 1) / 2)).sum(axis=1)
    upper = (cumulated <= np.floor(total / 2)).sum(axis=1)
    return np.where(total[:, 0] > 0, (lower + upper) / 2, np.nan)


def estimate(value: float, resampled: np.ndarray) -> Estimate:
    """A statistic with the interval of its values in the resamples; those in which it does not exist are left out."""
    resampled = resampled[~np.isnan(resampled)]
    if np.isnan(value):
        return Estimate(np.nan, np.nan, np.nan)
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))
