"""Shares of questions, and their differences, with intervals that are not empty where all questions say the same."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np

from .bootstrap import LEVEL, Estimate

Z = NormalDist().inv_cdf((1 + LEVEL) / 2)
NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan)


def share_estimate(hits: float, n: float) -> Estimate:
    """A share of independent questions with the interval of Wilson (1927)."""
    if n == 0:
        return NO_ESTIMATE
    share = hits / n
    centre, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low, high = ((centre + side * half) / (1 + Z**2 / n) for side in (-1, 1))
    return Estimate(share, low if hits else 0.0, high if hits < n else 1.0)


def paired_estimate(differences: np.ndarray) -> Estimate:
    """`share_difference` of the differences of every question, -1, 0 or 1, NaN where one share does not have it."""
    gained, lost, asked = (differences == 1).sum(), (differences == -1).sum(), (~np.isnan(differences)).sum()
    return share_difference(int(gained), int(lost), int(asked))


def share_difference(gained: int, lost: int, n: int) -> Estimate:
    """A share of questions less another of the same questions, with the interval of Bonett and Price (2012).

    An adjusted Wald interval for paired proportions (J. Educ. Behav. Stat. 37:479), cut off at -1 and 1.

    Args:
        gained: Questions that count for the first share alone.
        lost: For the second share alone.
        n: All questions, also those that count for both or neither.
    """
    if n == 0:
        return NO_ESTIMATE
    more, less = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    centre, half = more - less, Z * math.sqrt((more + less - (more - less) ** 2) / (n + 2))
    return Estimate((gained - lost) / n, max(-1.0, centre - half), min(1.0, centre + half))
