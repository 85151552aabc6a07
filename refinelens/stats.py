"""Every interval, test and simultaneous bound: numbers over questions, on arrays alone.

The bootstrap resamples questions and takes expanded percentiles (Hesterberg 2015, arXiv 1411.5279). Intervals of shares
are not empty where all questions say the same. What is estimated, and why so, stands in docs/definitions.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

RESAMPLES = 2000
LEVEL = 0.95
FEW_QUESTIONS = 5  # fewer have no interval: even the range of 4 values misses the true median once in 8 times
DRAWN_VALUES = 1 << 20  # held as fp64 at a time
EXACT_QUESTIONS = 16  # with a difference other than 0; up to here all 2**n sign patterns are counted
SIGN_RESAMPLES = 9999  # beyond
EQUAL = 1e-9  # as a share: differences of means that are the same but for rounding
MEAN, SHARE, SHARE_CHANGE = "mean", "share", "share_change"  # kinds of statistics, see `mean_estimates`
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)


@dataclass(frozen=True)
class Estimate:
    """A statistic with its interval; NaN where it does not exist."""

    value: float
    low: float
    high: float


NO_ESTIMATE = Estimate(math.nan, math.nan, math.nan)


def mean_estimates(
    sums: np.ndarray, counts: np.ndarray, seed: int, kinds: Sequence[str] | None = None
) -> list[Estimate]:
    """Means of several statistics over all their values, resampled by question.

    A share of questions with one value each, and a difference of two such shares, have the intervals of
    `share_estimate` and `paired_estimate` instead.

    Args:
        sums: ``[n_questions, n_statistics]``, the sum of a question's values.
        counts: Same shape, how many values the question has; it may have none.
        seed: Seed of the draws.
        kinds: Of every statistic `MEAN`, `SHARE` (values 0 and 1) or `SHARE_CHANGE` (-1, 0 and 1); None: all means.
    """
    means, questions = resampled_means(sums, counts, seed), (counts > 0).sum(0).tolist()
    found = [estimate(own[0], own[1:], n) for own, n in zip(means.T, questions, strict=True)]
    for i, kind in enumerate(kinds or ()):
        if kind != MEAN and counts[:, i].max() <= 1:
            of_share = kind == SHARE
            values = np.where(counts[:, i] > 0, sums[:, i], np.nan)
            found[i] = share_estimate(int(sums[:, i].sum()), questions[i]) if of_share else paired_estimate(values)
    return found


def resampled_means(sums: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """The means of `mean_estimates` and under them those of every resample, ``[1 + RESAMPLES, n_statistics]``.

    The draws depend on the seed and the number of questions alone, so that cells of one size are drawn alike.
    """
    drawn_means = [ratio(drawn @ sums, drawn @ counts) for drawn in _blocks(len(sums), seed)]
    return np.concatenate([ratio(sums.sum(0), counts.sum(0))[None], *drawn_means])


def median_estimate(histogram: np.ndarray, seed: int) -> Estimate:
    """Median of small integers, resampled by question.

    Args:
        histogram: ``[n_questions, n_values]``, how often a question has the value ``0 .. n_values - 1``.
        seed: Seed of the draws, the same as those of `mean_estimates`.
    """
    resampled = [_medians(drawn @ histogram) for drawn in _blocks(len(histogram), seed)]
    value = _medians(histogram.sum(0, dtype=float)[None])[0]
    return estimate(value, np.concatenate(resampled), int(histogram.any(1).sum()))


def estimate(value: float, resampled: np.ndarray, questions: int) -> Estimate:
    """A statistic with the interval of its values in the resamples; those in which it does not exist are left out.

    Args:
        value: The statistic.
        resampled: ``[RESAMPLES]``.
        questions: That have it; fewer than `FEW_QUESTIONS` have no interval.
    """
    if np.isnan(value) or questions < FEW_QUESTIONS:
        return Estimate(float(value), math.nan, math.nan)
    tail = _tail(questions)
    low, high = np.quantile(resampled[~np.isnan(resampled)], [tail, 1 - tail])
    return Estimate(float(value), float(low), float(high))


def correlation_estimate(
    a: np.ndarray, b: np.ndarray, compare: Callable[[np.ndarray, np.ndarray], np.ndarray], questions: int
) -> Estimate:
    """Correlation of two rows of means, with the interval of its resamples reflected at the value (basic bootstrap).

    The noise of the means moves a correlation towards 0, and that of resampled means, which have it twice, further:
    what the resamples are off, the value is off too, to the other side of the truth. The interval holds the value in
    any case, and ends at -1 and 1.

    Args:
        a: ``[1 + RESAMPLES, n]``, as `resampled_means` gives them.
        b: Same shape.
        compare: A correlation of every row of one with that of the other.
        questions: That were resampled.
    """
    values = compare(a, b)
    found = estimate(values[0], values[1:], questions)
    low, high = np.clip([2 * found.value - found.high, 2 * found.value - found.low], -1.0, 1.0)
    return Estimate(found.value, float(np.minimum(low, found.value)), float(np.maximum(high, found.value)))


def lower_bounds(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Bounds below the means of several statistics, ``[n_statistics]``, that hold for all of them at once.

    With a probability of `LEVEL`: one-sided t bounds at a Bonferroni level, with the standard error of a mean over
    questions with different numbers of values (Cochran 1977, Sampling Techniques, 6.4).

    Args:
        sums: ``[n_questions, n_statistics]``, the sum of a question's values; 2 questions or more have some.
        counts: Same shape, how many values the question has; a statistic without any has NaN for a bound.
    """
    means, questions = ratio(sums.sum(0), counts.sum(0)), (counts > 0).sum(0)
    squares = ((sums - means * counts) ** 2).sum(0) * questions / (questions - 1)
    errors = ratio(np.sqrt(squares), counts.sum(0))
    return means - t_quantile((1 - LEVEL) / (questions > 0).sum(), questions) * errors


