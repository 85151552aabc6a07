"""Argmax and rank of the certified lens against fp64 on real hidden states, with those of fp32 beside.

    python benchmarks/certify.py --tokens 512      # positions; rows are 31 times as many

Every layer of SmolLM2 at every position of the built-in task's documents; the target is the next token of the text.
A difference from the fp64 reference is settled by rational numbers, because the reference too rounds.
"""

from dataclasses import replace
from fractions import Fraction

import torch
from harness import options_of

from refinelens import _C, fused_lens
from refinelens.bench.competitors import naive
from refinelens.bench.problem import make_problem
from refinelens.kernels.reference import LensHead, LensStats, apply_norm, fused_lens_reference
from refinelens.view_config import BenchConfig

ROWS = 1024  # at a time


def exact_rank(x_hat, unembedding, target):
    """Rank by rational numbers where fp64 leaves it open."""
    z = unembedding.double() @ x_hat
    near = (z - z[target]).abs() <= 1e-9 * z.abs().max()
    x = [Fraction(v) for v in x_hat.tolist()]
    exact = {
        v: sum(Fraction(w) * h for w, h in zip(unembedding[v].tolist(), x, strict=True))
        for v in near.nonzero()[:, 0].tolist()
    }
    near_beating = sum(z_v > exact[target] or (z_v == exact[target] and v < target) for v, z_v in exact.items())
    return int(((z > z[target]) & ~near).sum()) + near_beating


def true_ranks(exact, certified, hidden, targets, problem):
    """Ranks of the fp64 reference, but where the certified differ those of rational numbers; and how many of these."""
    ranks = exact.target_rank.clone()
    x_hat = apply_norm(hidden, problem.norm, torch.float64)
    open_rows = (certified.target_rank != exact.target_rank).nonzero()[:, 0].tolist()
    for row in open_rows:
        ranks[row] = exact_rank(x_hat[row], problem.unembedding, int(targets[row]))
    return ranks, len(open_rows)


def main() -> None:
    """Compare block by block, then print what differs."""
    tokens = options_of(__doc__, tokens=512).tokens
    problem = make_problem(BenchConfig(device="cpu", model="smollm2", rows=31 * tokens))
    mismatches, worst, settled, fell_back = {}, 0.0, 0, 0
    for hidden, targets in zip(problem.hidden.split(ROWS), problem.targets.split(ROWS), strict=True):
        exact = fused_lens_reference(hidden, LensHead(problem.unembedding, problem.norm), targets, dtype=torch.float64)
        answers = {
            precision: fused_lens(hidden, problem.unembedding, problem.norm, targets, precision=precision)
            for precision in ("certified", "fp32")
        }
        certified = answers["certified"]
        answers["torch, fp32"] = LensStats(**naive(replace(problem, hidden=hidden, targets=targets)))
        ranks, n_settled = true_ranks(exact, certified, hidden, targets, problem)
        settled += n_settled
        fell_back += int(certified.fell_back.sum())
        error = (certified.logsumexp - exact.logsumexp).abs()
        assert (error <= certified.logsumexp_bound).all(), "the bound does not hold"
        worst = max(worst, float(error.max()))
        for name, stats in answers.items():
            found = torch.stack([(stats.argmax != exact.argmax).sum(), (stats.target_rank != ranks).sum()])
            mismatches[name] = mismatches.get(name, 0) + found
    kernels = _C.screen_kernels(problem.hidden.shape[1])[0]
    print(f"{len(problem.hidden)} rows, {len(problem.unembedding)} tokens, {kernels}")
    for name, (argmax, rank) in mismatches.items():
        print(f"{name}: {argmax} argmax and {rank} rank mismatches")
    print(f"{settled} ranks of the fp64 reference were settled by rational numbers; {fell_back} rows fell back")
    print(f"largest error of logsumexp {worst:.1e}, within its bound in every row")


if __name__ == "__main__":
    main()
