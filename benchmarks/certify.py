"""Argmax and rank of the certified lens against fp64 on real hidden states, with those of fp32 beside.

    python benchmarks/certify.py --tokens 512

Every layer of SmolLM2 at every position of the built-in task's documents; the target is the next token of the text.
A difference from the fp64 twin is settled by rational numbers, because the twin too rounds.
"""

import argparse
import time
from fractions import Fraction

import torch

from refinelens import LogitLens, fused_lens
from refinelens.kernels.lens_twin import fused_lens_twin
from refinelens.kernels.norms import apply_norm
from refinelens.models import load_model
from refinelens.task import load_task

CONTEXT = 256


def real_states(n_tokens):
    """Hidden states [layer, n_tokens, d_model], their next tokens [n_tokens], and the lens."""
    loaded = load_model("smollm2", "cpu")
    lens = LogitLens.from_model(loaded.model)
    text = " ".join(document.text for question in load_task("builtin").questions for document in question.documents)
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
    ties = sum(z_v > exact[target] or (z_v == exact[target] and v < target) for v, z_v in exact.items())
    return int(((z > z[target]) & ~near).sum()) + ties


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512, help="positions; rows are 31 times as many (default: 512)")
    n_tokens = parser.parse_args().tokens
    hidden, targets, lens = real_states(n_tokens)
    parts = lens.parts
    options = {"norm": parts.norm, "bias": parts.bias, "softcap": parts.softcap, "logit_scale": parts.logit_scale}
    rows, counts = 0, {"certified": [0, 0], "fp32": [0, 0], "torch fp32": [0, 0]}
    worst, bound, seconds, settled, fell_back = 0.0, 0.0, 0.0, 0, 0
    for layer in hidden:
        exact = fused_lens_twin(layer, parts.unembedding, targets=targets, dtype=torch.float64, **options)
        start = time.process_time()
        certified = fused_lens(layer, parts.unembedding, targets=targets, precision="certified", **options)
        seconds += time.process_time() - start
        true_rank = exact.target_rank.clone()
        x_hat = apply_norm(layer, parts.norm, torch.float64)
        for row in (certified.target_rank != exact.target_rank).nonzero()[:, 0].tolist():
            true_rank[row] = exact_rank(x_hat[row], parts.unembedding, int(targets[row]))
            settled += 1
        fp32 = fused_lens(layer, parts.unembedding, targets=targets, precision="fp32", **options)
        logits = apply_norm(layer, parts.norm) @ parts.unembedding.T
        naive_rank = (logits > logits.gather(1, targets[:, None])).sum(-1)
        answers = {
            "certified": (certified.argmax, certified.target_rank),
            "fp32": (fp32.argmax, fp32.target_rank),
            "torch fp32": (logits.argmax(-1), naive_rank),
        }
        for name, (argmax, rank) in answers.items():
            counts[name][0] += int((argmax != exact.argmax).sum())
            counts[name][1] += int((rank != true_rank).sum())
        error = (certified.logsumexp - exact.logsumexp).abs()
        assert (error <= certified.logsumexp_bound).all()
        worst, bound = max(worst, float(error.max())), max(bound, float(certified.logsumexp_bound.max()))
        fell_back += int(certified.fell_back.sum())
        rows += len(layer)
    print(f"{rows} rows, vocabulary {len(parts.unembedding)}, certified in {seconds:.1f} s of processor time")
    for name, (argmax, rank) in counts.items():
        print(f"{name}: {argmax} argmax and {rank} rank mismatches")
    print(f"{settled} ranks of the fp64 twin settled by rational numbers; {fell_back} rows fell back")
    print(f"logsumexp: largest error {worst:.2e}, largest bound {bound:.2e}")


if __name__ == "__main__":
    main()
