"""Divergences from the output beside the lens on a CPU, and the averaged unembedding beside torch's attention.

    python benchmarks/divergences.py [--layers 13] [--positions 256] [--rounds 5]

Correctness first, against fp64. Random layers that come ever closer to the output, GPT-2's width and vocabulary; the
averages with a vocabulary of 49,152. One thread, process CPU time, medians of calls that take turns.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median

import torch
from harness import Goal, goal_table, machine, options_of, turns
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from refinelens import LayerNorm, fused_lens, jsd_to_final, kl_to_final
from refinelens.bench.measure import torch_threads
from refinelens.kernels.reference import LensHead, LensStats, apply_norm
from refinelens.op.cpu import mean_unembedding_cpu, product_only

D_MODEL, VOCAB = 768, 50257
AVERAGES = [(rows, d_model) for rows in (128, 1024) for d_model in (576, 768)]
AVERAGES_VOCAB, CHUNK, CHECKED_ROWS = 49152, 256, 8
CAP = 30.0
DIVERGENCES = {
    "kl": (kl_to_final, None, "KL from the output: (lens + it) / lens"),
    "jsd": (jsd_to_final, None, "JSD: (lens + it) / lens"),
    "capped": (kl_to_final, CAP, "KL under a softcap: (lens + it) / lens"),
}
GOALS = [
    *(Goal(name, text, {"kl": 1.2}.get(name, 2.3)) for name, (_, _, text) in DIVERGENCES.items()),
    *(
        Goal(f"{rows}x{d_model}/{other}", f"averages, {rows} x {d_model}: time over {title}", 1.0)
        for rows, d_model in AVERAGES
        for other, title in (("mm", "mm, softmax, mm"), ("attention", "attention of torch"))
    ),
]


def by_products(x_hat: Tensor, weight: Tensor) -> Tensor:
    """Mean weights by whole logits of some rows at a time."""
    return torch.cat([torch.mm(torch.softmax(rows @ weight.T, -1), weight) for rows in x_hat.split(CHUNK)])


def by_attention(x_hat: Tensor, weight: Tensor) -> Tensor:
    """Mean weights by what torch has for keys and values."""
    query, keys = x_hat[None, None], weight[None, None]
    return scaled_dot_product_attention(query, keys, keys, scale=1.0)[0, 0]


def averages(rows: int, d_model: int, rounds: int) -> dict[str, float]:
    """Seconds of each way; exits where one is off fp64."""
    generator = torch.Generator().manual_seed(0)
    x_hat = torch.randn(rows, d_model, generator=generator)
    weight = torch.randn(AVERAGES_VOCAB, d_model, generator=generator) * 3 / d_model**0.5
    ways: dict[str, Callable[[], object]] = {
        "own": lambda: mean_unembedding_cpu(x_hat, LensHead(weight))[0],
        "mm": lambda: by_products(x_hat, weight),
        "attention": lambda: by_attention(x_hat, weight),
        "our product": lambda: product_only(x_hat, weight),
    }
    some, wide = x_hat[:CHECKED_ROWS], weight.double()
    exact = torch.softmax(some.double() @ wide.T, -1) @ wide
    for name in ("own", "mm", "attention"):
        off = float((ways[name]()[:CHECKED_ROWS] - exact).abs().max() / exact.abs().max())
        if off > 1e-5:
            raise SystemExit(f"{name}: expected mean weights within 1e-5 of fp64, got {off:.1e}")
    return {name: median(seconds) for name, seconds in turns(ways, rounds).items()}


def check_divergences(hidden: Tensor, stats: LensStats, head: LensHead, name: str) -> None:
    """Exits where that of some positions is off fp64."""
    x_hat = apply_norm(hidden[:, :CHECKED_ROWS], head.norm, torch.float64)
    logits = x_hat @ head.weight.double().T
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_p = logits.log_softmax(-1)
    p, mean = log_p.exp(), ((log_p.exp() + log_p[-1].exp()) / 2).log()
    if name == "jsd":
        exact = (p * (log_p - mean) + p[-1] * (log_p[-1] - mean)).sum(-1) / 2
    else:
        exact = (p[-1] * (log_p[-1] - log_p)).sum(-1)
    off = float((DIVERGENCES[name][0](hidden, stats, head)[:, :CHECKED_ROWS] - exact).abs().max())
    slack = 2e-6 * float(stats.logsumexp.max())  # the rounding of fp32 products is that of plain torch
    if off > slack:
        raise SystemExit(f"{name}: expected divergences within {slack:.1e} of fp64, got {off:.1e}")


def divergences(n_layers: int, positions: int, rounds: int) -> dict[str, float]:
    """Seconds of the lens, with and without a softcap, and of each divergence."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(n_layers, positions, D_MODEL, generator=generator)
    hidden = (steps / torch.arange(1.0, n_layers + 1)[:, None, None]).cumsum(0)
    weight = torch.randn(VOCAB, D_MODEL, generator=generator) * 3 / D_MODEL**0.5
    norm = LayerNorm(torch.rand(D_MODEL, generator=generator) + 0.5, torch.randn(D_MODEL, generator=generator) / 8)
    calls: dict[str, Callable[[], object]] = {}
    for name, (divergence, cap, _) in DIVERGENCES.items():
        head = LensHead(weight, norm, softcap=cap)
        stats = fused_lens(hidden, head)
        check_divergences(hidden, stats, head, name)
        calls[f"lens {cap}"] = lambda head=head: fused_lens(hidden, head, precision="fp32")
        calls[name] = lambda divergence=divergence, stats=stats, head=head: divergence(hidden, stats, head)
    return {name: median(seconds) for name, seconds in turns(calls, rounds).items()}


def main() -> int:
    """Measure, and print seconds and goals; exit code 1 where one is missed."""
    options = options_of(__doc__, layers=13, positions=256, rounds=5)
    seconds = divergences(options.layers, options.positions, options.rounds)
    print(f"{machine()}; {options.layers} x {options.positions} rows, D {D_MODEL}, V {VOCAB}")
    print(", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items()))
    found: dict[str, float | None] = {
        name: 1 + seconds[name] / seconds[f"lens {cap}"] for name, (_, cap, _) in DIVERGENCES.items()
    }
    for rows, d_model in AVERAGES:
        times = averages(rows, d_model, options.rounds)
        print(f"averages, {rows} x {d_model}: " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in times.items()))
        found |= {f"{rows}x{d_model}/{other}": times["own"] / times[other] for other in ("mm", "attention")}
    print(f"\n{goal_table(GOALS, found)}")
    return 0 if all((found[goal.key] or 0) <= goal.must for goal in GOALS) else 1


if __name__ == "__main__":
    with torch_threads(1), torch.no_grad():
        sys.exit(main())