def t_quantile(tail: float, questions: np.ndarray | int) -> np.ndarray:
    """What Student's t of the mean of so many questions, 2 or more, exceeds with probability ``tail``."""
    from scipy.special import stdtrit  # half a second to import

    return -stdtrit(np.asarray(questions) - 1, tail)


def groups(*columns: np.ndarray) -> Iterator[tuple]:
    """Every combination of values of some columns, ascending, and bool ``[n]`` which rows have it: ``(*values, rows)``.

    Args:
        columns: Integers ``[n]``, one array or more.
    """
    table = np.stack(columns, axis=1)
    for values in np.unique(table, axis=0):
        yield *values.tolist(), (table == values).all(axis=1)


def sums_and_counts(values: np.ndarray, owner: np.ndarray, owners: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of the values of each owner and how many they are, fp64 ``[owners, n_statistics]`` each.

    Args:
        values: ``[n, n_statistics]``; NaN is no value.
        owner: ``[n]`` integers from 0 to ``owners - 1``, such as questions.
        owners: How many there are.
    """
    exists = ~np.isnan(values)
    sums, counts = (
        np.stack([np.bincount(owner, weights=column, minlength=owners) for column in weights.T], 1)
        for weights in (np.where(exists, values, 0.0), exists)
    )
    return sums, counts


def ratio(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means, NaN where there is no value."""
    return np.divide(sums, counts, out=np.full(np.shape(sums), np.nan), where=counts > 0)


@lru_cache
def _tail(questions: int) -> float:
    """What the interval leaves out on either side.

    More than plain percentiles do: resampled means vary by sqrt((n - 1) / n) too little, and nobody knows by how much
    they should.
    """
    wider = math.sqrt(questions / (questions - 1))
    return NormalDist().cdf(-wider * float(t_quantile((1 - LEVEL) / 2, questions)))


@lru_cache(maxsize=2)
def _draws(n_questions: int, seed: int) -> np.ndarray:
    """``[RESAMPLES, n_questions]``: how often each resample has each question."""
    generator = np.random.default_rng(seed)
    draws, step = np.empty((RESAMPLES, n_questions), dtype=np.uint16), max(1, DRAWN_VALUES // n_questions)
    for start in range(0, RESAMPLES, step):
        block = draws[start : start + step]
        drawn = generator.integers(0, n_questions, block.shape) + n_questions * np.arange(len(block))[:, None]
        block[:] = np.bincount(drawn.ravel(), minlength=block.size).reshape(block.shape)
    return draws


def _blocks(n_questions: int, seed: int) -> Iterator[np.ndarray]:
    draws, step = _draws(n_questions, seed), max(1, DRAWN_VALUES // n_questions)
    for start in range(0, RESAMPLES, step):
        yield draws[start : start + step].astype(float)


def _medians(histograms: np.ndarray) -> np.ndarray:
    """Median of each row's values, NaN where it has none."""
    cumulated = histograms.cumsum(axis=1)
    total = cumulated[:, -1:]
    lower = (cumulated <= np.floor((total - 1) / 2)).sum(axis=1)
    upper = (cumulated <= np.floor(total / 2)).sum(axis=1)
    return np.where(total[:, 0] > 0, (lower + upper) / 2, np.nan)


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


@dataclass(frozen=True)
class PairedTest:
    """Differences of questions, and the one-sided test that they lie above 0; NaN where a number does not exist."""

    questions: int  # that have a difference
    differ: int  # of these, whose difference is not 0
    difference: Estimate  # mean over questions
    d_z: float  # mean / standard deviation (Cohen 1988)
    p: float

    @classmethod
    def of(cls, d: np.ndarray, p: float, seed: int) -> PairedTest:
        """The test of ``d`` ``[questions]`` whose p is known, or NaN where there is none."""
        effect, d_z = NO_ESTIMATE, math.nan
        if len(d):
            effect = mean_estimates(d[:, None], np.ones((len(d), 1)), seed)[0]
        if len(d) > 1 and np.ptp(d) > EQUAL * np.abs(d).max():
            d_z = float(d.mean() / d.std(ddof=1))
        return cls(len(d), int(np.count_nonzero(d)), effect, d_z, p)


def sign_flip(differences: np.ndarray, seed: int, exact_questions: int = EXACT_QUESTIONS) -> tuple[float, str]:
    """One-sided p, of a mean above 0, under all changes of sign, and how it was found.

    Args:
        differences: ``[n]``, one per question; at least 2, not all 0.
        seed: Seed of the sign patterns drawn where more than ``exact_questions`` differences are not 0.
        exact_questions: Up to so many, every pattern is counted.
    """
    from scipy.stats import permutation_test  # takes a second to import

    differences = differences[differences != 0]  # a zero is the same under either sign
    if len(differences) == 1:
        differences = np.append(differences, 0.0)  # scipy wants two values
    exact = len(differences) <= exact_questions
    result = permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=2**exact_questions if exact else SIGN_RESAMPLES,
        batch=max(1, DRAWN_VALUES // len(differences)),
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue), "exact sign-flip" if exact else f"sign-flip, {SIGN_RESAMPLES} patterns, seed {seed}"


def holm(p: list[float]) -> list[float]:
    """Adjusted p values (Holm 1979); NaN stays, and does not count as a test."""
    adjusted, largest = list(p), 0.0
    tested = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    for step, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - step) * p[i]))
        adjusted[i] = largest
    return adjusted
