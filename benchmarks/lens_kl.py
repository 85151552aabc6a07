"""The gradient of a layer's divergence from the output, forward and backward: `python benchmarks/lens_kl.py`.

    python benchmarks/lens_kl.py [--layers 12] [--positions 32] [--rounds 5] [--softcap 0]

``lens_kl`` beside what is used instead: autograd over all logits, the same 64 rows at a time, and on a GPU Liger's
fused linear Jensen-Shannon loss with beta 0, which is this divergence, where ``liger-kernel`` is installed. GPT-2's
width and vocabulary, random states. Correctness first: every gradient is held against fp64 on some rows. All take
turns; medians; process CPU time on one thread on a CPU, wall time between synchronisations on a GPU. Memory is the
growth of the peak in one call.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from statistics import median

import torch
from harness import machine, options_of, turns
from torch import Tensor

from refinelens import LayerNorm, LensHead, lens_kl
from refinelens.bench.measure import torch_threads
from refinelens.bench.problem import D_MODEL, VOCAB, peak_growth, peak_growth_cuda
from refinelens.kernels.reference import apply_norm, soft_cap

CHECKED, CHUNK = 64, 64  # rows
MISS = 1e-3  # of the largest element of a gradient in fp32; bf16 states and products miss by their rounding


def log_p(states: Tensor, head: LensHead) -> Tensor:
    """Log-probabilities in the dtype of the states, fp32 after the product."""
    z = head.z(apply_norm(states, head.norm, torch.promote_types(states.dtype, torch.float32)).to(states.dtype))
    z = z.double() if states.dtype == torch.float64 else z.float()
    return soft_cap(z, head.softcap).log_softmax(-1)


def by_autograd(states: Tensor, final: Tensor, head: LensHead) -> Tensor:
    """All logits of the rows at once."""
    other = log_p(final, head)
    return (other.exp() * (other - log_p(states, head))).sum(-1)


def in_chunks(states: Tensor, final: Tensor, head: LensHead) -> Tensor:
    """Some rows at a time; each is differentiated before the next."""
    final = final.expand_as(states).reshape(-1, states.shape[-1])
    rows, gradients = states.detach().reshape(-1, states.shape[-1]), []
    for own, other in zip(rows.split(CHUNK), final.split(CHUNK), strict=True):
        own = own.clone().requires_grad_()
        by_autograd(own, other, head).sum().backward()
        gradients.append(own.grad)
    return torch.cat(gradients).view_as(states)


def by_liger(states: Tensor, final: Tensor, head: LensHead) -> Tensor:
    """Liger's loss, whose teacher has rows of its own beside every layer's; the mean over rows becomes their sum."""
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    def normed(x: Tensor) -> Tensor:
        return apply_norm(x, head.norm).to(x.dtype).reshape(-1, x.shape[-1])

    own, other = normed(states), normed(final.expand_as(states))
    return LigerFusedLinearJSD(jsd_beta=0.0)(own, head.weight, other, head.weight) * len(own)


def gradient(run, states: Tensor, final: Tensor, head: LensHead) -> Tensor:
    """By the states, of the sum over rows."""
    if run is in_chunks:
        return in_chunks(states, final, head)
    own = states.detach().clone().requires_grad_()
    run(own, final, head).sum().backward()
    return own.grad


def main() -> None:
    """Check, time and print."""
    options = options_of(__doc__, layers=12, positions=32, rounds=5, softcap=0.0)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    norm = LayerNorm(normal(D_MODEL), normal(D_MODEL))
    head = LensHead(normal(VOCAB, D_MODEL) / 8, norm, None, options.softcap or None)
    final = normal(options.positions, D_MODEL)
    states = final + normal(options.layers, options.positions, D_MODEL) / 2
    runs = {"lens_kl": lens_kl, "all logits": by_autograd, f"{CHUNK} rows at a time": in_chunks}
    if device == "cuda" and importlib.util.find_spec("liger_kernel") and not options.softcap:
        runs["Liger fused linear JSD"] = by_liger
    growth = peak_growth_cuda if device == "cuda" else peak_growth
    sizes = f"{options.layers} x {options.positions} rows x {D_MODEL} x {VOCAB}"
    print(f"{machine(device)}; {sizes}, {dtype}, softcap {head.softcap}")
    calls = {name: partial(gradient, run, states, final, head) for name, run in runs.items()}
    some = states.reshape(-1, D_MODEL)[:CHECKED], final.repeat(-(-CHECKED // len(final)), 1)[:CHECKED]
    truth = gradient(by_autograd, *(x.double() for x in some), _widened(head))
    for name, run in runs.items():
        miss = float((gradient(run, *some, head).double() - truth).abs().max() / truth.abs().max())
        if miss > (MISS if dtype == torch.float32 else 0.05):
            raise SystemExit(f"{name}: expected the gradient of fp64, got one that misses it by {miss:.2g}")
        print(f"  {name}: off fp64 by {miss:.1e} of the largest element, {growth(calls[name]) / 1e6:.0f} MB")
    medians = {name: median(seconds) for name, seconds in turns(calls, options.rounds, device).items()}
    for name, seconds in medians.items():
        print(f"  {name}: {1e3 * seconds:.1f} ms, {seconds / medians['lens_kl']:.2f} times lens_kl")


def _widened(head: LensHead) -> LensHead:
    norm = head.norm
    assert isinstance(norm, LayerNorm)
    return LensHead(head.weight.double(), LayerNorm(norm.weight.double(), norm.bias.double()), None, head.softcap)


if __name__ == "__main__":
    with torch_threads(1):
        main()
