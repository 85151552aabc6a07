"""Benchmark of the fused lens beside the torch expressions it replaces: correctness first, then time.

    make bench

Every round of a competitor is preceded by a round of the naive expression on the same data, so that the
ratio holds when the machine's speed drifts; the naive expression against itself shows the noise. On a CPU:
one thread, process CPU time. On CUDA: wall-clock time around a synchronised call.
"""

import ctypes
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from torch.nn import functional as F

import refinelens
from refinelens.kernels.lens_twin import fused_lens_twin
from refinelens.manifest import device_name

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
CLOCK = time.perf_counter if CUDA else time.process_time

# rows = layers x positions, d_model, vocab_size, dtype
CPU_SHAPES = {
    "gpt2-13x32": (13 * 32, 768, 50257, torch.float32),
    "smollm2-31x1": (31, 576, 49152, torch.float32),
}
GPU_SHAPES = {
    "gpt2-13x8": (13 * 8, 768, 50257, torch.bfloat16),
    "gpt2-13x1024": (13 * 1024, 768, 50257, torch.bfloat16),
    "smollm2-31x1024": (31 * 1024, 576, 49152, torch.bfloat16),
    "llama3-8b-33x8": (33 * 8, 4096, 128256, torch.bfloat16),
    "llama3-8b-33x1024": (33 * 1024, 4096, 128256, torch.bfloat16),
}
SHAPES = GPU_SHAPES if CUDA else CPU_SHAPES
FUSED = ("twin", "triton") if CUDA else ("twin", "cpp")


@pytest.fixture(scope="module", params=SHAPES)
def problem(request):
    rows, d_model, vocab, dtype = SHAPES[request.param]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    targets = torch.randint(0, vocab, (rows,), generator=generator, device=DEVICE)
    norm = refinelens.LayerNorm(randn(d_model), randn(d_model))
    return request.param, randn(rows, d_model), randn(vocab, d_model) / d_model**0.5, norm, targets


def matrix_product(hidden, unembedding, norm, targets):
    """The floor: the logits alone, no statistics."""
    return hidden @ unembedding.T


def naive(hidden, unembedding, norm, targets):
    """What people write: all logits, then one reduction after the other."""
    x_hat = F.layer_norm(hidden, hidden.shape[-1:], norm.weight, norm.bias, norm.eps)
    logits = (x_hat @ unembedding.T).float()
    maximum = logits.max(-1)
    target_logit = logits.gather(-1, targets[:, None])
    rank = (logits > target_logit).sum(-1)
    logsumexp = logits.logsumexp(-1)
    log_p = logits - logsumexp[:, None]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return maximum.indices, maximum.values, logsumexp, entropy, target_logit[:, 0], rank


def fused(backend):
    def run(hidden, unembedding, norm, targets):
        stats = refinelens.fused_lens(hidden, unembedding, norm, targets, backend=backend)
        return (
            stats.argmax, stats.max_logit, stats.logsumexp, stats.entropy, stats.target_logit, stats.target_rank
        )  # fmt: skip

    run.__name__ = backend
    return run


COMPETITORS = [matrix_product, naive, *map(fused, FUSED)]


@pytest.mark.parametrize("competitor", COMPETITORS, ids=lambda c: c.__name__)
def test_fused_lens(benchmark, problem, competitor):
    name, *arguments = problem
    hidden, unembedding, _, _ = arguments
    rows, d_model = hidden.shape
    flops = 2 * rows * d_model * len(unembedding)
    moved = (hidden.numel() + unembedding.numel()) * hidden.element_size() + rows * 6 * 8
    benchmark.group = name
    benchmark.extra_info.update(shape=name, competitor=competitor.__name__, flops=flops, bytes=moved)
    try:
        peak = peak_memory(competitor, arguments)
    except torch.OutOfMemoryError:
        pytest.skip(f"{competitor.__name__} does not fit into the GPU's memory at {name}")
    benchmark.extra_info["peak_memory"] = peak
    if competitor is not matrix_product:
        benchmark.extra_info["mismatches"] = check(competitor, arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    baseline = []

    def before_each_round():
        baseline.append(timed(naive, arguments))

    seconds = []
    benchmark.pedantic(lambda: seconds.append(timed(competitor, arguments)), setup=before_each_round, rounds=7)
    torch.set_num_threads(threads)
    benchmark.extra_info.update(
        naive_over_this=median(baseline) / median(seconds),
        median_seconds=median(seconds),
        spread=(max(seconds) - min(seconds)) / median(seconds),
        device=device_name(DEVICE),
        torch=torch.__version__,
    )


def timed(run, arguments):
    if CUDA:
        torch.cuda.synchronize()
    start = CLOCK()
    run(*arguments)
    if CUDA:
        torch.cuda.synchronize()
    return CLOCK() - start


def check(run, arguments):
    """Rows whose argmax or rank differs from fp64, over at most 512 rows; the rest must be near.

    Half-precision naive logits are rounded before they are compared, so they may differ on many rows.
    """
    hidden, unembedding, norm, targets = arguments
    hidden, targets = hidden[:512], targets[:512]
    ours = run(hidden, unembedding, norm, targets)
    exact = fused_lens_twin(hidden, unembedding, norm, targets, dtype=torch.float64)
    tolerance = 2e-4 if hidden.dtype == torch.float32 else 0.1
    for value, truth in zip(ours[1:5], exact[1:5], strict=True):
        assert (value.double() - truth).abs().max() < tolerance
    return {
        "rows": len(hidden),
        "argmax": int((ours[0] != exact.argmax).sum()),
        "rank": int((ours[5] != exact.target_rank).sum()),
    }


def peak_memory(run, arguments):
    """Bytes that a first call needs beyond its arguments; two rows load the libraries before it."""
    hidden, unembedding, norm, targets = arguments
    run(hidden[:2], unembedding, norm, targets[:2])
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(*arguments)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # else freed pages of earlier competitors are used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak of the resident set
    before = resident("VmRSS")
    run(*arguments)
    return resident("VmHWM") - before


def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
