"""Time: calls that take turns, so that a machine that drifts drifts for all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch


class Race:
    """Calls under a name and the seconds of each, round by round."""

    def __init__(self, device: str, threads: int):
        self._device = device
        self._calls: list[tuple[Hashable, Callable[[], object]]] = []
        # CPU time leaves out what other processes take, but the times of several threads would add up.
        self.clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
        self.seconds: dict[Hashable, list[float]] = {}

    def enter(self, name: Hashable, call: Callable[[], object]) -> None:
        """Let ``call`` take part from the next round on."""
        self._calls.append((name, call))
        self.seconds[name] = []

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
