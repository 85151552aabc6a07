"""The steps of `gpu_goals.py`: each prints what it found and adds to the measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import triton
from harness import device_times, print_times
from logsumexp_only import launch_logsumexp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config

from refinelens import LogitLens, fused_lens, kl_to_final, lens_top_k
from refinelens.bench import competitors
from refinelens.bench import problem as bench
from refinelens.kernels.config import LensOptions, choose_splits, generation_of, pinned_config, processor_count
from refinelens.kernels.fused_lens import fused_lens_triton, reduce_rows, target_matches_main_product
from refinelens.kernels.graphs import GraphedLens
from refinelens.kernels.kernel import LensRows, RowStats, launch_targets
from refinelens.kernels.norm_kernel import normed_rows
from refinelens.kernels.reference import LayerNorm, LensHead, fused_lens_reference
from refinelens.kernels.search import outputs_agree

CHUNK_BYTES = 2**28  # of fp32 logits in the chunked baseline


@dataclass(frozen=True)
class Problem:
    """One shape in bf16: rows are layers x positions."""

    name: str
    rows: int
    d_model: int
    vocab: int

    def _randn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    @cached_property
    def hidden(self) -> Tensor:
        return self._randn(0, self.rows, self.d_model)

    @cached_property
    def unembedding(self) -> Tensor:
        return self._randn(1, self.vocab, self.d_model) / self.d_model**0.5

    @cached_property
    def norm(self) -> LayerNorm:
        return LayerNorm(self._randn(2, self.d_model), self._randn(3, self.d_model))

    @cached_property
    def targets(self) -> Tensor:
        return torch.randint(0, self.vocab, (self.rows,), device="cuda")

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.d_model * self.vocab

    def fused(self, config=None, targets: bool = True):
        """Everything, from the norm to the merge of the splits."""
        chosen = self.targets if targets else None
        return fused_lens_triton(self.hidden, LensHead(self.unembedding, self.norm), chosen, config=config)

    def product(self) -> Callable[[], Tensor]:
        """B: cuBLAS on these rows, V padded to a multiple of 64, bf16 output allocated before."""
        padded = self._randn(1, -(-self.vocab // 64) * 64, self.d_model)
        out = torch.empty(self.rows, len(padded), device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(self.hidden, padded.T, out=out)

    def naive(self) -> competitors.Statistics:
        """What people write: all logits, then one reduction after the other."""
        return competitors.naive(bench.Problem(self.hidden, self.unembedding, self.norm, self.targets))

    def chunked(self) -> list[competitors.Statistics]:
        """The same on as many rows at a time as keep their logits small."""
        size = max(1, CHUNK_BYTES // (4 * self.vocab))
        parts = zip(self.hidden.split(size), self.targets.split(size), strict=True)
        problems = (bench.Problem(hidden, self.unembedding, self.norm, targets) for hidden, targets in parts)
        return [competitors.naive(problem) for problem in problems]


LARGE = [
    Problem("gpt2-13x1024", 13 * 1024, 768, 50257),
    Problem("smollm2-31x1024", 31 * 1024, 576, 49152),
    Problem("llama-33x1024", 33 * 1024, 4096, 128256),
    Problem("gpt2-13x16384", 13 * 16384, 768, 50257),
]
FEW = [Problem("gpt2-13x8", 13 * 8, 768, 50257), Problem("llama-33x8", 33 * 8, 4096, 128256)]
CHECKED_ROWS = 256
DEVICE = torch.device("cuda")


def run_all() -> dict[str, float]:
    """All steps in order; the first one decides whether the others mean anything, any other may fail alone."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}\n")
    measured: dict[str, float] = {"rank0": 0, "bits": 0, "failed": 0}
    for problem in [*FEW, *LARGE]:
        correctness(problem, measured)
    if measured["rank0"]:
        return measured
    steps = [(target_bits,), (few_rows,)]
    steps += [(step, problem) for problem in LARGE for step in (against_product, breakdown)]
    steps += [(step, problem) for problem in (LARGE[0], LARGE[2]) for step in (statistics, against_torch)]
    steps += [(beside_the_lens, LARGE[0]), (shares_of_a_model,)]
    steps += [(configurations, problem) for problem in LARGE[:3]]
    for step, *problem in steps:
        try:
            step(*problem, measured)
        except Exception as error:
            measured["failed"] += 1
            print(f"{step.__name__} FAILED: {type(error).__name__}: {error}")
    return measured


