"""The rule that a verdict follows from, at its nominal rates."""

import math

import numpy as np
import pytest

from refinelens.claims.verdict import CANNOT_TELL, CONTRADICTED, SUPPORTED, Rule, judge, of_estimate
from refinelens.stats import Estimate

pytestmark = pytest.mark.medium


def sides(means, n, seed, spread=2.0):
    source = np.random.default_rng(seed)
    return {f"side {i}": mean + spread * source.standard_normal(n) for i, mean in enumerate(means)}


def test_every_side_must_lie_above():
    rule = Rule()
    assert judge(sides((2, 2), 60, 0), rule, 0).verdict == SUPPORTED
    assert judge(sides((2, 0), 60, 0), rule, 0).verdict == CANNOT_TELL
    assert judge(sides((2, -2), 60, 0), rule, 0).verdict == CONTRADICTED


def test_the_smallest_difference_speaks_for_all():
    found = judge(sides((3, 1), 80, 1), Rule(), 0)
    means = [side.difference.value for side in found.sides]
    assert found.estimate.value == min(means) and found.p == max(side.p for side in found.sides)
    assert [side.questions for side in found.sides] == [80, 80] and found.n == 80


def test_a_margin_lets_no_effect_be_shown():
    exact = {"depth": np.tile([0.1, -0.1], 20)}
    assert judge(exact, Rule(), 0).verdict == CANNOT_TELL
    found = judge(exact, Rule(margin=0.25), 0)
    assert found.verdict == CONTRADICTED and "smallest that counts" in found.reason


def test_missing_values_and_few_questions():
    values = np.full(30, np.nan)
    values[:4] = 5.0
    found = judge({"depth": values}, Rule(), 0)
    assert found.verdict == CANNOT_TELL and found.n == 4 and "fewer than 5" in found.reason
    entry = found.entry()
    assert entry["estimate"] == {"value": 5.0, "low": None, "high": None}
    assert judge({"depth": np.full(5, np.nan)}, Rule(), 0).verdict == CANNOT_TELL


def test_what_differs_nowhere_is_no_support():
    found = judge({"depth": np.zeros(50)}, Rule(), 0)
    assert found.verdict == CANNOT_TELL and found.p == 1.0
    for n, verdict in ((50, CANNOT_TELL), (100, CONTRADICTED)):  # by the rule of three 3 / n lies below 0.04 from 75 on
        assert judge({"share": np.zeros(n)}, Rule(margin=0.04), 0, largest=1.0).verdict == verdict


def test_the_smallest_effect_that_would_have_shown():
    """Drawn at that mean, the one-sided t test finds it in about eighty of a hundred."""
    from scipy.stats import ttest_1samp

    n = 40
    detectable = (1.6849 + 0.8512) / math.sqrt(n)  # quantiles of t with 39 degrees of freedom
    found = sum(
        ttest_1samp(np.random.default_rng(seed).standard_normal(n) + detectable, 0, alternative="greater").pvalue < 0.05
        for seed in range(400)
    )
    assert 0.74 < found / 400 < 0.86
    d = np.random.default_rng(3).standard_normal(n)
    assert judge({"d": d}, Rule(), 0).detectable == pytest.approx(detectable * d.std(ddof=1), rel=1e-3)


@pytest.mark.parametrize(
    "estimate, verdict",
    [
        ((0.7, 0.6, 0.8), SUPPORTED),
        ((0.7, 0.4, 0.8), CANNOT_TELL),
        ((0.2, 0.1, 0.3), CONTRADICTED),
        ((0.9, math.nan, math.nan), CANNOT_TELL),
    ],
)
def test_one_number_against_a_threshold(estimate, verdict):
    assert of_estimate("Spearman", Estimate(*estimate), 12, 0.5).verdict == verdict


@pytest.mark.parametrize("n", [10, 20, 30, 50])
@pytest.mark.parametrize("share, effect, margin, largest", [(0.05, 1.0, 0.02, 1.0), (0.1, 4.0, 0.25, 8.0)])
def test_an_effect_of_few_questions_is_not_contradicted(n, share, effect, margin, largest):
    """Most questions differ by nothing, a small sample may have none of the others; the mean is above the margin."""
    verdicts = []
    for seed in range(60):
        d = effect * (np.random.default_rng(seed).random(n) < share)
        verdicts.append(judge({"d": d}, Rule(margin=margin), seed, largest).verdict)
    assert verdicts.count(CONTRADICTED) <= 60 * 0.05


@pytest.mark.slow
def test_verdicts_come_at_their_rates():
    """Where both means are 0, the worst case of the claim, support is said in at most one of twenty."""
    verdicts = [judge(sides((0, 5), 40, seed), Rule(), seed).verdict for seed in range(200)]
    assert verdicts.count(SUPPORTED) <= 0.05 * 200 + 3 * math.sqrt(200 * 0.05 * 0.95)
    assert verdicts.count(CONTRADICTED) <= 0.025 * 200 + 3 * math.sqrt(200 * 0.025 * 0.975)
    verdicts = [judge(sides((-1.5, 1.5), 40, seed), Rule(), seed).verdict for seed in range(200)]
    assert verdicts.count(CONTRADICTED) > 190
