"""The lens of a few rows on a CPU beside torch: `python benchmarks/few_rows.py [--rows 1,2,4,8,16] [--rounds 25]`.

torch's side is what one writes by hand: layer_norm, F.linear, argmax and logsumexp. GPT-2's width and vocabulary, fp32.
Correctness first. One thread, process CPU time, medians of calls that take turns. One row is bound by reading the
unembedding, 154 MB, once.
"""

from __future__ import annotations

from statistics import median

import torch
from harness import Goal, goal_table, machine, options_of, turns
from torch.nn.functional import layer_norm, linear

from refinelens import LayerNorm, fused_lens
from refinelens.bench.measure import torch_threads
from refinelens.op.cpu import product_only

D_MODEL, VOCAB = 768, 50257


def main() -> None:
    """Measure, and print milliseconds and goals."""
    options = options_of(__doc__, rows="1,2,4,8,16", rounds=25)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, D_MODEL, generator=generator) * 3 / D_MODEL**0.5
    norm = LayerNorm(torch.rand(D_MODEL, generator=generator) + 0.5, torch.randn(D_MODEL, generator=generator))
    goals, found = [], {}
    print(machine())
    for rows in map(int, options.rows.split(",")):
        hidden = torch.randn(rows, D_MODEL, generator=generator)

        def by_hand(hidden=hidden):
            logits = linear(layer_norm(hidden, (D_MODEL,), norm.weight, norm.bias, norm.eps), weight)
            return logits.argmax(-1), logits.logsumexp(-1)

        stats, (argmax, logsumexp) = fused_lens(hidden, weight, norm), by_hand()
        if not torch.equal(stats.argmax, argmax) or (stats.logsumexp - logsumexp).abs().max() > 1e-4:
            raise SystemExit(f"{rows} rows: expected the argmax and logsumexp of torch, got others")
        calls = {
            "ours": lambda hidden=hidden: fused_lens(hidden, weight, norm, precision="fp32"),
            "torch": by_hand,
            "linear of torch": lambda hidden=hidden: linear(hidden, weight),
            "our product": lambda hidden=hidden: product_only(hidden, weight),
        }
        times = {name: median(seconds) for name, seconds in turns(calls, options.rounds).items()}
        print(f"{rows} rows: " + ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in times.items()))
        goals.append(Goal(str(rows), f"{rows} rows: time over torch", 1.0))
        found[str(rows)] = times["ours"] / times["torch"]
    print(f"\n{goal_table(goals, found)}")


if __name__ == "__main__":
    with torch_threads(1), torch.no_grad():
        main()
