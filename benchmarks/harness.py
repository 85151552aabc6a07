"""What the measurements here share: options, the machine, turns, goals and their table, the clock of a GPU.

Tables are those of `refinelens.bench.table.aligned`.
"""

from __future__ import annotations

import random
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch

from refinelens.bench.measure import take_turns
from refinelens.machine import device_name

if TYPE_CHECKING:
    from transformers import LlamaConfig

    from refinelens.data.prompts import Context
    from refinelens.sweeping.inputs import SweepInputs

ROUNDS = 9
SPIN_CYCLES = 3_000_000  # 1.5 ms
NOT_MEASURED = "not measured"
Times = dict[str, tuple[float, float]]  # median seconds and spread, by name


def options_of(doc: str, folder: bool = False, **defaults: str | int) -> Namespace:
    """What the command line asks of a script: an option for each default, of its type, and maybe a folder to write to.

    Args:
        doc: Docstring of the script, which says what the options are.
        folder: Whether there is one.
        defaults: By name.
    """
    parser = ArgumentParser(description=doc, formatter_class=RawDescriptionHelpFormatter)
    if folder:
        parser.add_argument("folder")
    for name, default in defaults.items():
        help = f"(default: {default})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=help)
    return parser.parse_args()


def machine(device: str = "cpu") -> str:
    """What a measurement was made on."""
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if device == "cpu" else ""
    return f"{device_name(device)}{threads}, torch {torch.__version__}"


def llama_of(
    width: int, inner: int, layers: int, heads: int, key_value_heads: int, vocabulary: int, positions: int
) -> Callable[..., LlamaConfig]:
    """Makes the configuration of a Llama of this shape."""
    from transformers import LlamaConfig  # takes a second, which most scripts do not need

    return partial(
        LlamaConfig,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
    )


def contexts_of(inputs: SweepInputs) -> list[list[Context]]:
    """Of every question, as its sweep asks them."""
    builder = inputs.builder()
    return [builder.build(question).contexts for question in inputs.questions]


def turns(
    calls: dict[Hashable, Callable[[], object]], rounds: int, device: str = "cpu", threads: int = 1
) -> dict[Hashable, list[float]]:
    """Seconds of every call, round by round, all in turn, after one of each that is not counted."""
    for call in calls.values():
        call()
    return take_turns(calls, rounds, device, threads)


@dataclass(frozen=True)
class Goal:
    """A bound on a number, an upper one unless ``at_least``, and one that would be better still."""

    key: str  # of the number in what was measured
    text: str
    must: float
    stretch: float | None = None
    at_least: bool = False
    unit: str = ""

    def row(self, measured: dict[str, float | None]) -> str:
        """A line of `goal_table`."""
        sign, value = ">=" if self.at_least else "<=", measured.get(self.key)
        bounds = ["-" if b is None else f"{sign} {b:g} {self.unit}".strip() for b in (self.must, self.stretch)]
        met = value is not None and (value >= self.must if self.at_least else value <= self.must)
        words = (NOT_MEASURED, "-") if value is None else (f"{value:.3g} {self.unit}", "yes" if met else "no")
        return f"| {' | '.join([self.text, *bounds, *words])} |"


def goal_table(goals: list[Goal], measured: dict[str, float | None]) -> str:
    """Every goal, what was measured of it and whether it is met, in Markdown."""
    heading = "| goal | must | stretch | measured | must met |\n| --- | --- | --- | --- | --- |"
    return "\n".join([heading, *(goal.row(measured) for goal in goals)])


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
