"""What the Jacobian of a prompt costs beside the estimator as it was published.

    OMP_NUM_THREADS=1 python benchmarks/jacobian.py [--model smollm2] [--from-layer 27] [--tokens 128] [--rounds 2]

The published estimator runs the prompt as a batch of 8, keeps the graph, and passes backwards once for every 8 output
dimensions. Ours runs it once, from the keys and values of the positions that are left out, and batches gradients.
Correctness first: both must give the same matrices to fp32 rounding. Takes turns, prints medians of process CPU time on
one thread.
"""

from __future__ import annotations

from statistics import median

import torch
from harness import machine, options_of, turns

from refinelens.bench.measure import torch_threads
from refinelens.data.texts import load_text
from refinelens.fitting.jacobian import SKIPPED, JacobianEstimator, _frozen, _graph
from refinelens.fitting.text import sequences
from refinelens.lens.logit_lens import LogitLens
from refinelens.model.hooks import run_base
from refinelens.model.loading import load_model

AT_ONCE = 8  # output dimensions of a backward pass, which is the published default
GOAL = 1.5


def published(lens: LogitLens, ids: list[int], from_layer: int) -> torch.Tensor:
    """``[n_layers - from_layer, d_model, d_model]``."""
    with _frozen(lens.model), _graph(lens.blocks, from_layer) as streams:
        run_base(lens.model, torch.tensor([ids] * AT_ONCE), gradients=True)
    valid, rows = torch.arange(SKIPPED, len(ids) - 1), torch.arange(AT_ONCE)[:, None]
    jacobian = torch.empty(len(streams) - 1, lens.d_model, lens.d_model)
    cotangent = torch.zeros_like(streams[-1])
    for first in range(0, lens.d_model, AT_ONCE):
        cotangent.zero_()
        cotangent[rows, valid, first + rows] = 1.0
        gradients = torch.autograd.grad(streams[-1], streams[:-1], cotangent, retain_graph=True)
        jacobian[:, first : first + AT_ONCE] = torch.stack([own[:, valid].mean(1) for own in gradients])
    return jacobian


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, model="smollm2", from_layer=27, tokens=128, rounds=2)
    loaded = load_model(options.model, "cpu")
    lens = LogitLens(loaded.model)
    (ids,) = sequences(load_text("builtin" if options.model != "tiny" else "tiny"), loaded.tokenizer, options.tokens, 1)
    estimate = JacobianEstimator(lens, options.from_layer)
    wanted, found = published(lens, ids, options.from_layer), estimate(ids)
    error = float((found - wanted).abs().max() / wanted.abs().max())
    if error > 1e-5:
        raise SystemExit(f"expected equal Jacobians, got a difference of {error:.1e} of the largest number")
    runs = {"published": lambda: published(lens, ids, options.from_layer), "ours": lambda: estimate(ids)}
    seconds = {name: median(times) for name, times in turns(runs, options.rounds).items()}
    print(f"{machine()}; {options.model}, {len(ids)} tokens, layers {options.from_layer} to {lens.n_layers - 1}")
    print(f"largest difference {error:.1e}; published {seconds['published']:.1f} s, ours {seconds['ours']:.1f} s")
    print(f"published / ours: {seconds['published'] / seconds['ours']:.2f} (goal: at least {GOAL})")


if __name__ == "__main__":
    with torch_threads(1):
        main()
