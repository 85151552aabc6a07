"""What was set out to be reached, and whether a run of the benchmark reaches it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from refinelens.bench.table import Report, Result

Reports = dict[str, Report]  # by case of bench_fused_lens.py
SMALL, LARGE, SMALL_AVX2 = "gpt2-13x32", "gpt2-13x256", "gpt2-13x32-avx2"
REAL, REAL_AVX512 = "smollm2-31x64", "smollm2-31x64-avx512"
MEGABYTE = 1e6


@dataclass(frozen=True)
class Goal:
    """A bound on a number; ``measure`` returns None where a run does not have it."""

    text: str
    at_least: float | None
    at_most: float | None
    measure: Callable[[Reports], float | None]


def _of(case: str, name: str, number: Callable[[Result], float | None]) -> Callable[[Reports], float | None]:
    def measure(reports: Reports) -> float | None:
        result = reports[case].result(name) if case in reports else None
        return None if result is None else number(result)

    return measure


def _speed(case: str, name: str) -> Callable[[Reports], float | None]:
    """How many times faster than naive."""
    return _of(case, name, lambda result: result.ratio)


def _time_over(case: str, product: str, vendor: str = "") -> Callable[[Reports], float | None]:
    """Our fp32 time over a matrix product's, on a machine of this vendor."""

    def measure(reports: Reports) -> float | None:
        report = reports.get(case)
        ours, floor = (report.result(name) if report else None for name in ("fp32", product))
        return ours.seconds / floor.seconds if ours and floor and vendor in report.device else None

    return measure


def _peak_share(case: str) -> Callable[[Reports], float | None]:
    return _of(case, "fp32", lambda result: result.peak_share)


def _megabytes(case: str, name: str) -> Callable[[Reports], float | None]:
    return _of(case, name, lambda result: None if result.extra_bytes is None else result.extra_bytes / MEGABYTE)


def _ids_off(case: str, name: str) -> Callable[[Reports], float | None]:
    return _of(case, name, lambda result: result.verdict.argmax_off + result.verdict.rank_off)


CPU_GOALS = [
    Goal("fp32: times faster than naive, 416 rows", 2.3, None, _speed(SMALL, "fp32")),
    Goal("fp32: times faster than naive, 3328 rows", 2.3, None, _speed(LARGE, "fp32")),
    Goal("fp32: time over our own matrix product, 416 rows", None, 1.05, _time_over(SMALL, "product")),
    Goal("fp32: time over our own matrix product, 3328 rows", None, 1.05, _time_over(LARGE, "product")),
    Goal("fp32: share of the FMA peak, 416 rows", 0.85, None, _peak_share(SMALL)),
    Goal("fp32: share of the FMA peak, 3328 rows", 0.85, None, _peak_share(LARGE)),
    Goal("fp32: time over torch.mm on AMD, 416 rows", None, 0.75, _time_over(SMALL, "mm", vendor="AMD")),
    Goal("fp32: time over torch.mm on AMD, 3328 rows", None, 0.75, _time_over(LARGE, "mm", vendor="AMD")),
    Goal("fp32: extra MB, 3328 rows", None, 20, _megabytes(LARGE, "fp32")),
    Goal("fp32 on AVX2: times faster than naive, 416 rows", 1.5, None, _speed(SMALL_AVX2, "fp32")),
    Goal("certified: times faster than naive, real states", 4, None, _speed(REAL, "certified")),
    Goal("certified on AVX-512 without AMX: times faster than naive", 4, None, _speed(REAL_AVX512, "certified")),
    Goal("certified, stretch: times faster than naive, real states", 6, None, _speed(REAL, "certified")),
    Goal("certified: argmax and ranks off fp64, 1984 real rows", None, 0, _ids_off(REAL, "certified")),
    Goal("plain torch: times faster than naive, 416 rows", 1.4, None, _speed(SMALL, "reference")),
    Goal("plain torch: times faster than naive, 3328 rows", 1.4, None, _speed(LARGE, "reference")),
    Goal("plain torch: extra MB, 3328 rows", None, 40, _megabytes(LARGE, "reference")),
]


def goal_row(goal: Goal, reports: Reports) -> list[str]:
    """The goal, its bound, what was measured, and the verdict."""
    value = goal.measure(reports)
    at_least = goal.at_least is not None
    bound = goal.at_least if at_least else goal.at_most
    cells = [goal.text, f"{'at least' if at_least else 'at most'} {bound:g}"]
    if value is None:
        return [*cells, "-", "not measured"]
    return [*cells, f"{value:.4g}", "met" if (value >= bound if at_least else value <= bound) else "not met"]
