"""How long a call of the fused lens keeps the host busy, without a GPU: the kernels are compiled, and never launched.

    python benchmarks/host_time.py [--ordinary] [--rows 104] [--rounds 30]

Tensors lie on the CPU, Triton's driver is a stand-in that says it is an H100 and takes launches without passing them
on. So what is timed is our own Python and Triton's, with torch's small operators on a CPU in the place of those on a
GPU; the driver's share of a launch is not in it. Processor time of one thread, medians; the first calls compile.
``--ordinary`` keeps no plans (`refinelens.kernels.launches`): Triton makes every launch, as in a first call.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import refinelens
from refinelens.kernels import fused_lens as kernels
from refinelens.kernels.reference import LayerNorm, LensHead
from refinelens.op import backends
from refinelens.op import fused_lens as op

CALLS = 50  # a round
D_MODEL, VOCAB = 768, 50257  # GPT-2


class StandIn:
    """What Triton asks of a driver, answered for a GPU that is not there; ``launches`` has what launchers are given."""

    launches: list[tuple] = []

    def __init__(self):
        properties = dict(max_shared_mem=232_448, multiprocessor_count=132, warpSize=32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, *binary: (1, name, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        """Launches nothing."""
        return lambda *given: self.launches.append(given)


def pretend() -> None:
    """CPU tensors go the way of CUDA ones."""
    driver.set_active(StandIn())
    op.choose_backend = backends.choose_backend = lambda device_type, backend="auto": ("triton", "pretended")
    kernels.processor_count = lambda device: 132
    kernels.target_matches_main_product = lambda head, config: True


def defined(buffer: torch.Tensor) -> torch.Tensor:
    """Nothing is computed, and results shall not be what was left over in memory."""
    return buffer if buffer.nbytes > 2**14 else buffer.zero_()


def microseconds(run: Callable[[], object]) -> float:
    """Processor time of one call, the mean of a round."""
    begin = time.process_time()
    for _ in range(CALLS):
        run()
    StandIn.launches.clear()
    return (time.process_time() - begin) / CALLS * 1e6


def stages(rows: int) -> dict[str, Callable[[], object]]:
    """What a call does, each stage with all those before it."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    hidden, weight, norm = randn(rows, D_MODEL), randn(VOCAB, D_MODEL), LayerNorm(randn(D_MODEL), randn(D_MODEL))
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    head = LensHead(weight, norm)
    given = (hidden, weight, "layer", norm.weight, norm.bias, norm.eps, norm.offset, targets, None, None, 1.0)
    call = partial(refinelens.fused_lens, hidden, head, targets=targets)
    return {
        "kernels": lambda: kernels.packed_lens(hidden, head, targets),
        "torch's operator": lambda: torch.ops.refinelens.fused_lens.default(*given, "auto", "auto", False),
        "operands checked, statistics": lambda: call(check_values=False),
        "values checked": call,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=104, help="of a call: 13 layers x 8 positions")
    parser.add_argument("--ordinary", action="store_true", help="every launch as Triton makes it")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pretend()
    if options.ordinary:
        kernels.run_planned = lambda kind, operands, results, run: run()
    runs = stages(options.rows)
    torch.empty, empty = (lambda *size, dtype, **how: defined(empty(*size, dtype=dtype, **how))), torch.empty
    for run in runs.values():
        run()
    StandIn.launches.clear()
    runs["kernels"]()
    launches = len(StandIn.launches)
    taken = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            taken[name].append(microseconds(run))
    print(f"{options.rows} rows, torch {torch.__version__}, Triton {triton.__version__}, {launches} launches a call")
    before = 0.0
    for name, values in taken.items():
        total = median(values)
        print(f"{name:30} {total:7.1f} us {total - before:+8.1f}    least {min(values):7.1f}")
        before = total


if __name__ == "__main__":
    main()
