"""The steps of `gpu_goals.py`: each prints what it found and adds to the measurements."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
import triton
from harness import device_times, print_times
from logsumexp_only import launch_logsumexp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config

from refinelens import LogitLens, fused_lens, jsd_to_final, kl_to_final, lens_top_k
from refinelens.bench.competitors import naive, row_chunks
from refinelens.bench.problem import Problem, peak_growth_cuda, random_problem
from refinelens.kernels.config import LensOptions, choose_splits, generation_of, pinned_config, processor_count
from refinelens.kernels.fused_lens import fused_lens_triton, reduce_rows, target_matches_main_product
from refinelens.kernels.graphs import GraphedLens
from refinelens.kernels.kernel import LensRows, RowStats, launch_targets
from refinelens.kernels.norm_kernel import normed_rows
from refinelens.kernels.reference import LayerNorm, LensHead, fused_lens_reference
from refinelens.kernels.search import outputs_agree
from refinelens.op.vocabulary import MOST_TARGETS, fused_lens_targets, fused_lens_top_k

CHUNK_BYTES = 2**28  # of fp32 logits in the chunked baseline


@dataclass(frozen=True)
class Case:
    """One shape in bf16: rows are layers x positions."""

    name: str
    rows: int
    d_model: int
    vocab: int

    def _randn(self, seed: int, *shape: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    @cached_property
    def problem(self) -> Problem:
        """Random, its norm too."""
        norm = LayerNorm(self._randn(2, self.d_model), self._randn(3, self.d_model))
        return replace(random_problem(self.rows, self.d_model, self.vocab, torch.bfloat16, "cuda"), norm=norm)

    @property
    def head(self) -> LensHead:
        return LensHead(self.problem.unembedding, self.problem.norm)

    def fused(self, config=None, targets: bool = True):
        """Everything, from the norm to the merge of the splits."""
        chosen = self.problem.targets if targets else None
        return fused_lens_triton(self.problem.hidden, self.head, chosen, config=config)

    def product(self) -> Callable[[], Tensor]:
        """B: cuBLAS on these rows, V padded to a multiple of 64, bf16 output allocated before."""
        hidden, padded = self.problem.hidden, self._randn(1, -(-self.vocab // 64) * 64, self.d_model)
        out = torch.empty(self.rows, len(padded), device="cuda", dtype=torch.bfloat16)
        return lambda: torch.mm(hidden, padded.T, out=out)


LARGE = [
    Case("gpt2-13x1024", 13 * 1024, 768, 50257),
    Case("smollm2-31x1024", 31 * 1024, 576, 49152),
    Case("llama-33x1024", 33 * 1024, 4096, 128256),
    Case("gpt2-13x16384", 13 * 16384, 768, 50257),
]
FEW = [Case("gpt2-13x8", 13 * 8, 768, 50257), Case("llama-33x8", 33 * 8, 4096, 128256)]
CHECKED_ROWS = 256
LISTED = 10  # likeliest tokens
DEVICE = torch.device("cuda")


def run_all() -> dict[str, float]:
    """All steps in order; the first one decides whether the others mean anything, any other may fail alone."""
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}\n")
    measured: dict[str, float] = {"rank0": 0, "bits": 0, "failed": 0}
    for case in [*FEW, *LARGE]:
        correctness(case, measured)
    if measured["rank0"]:
        return measured
    steps = [(target_bits,), (few_rows,)]
    steps += [(step, case) for case in LARGE for step in (against_product, breakdown)]
    steps += [(step, case) for case in (LARGE[0], LARGE[2]) for step in (statistics, against_torch)]
    steps += [(beside_the_lens, case) for case in (LARGE[0], LARGE[2])]
    steps += [(in_plain_torch, LARGE[0]), (shares_of_a_model,)]
    steps += [(configurations, case) for case in LARGE[:3]]
    for step, *case in steps:
        try:
            step(*case, measured)
        except Exception as error:
            measured["failed"] += 1
            print(f"{step.__name__} FAILED: {type(error).__name__}: {error}")
    return measured


def correctness(case: Case, measured: dict[str, float]) -> None:
    """Rows off fp64: after the same rounding of the normed states, and without any; the invariant on all rows.

    Beside them the argmax of logits rounded to bf16, which is what people get from a product in bf16.
    """
    problem = case.problem
    out = case.fused()
    measured["rank0"] += int(((out.target_rank == 0) != (out.argmax == problem.targets)).sum())
    part = slice(0, CHECKED_ROWS)
    hidden, targets = problem.hidden[part], problem.targets[part]
    x_hat = normed_rows(hidden, problem.norm, 1)[:, : case.d_model]
    rounded = fused_lens_reference(x_hat, LensHead(problem.unembedding), targets, dtype=torch.float64)
    truth = fused_lens_reference(hidden, case.head, targets, dtype=torch.float64)
    off = [int((out.argmax[part] != other.argmax).sum()) for other in (rounded, truth)]
    off_naive = int(((x_hat @ problem.unembedding.T).argmax(-1) != truth.argmax).sum())
    ranks = int((out.target_rank[part] != rounded.target_rank).sum())
    error = float((out.logsumexp[part] - rounded.logsumexp).abs().max())
    print(f"{case.name}, {len(hidden)} rows: argmax {off[0]}, rank {ranks} off fp64 of the same states, logsumexp "
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


def against_product(case: Case, measured: dict[str, float]) -> None:
    """B, the pinned kernel with and without targets, and the memory."""
    runs = {"B": case.product(), "fused": case.fused, "no targets": lambda: case.fused(targets=False)}
    times = device_times(runs)
    print_times(case.name, times, note=lambda name, seconds: f"{case.problem.flops / seconds / 1e12:.0f} TFLOP/s")
    measured[f"{case.name}/B"] = times["fused"][0] / times["B"][0]
    measured["memory"] = max(measured.get("memory", 0), peak_growth_cuda(case.fused) / 1e6)


def breakdown(case: Case, measured: dict[str, float]) -> None:
    """Where a call spends the device's time, kernel by kernel."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        case.fused()
        torch.cuda.synchronize()
    events = sorted(profiled.key_averages(), key=lambda event: -event.device_time_total)
    parts = [f"{event.key} {event.device_time_total:.0f} us in {event.count}" for event in events[:6]]
    print(f"{case.name}: {'; '.join(parts)}")


