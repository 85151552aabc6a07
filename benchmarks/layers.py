"""What a scan of all layers costs: forward passes per context, counted and timed, beside starting over every time.

    OMP_NUM_THREADS=1 python benchmarks/layers.py [--model smollm2] [--task builtin] [--documents 5] [--contexts 2]

Correctness first: what remains after a skip must be, bit for bit, the states of the whole model with that block hooked.
A forward pass is ``n_layers`` calls of a block with every token of the context, less where a call has fewer tokens;
what finds attention and feed-forward part once a model is not counted. Process CPU time of one thread; the clean run
and the scans of one context take turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from refinelens.data.prompts import DEFAULT_TEMPLATE, build_context
from refinelens.data.tasks import DistractorSource, choose_questions, load_task
from refinelens.layers.ablation import scan
from refinelens.layers.blocks import ActivationCache, BlockReplay, check_replay
from refinelens.layers.interventions import EVERY, LAST, Intervention, MeanContributions
from refinelens.lens.logit_lens import LogitLens
from refinelens.machine import device_name
from refinelens.model.hooks import first_state
from refinelens.model.loading import LoadedModel, load_model

GOAL = 0.6  # forward passes a layer
CHECKED = 3  # blocks whose skip is compared with the whole model
WAYS = ("skip", "mean", "attn", "mlp")


def main() -> None:
    """Compare, then count and time, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="builtin")
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--contexts", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(options.model, "cpu")
    lens = LogitLens(loaded.model)
    restarts, contexts = check_replay(lens), _contexts(loaded, options)
    lengths = ", ".join(str(ids.shape[1]) for ids in contexts)
    print(f"{options.model} on {options.task}, {device_name('cpu')}, 1 thread, torch {torch.__version__}")
    print(f"{lens.n_layers} blocks, contexts of {lengths} tokens; goal {GOAL} x {lens.n_layers} forward passes a scan")
    print(f"equal to the whole model with a hook: {_check(lens, contexts[0])} skips\n")
    print("                                 forward passes   x layers    times the CPU time of a clean run")
    for tokens, name in ((EVERY, "all tokens"), (LAST, "the answer's")):
        _measure(lens, restarts, contexts, tokens, name)


def _contexts(loaded: LoadedModel, options: argparse.Namespace) -> list[Tensor]:
    task = load_task(options.task)
    source = DistractorSource(task, 0)
    asked = choose_questions(task, options.contexts, 0)
    built = [
        build_context(loaded.tokenizer, DEFAULT_TEMPLATE, q, source.choose(q, options.documents - 1), 0) for q in asked
    ]
    return [torch.tensor([context.input_ids[: context.prompt_length]]) for context in built]


def _check(lens: LogitLens, ids: Tensor) -> int:
    """Number of skips compared; raises where one differs."""
    run = ActivationCache.record(lens, ids)
    remains = scan(run, Intervention("skip", EVERY, [], None).of_context(run), 1)
    step = max(1, lens.n_layers // CHECKED)
    checked = range(0, lens.n_layers, step)
    for index in checked:
        with _hooks(lens, [index], lambda _module, args, kwargs, _output: first_state(args, kwargs)):
            own = lens.hidden(ids, torch.tensor([ids.shape[1] - 1]))[index + 1 :, 0, 0]
        if not torch.equal(own, remains[index]):
            raise SystemExit(
                f"block {index}: the scan is not the model, difference {(own - remains[index]).abs().max()}"
            )
    return len(checked)


@contextmanager
def _hooks(lens: LogitLens, indices: list[int], hook: Callable) -> Iterator[None]:
    handles = [lens.blocks[i].register_forward_hook(hook, with_kwargs=True) for i in indices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(lens: LogitLens, restarts: BlockReplay, contexts: list[Tensor], tokens: slice, name: str) -> None:
    cached = tokens == LAST and restarts.cached
    found: dict[str, list[tuple[float, float]]] = {}
    for ids in contexts:
        means = MeanContributions.of_nothing(lens.n_layers, ids.shape[1], lens.d_model, "cpu")
        means.add(ActivationCache.record(lens, ids.flip(1), cached), tokens)  # another context's
        run, *clean = _counted(lens, ids, lambda ids=ids: ActivationCache.record(lens, ids, cached))
        found.setdefault("clean run", []).append((clean[0], 1.0))
        for way in WAYS:
            intervention = Intervention(way, tokens, restarts.sublayers, means)
            at_a_time = restarts.at_a_time(ids.shape[1], cached, on_cpu=True)
            start = intervention.of_context(run)
            _, passes, seconds = _counted(lens, ids, lambda run=run, start=start, n=at_a_time: scan(run, start, n))
            found.setdefault(way, []).append((passes, seconds / clean[1]))
    for way, values in found.items():
        passes, times = (statistics.mean(column) for column in zip(*values, strict=True))
        print(f"{name:14} {way:12} {passes:18.2f} {passes / lens.n_layers:12.3f} {times:18.2f}", flush=True)
    whole = sum(statistics.mean(p for p, _ in found[key]) for key in found)
    print(f"{name:14} {'all, a scan':12} {whole / len(WAYS):18.2f} {whole / len(WAYS) / lens.n_layers:12.3f}\n")


def _counted(lens: LogitLens, ids: Tensor, work: Callable) -> tuple[object, float, float]:
    """What the work gives, its forward passes and its CPU time."""
    tokens = [0]

    def count(_module, args, kwargs, _output):
        state = first_state(args, kwargs)
        tokens[0] += state.shape[0] * state.shape[1]

    with _hooks(lens, list(range(lens.n_layers)), count):
        start = time.process_time()
        result = work()
        seconds = time.process_time() - start
    return result, tokens[0] / ids.shape[1] / lens.n_layers, seconds


if __name__ == "__main__":
    main()
