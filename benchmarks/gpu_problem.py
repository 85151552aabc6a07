"""Shapes, operands, peers and clock of the measurements on a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from statistics import median

import torch
from torch import Tensor

from refinelens.bench import competitors
from refinelens.bench import problem as bench
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.reference import LayerNorm, LensHead

ROUNDS = 9
SPIN_CYCLES = 3_000_000  # 1.5 ms
CHUNK_BYTES = 2**28  # of fp32 logits in the chunked peer


@dataclass(frozen=True)
class Problem:
    """One shape in bf16: rows are layers x positions."""

    name: str
    rows: int
    d_model: int
    vocab: int

    def _randn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    @cached_property
    def hidden(self) -> Tensor:
        return self._randn(0, self.rows, self.d_model)

    @cached_property
    def unembedding(self) -> Tensor:
        return self._randn(1, self.vocab, self.d_model) / self.d_model**0.5

    @cached_property
    def norm(self) -> LayerNorm:
        return LayerNorm(self._randn(2, self.d_model), self._randn(3, self.d_model))

    @cached_property
    def targets(self) -> Tensor:
        return torch.randint(0, self.vocab, (self.rows,), device="cuda")

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.d_model * self.vocab

    def fused(self, config=None, targets: bool = True):
        """Everything, from the norm to the merge of the splits."""
        chosen = self.targets if targets else None
        return fused_lens_triton(self.hidden, LensHead(self.unembedding, self.norm), chosen, config=config)

    def product(self) -> Callable[[], Tensor]:
        """B: cuBLAS on these rows, V padded to a multiple of 64, bf16 output allocated before."""
        padded = self._randn(1, -(-self.vocab // 64) * 64, self.d_model)
        out = torch.empty(self.rows, len(padded), device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(self.hidden, padded.T, out=out)

    def naive(self) -> competitors.Statistics:
        """What people write: all logits, then one reduction after the other."""
        return competitors.naive(bench.Problem(self.hidden, self.unembedding, self.norm, self.targets))

    def chunked(self) -> list[competitors.Statistics]:
        """The same on as many rows at a time as keep their logits small."""
        size = max(1, CHUNK_BYTES // (4 * self.vocab))
        parts = zip(self.hidden.split(size), self.targets.split(size), strict=True)
        problems = (bench.Problem(hidden, self.unembedding, self.norm, targets) for hidden, targets in parts)
        return [competitors.naive(problem) for problem in problems]


def timed(runs: dict[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, tuple[float, float]]:
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
