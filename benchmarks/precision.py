"""Where the certified precision repays itself on a CPU: `python benchmarks/precision.py [--model smollm2]`.

For every instruction set that runs here: fp32 against certified as ``precision="auto"`` would run it, its index of the
unembedding kept and made within the call, and the error of both logsumexps against fp64. One thread, process CPU time,
all in turn; medians. What `refinelens.op.backends.CERTIFIED_FROM` holds was read from this table.

    --model    none (GPT-2's shape, states of random layers) or the bench's smollm2, with its own states
    --rows     to measure, separated by commas
    --isas     to measure, of REFINELENS_ISA
    --rounds   of turns
"""

from __future__ import annotations

import os
from statistics import median
from unittest.mock import patch

import torch
from harness import machine, options_of, turns

from refinelens.bench.measure import torch_threads
from refinelens.bench.problem import make_problem
from refinelens.bench.table import aligned
from refinelens.errors import InputError
from refinelens.kernels.reference import LensHead, fused_lens_reference
from refinelens.op.backends import instruction_set
from refinelens.op.cpu import _indexes, fused_lens_cpu, fused_lens_screened, screen_index
from refinelens.view_config import BenchConfig

CHECKED_ROWS = 208  # against fp64, spread over all


def row_of(isa: str, hidden: torch.Tensor, head: LensHead, targets: torch.Tensor, rounds: int) -> list[str]:
    """One line of the table, or an InputError where the processor does not have the instruction set."""
    with patch.dict(os.environ, {"REFINELENS_ISA": isa}):
        instruction_set()

        def anew() -> None:
            _indexes.clear()
            fused_lens_screened(hidden, head, targets)

        calls = {
            "fp32": lambda: fused_lens_cpu(hidden, head, targets),
            "within": anew,
            "kept": lambda: fused_lens_screened(hidden, head, targets),  # its index is that of the call before
        }
        seconds = {name: median(times) for name, times in turns(calls, rounds).items()}
        some = slice(None, None, max(1, len(hidden) // CHECKED_ROWS))
        exact = fused_lens_reference(hidden[some], head, targets[some], dtype=torch.float64).logsumexp
        errors = [
            float((run(hidden[some], head, targets[some]).logsumexp - exact).abs().max())
            for run in (fused_lens_cpu, fused_lens_screened)
        ]
        kernels = screen_index(head.weight).kernels
    fp32 = seconds["fp32"]
    times = [f"{1e3 * fp32:.0f}", *(f"{1e3 * seconds[k]:.0f} ({seconds[k] / fp32:.2f})" for k in ("kept", "within"))]
    return [isa, kernels, str(len(hidden)), *times, *(f"{error:.1e}" for error in errors)]


def main() -> None:
    """Measure and print the table."""
    options = options_of(__doc__, model="none", rows="416,2048,10000", isas="baseline,v3,v4,amx", rounds=3)
    table = [["isa", "screen", "rows", "fp32, ms", "certified, index kept", "index made", "error, fp32", "certified"]]
    for rows in map(int, options.rows.split(",")):
        model = None if options.model == "none" else options.model
        problem = make_problem(BenchConfig(rows=rows, model=model))
        head = LensHead(problem.unembedding, problem.norm)
        for isa in options.isas.split(","):
            try:
                table.append(row_of(isa, problem.hidden, head, problem.targets, options.rounds))
            except InputError:
                table.append([isa, "not on this processor", *[""] * 6])
            print("  ".join(table[-1]), flush=True)
    shape = "x".join(map(str, problem.unembedding.shape))
    print(f"\n{machine()}; unembedding {shape}, {problem.states}\n")
    print("\n".join(aligned(table)))


if __name__ == "__main__":
    with torch_threads(1), torch.no_grad():
        main()
