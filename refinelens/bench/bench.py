"""One benchmark: every competitor is held against fp64 and, if it is right, timed in turn with the others."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..machine import __version__, device_name, package_version
from ..op.backends import instruction_set
from ..view_config import BenchConfig
from .competitors import BASELINE, COMPETITORS, NAIVE, OURS, Competitor, choose
from .measure import DoesNotRun, Fp64Check, clock_of, extra_memory, peak_meter, spread, take_turns, timed, torch_threads
from .problem import Problem, available_memory, can_measure_growth, make_problem, peak_growth_cuda
from .table import CheckResult, Report, Result

TRIAL_ROWS = 64
MEMORY_SHARE = 0.5  # of what is available that the logits of a competitor may take


@dataclass(frozen=True)
class Setup:
    """Who may take part, and what is asked of the machine."""

    competitors: dict[str, Competitor] = field(default_factory=lambda: COMPETITORS)  # by name
    available_memory: Callable[[str], int | None] = available_memory
    extra_memory: Callable[[Path, str, int, int], int] | None = extra_memory if can_measure_growth() else None
    longest: float = 10.0  # seconds of a call; what would take longer is measured on fewer rows


@dataclass(frozen=True)
class Entry:
    """A competitor that passed the check, with what is known before it is timed."""

    competitor: Competitor
    problem: Problem  # on the rows it is measured on
    first_seconds: float | None  # by how much the very first call took longer, if it was tried
    extra_bytes: int | None
    verdict: CheckResult | None

    def result(self, problem: Problem, seconds: list[float], naive: list[float] | None, peak: float | None) -> Result:
        """This row of the table.

        Args:
            problem: On all rows.
            seconds: A row of the problem took, round by round.
            naive: The same of the naive expression, if it was timed.
            peak: FLOP/s, if measured.
        """
        whole = median(seconds) * len(problem.hidden)
        flops = problem.flops / whole
        return Result(
            name=self.competitor.name,
            title=self.competitor.title,
            group=self.competitor.group,
            measured_rows=len(self.problem.hidden),
            seconds=whole,
            spread=spread(seconds),
            ratio=naive and median(a / b for a, b in zip(naive, seconds, strict=True)),
            flops=flops,
            peak_share=flops / peak if peak else None,
            extra_bytes=self.extra_bytes,
            verdict=self.verdict,
            note=self._note(len(problem.hidden)),
        )

    def _note(self, all_rows: int) -> str | None:
        rows, remarks = len(self.problem.hidden), []
        if rows < all_rows:
            remarks.append(f"measured on {rows} of {all_rows} rows and scaled up; all take too much memory or time")
        if self.competitor.keeps and self.first_seconds:
            remarks.append(
                f"{self.competitor.keeps} is made once, in {self.first_seconds:.2g} s, which do not count; its bytes do"
            )
        if self.verdict and self.verdict.fell_back:
            remarks.append(f"{self.verdict.fell_back} of {self.verdict.rows} rows fell back to the exact path")
        return "; ".join(remarks) or None


def run_bench(
    options: BenchConfig, progress: Callable[[str], None] = lambda text: None, setup: Setup | None = None
) -> Report:
    """Check and time every competitor on one problem.

    Args:
        options: What is measured.
        progress: Called with what is being done.
        setup: If not this package's competitors on this machine.

    Raises:
        InputError: Options that do not fit this machine.
    """
    setup = setup or Setup()
    chosen = choose(options.baselines, setup.competitors)
    with torch_threads(options.threads), torch.no_grad():
        isa = _instruction_set()
        progress("making the problem")
        problem = make_problem(options)
        device, threads, rows = problem.hidden.device.type, options.threads, len(problem.hidden)
        admission = _Admission(problem, threads, setup, progress)
        admission.admit(chosen)
        entries = admission.entries
        peak = peak_meter(device, problem.hidden.dtype, threads)
        rates: list[float] = []

        def before_round(number: int) -> None:
            progress(f"round {number + 1} of {options.rounds}")
            if peak:
                rates.append(peak[1]())

        calls = {name: partial(entry.competitor.run, entry.problem) for name, entry in entries.items()}
        found = take_turns(calls, options.rounds, device, threads, before_round)
    peak_flops = median(rates) if rates else None
    per_row = {name: [s / len(entries[name].problem.hidden) for s in seconds] for name, seconds in found.items()}
    naive = per_row.get(NAIVE)
    return Report(
        device=device_name(device),
        device_type=device,
        instruction_set=isa,
        threads=threads,
        clock="process CPU time" if clock_of(device, threads) is time.process_time else "wall clock",
        versions=_versions(device),
        date=f"{datetime.now(UTC):%Y-%m-%d}",
        rows=rows,
        d_model=problem.hidden.shape[1],
        vocab=len(problem.unembedding),
        dtype=str(problem.hidden.dtype).removeprefix("torch."),
        states=problem.states,
        rounds=options.rounds,
        peak=peak and peak[0],
        peak_flops=peak_flops,
        results=[entry.result(problem, per_row[name], naive, peak_flops) for name, entry in entries.items()],
        left_out=admission.left_out,
        failed=admission.failed,
    )


class _Admission:
    """Decides who is timed, and on how many rows."""

    def __init__(self, problem: Problem, threads: int, setup: Setup, progress: Callable[[str], None]):
        self.entries: dict[str, Entry] = {}  # by name, those that run here and are right
        self.left_out: dict[str, str] = {}  # title: why
        self.failed: list[str] = []  # titles of our own that do not run to the end or are wrong
        self._problem, self._threads, self._setup, self._progress = problem, threads, setup, progress
        self._device = problem.hidden.device.type
        progress("fp64")
        self._check = Fp64Check(problem)

    def admit(self, competitors: list[Competitor]) -> None:
        """Enter every competitor that runs here and is right; note why another does not."""
        with tempfile.TemporaryDirectory(prefix="refinelens-bench-") as folder:
            file = Path(folder) / "problem.pt"
            if self._device == "cpu":
                torch.save(self._problem, file)
            for competitor in competitors:
                self._progress(competitor.title)
                reason = competitor.obstacle(self._problem) or self._failure(competitor, file)
                if reason is not None:
                    self.left_out[competitor.title] = reason

    def _failure(self, competitor: Competitor, file: Path) -> str | None:
        """Enter one that has no obstacle, or say how it failed."""
        try:
            self.entries[competitor.name] = self._prepare(competitor, file)
            return None
        except (DoesNotRun, torch.OutOfMemoryError) as error:
            if competitor.group == OURS:
                self.failed.append(competitor.title)
            return str(error) if isinstance(error, DoesNotRun) else "does not fit into memory"
        except Exception as error:  # other people's code can raise anything
            if competitor.group != BASELINE:
                raise
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"

    def _prepare(self, competitor: Competitor, file: Path) -> Entry:
        rows, first_seconds = self._affordable_rows(competitor)
        problem, extra = self._problem.first(rows), None
        if self._device == "cpu" and self._setup.extra_memory:
            extra = self._setup.extra_memory(file, competitor.name, rows, self._threads)
        verdict = self._check.judge(competitor.run(problem), rows)
        if self._device == "cuda":
            extra = peak_growth_cuda(lambda: competitor.run(problem))
        if verdict and verdict.wrong:
            raise DoesNotRun(f"wrong: {verdict.wrong}")
        return Entry(competitor, problem, first_seconds, extra, verdict)

    def _affordable_rows(self, competitor: Competitor) -> tuple[int, float | None]:
        """How many rows memory and patience allow, and by how much a first call takes longer than a second."""
        rows, a_row = len(self._problem.hidden), competitor.logits_of_a_row(self._problem)
        available = self._setup.available_memory(self._device)
        if available is not None and a_row:
            rows = min(rows, int(MEMORY_SHARE * available) // a_row)
            if rows == 0:
                raise DoesNotRun(f"does not fit: {a_row / 1e9:.3g} GB a row, {available / 1e9:.3g} GB available")
        if competitor.compiles:  # a trial would compile once more; it takes about as long as naive
            return min(rows, len(self.entries[NAIVE].problem.hidden)) if NAIVE in self.entries else rows, None
        trial = self._problem.first(TRIAL_ROWS)
        first, second = (timed(partial(competitor.run, trial), self._device, self._threads) for _ in range(2))
        return min(rows, max(1, int(self._setup.longest / second * len(trial.hidden)))), first - second


def _versions(device: str) -> dict[str, str]:
    found = {"refinelens": __version__, "torch": torch.__version__, "Python": platform.python_version()}
    if device == "cuda" and importlib.util.find_spec("triton"):
        found["Triton"] = package_version("triton") or "of a package of another name"
    return found


def _instruction_set() -> str | None:
    try:
        return instruction_set()
    except ImportError:
        return None