def statistics(case: Case, measured: dict[str, float]) -> None:
    """All statistics against a logsumexp alone, on the first 3,072 rows and the whole tiles of the vocabulary."""
    problem = case.problem
    config = pinned_config(torch.bfloat16, True, case.rows, generation_of(DEVICE))
    weight = problem.unembedding[: case.vocab // config.block_v * config.block_v]
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
    print_times(f"{case.name}, {n_rows} rows", times)
    measured[f"{case.name}/statistics"] = times["all statistics"][0] / times["logsumexp alone"][0]


def configurations(case: Case, measured: dict[str, float]) -> None:
    """Loads with and without TMA, stages, program-id grouping, split counts."""
    generation = generation_of(DEVICE)
    pinned = pinned_config(torch.bfloat16, True, case.rows, generation)
    processors = processor_count(DEVICE)
    splits = choose_splits(-(-case.rows // pinned.block_m), case.vocab // pinned.block_v, processors)
    tried = {"pinned": pinned, "without TMA": replace(pinned, kind="plain"), "4 stages": replace(pinned, num_stages=4)}
    tried |= {f"groups of {group}": replace(pinned, group=group) for group in (4, 24)}
    tried |= {f"{count} splits": replace(pinned, splits=count) for count in (5, 10, 17) if count != splits}
    reference = case.fused(pinned)
    agrees = {name: outputs_agree(case.fused(config), reference) for name, config in tried.items()}
    times = device_times({name: lambda config=config: case.fused(config) for name, config in tried.items()})

    def note(name: str, seconds: float) -> str:
        return f"{seconds / times['pinned'][0]:.3f} of pinned, {'agrees' if agrees[name] else 'DISAGREES'}"

    print_times(case.name, times, note=note)


def against_torch(case: Case, measured: dict[str, float]) -> None:
    """What people run instead: all logits at once, or of as many rows at a time as keep them small."""
    size = max(1, CHUNK_BYTES // (4 * case.vocab))
    chunked, whole = partial(row_chunks, case.problem, size), partial(naive, case.problem)
    times = device_times({"fused": case.fused, "chunked": chunked, "naive": whole})
    ours, _ = times.pop("fused")
    print_times(case.name, times, digits=2)
    measured |= {f"{case.name}/{name}": seconds / ours for name, (seconds, _) in times.items()}


def beside_the_lens(case: Case, measured: dict[str, float]) -> None:
    """What goes over the vocabulary beside the lens, against the lens itself with one target a row.

    First what needs equal bits in several kernels: the place of a token in a list is its rank.
    """
    problem, head = case.problem, case.head
    hidden = problem.hidden.view(case.rows // 1024, 1024, case.d_model)
    capped = replace(head, softcap=30.0)
    stats, capped_stats = fused_lens(hidden, head), fused_lens(hidden, capped)
    _, top = fused_lens_top_k(hidden, head, LISTED)
    ids = top.ids[..., :MOST_TARGETS]
    _, several = fused_lens_targets(hidden, head, ids)
    off = int((several.rank != torch.arange(MOST_TARGETS, device=DEVICE)).sum())
    measured["places"] = measured.get("places", 0) + off
    print(f"{case.name}: {off} of {several.rank.numel()} tokens of lists have another rank than their place")
    unchecked = dict(check_values=False)
    runs = {
        "fused": case.fused,
        "KL": lambda: kl_to_final(hidden, stats, head),
        "KL, capped": lambda: kl_to_final(hidden, capped_stats, capped),
        "JSD": lambda: jsd_to_final(hidden, stats, head),
        "list": lambda: lens_top_k(hidden, head, LISTED),
        "with list": lambda: fused_lens_top_k(hidden, head, LISTED, **unchecked),
        "8 targets": lambda: fused_lens_targets(hidden, head, ids, **unchecked),
    }
    times = device_times(runs)
    print_times(case.name, times, 2, note=lambda name, seconds: f"{seconds / times['fused'][0]:.2f} of fused")
    measured |= {f"{case.name}/{name}": seconds / times["fused"][0] for name, (seconds, _) in times.items()}


def in_plain_torch(case: Case, measured: dict[str, float]) -> None:
    """The same lens without Triton."""
    problem = case.problem
    plain = partial(fused_lens, problem.hidden, case.head, targets=problem.targets, backend="reference")
    print_times(case.name, device_times({"fused": case.fused, "the lens in plain torch": plain}), 2)


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
        for lens.replays.enabled in (False, True):
            host = _host_seconds(lambda hidden=hidden, targets=targets: lens.read_states(hidden, targets)) * 1e6
            how = "may be replayed" if lens.replays.enabled else "launched"
            print(f"gpt2, {name}: lens and KL, {how}, take {host:.0f} us of the host, its one wait for them included")
        print(f"gpt2, {name}: kinds that are replayed: {sum(map(bool, lens.replays._recorded.values()))}")


def few_rows(measured: dict[str, float]) -> None:
    """Short calls, where launches count: plain, replayed as a graph, and with copies in and out of the graph."""
    for case in FEW:
        lens, hidden, targets = GraphedLens(case.head), case.problem.hidden, case.problem.targets
        assert outputs_agree(lens(hidden, targets), case.fused()), "a replayed graph differs"
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            case.fused()
        runs = {
            "call": case.fused,
            "graph": graph.replay,
            "GraphedLens": lambda lens=lens, hidden=hidden, targets=targets: lens(hidden, targets),
            "B": case.product(),
        }
        times = device_times(runs, rounds=50)
        print_times(case.name, times, digits=1, unit="us")
        for name in ("call", "GraphedLens"):
            print(f"{case.name}: {name} keeps the host busy for {_host_seconds(runs[name]) * 1e6:.0f} us")
        measured[f"{case.name}/graphed"] = times["graph"][0] * 1e6
        measured[case.name] = times["graph"][0] * 1e3
        breakdown(case, measured)


def _host_seconds(run: Callable[[], object], calls: int = 100) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        run()
    seconds = (time.perf_counter() - begin) / calls
    torch.cuda.synchronize()
    return seconds
