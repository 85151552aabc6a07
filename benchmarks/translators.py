"""What a lens with translators costs beside the plain one: the op at GPT-2's width, all layers.

    python benchmarks/translators.py [--positions 32] [--rounds 5]

Both read the same random states, translated ones within `LogitLens.read`, block by block. Correctness first:
translators of zeros must give the plain reading. Takes turns, prints medians; process CPU time on one thread
on a CPU, wall time between synchronisations on a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.translators import Translators
from refinelens.model.head import LensHead

D_MODEL, VOCAB, N_LAYERS = 768, 50257, 12


def main() -> None:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden, targets = (
        normal(N_LAYERS + 1, 1, options.positions, D_MODEL),
        torch.arange(options.positions, device=device),
    )
    head = LensHead(normal(VOCAB, D_MODEL) / D_MODEL**0.5)
    lens = object.__new__(LogitLens)  # no model is run
    lens.blocks = torch.nn.ModuleList([torch.nn.Identity()] * N_LAYERS)
    lens.head, lens.backend, lens.tokenizer, lens.name, lens.translators = head, "auto", None, "plain", None
    maps = Translators(normal(N_LAYERS, D_MODEL, D_MODEL) / D_MODEL**0.5, normal(N_LAYERS, D_MODEL))
    zeros = Translators(torch.zeros_like(maps.weight), torch.zeros_like(maps.bias))
    plain, same = (lens.read_states(hidden, targets, t, kl=False).stats for t in (None, zeros))
    if not torch.equal(plain.argmax, same.argmax) or not torch.equal(plain.target_rank, same.target_rank):
        raise SystemExit("expected translators of zeros to change nothing, got another argmax or rank")
    seconds: dict[str, list[float]] = {"plain": [], "translated": []}
    for _ in range(options.rounds + 1):
        for name, translators in (("plain", None), ("translated", maps)):
            seconds[name].append(_seconds(lambda t=translators: lens.read_states(hidden, targets, t, kl=False), device))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}  # the first of each warms up
    rows = (N_LAYERS + 1) * options.positions
    extra = 2 * N_LAYERS * options.positions * D_MODEL**2 / (2 * rows * D_MODEL * VOCAB)
    print(
        f"{device}, {dtype}, {rows} rows, D {D_MODEL}, V {VOCAB}: "
        + ", ".join(f"{n} {s:.3f} s" for n, s in medians.items())
    )
    print(f"translated / plain: {medians['translated'] / medians['plain']:.3f} (extra FLOPs {100 * extra:.1f} %)")


def _seconds(call, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        call()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