def correctness(problem: Problem, measured: dict[str, float]) -> None:
    """Rows off fp64: after the same rounding of the normed states, and without any; the invariant on all rows.

    Beside them the argmax of logits rounded to bf16, which is what people get from a product in bf16.
    """
    out = problem.fused()
    measured["rank0"] += int(((out.target_rank == 0) != (out.argmax == problem.targets)).sum())
    part = slice(0, CHECKED_ROWS)
    hidden, targets = problem.hidden[part], problem.targets[part]
    x_hat = normed_rows(hidden, problem.norm, 1)[:, : problem.d_model]
    rounded = fused_lens_reference(x_hat, LensHead(problem.unembedding), targets, dtype=torch.float64)
    truth = fused_lens_reference(hidden, LensHead(problem.unembedding, problem.norm), targets, dtype=torch.float64)
    off = [int((out.argmax[part] != other.argmax).sum()) for other in (rounded, truth)]
    off_naive = int(((x_hat @ problem.unembedding.T).argmax(-1) != truth.argmax).sum())
    ranks = int((out.target_rank[part] != rounded.target_rank).sum())
    error = float((out.logsumexp[part] - rounded.logsumexp).abs().max())
    print(f"{problem.name}, {len(hidden)} rows: argmax {off[0]}, rank {ranks} off fp64 of the same states, logsumexp "
          f"{error:.1e}; argmax {off[1]} off fp64 throughout, bf16 logits {off_naive}")  # fmt: skip
    measured["argmax"] = max(measured.get("argmax", 0), off[1] - off_naive)
    assert error < 1e-3, "the logsumexp is wrong: nothing below would mean anything"


def target_bits(measured: dict[str, float]) -> None:
    """Whether every kind of kernel forms a target's logit with the bits of its own product."""
    generation = generation_of(DEVICE)
    configs = [pinned_config(torch.bfloat16, True, rows, generation) for rows in (1024, 264, 100, 60, 5)]
    configs.append(replace(configs[0], kind="plain"))
    head = LensHead(torch.empty(0, 0, device="cuda", dtype=torch.bfloat16))
    for config in configs:
        same = target_matches_main_product(head, config)
        measured["bits"] += not same
        print(f"target bits, {config.kind} {config.block_m}x{config.block_v}: {'equal' if same else 'differ'}")


def against_product(problem: Problem, measured: dict[str, float]) -> None:
    """B, the pinned kernel with and without targets, and the memory."""
    runs = {"B": problem.product(), "fused": problem.fused, "no targets": lambda: problem.fused(targets=False)}
    times = device_times(runs)
    print_times(problem.name, times, note=lambda name, seconds: f"{problem.flops / seconds / 1e12:.0f} TFLOP/s")
    measured[f"{problem.name}/B"] = times["fused"][0] / times["B"][0]
    measured["memory"] = max(measured.get("memory", 0), bench.peak_growth_cuda(problem.fused) / 1e6)


