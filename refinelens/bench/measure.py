"""How calls are measured: against fp64 first, then in turn, so that a machine that drifts drifts for all alike.

The memory that a competitor needs on a CPU is that of a fresh process. The most arithmetic that this machine does is
measured beside them.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.reference import LensHead, apply_norm, fused_lens_reference
from ..machine import module_command, module_path
from .competitors import COMPETITORS, Statistics
from .problem import Problem, peak_growth
from .table import CheckResult

MINUTES = 10  # after which a process is given up
MILLISECONDS = 50.0
SQUARE = 8192  # rows and columns of the matrices whose product is a GPU's peak
CHECKED_ROWS = 4096  # at most, spread over the problem
EXPLAINED_ROWS = 64  # rows of another rank whose near ties are counted
IDS = ("argmax", "target_rank")
Name = TypeVar("Name", bound=Hashable)


class DoesNotRun(Exception):
    """A competitor that failed; says why in a few words."""


def extra_memory(problem_file: Path, competitor: str, rows: int, threads: int) -> int:
    """Growth of the peak resident set in the first call of a competitor on the first ``rows`` rows, bytes.

    The process is fresh because pages that an earlier call freed are used again unseen, and because one
    that is killed for its memory takes nothing else with it.

    Args:
        problem_file: A `Problem`, saved by torch.

    Raises:
        DoesNotRun: The process failed, was killed or took longer than ``MINUTES``.
    """
    command = module_command(__name__, problem_file, competitor, rows, threads)
    environment = os.environ | module_path() | {"OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        raise DoesNotRun(f"took longer than {MINUTES} minutes") from None
    if done.returncode == -9:
        raise DoesNotRun("does not fit into memory")
    if done.returncode != 0:
        raise DoesNotRun((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])


def _main(problem_file: str, name: str, rows: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    problem: Problem = torch.load(problem_file, weights_only=False).first(int(rows))
    competitor = COMPETITORS[name]
    # What is compiled for one shape is compiled before. The others need only their libraries then: what
    # they build once for an unembedding counts.
    competitor.run(problem if competitor.compiles else problem.tiny())
    print(peak_growth(lambda: competitor.run(problem)))


if __name__ == "__main__":
    _main(*sys.argv[1:])


def clock_of(device: str, threads: int) -> Callable[[], float]:
    """CPU time leaves out what other processes take, but the times of several threads would add up."""
    return time.process_time if device == "cpu" and threads == 1 else time.perf_counter


def timed(call: Callable[[], object], device: str = "cpu", threads: int = 1) -> float:
    """Seconds of one call."""
    clock = clock_of(device, threads)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = clock()
    call()
    wait()
    return clock() - start


def take_turns(
    calls: dict[Name, Callable[[], object]],
    rounds: int,
    device: str = "cpu",
    threads: int = 1,
    before_round: Callable[[int], None] = lambda number: None,
) -> dict[Name, list[float]]:
    """Seconds of every call, round by round: each once a round, every other round in reverse."""
    order, seconds = list(calls), {name: [] for name in calls}
    for number in range(rounds):
        before_round(number)
        for name in order:
            seconds[name].append(timed(calls[name], device, threads))
        order.reverse()
    return seconds


def spread(seconds: list[float]) -> float:
    """(Slowest - fastest) / median."""
    return (max(seconds) - min(seconds)) / median(seconds)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the block with this many threads, and restore what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_meter(device: str, dtype: torch.dtype, threads: int) -> tuple[str, Callable[[], float]] | None:
    """What the peak is, in words, and a function that measures it in FLOP/s; None without the extension.

    On a CPU the peak of fp32 fused multiply-adds in registers, whatever the dtype: the op multiplies in
    fp32. On a GPU a square matrix product in ``dtype``.
    """
    if device == "cuda":
        left, right = (torch.randn(SQUARE, SQUARE, device=device, dtype=dtype) for _ in range(2))
        words = f"{SQUARE}^3 matrix product in {dtype}".replace("torch.", "")
        return words, lambda: 2 * SQUARE**3 / timed(lambda: left @ right, device)
    try:
        from .._C import fma_peak
    except ImportError:
        return None
    return f"fp32 FMA in registers x {threads}", lambda: threads * fma_peak(MILLISECONDS)


class Fp64Check:
    """The statistics of a problem in fp64, on at most `CHECKED_ROWS` of its rows.

    What counts as rounding, in units of the largest possible logit |x| |w| (Cauchy-Schwarz): two epsilon in
    half precision, where the operands and the logit are rounded and sums are kept in fp32; in fp32
    sqrt(d_model) epsilon, the spread of d_model rounding errors. On top, the error of fp32 sums over the
    vocabulary.
    """

    def __init__(self, problem: Problem):
        n_rows = len(problem.hidden)
        self._problem = problem
        index = torch.linspace(0, n_rows - 1, min(n_rows, CHECKED_ROWS), dtype=torch.float64)
        self._index = index.long().to(problem.hidden.device)
        hidden, self._targets = problem.hidden[self._index], problem.targets[self._index]
        head = LensHead(problem.unembedding, problem.norm)
        exact = fused_lens_reference(hidden, head, self._targets, dtype=torch.float64)
        self._exact = dict(exact.items()) | {"target_logprob": exact.target_logit - exact.logsumexp}
        self._x_hat = apply_norm(hidden, problem.norm, torch.float64)
        largest = float(self._x_hat.norm(dim=-1).max() * problem.unembedding.norm(dim=-1).max())
        eps = torch.finfo(hidden.dtype).eps
        growth = math.sqrt(hidden.shape[1]) if hidden.dtype == torch.float32 else 2.0
        sums = 32 * torch.finfo(torch.float32).eps * math.log(len(problem.unembedding) + 1)
        self.tolerance = growth * eps * largest + sums

    def judge(self, found: Statistics, n_rows: int) -> CheckResult | None:
        """Compare the statistics of the problem's first ``n_rows`` rows; None where there are none."""
        if not found:
            return None
        rows = int((self._index < n_rows).sum())
        index = self._index[:rows]
        found = {name: value[index] for name, value in found.items()}
        # A bound that came with the logsumexp is part of the answer; entropy and log-probability inherit it.
        bound = found.pop("logsumexp_bound", torch.zeros(rows, dtype=torch.float32, device=index.device)).double()
        error, wrong = 0.0, []
        for name, value in found.items():
            if name in self._exact and name not in IDS:
                off = (value.double() - self._exact[name][:rows]).abs()
                error = max(error, float(off.max()))
                if not (off <= self.tolerance + bound).all():
                    wrong.append(f"{name} differs by {float(off.max()):.2g}, rounding explains {self.tolerance:.2g}")
        differs = {name: (found[name] != self._exact[name][:rows]).nonzero()[:, 0] for name in IDS if name in found}
        for name, explain in (("argmax", self._unexplained_argmax), ("target_rank", self._unexplained_rank)):
            if len(differs.get(name, ())):
                wrong += explain(found[name], differs[name])
        counts = {name: len(off) for name, off in differs.items()}
        return CheckResult(
            rows=rows,
            argmax_off=counts.get("argmax"),
            rank_off=counts.get("target_rank"),
            error=error,
            fell_back=int(found["fell_back"].sum()) if "fell_back" in found else None,
            wrong="; ".join(wrong) or None,
        )

    def _unexplained_argmax(self, argmax: Tensor, rows: Tensor) -> list[str]:
        """Of the rows that have another: an argmax whose logit lies too far below the maximum."""
        ids = argmax[rows]
        if not ((ids >= 0) & (ids < len(self._problem.unembedding))).all():
            return ["argmax lies outside the vocabulary"]
        own = (self._x_hat[rows] * self._problem.unembedding[ids].double()).sum(-1)
        gap = float((self._exact["max_logit"][rows] - own).max())
        if gap <= 2 * self.tolerance:
            return []
        return [f"an argmax lies {gap:.2g} below the maximum, rounding explains {2 * self.tolerance:.2g}"]

    def _unexplained_rank(self, ranks: Tensor, rows: Tensor) -> list[str]:
        """Of the first rows that have another: a rank that differs by more than the tokens near the target."""
        rows = rows[:EXPLAINED_ROWS]
        logits = self._x_hat[rows] @ self._problem.unembedding.double().T
        own = self._exact["target_logit"][rows, None]
        near = ((logits - own).abs() <= 2 * self.tolerance).sum(-1) - 1  # the target itself is no rival
        differs = (ranks[rows] - self._exact["target_rank"][rows]).abs()
        worst = int((differs - near).argmax())
        if differs[worst] <= near[worst]:
            return []
        return [f"a rank differs by {int(differs[worst])}, near ties explain {int(near[worst])}"]
