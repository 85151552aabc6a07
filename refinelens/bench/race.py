"""Time: calls that take turns, so that a machine that drifts drifts for all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class Race:
    """Named calls and the seconds of each, round by round."""

    def __init__(self, calls: Mapping[str, Callable[[], object]], device: str, threads: int):
        self._calls = list(calls.items())
        self._device = device
        # Time that other processes take does not count, but then threads would add up.
        self.clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
        self.seconds: dict[str, list[float]] = {name: [] for name in calls}

    def round(self) -> None:
        """Call each once, every other round in reverse."""
        for name, call in self._calls:
            self.seconds[name].append(self.time(call))
        self._calls.reverse()

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call."""
        self._wait()
        start = self.clock()
        call()
        self._wait()
        return self.clock() - start

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run the block with this many threads, and restore what was set."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
