"""What several targets a row cost beside one: logits and ranks of all from one product, on a CPU by C++.

    OMP_NUM_THREADS=1 python benchmarks/targets.py [--rows 416] [--d-model 768] [--vocab 50257] [--rounds 11]

Correctness first: every target has the logit and the rank that it has alone, bit for bit. Takes turns, prints medians
of the process CPU time on one thread.
"""

from __future__ import annotations

from statistics import median

import torch
from harness import machine, options_of, turns

from refinelens import LayerNorm, LensHead, fused_lens
from refinelens.bench.measure import torch_threads
from refinelens.op.backends import choose_precision, instruction_set
from refinelens.op.vocabulary import MOST_TARGETS, fused_lens_targets

COUNTS = (2, 4, MOST_TARGETS)
GOAL = 1.1  # of two targets


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, rows=416, d_model=768, vocab=50257, rounds=11)
    rows, d_model, vocab = options.rows, options.d_model, options.vocab
    if choose_precision("cpp", "cpu", rows=rows, d_model=d_model)[0] != "fp32":
        raise SystemExit("rows: expected so few that this processor takes them in fp32, got more; pass fewer")
    generator = torch.Generator().manual_seed(0)
    hidden, unembedding = (torch.randn(n, d_model, generator=generator) for n in (rows, vocab))
    ids = torch.randint(vocab, (rows, MOST_TARGETS), generator=generator)
    head = LensHead(unembedding, LayerNorm(torch.ones(d_model), torch.zeros(d_model)))

    def one(i=0):
        return fused_lens(hidden, head, targets=ids[:, i])

    stats, several = fused_lens_targets(hidden, head, ids)
    for i in range(MOST_TARGETS):
        alone = one(i)
        pairs = ((alone.target_rank, several.rank[:, i]), (alone.target_logit, several.logit[:, i]))
        if not all(torch.equal(*pair) for pair in (*pairs, (alone.logsumexp, stats.logsumexp))):
            raise SystemExit(f"expected the bits of target {i} alone, got others")

    calls = {1: one} | {n: lambda n=n: fused_lens_targets(hidden, head, ids[:, :n]) for n in COUNTS}
    seconds = {n: median(times) for n, times in turns(calls, options.rounds).items()}
    print(f"{machine()}; {instruction_set()}; {rows} rows x {d_model} x {vocab}, {options.rounds} rounds")
    for n, own in seconds.items():
        print(f"{n} target{'s' if n > 1 else ''}: {own * 1e3:.1f} ms, {own / seconds[1]:.3f} times one")
    print(f"2 targets / 1: {seconds[2] / seconds[1]:.3f} (goal: at most {GOAL})")


if __name__ == "__main__":
    with torch_threads(1):
        main()
