"""Argmax and rank of the certified lens against fp64 on real hidden states, with those of fp32 beside.

    python benchmarks/certify.py --tokens 512

Every layer of SmolLM2 at every position of the built-in task's documents; the target is the next token of the text.
A difference from the fp64 twin is settled by rational numbers, because the twin too rounds.
"""

import argparse
from fractions import Fraction

import torch

from refinelens import _C, LogitLens, fused_lens
from refinelens.kernels.lens_twin import fused_lens_twin
from refinelens.kernels.norms import apply_norm
from refinelens.lens import LensStats
from refinelens.models import load_model
from refinelens.task import load_task

CONTEXT = 256


def real_states(n_tokens):
    """Hidden states [layer, n_tokens, d_model], their next tokens [n_tokens], and the lens."""
    loaded = load_model("smollm2", "cpu")
    lens = LogitLens.from_model(loaded.model)
    text = " ".join(question.gold.text for question in load_task("builtin").questions)
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    states, targets = [], []
    for start in range(0, n_tokens, CONTEXT):
        chunk = ids[:, start : min(start + CONTEXT, n_tokens) + 1]
        states.append(lens.hidden(chunk[:, :-1], torch.arange(chunk.shape[1] - 1))[:, 0])
        targets.append(chunk[0, 1:])
    return torch.cat(states, 1), torch.cat(targets), lens


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


def true_ranks(exact, answers, layer, targets, parts):
    """Ranks of the fp64 twin, but where an answer differs those of rational numbers; and how many of these."""
    ranks = exact.target_rank.clone()
    x_hat = apply_norm(layer, parts.norm, torch.float64)
    open_rows = (answers["certified"].target_rank != exact.target_rank).nonzero()[:, 0].tolist()
    for row in open_rows:
        ranks[row] = exact_rank(x_hat[row], parts.unembedding, int(targets[row]))
    return ranks, len(open_rows)


def naive(layer, targets, parts):
    """All logits in fp32, and the target's among them."""
    logits = apply_norm(layer, parts.norm) @ parts.unembedding.T
    return LensStats(
        argmax=logits.argmax(-1),
        max_logit=logits.amax(-1),
        logsumexp=logits.logsumexp(-1),
        entropy=torch.distributions.Categorical(logits=logits).entropy(),
        target_rank=(logits > logits.gather(1, targets[:, None])).sum(-1),
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="positions; rows are 31 times as many (default: 512)")
    hidden, targets, lens = real_states(parser.parse_args().tokens)
    parts = lens.parts
    mismatches, worst, settled, fell_back = {}, 0.0, 0, 0
    for layer in hidden:
        exact = fused_lens_twin(layer, parts.unembedding, parts.norm, targets, dtype=torch.float64)
        answers = {
            precision: fused_lens(layer, parts.unembedding, parts.norm, targets, precision=precision)
            for precision in ("certified", "fp32")
        }
        certified = answers["certified"]
        answers["torch, fp32"] = naive(layer, targets, parts)
        ranks, n_settled = true_ranks(exact, answers, layer, targets, parts)
        settled += n_settled
        fell_back += int(certified.fell_back.sum())
        error = (certified.logsumexp - exact.logsumexp).abs()
        assert (error <= certified.logsumexp_bound).all(), "the bound does not hold"
        worst = max(worst, float(error.max()))
        for name, stats in answers.items():
            found = torch.stack([(stats.argmax != exact.argmax).sum(), (stats.target_rank != ranks).sum()])
            mismatches[name] = mismatches.get(name, 0) + found
    print(f"{hidden[..., 0].numel()} rows, {len(parts.unembedding)} tokens, {_C.screen_kernels(hidden.shape[-1])[0]}")
    for name, (argmax, rank) in mismatches.items():
        print(f"{name}: {argmax} argmax and {rank} rank mismatches")
    print(f"{settled} ranks of the fp64 twin were settled by rational numbers; {fell_back} rows fell back")
    print(f"largest error of logsumexp {worst:.1e}, within its bound in every row")


if __name__ == "__main__":
    main()
