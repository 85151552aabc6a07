"""What the measurements here share: goals and their table, the clock of a GPU, and what a line of times looks like.

On a CPU calls take turns by `refinelens.bench.measure.take_turns`, as in `refinelens bench`.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch

from refinelens.machine import device_name

ROUNDS = 9
SPIN_CYCLES = 3_000_000  # 1.5 ms
NOT_MEASURED = "not measured"
Times = dict[str, tuple[float, float]]  # median seconds and spread, by name


@dataclass(frozen=True)
class Goal:
    """A bound on a number, an upper one unless ``at_least``, and one that would be better still."""

    text: str
    measured: Callable[[dict], float | None]  # in what was measured; None where it was not
    must: float
    stretch: float | None = None
    at_least: bool = False
    unit: str = ""

    def row(self, found: dict) -> str:
        """A line of `goal_table`."""
        sign, value = ">=" if self.at_least else "<=", self.measured(found)
        bounds = (f"{sign} {bound:g} {self.unit}".strip() if bound is not None else "-"
                  for bound in (self.must, self.stretch))  # fmt: skip
        met = value is not None and (value >= self.must if self.at_least else value <= self.must)
        words = (NOT_MEASURED, "-") if value is None else (f"{value:.3g} {self.unit}", "yes" if met else "no")
        return f"| {' | '.join([self.text, *bounds, *words])} |"


def goal_table(goals: list[Goal], found: dict) -> str:
    """Every goal, what was measured of it and whether it is met, in Markdown."""
    heading = "| goal | must | stretch | measured | must met |\n| --- | --- | --- | --- | --- |"
    return "\n".join([heading, *(goal.row(found) for goal in goals)])


def machine() -> str:
    """What a measurement on one thread of a CPU was made on."""
    return f"{device_name('cpu')}, 1 thread, torch {torch.__version__}"


def device_times(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> Times:
    """Median seconds of the device and spread (of the middle half) of every run.

    All take turns, in another order every round: at this load the clock follows the power drawn just before. The device
    spins before each run while its launches are queued, so that no time is measured in which it waits for the host.
    """
    for run in runs.values():
        run()
    order, shuffle = list(runs), random.Random(0).shuffle
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(SPIN_CYCLES)
            begin.record()
            runs[name]()
            end.record()
            end.synchronize()
            seconds[name].append(begin.elapsed_time(end) / 1e3)
    return {name: (median(times), _spread(times)) for name, times in seconds.items()}


def _spread(times: list[float]) -> float:
    ordered = sorted(times)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / median(ordered)


def print_times(
    label: str, times: Times, digits: int = 3, unit: str = "ms", note: Callable[[str, float], str] | None = None
) -> None:
    """A line per run, with a note on its name and seconds."""
    for name, (seconds, spread) in times.items():
        value = f"{seconds * {'ms': 1e3, 'us': 1e6}[unit]:.{digits}f} {unit}"
        print(f"{label}: {name} {value} ({spread:.0%}){f', {note(name, seconds)}' if note else ''}")
