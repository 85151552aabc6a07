"""Cost of the op on a CPU against rows, d_model and vocabulary: `python benchmarks/scaling.py FOLDER`.

Writes scaling.csv and scaling.png to FOLDER, and prints how linear the cost is, what odd sizes cost and what
a second thread brings. All points of an axis take turns; medians; one thread and process CPU time, but for the
comparison of threads, which is by wall clock and needs two idle cores.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pandas as pd
import torch
from harness import options_of, turns
from matplotlib.figure import Figure

from refinelens.bench.bench import MEMORY_SHARE
from refinelens.bench.competitors import COMPETITORS
from refinelens.bench.measure import spread, torch_threads
from refinelens.bench.problem import Problem, available_memory, random_problem
from refinelens.machine import device_name

NAMES = ("fp32", "certified", "naive", "transformer-lens")  # the last where it is installed
ROWS, D_MODEL, VOCAB = 416, 768, 50257
AXES = {
    "rows": (1, 4, 16, 64, 256, 1024, 4096, 16384),
    "d_model": (64, 128, 256, 512, 1024, 2048, 4096),
    "vocab": (1024, 4096, 16384, 65536, 262144),
}
# A round size, and one that fills no tile, cache line or vector whole.
ODD = {"rows": (416, 417), "d_model": (768, 769), "vocab": (50304, 50257)}
ROUNDS, ODD_ROUNDS = 3, 9
LARGEST = 3  # points of an axis over which the slope is taken; below, fixed costs show


# Of a point, with the name of the competitor: median seconds of a call, and their spread, (slowest - fastest) / median.
COLUMNS = ("axis", "rows", "d_model", "vocab", "threads", "name", "seconds", "spread")


def measure() -> Iterator[tuple]:
    """A row of `COLUMNS` for every point, axis by axis."""
    for axis, sizes in AXES.items():
        yield from _points(axis, axis, sizes, NAMES, ROUNDS)
    for axis, sizes in ODD.items():
        yield from _points(f"odd {axis}", axis, sizes, ("fp32",), ODD_ROUNDS)
    yield from _threads()


def _points(label: str, axis: str, sizes: tuple[int, ...], names: tuple[str, ...], rounds: int) -> Iterator[tuple]:
    shapes = [{"rows": ROWS, "d_model": D_MODEL, "vocab": VOCAB} | {axis: size} for size in sizes]
    problems = [random_problem(**shape, dtype=torch.float32, device="cpu") for shape in shapes]
    calls = {
        (name, i): partial(COMPETITORS[name].run, problem)
        for name in names
        for i, problem in enumerate(problems)
        if _can_run(name, problem)
    }
    for (name, i), seconds in turns(calls, rounds).items():
        yield label, *shapes[i].values(), 1, name, median(seconds), spread(seconds)


def _can_run(name: str, problem: Problem) -> bool:
    competitor = COMPETITORS[name]
    needed = competitor.logits_of_a_row(problem) * len(problem.hidden)
    return competitor.obstacle(problem) is None and needed <= MEMORY_SHARE * available_memory("cpu")


def _threads() -> Iterator[tuple]:
    problem = random_problem(ROWS, D_MODEL, VOCAB, torch.float32, "cpu")

    def run_on(threads: int) -> None:
        with torch_threads(threads):
            COMPETITORS["fp32"].run(problem)

    calls = {threads: partial(run_on, threads) for threads in (1, 2)}
    for threads, seconds in turns(calls, ODD_ROUNDS, threads=2).items():
        yield "threads", ROWS, D_MODEL, VOCAB, threads, "fp32", median(seconds), spread(seconds)


def line(points: pd.DataFrame, axis: str, name: str = "fp32") -> pd.Series:
    """Seconds of a competitor by size, along an axis, also ``odd`` ones and ``threads``."""
    own = points[(points.axis == axis) & (points["name"] == name)]
    return own.set_index(axis.removeprefix("odd ")).seconds.sort_index()


def findings(points: pd.DataFrame) -> Iterator[str]:
    """The numbers behind the figure, in words."""
    for axis in AXES:
        last = line(points, axis)[-LARGEST:]
        low, high = last.index[[0, -1]]
        slope = math.log(last[high] / last[low]) / math.log(high / low)
        yield f"{axis}: cost grows with the power {slope:.2f} from {low} to {high}"
    for axis, (even, odd) in ODD.items():
        seconds = line(points, f"odd {axis}")
        cost = seconds / seconds.index
        yield f"{axis} {odd} against {even}: {cost[odd] / cost[even] - 1:+.1%} for each of them (goal: within 5 %)"
    seconds = line(points, "threads")
    yield f"2 threads: {seconds[1] / seconds[2]:.2f} times as fast as 1 (goal: 1.8 on two idle cores)"


def draw(points: pd.DataFrame, path: Path) -> None:
    """Three panels, cost against size, both logarithmic; the thin line is proportional to size."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(AXES), sharey=True)
    for panel, axis in zip(panels, AXES, strict=True):
        for name in reversed(NAMES):  # the fused kernel last, on top
            seconds = line(points, axis, name)
            if seconds.empty:
                continue
            panel.plot(seconds, marker="o", ms=4, label=COMPETITORS[name].title)
        first = seconds.index[-LARGEST:][0]  # of the points over which the slope is taken
        guide = seconds[first] * seconds.index / first
        panel.plot(seconds.index, guide, color="grey", lw=0.8, zorder=0, label="proportional to size")
        panel.set(xscale="log", yscale="log", xlabel=axis)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("seconds, one thread")
    panels[0].legend(frameon=False, fontsize=8)
    fixed = f"{ROWS} rows, d_model {D_MODEL}, vocab {VOCAB} where not varied"
    figure.suptitle(f"{device_name('cpu')}, torch {torch.__version__}; {fixed}", fontsize=9)
    figure.savefig(path, dpi=150)


def main(folder: str) -> None:
    with torch_threads(1), torch.no_grad():
        points = pd.DataFrame(measure(), columns=COLUMNS)
    points.to_csv(Path(folder) / "scaling.csv", index=False, float_format="%.4g")
    draw(points, Path(folder) / "scaling.png")
    print("\n".join(findings(points)))


if __name__ == "__main__":
    main(options_of(__doc__, folder=True).folder)
