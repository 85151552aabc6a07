"""From differences of questions to a verdict, by a rule that is fixed before they are seen.

A claim says that one or more differences lie above 0: depth in the middle less that at the first position, and less
that at the last one. It is *supported* where the one-sided test of every difference says so (an intersection-union
test, Berger 1982). It is *contradicted* where for at least one of them the opposite test says that its mean lies below
a margin, the smallest effect that counts, which a recipe names; with k differences each at a k-th of the level. Else
the data *cannot tell*. Tests flip signs of questions, as those of `report.summary`; the opposite one is also taken as a
t test with a question more, and the larger p of the two counts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..stats import FEW_QUESTIONS, NO_ESTIMATE, Estimate, PairedTest, sign_flip, t_quantile

SUPPORTED, CONTRADICTED, CANNOT_TELL = "supported", "contradicted", "cannot tell"
POWER = 0.8


@dataclass(frozen=True)
class Rule:
    """How a verdict is reached."""

    alpha: float = 0.05
    margin: float = 0.0  # the smallest effect that counts, in the unit of the differences


@dataclass(frozen=True)
class Side:
    """One of the differences that a claim is about; NaN where a number does not exist."""

    name: str
    questions: int
    difference: Estimate
    p: float  # one-sided, of a mean above 0
    p_opposite: float  # one-sided, of a mean below the margin
    detectable: float  # the smallest mean that this number of questions would have shown, with a power of `POWER`


@dataclass(frozen=True)
class Finding:
    """What came of one analysis: the smallest of its differences, and what follows."""

    verdict: str
    reason: str  # of the verdict, in a sentence
    n: int  # questions of the difference that has the fewest
    estimate: Estimate  # the smallest difference
    p: float  # the largest p of all differences
    detectable: float  # the largest of all differences
    sides: tuple[Side, ...]

    def entry(self) -> dict[str, Any]:
        """As JSON holds it, see `plain`."""
        return plain(asdict(self))


def judge(differences: dict[str, np.ndarray], rule: Rule, seed: int, largest: float | None = None) -> Finding:
    """The verdict on a claim that all means of some differences lie above 0.

    Args:
        differences: By name, fp64 ``[questions]`` each; NaN where a question has none.
        rule: Level and margin.
        seed: Of intervals and of resampled tests.
        largest: The largest difference that a question can have, None for the largest that one has.
    """
    sides = [_side(name, d[~np.isnan(d)], rule, seed, largest) for name, d in differences.items()]
    smallest = min(sides, key=lambda side: (not math.isnan(side.difference.value), side.difference.value))
    p = max(side.p for side in sides) if not any(math.isnan(side.p) for side in sides) else math.nan
    n, detectable = min(side.questions for side in sides), float(np.max([side.detectable for side in sides]))
    verdict, reason = _verdict(sides, p, n, rule)
    return Finding(verdict, reason, n, smallest.difference, p, detectable, tuple(sides))


def _verdict(sides: list[Side], p: float, n: int, rule: Rule) -> tuple[str, str]:
    if n < FEW_QUESTIONS:
        return CANNOT_TELL, f"{n} questions have the difference; fewer than {FEW_QUESTIONS} tell nothing"
    if p < rule.alpha:
        return SUPPORTED, f"every difference lies above 0 (p = {p:.2g}, below {rule.alpha:g})"
    level = rule.alpha / len(sides)
    below = [side for side in sides if side.p_opposite < level]
    if below:
        side = min(below, key=lambda side: side.p_opposite)
        what = f"below {rule.margin:g}, the smallest that counts" if rule.margin else "below 0"
        return CONTRADICTED, f"{side.name} lies {what} (p = {side.p_opposite:.2g}, below {level:g})"
    return CANNOT_TELL, "neither every difference above 0 nor one below the smallest that counts, for sure"


def _side(name: str, d: np.ndarray, rule: Rule, seed: int, largest: float | None) -> Side:
    test = PairedTest.of(d, math.nan, seed)
    p, opposite = (_p(values, seed) for values in (d, rule.margin - d))
    if len(d) > 1:
        largest = float(np.abs(d).max()) if largest is None else largest
        opposite = max(opposite, _p_with_one_more(d, rule.margin, largest))
    return Side(name, len(d), test.difference, p, opposite, _detectable(d, rule.alpha))


def _p(d: np.ndarray, seed: int) -> float:
    """Of a mean above 0; 1 where nothing differs from 0, NaN of fewer than 2 questions."""
    if len(d) < 2:
        return math.nan
    return sign_flip(d, seed)[0] if d.any() else 1.0


def _p_with_one_more(d: np.ndarray, margin: float, largest: float) -> float:
    """One-sided t test of a mean below the margin, with a question more that has the largest difference there can be.

    Where most questions differ by nothing, those that would are few, and may be absent from a small sample: flipping
    signs then takes equal values for sure ones. With the question more it takes some ``3 * largest / margin`` questions
    without any difference to tell that their mean lies below the margin, as by the rule of three.
    """
    from scipy.special import stdtr

    more = np.append(d, max(largest, margin))
    error = more.std(ddof=1) / math.sqrt(len(more))
    if error == 0.0:
        return 1.0
    return float(stdtr(len(more) - 1, (more.mean() - margin) / error))


def _detectable(d: np.ndarray, alpha: float) -> float:
    """The mean that a one-sided t test of so many differences of such a spread finds with a power of `POWER`."""
    if len(d) < 2 or not np.ptp(d):
        return math.nan
    quantiles = sum(float(t_quantile(tail, len(d))) for tail in (alpha, 1 - POWER))
    return float(quantiles * d.std(ddof=1) / math.sqrt(len(d)))


def of_estimate(name: str, estimate: Estimate, n: int, threshold: float, margin: float = 0.0) -> Finding:
    """The verdict on a claim that one number lies above a threshold, from its 95 % interval alone.

    It is contradicted where the interval lies below the threshold by so much that it does not reach ``margin`` above.
    """
    side = Side(name, n, estimate, math.nan, math.nan, math.nan)
    exists = not math.isnan(estimate.low)
    verdict, reason = CANNOT_TELL, f"its interval holds {threshold:g}" if exists else "there is no interval"
    if exists and estimate.low > threshold:
        verdict, reason = SUPPORTED, f"its interval lies above {threshold:g}"
    elif exists and estimate.high < threshold + margin:
        verdict, reason = CONTRADICTED, f"its interval lies below {threshold + margin:g}"
    return Finding(verdict, f"{name}: {reason}", n, estimate, math.nan, math.nan, (side,))


NOTHING = Finding(CANNOT_TELL, "there is nothing to compare", 0, NO_ESTIMATE, math.nan, math.nan, ())


def plain(value: Any) -> Any:
    """A value as JSON holds it: None where a number does not exist, numbers to six digits."""
    if isinstance(value, dict):
        return {name: plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value
