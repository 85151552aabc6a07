"""What a scan of all layers costs: forward passes per context, counted and timed, beside starting over every time.

    OMP_NUM_THREADS=1 python benchmarks/layers.py [--model smollm2] [--task builtin] [--documents 5] [--contexts 2]

Correctness first: what remains after a skip must be, bit for bit, the states of the whole model with that block hooked.
A forward pass is ``n_layers`` calls of a block with every token of the context, less where a call has fewer tokens;
what finds attention and feed-forward part once a model is not counted. Process CPU time of one thread; the clean run
and the scans of one context take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import mean

import torch
from harness import contexts_of, machine, options_of
from torch import Tensor

from refinelens.bench.measure import timed, torch_threads
from refinelens.bench.table import aligned
from refinelens.config import SweepConfig
from refinelens.layers.ablation import scan
from refinelens.layers.interventions import EVERY, LAST, Intervention, MeanContributions
from refinelens.lens.blocks import ActivationCache, BlockReplay, check_replay
from refinelens.lens.logit_lens import LogitLens
from refinelens.model.hooks import first_state
from refinelens.sweeping.inputs import SweepInputs

GOAL = 0.6  # forward passes a layer
CHECKED = 3  # blocks whose skip is compared with the whole model
WAYS = ("skip", "mean", "attn", "mlp")


def main() -> None:
    """Compare, then count and time, and print."""
    given = options_of(__doc__, model="smollm2", task="builtin", documents=5, contexts=2)
    options = SweepConfig(
        given.model, given.task, given.documents, gold_positions="0", examples=given.contexts, device="cpu"
    )
    inputs = SweepInputs.load(options)
    lens = inputs.logit_lens
    contexts = [torch.tensor([c.input_ids[: c.prompt_length]]) for own in contexts_of(inputs) for c in own]
    replay = check_replay(lens)
    lengths = ", ".join(str(ids.shape[1]) for ids in contexts)
    print(f"{given.model} on {given.task}, {machine()}")
    print(f"{lens.n_layers} blocks, contexts of {lengths} tokens; goal {GOAL} x {lens.n_layers} forward passes a scan")
    print(f"equal to the whole model with a hook: {_check(lens, contexts[0])} skips\n")
    rows = [["", "forward passes", "x layers", "times the CPU time of a clean run"]]
    for tokens, name in ((EVERY, "all tokens"), (LAST, "the answer's")):
        rows += _measure(lens, replay, contexts, tokens, name)
    print("\n".join(aligned(rows)))


def _check(lens: LogitLens, ids: Tensor) -> int:
    """Number of skips compared; raises where one differs."""
    run = ActivationCache.record(lens, ids)
    downstream = scan(run, Intervention("skip", EVERY, [], None).of_context(run), 1)
    checked = range(0, lens.n_layers, max(1, lens.n_layers // CHECKED))
    for index in checked:
        with _hooks(lens, [index], lambda _module, args, kwargs, _output: first_state(args, kwargs)):
            own = lens.hidden(ids, torch.tensor([ids.shape[1] - 1]))[index + 1 :, 0, 0]
        if not torch.equal(own, downstream[index]):
            largest = (own - downstream[index]).abs().max()
            raise SystemExit(f"block {index}: the scan is not the model, difference {largest}")
    return len(checked)


@contextmanager
def _hooks(lens: LogitLens, indices: list[int], hook: Callable) -> Iterator[None]:
    handles = [lens.blocks[i].register_forward_hook(hook, with_kwargs=True) for i in indices]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _measure(
    lens: LogitLens, replay: BlockReplay, contexts: list[Tensor], tokens: slice, name: str
) -> Iterator[list[str]]:
    """Rows of the table: the clean run, every way, and all ways together as `refinelens layers` runs them."""
    cached = tokens == LAST and replay.cached
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ("clean run", *WAYS)}
    for ids in contexts:
        means = MeanContributions.of_nothing(lens.n_layers, ids.shape[1], lens.d_model, "cpu")
        means.add(ActivationCache.record(lens, ids.flip(1), cached), tokens)  # another context's
        run, passes, clean = _counted(lens, ids, lambda ids=ids: ActivationCache.record(lens, ids, cached))
        found["clean run"].append((passes, 1.0))
        at_a_time = replay.at_a_time(ids.shape[1], cached, on_cpu=True)
        for way in WAYS:
            start = Intervention(way, tokens, replay.sublayers, means).of_context(run)
            work = lambda run=run, start=start, n=at_a_time: scan(run, start, n)  # noqa: E731
            _, passes, seconds = _counted(lens, ids, work)
            found[way].append((passes, seconds / clean))
    whole = 0.0
    for way, values in found.items():
        passes, times = map(mean, zip(*values, strict=True))
        whole += passes / len(WAYS)
        yield [f"{name:14} {way}", f"{passes:.2f}", f"{passes / lens.n_layers:.3f}", f"{times:.2f}"]
    yield [f"{name:14} all, a scan", f"{whole:.2f}", f"{whole / lens.n_layers:.3f}", ""]


def _counted(lens: LogitLens, ids: Tensor, work: Callable) -> tuple[object, float, float]:
    """What the work gives, its forward passes and its CPU time."""
    tokens, result = [0], []

    def count(_module, args, kwargs, _output):
        state = first_state(args, kwargs)
        tokens[0] += state.shape[0] * state.shape[1]

    with _hooks(lens, list(range(lens.n_layers)), count):
        seconds = timed(lambda: result.append(work()))
    return result[0], tokens[0] / ids.shape[1] / lens.n_layers, seconds


if __name__ == "__main__":
    with torch_threads(1):
        main()
