"""Tokens a second of a sweep beside plain forward passes over the same contexts, and where its time goes.

    OMP_NUM_THREADS=1 python benchmarks/throughput.py [--shapes gpt2,smollm2] [--questions 4] [--documents 5,10]
        [--reuse-prefix auto] [--rounds 3]

Models have random weights and the tokenizer of SmolLM2, so that nothing is downloaded; ``1b`` and ``8b`` are for GPUs.
A plain pass runs the model without its unembedding over whole contexts, on a GPU at the best of several batch sizes; a
sweep does all that it does, its parts written to a folder that goes again. Both take turns; medians, on a CPU of
process CPU time. A token counts once for each context that it stands in, also where contexts share it
(``--reuse-prefix``). Random weights round more than trained ones, so that in half precision the proof of shared
prefixes may refuse what it would grant: here, with ``on``, it is made, and its verdict printed, but not heeded.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from harness import contexts_of, llama_of, machine, options_of, turns
from transformers import GPT2Config

from refinelens.bench.measure import clock_of, timed
from refinelens.bench.table import aligned
from refinelens.config import SweepConfig
from refinelens.lens import runner
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.prefix import PrefixReuse, check_branching
from refinelens.model.hooks import run_base
from refinelens.model.loading import OUTLINE, LoadedModel, load_model
from refinelens.model.positions import padded
from refinelens.store.results import Run
from refinelens.sweeping import inputs as sweep_inputs
from refinelens.sweeping import predict
from refinelens.sweeping.contexts import ContextBuilder
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.recorder import RunWriter

VOCAB, POSITIONS = 50_257, 8192


SHAPES: dict[str, Callable] = {
    "gpt2": partial(GPT2Config, vocab_size=VOCAB, n_positions=POSITIONS),
    "smollm2": llama_of(576, 1536, 30, 9, 3, VOCAB, POSITIONS),
    "1b": llama_of(2048, 8192, 16, 32, 8, VOCAB, POSITIONS),
    "8b": llama_of(4096, 14336, 32, 32, 8, VOCAB, POSITIONS),
}
STAGES = {  # what is timed within a sweep, by what it is called
    "contexts": (ContextBuilder, "build"),
    "forward": (LogitLens, "hidden"),
    "lens": (LogitLens, "read_states"),
    "tables": (predict, "prediction_table"),
    "writing": (RunWriter, "add"),
}
BATCHES = (4096, 16384, 65536)  # tokens of a plain pass on a GPU


def main() -> None:
    """A line for every shape."""
    shapes = {"shapes": "gpt2,smollm2,1b,8b" if torch.cuda.is_available() else "gpt2,smollm2"}
    given = options_of(__doc__, **shapes, questions=4, documents="5,10", reuse_prefix="auto", rounds=3)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{given.questions} built-in questions, documents {given.documents}, {machine(device)}\n")
    rows = [["model", "tokens", "plain, tokens/s", "sweep, tokens/s", "sweep / plain", *STAGES, "rest"]]
    for name in given.shapes.split(","):
        rows.append([name, *_measure(name, given, device)])
    print("\n".join(aligned(rows)))


def _measure(name: str, given, device: str) -> list[str]:
    loaded = _random_model(SHAPES[name], device)
    sweep_inputs.load_model = lambda *_, **__: loaded
    options = SweepConfig(
        name, "builtin", given.documents, examples=given.questions, device=device, reuse_prefix=given.reuse_prefix
    )
    inputs = SweepInputs.load(options)
    if given.reuse_prefix == "on":
        print(f"{name}: {check_branching(inputs.logit_lens).why}")
        predict.choose_reuse = lambda *_: PrefixReuse(True, "for its time alone")
        runner.compare = lambda *_: PrefixReuse(True, "for its time alone")
    contexts = [context.input_ids for own in contexts_of(inputs) for context in own]
    n_tokens, spent = sum(map(len, contexts)), Counter()
    sizes = (1,) if device == "cpu" else BATCHES
    calls = {size: partial(_plain, loaded, contexts, size) for size in sizes} | {"sweep": partial(_sweep, inputs)}
    times = {key: median(values) for key, values in turns(calls, given.rounds, device).items()}
    plain, sweep = min(times[size] for size in sizes), times["sweep"]
    with _timed(spent, device):
        whole = timed(calls["sweep"], device)  # once more: a GPU is waited for after every stage
    shares = [spent[stage] / whole for stage in STAGES]
    numbers = [f"{n_tokens / plain:.0f}", f"{n_tokens / sweep:.0f}", f"{plain / sweep:.2f}"]
    return [str(n_tokens), *numbers, *(f"{share:.3f}" for share in (*shares, 1 - sum(shares)))]


def _random_model(config: Callable, device: str) -> LoadedModel:
    from transformers import AutoModelForCausalLM

    tokenizer = load_model("smollm2", part=OUTLINE).tokenizer
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config()).to(torch.float32 if device == "cpu" else torch.bfloat16)
    return LoadedModel("random", model.eval(), tokenizer, "", "", "", "", ())


def _plain(loaded: LoadedModel, contexts: list, tokens: int) -> None:
    """The longest first, so that a batch holds what is alike."""
    left = sorted(contexts, key=len, reverse=True)
    while left:
        batch = left[: max(1, tokens // len(left[0]))]
        ids, mask = padded(batch)
        run_base(loaded.model, ids.to(loaded.device), None if mask is None else mask.to(loaded.device))
        left = left[len(batch) :]


def _sweep(inputs: SweepInputs) -> None:
    with tempfile.TemporaryDirectory() as folder:
        writer = RunWriter(Run(Path(folder)), inputs.manifest(None, 1, 8))
        for place, result in inputs.ask(writer.missing(), lambda: False):
            writer.add(place, result)
        writer.close("finished")


@contextmanager
def _timed(spent: Counter, device: str) -> Iterator[None]:
    """Within the block the stages of a sweep add up what they take."""
    clock = clock_of(device, 1)
    own = {stage: getattr(*place) for stage, place in STAGES.items()}

    def wrapped(stage: str, function: Callable) -> Callable:
        def stage_timed(*arguments, **words):
            start = clock()
            try:
                return function(*arguments, **words)
            finally:
                if device == "cuda":
                    torch.cuda.synchronize()
                spent[stage] += clock() - start

        return stage_timed

    for stage, (owner, name) in STAGES.items():
        setattr(owner, name, wrapped(stage, own[stage]))
    try:
        yield
    finally:
        for stage, (owner, name) in STAGES.items():
            setattr(owner, name, own[stage])


if __name__ == "__main__":
    main()
