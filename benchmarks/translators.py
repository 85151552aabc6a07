"""What a lens with translators costs beside the plain one: all layers of a GPT-2 of random weights.

    python benchmarks/translators.py [--positions 32] [--rounds 5]

Both read the same random states, translated ones within `LogitLens.read_states`, block by block. Correctness first:
translators of zeros must give the plain reading. Takes turns, prints medians; process CPU time on one thread
on a CPU, wall time between synchronisations on a GPU.
"""

from __future__ import annotations

from statistics import median

import torch
from harness import options_of, turns
from transformers import AutoModelForCausalLM, GPT2Config

from refinelens.bench.measure import torch_threads
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.translators import Translators


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, positions=32, rounds=5)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    lens = LogitLens(AutoModelForCausalLM.from_config(GPT2Config(), dtype=dtype).to(device))
    n_layers, d_model, vocab = lens.n_layers, lens.d_model, lens.head.vocab_size
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    hidden = normal(n_layers + 1, 1, options.positions, d_model)
    targets = torch.arange(options.positions, device=device)
    maps = Translators(normal(n_layers, d_model, d_model) / d_model**0.5, normal(n_layers, d_model))
    zeros = Translators(torch.zeros_like(maps.weight), torch.zeros_like(maps.bias))

    def read(translators: Translators | None):
        return lens.read_states(hidden, targets, translators, kl=False).stats

    plain, same = read(None), read(zeros)
    if not torch.equal(plain.argmax, same.argmax) or not torch.equal(plain.target_rank, same.target_rank):
        raise SystemExit("expected translators of zeros to change nothing, got another argmax or rank")
    calls = {"plain": lambda: read(None), "translated": lambda: read(maps)}
    medians = {name: median(seconds) for name, seconds in turns(calls, options.rounds, device).items()}
    rows = (n_layers + 1) * options.positions
    extra = n_layers * d_model / ((n_layers + 1) * vocab)
    times = ", ".join(f"{name} {seconds:.3f} s" for name, seconds in medians.items())
    print(f"{device}, {dtype}, {rows} rows, D {d_model}, V {vocab}: {times}")
    print(f"translated / plain: {medians['translated'] / medians['plain']:.3f} (extra FLOPs {100 * extra:.1f} %)")


if __name__ == "__main__":
    with torch_threads(1):
        main()