def breakdown(problem: Problem, measured: dict[str, float]) -> None:
    """Where a call spends the device's time, kernel by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        problem.fused()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
    parts = [f"{event.key} {event.device_time_total:.0f} us in {event.count}" for event in events[:6]]
    print(f"{problem.name}: {'; '.join(parts)}")


def statistics(problem: Problem, measured: dict[str, float]) -> None:
    """All statistics against a logsumexp alone, on the first 3,072 rows and the whole tiles of the vocabulary."""
    config = pinned_config(torch.bfloat16, True, problem.rows, generation_of(DEVICE))
    weight = problem.unembedding[: problem.vocab // config.block_v * config.block_v]
    n_rows = 3072
    targets = problem.targets[:n_rows].clamp(max=len(weight) - 1)
    stats, target_z = RowStats.empty(n_rows, DEVICE), torch.empty(n_rows, device=DEVICE)
    rows = LensRows(normed_rows(problem.hidden[:n_rows], problem.norm, config.block_m), targets, target_z, n_rows)
    head = LensHead(weight)
    options = LensOptions(head, config, has_targets=True, same_bits=target_matches_main_product(head, config))

    def everything():
        launch_targets(rows, options)
        reduce_rows(rows, stats, options)

    def alone():
        return launch_logsumexp(rows.x_hat, n_rows, weight, config)

    everything()
    peak, total = alone()
    assert torch.allclose((peak + total.log2()).mul(math.log(2)).logsumexp(0), stats.logsumexp, atol=1e-3)
    times = device_times({"all statistics": everything, "logsumexp alone": alone})
    print_times(f"{problem.name}, {n_rows} rows", times)
    measured[f"{problem.name}/statistics"] = times["all statistics"][0] / times["logsumexp alone"][0]


def configurations(problem: Problem, measured: dict[str, float]) -> None:
    """Loads with and without TMA, stages, program-id grouping, split counts."""
    generation = generation_of(DEVICE)
    pinned = pinned_config(torch.bfloat16, True, problem.rows, generation)
    processors = processor_count(DEVICE)
    splits = choose_splits(-(-problem.rows // pinned.block_m), problem.vocab // pinned.block_v, processors)
    tried = {"pinned": pinned, "without TMA": replace(pinned, kind="plain"), "4 stages": replace(pinned, num_stages=4)}
    tried |= {f"groups of {group}": replace(pinned, group=group) for group in (4, 24)}
    tried |= {f"{count} splits": replace(pinned, splits=count) for count in (5, 10, 17) if count != splits}
    reference = problem.fused(pinned)
    agrees = {name: outputs_agree(problem.fused(config), reference) for name, config in tried.items()}
    times = device_times({name: lambda config=config: problem.fused(config) for name, config in tried.items()})

    def note(name: str, seconds: float) -> str:
        return f"{seconds / times['pinned'][0]:.3f} of pinned, {'agrees' if agrees[name] else 'DISAGREES'}"

    print_times(problem.name, times, note=note)


def against_torch(problem: Problem, measured: dict[str, float]) -> None:
    """What people run instead."""
    times = device_times({"fused": problem.fused, "chunked": problem.chunked, "naive": problem.naive})
    ours, _ = times.pop("fused")
    print_times(problem.name, times, digits=2)
    measured |= {f"{problem.name}/{name}": seconds / ours for name, (seconds, _) in times.items()}


def beside_the_lens(problem: Problem, measured: dict[str, float]) -> None:
    """What is plain torch on a GPU: the divergence to the last layer, lists of tokens, the lens without Triton."""
    hidden = problem.hidden.view(13, -1, problem.d_model)
    operands = dict(unembedding=problem.unembedding, norm=problem.norm)
    stats = fused_lens(hidden, **operands)
    runs = {
        "fused": problem.fused,
        "KL to the last layer": lambda: kl_to_final(hidden, stats, **operands),
        "10 likeliest tokens": lambda: lens_top_k(hidden, k=10, **operands),
        "the lens in plain torch": lambda: fused_lens(hidden, targets=problem.targets.view(13, -1), backend="reference",
                                                      **operands),
    }  # fmt: skip
    times = device_times(runs)
    print_times(problem.name, times, 2, note=lambda name, seconds: f"{seconds / times['fused'][0]:.2f} of fused")


def shares_of_a_model(measured: dict[str, float]) -> None:
    """The lens beside the model's own pass: a GPT-2 of random weights in bf16, 8 contexts of 1,024 tokens."""
    model = AutoModelForCausalLM.from_config(GPT2Config(), dtype=torch.bfloat16).to(DEVICE)
    lens = LogitLens(model)
    ids = torch.randint(0, 50257, (8, 1024), generator=torch.Generator().manual_seed(0))
    for name, positions in (("the last position", torch.tensor([1023])), ("every position", torch.arange(1024))):
        hidden = lens.hidden(ids, positions)
        targets = torch.zeros(hidden.shape[1:-1], dtype=torch.int64, device=DEVICE)
        times = device_times({
            "model": lambda positions=positions: lens.hidden(ids, positions),
            "lens": lambda hidden=hidden, targets=targets: lens.read_states(hidden, targets, kl=False),
            "lens and KL": lambda hidden=hidden, targets=targets: lens.read_states(hidden, targets),
        })  # fmt: skip
        model, _ = times["model"]
        note = lambda name, seconds, model=model: f"{seconds / model:.1%} of the model's pass"  # noqa: E731
        print_times(f"gpt2, {name}", times, digits=2, note=note)


def few_rows(measured: dict[str, float]) -> None:
    """Short calls, where launches count: plain, replayed as a graph, and with copies in and out of the graph."""
    for problem in FEW:
        lens = GraphedLens(LensHead(problem.unembedding, problem.norm))
        assert outputs_agree(lens(problem.hidden, problem.targets), problem.fused()), "a replayed graph differs"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            problem.fused()
        runs = {
            "call": problem.fused,
            "graph": graph.replay,
            "GraphedLens": lambda p=problem, g=lens: g(p.hidden, p.targets),
            "B": problem.product(),
        }
        times = device_times(runs, rounds=50)
        print_times(problem.name, times, digits=1, unit="us")
        for name in ("call", "GraphedLens"):
            print(f"{problem.name}: {name} keeps the host busy for {_host_seconds(runs[name]) * 1e6:.0f} us")
        measured[f"{problem.name}/graphed"] = times["graph"][0] * 1e6
        measured[problem.name] = times["graph"][0] * 1e3
        breakdown(problem, measured)


def _host_seconds(run: Callable[[], object], calls: int = 100) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize()
    return seconds
