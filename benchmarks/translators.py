"""What a lens with translators costs beside the plain one: the op at GPT-2's width, all layers.

    python benchmarks/translators.py [--positions 32] [--rounds 5]

Both read the same random states, translated ones within `LogitLens.read`, block by block. Correctness first:
translators of zeros must give the plain reading. Takes turns, prints medians; process CPU time on one thread
on a CPU, wall time between synchronisations on a GPU.
"""

from __future__ import annotations

from statistics import median

import torch
from harness import options_of, turns

from refinelens.bench.measure import torch_threads
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.translators import Translators
from refinelens.model.head import LensHead

D_MODEL, VOCAB, N_LAYERS = 768, 50257, 12


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, positions=32, rounds=5)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden = normal(N_LAYERS + 1, 1, options.positions, D_MODEL)
    targets = torch.arange(options.positions, device=device)
    head = LensHead(normal(VOCAB, D_MODEL) / D_MODEL**0.5)
    lens = object.__new__(LogitLens)  # no model is run
    lens.blocks = torch.nn.ModuleList([torch.nn.Identity()] * N_LAYERS)
    lens.head, lens.backend, lens.tokenizer, lens.name, lens.translators = head, "auto", None, "plain", None
    maps = Translators(normal(N_LAYERS, D_MODEL, D_MODEL) / D_MODEL**0.5, normal(N_LAYERS, D_MODEL))
    zeros = Translators(torch.zeros_like(maps.weight), torch.zeros_like(maps.bias))
    plain, same = (lens.read_states(hidden, targets, t, kl=False).stats for t in (None, zeros))
    if not torch.equal(plain.argmax, same.argmax) or not torch.equal(plain.target_rank, same.target_rank):
        raise SystemExit("expected translators of zeros to change nothing, got another argmax or rank")
    calls = {
        name: lambda t=translators: lens.read_states(hidden, targets, t, kl=False)
        for name, translators in (("plain", None), ("translated", maps))
    }
    medians = {name: median(seconds) for name, seconds in turns(calls, options.rounds, device).items()}
    rows = (N_LAYERS + 1) * options.positions
    extra = 2 * N_LAYERS * options.positions * D_MODEL**2 / (2 * rows * D_MODEL * VOCAB)
    times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in medians.items())
    print(f"{device}, {dtype}, {rows} rows, D {D_MODEL}, V {VOCAB}: {times}")
    print(f"translated / plain: {medians['translated'] / medians['plain']:.3f} (extra FLOPs {100 * extra:.1f} %)")


if __name__ == "__main__":
    with torch_threads(1):
        main()
