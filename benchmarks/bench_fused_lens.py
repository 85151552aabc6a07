"""The cases of fused_lens.py for pytest-benchmark: every competitor is held against fp64, then timed by itself.

    make bench

One that fails its check is not timed, and its test fails. One runs after the other here, so that a time compares with
that of an earlier run (``--benchmark-compare``), not with that of another competitor: in fused_lens.py all take turns.
"""

from functools import lru_cache

import pytest
import torch
from fused_lens import CASES, as_set

from refinelens.bench.bench import MEMORY_SHARE
from refinelens.bench.competitors import COMPETITORS, Competitor, choose
from refinelens.bench.measure import Fp64Check, clock_of, torch_threads
from refinelens.bench.problem import Problem, available_memory, make_problem

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TESTS = [(case, one.name) for case, options in CASES.items() for one in choose(options.baselines)]
pytestmark = pytest.mark.benchmark(timer=clock_of(DEVICE, threads=1))


@lru_cache(maxsize=1)  # tests come case by case
def _problem(case: str) -> tuple[Problem, Fp64Check]:
    problem = make_problem(CASES[case])
    return problem, Fp64Check(problem)


def time_if_right(benchmark, competitor: Competitor, problem: Problem, check: Fp64Check, rounds: int) -> None:
    """Hold a competitor's statistics against fp64, then time it."""
    rows = len(problem.hidden)
    available = available_memory(DEVICE)
    if available is not None and competitor.logits_of_a_row(problem) * rows > MEMORY_SHARE * available:
        pytest.skip("does not fit into memory")
    verdict = check.judge(competitor.run(problem), rows)
    if verdict and verdict.wrong:
        pytest.fail(verdict.wrong)

    def call():
        competitor.run(problem)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(call, rounds=rounds)


@pytest.mark.parametrize("case, name", TESTS)
def test_fused_lens(benchmark, case, name):
    benchmark.group = case
    with as_set(case) as reason, torch_threads(1), torch.no_grad():
        if reason:
            pytest.skip(reason)
        problem, check = _problem(case)
        obstacle = COMPETITORS[name].obstacle(problem)
        if obstacle:
            pytest.skip(obstacle)
        time_if_right(benchmark, COMPETITORS[name], problem, check, CASES[case].rounds)
