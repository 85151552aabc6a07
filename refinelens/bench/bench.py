"""One benchmark: every competitor is held against fp64 and, if it is right, timed in turn with the others."""

from __future__ import annotations

import importlib.util
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median

import torch

from ..config import BenchConfig
from ..machine import __version__, device_name, package_version
from ..op.backends import instruction_set
from .competitors import BASELINE, COMPETITORS, NAIVE, OURS, Competitor, choose
from .measure import DoesNotRun, Fp64Check, Timer, extra_memory, peak_meter, spread, torch_threads
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

    def note(self, all_rows: int) -> str | None:
        """What a reader must know of this row of the table."""
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
    with open_session(options, progress, setup) as session:
        for number in range(options.rounds):
            progress(f"round {number + 1} of {options.rounds}")
            session.round()
        return session.report()


@contextmanager
def open_session(
    options: BenchConfig, progress: Callable[[str], None] = lambda text: None, setup: Setup | None = None
) -> Iterator[Session]:
    """A session to call ``round`` of as often as wanted, while torch has the options' number of threads."""
    setup = setup or Setup()
    chosen = choose(options.peers, setup.competitors)
    with torch_threads(options.threads), torch.no_grad():
        yield Session(options, chosen, setup, progress)


class Session:
    """Competitors that are right, ready to be timed; made by `open_session`."""

    def __init__(
        self, options: BenchConfig, competitors: list[Competitor], setup: Setup, progress: Callable[[str], None]
    ):
        self.options = options
        self._setup = setup
        self._instruction_set = _instruction_set()
        progress("making the problem")
        self.problem = make_problem(options)
        self._device = self.problem.hidden.device.type
        progress("fp64")
        self._check = Fp64Check(self.problem)
        self._left_out: dict[str, str] = {}
        self._failed: list[str] = []
        self._entries: dict[str, Entry] = {}
        self._timer = Timer(self._device, options.threads)
        with tempfile.TemporaryDirectory(prefix="refinelens-bench-") as folder:
            file = Path(folder) / "problem.pt"
            if self._device == "cpu":
                torch.save(self.problem, file)
            for competitor in competitors:
                progress(competitor.title)
                self._admit(competitor, file)
        for name, entry in self._entries.items():
            self._timer.enter(name, partial(entry.competitor.run, entry.problem))
        self._peak = peak_meter(self._device, self.problem.hidden.dtype, options.threads)
        self._peaks: list[float] = []
        self._rounds = 0

    def round(self) -> None:
        """Time every competitor once, and the peak beside them."""
        if self._peak:
            self._peaks.append(self._peak[1]())
        self._timer.round()
        self._rounds += 1

    def _admit(self, competitor: Competitor, problem_file: Path) -> None:
        """Enter a competitor if it runs here and is right; else note why not."""
        try:
            reason = competitor.obstacle(self.problem)
            if reason is None:
                entry = self._prepare(competitor, problem_file)
                reason = entry.verdict and entry.verdict.wrong
                if reason is None:
                    self._entries[competitor.name] = entry
                    return
                self._note_failure(competitor)
                reason = f"wrong: {reason}"
        except (DoesNotRun, torch.OutOfMemoryError) as error:
            reason = str(error) if isinstance(error, DoesNotRun) else "does not fit into memory"
            self._note_failure(competitor)
        except Exception as error:  # other people's code can raise anything
            if competitor.group != BASELINE:
                raise
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        self._left_out[competitor.title] = reason

    def _note_failure(self, competitor: Competitor) -> None:
        if competitor.group == OURS:
            self._failed.append(competitor.title)

    def _prepare(self, competitor: Competitor, problem_file: Path) -> Entry:
        rows, first_seconds = self._affordable_rows(competitor)
        problem = self.problem.first(rows)
        extra = None
        if self._device == "cpu" and self._setup.extra_memory:
            extra = self._setup.extra_memory(problem_file, competitor.name, rows, self.options.threads)
        verdict = self._check.judge(competitor.run(problem), rows)
        if self._device == "cuda":
            extra = peak_growth_cuda(lambda: competitor.run(problem))
        return Entry(competitor, problem, first_seconds, extra, verdict)

    def _affordable_rows(self, competitor: Competitor) -> tuple[int, float | None]:
        """How many rows memory and patience allow, and by how much a first call takes longer than a second."""
        rows = len(self.problem.hidden)
        there = self._setup.available_memory(self._device)
        if there is not None and competitor.logit_bytes:
            a_row = competitor.logit_bytes * len(self.problem.unembedding)
            rows = min(rows, int(MEMORY_SHARE * there) // a_row)
            if rows == 0:
                raise DoesNotRun(f"does not fit: {a_row / 1e9:.3g} GB a row, {there / 1e9:.3g} GB available")
        if competitor.compiles:  # a trial would compile once more; it takes about as long as naive
            return min(rows, len(self._entries[NAIVE].problem.hidden)) if NAIVE in self._entries else rows, None
        trial = self.problem.first(TRIAL_ROWS)
        first, seconds = (self._timer.time(lambda: competitor.run(trial)) for _ in range(2))
        return min(rows, max(1, int(self._setup.longest / seconds * len(trial.hidden)))), first - seconds

    def report(self) -> Report:
        """What the rounds so far have shown."""
        problem, rows = self.problem, len(self.problem.hidden)
        peak = median(self._peaks) if self._peaks else None
        return Report(
            device=device_name(self._device),
            device_type=self._device,
            instruction_set=self._instruction_set,
            threads=self.options.threads,
            clock="process CPU time" if self._timer.clock is time.process_time else "wall clock",
            versions=_versions(self._device),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            rows=rows,
            d_model=problem.hidden.shape[1],
            vocab=len(problem.unembedding),
            dtype=str(problem.hidden.dtype).removeprefix("torch."),
            states=problem.states,
            rounds=self._rounds,
            peak=self._peak[0] if self._peak else None,
            peak_flops=peak,
            results=[self._result(entry, peak) for entry in self._entries.values()],
            left_out=self._left_out,
            failed=self._failed,
        )

    def _per_row(self, name: str) -> list[float]:
        return [seconds / len(self._entries[name].problem.hidden) for seconds in self._timer.seconds[name]]

    def _result(self, entry: Entry, peak: float | None) -> Result:
        per_row = self._per_row(entry.competitor.name)
        seconds = median(per_row) * len(self.problem.hidden)
        naive = self._per_row(NAIVE) if NAIVE in self._entries else None
        flops = self.problem.flops / seconds
        return Result(
            name=entry.competitor.name,
            title=entry.competitor.title,
            group=entry.competitor.group,
            measured_rows=len(entry.problem.hidden),
            seconds=seconds,
            spread=spread(per_row),
            ratio=naive and median(a / b for a, b in zip(naive, per_row, strict=True)),
            flops=flops,
            peak_share=flops / peak if peak else None,
            extra_bytes=entry.extra_bytes,
            verdict=entry.verdict,
            note=entry.note(len(self.problem.hidden)),
        )


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
