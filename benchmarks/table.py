"""Print the tables of a benchmark run, and on a CPU the goals: `python benchmarks/table.py FILE.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from harness import Goal, goal_table

from refinelens.bench.table import Report, Result, markdown_table, report_from_json

Reports = dict[str, Report]  # by case of bench_fused_lens.py
Measured = Callable[[Reports], float | None]
SMALL, LARGE, SMALL_AVX2 = "gpt2-13x32", "gpt2-13x256", "gpt2-13x32-avx2"
REAL, REAL_AVX512 = "smollm2-31x64", "smollm2-31x64-avx512"
BOTH = ((416, SMALL), (3328, LARGE))


def _of(case: str, name: str, number: Callable[[Result], float | None]) -> Measured:
    def measured(reports: Reports) -> float | None:
        result = reports[case].result(name) if case in reports else None
        return None if result is None else number(result)

    return measured


def _speed(case: str, name: str = "fp32") -> Measured:
    """How many times faster than naive."""
    return _of(case, name, lambda result: result.ratio)


def _time_over(case: str, product: str, vendor: str = "") -> Measured:
    """Our fp32 time over a matrix product's, on a machine of this vendor."""

    def measured(reports: Reports) -> float | None:
        report = reports.get(case)
        ours, floor = (report.result(name) if report else None for name in ("fp32", product))
        return ours.seconds / floor.seconds if ours and floor and vendor in report.device else None

    return measured


def _peak_share(case: str) -> Measured:
    return _of(case, "fp32", lambda result: result.peak_share)


def _megabytes(case: str, name: str) -> Measured:
    return _of(case, name, lambda result: None if result.extra_bytes is None else result.extra_bytes / 1e6)


def _ids_off(case: str, name: str) -> Measured:
    return _of(case, name, lambda result: result.verdict.argmax_off + result.verdict.rank_off)


GOALS = [
    *(Goal(f"fp32: times faster than naive, {n} rows", _speed(case), 2.3, at_least=True) for n, case in BOTH),
    *(Goal(f"fp32: time over our own matrix product, {n} rows", _time_over(case, "product"), 1.05) for n, case in BOTH),
    *(Goal(f"fp32: share of the FMA peak, {n} rows", _peak_share(case), 0.85, at_least=True) for n, case in BOTH),
    *(Goal(f"fp32: time over torch.mm on AMD, {n} rows", _time_over(case, "mm", "AMD"), 0.75) for n, case in BOTH),
    Goal("fp32: extra memory, 3328 rows", _megabytes(LARGE, "fp32"), 20, unit="MB"),
    Goal("fp32 on AVX2: times faster than naive, 416 rows", _speed(SMALL_AVX2), 1.5, at_least=True),
    Goal("certified: times faster than naive, real states", _speed(REAL, "certified"), 4, 6, at_least=True),
    Goal("certified on AVX-512 without AMX: the same", _speed(REAL_AVX512, "certified"), 4, at_least=True),
    Goal("certified: argmax and ranks off fp64, 1984 real rows", _ids_off(REAL, "certified"), 0),
    *(Goal(f"plain torch: times faster than naive, {n} rows", _speed(case, "reference"), 1.4, at_least=True)
      for n, case in BOTH),
    Goal("plain torch: extra memory, 3328 rows", _megabytes(LARGE, "reference"), 40, unit="MB"),
]  # fmt: skip


def main(path: str) -> None:
    """Markdown: one table per case that pytest-benchmark wrote to ``path``, and the goals under them."""
    runs = json.loads(Path(path).read_text())["benchmarks"]
    reports = {run["param"]: report_from_json(run["extra_info"]["report"]) for run in runs}
    parts = [f"### {case}\n\n{markdown_table(report)}" for case, report in reports.items()]
    if any(report.device_type == "cpu" for report in reports.values()):
        parts.append(f"### Goals\n\n{goal_table(GOALS, reports)}")
    print("\n\n".join(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
