"""Tokens a second of a sweep whose batches hold contexts of several questions, beside plain forward passes.

    OMP_NUM_THREADS=1 python benchmarks/batching.py [--model tiny] [--documents closed-book,oracle,3] [--questions 24]
        [--batch-size 16] [--sizes 1,4,16,64] [--device auto] [--dtype auto] [--rounds 5]

Rows come first: argmax and rank of every layer must be those of contexts that run one by one; in half precision, where
rounding may change a rank, the table says how many differ. Then all ways take turns, a round at a time:

- *plain N*: the model without its unembedding, N contexts a pass, sorted by length, padded; nothing is kept or read;
- *a question*: forward passes of the runner, of which none leaves its question;
- *questions*: the same with those questions together that a sweep runs together;
- *sweep*: all of it, from the questions' texts to rows: contexts, passes, lens at every layer.

Tokens are those of the contexts, without padding. Medians over rounds, the range in
brackets, and as a share of the best plain one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from transformers import PreTrainedModel

from refinelens.config import SweepConfig, parse_documents
from refinelens.data.prompts import Context
from refinelens.lens.runner import ForwardRunner, ModelInput
from refinelens.machine import device_name
from refinelens.model.hooks import run_base
from refinelens.sweeping.predict import Predictor, groups_of, questions_together
from refinelens.sweeping.sweep import SweepInputs


def main() -> int:
    """Compare, then time, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--task", default="tiny")
    parser.add_argument("--documents", type=parse_documents, default=(0, 1, 3))
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch-size", default="16", help="of the sweep; auto fills batches by tokens on a GPU")
    parser.add_argument("--sizes", default="1,4,16,64", help="of the plain forward passes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    options = SweepConfig(
        given.model,
        given.task,
        given.documents,
        examples=given.questions,
        device=given.device,
        dtype=given.dtype,
        batch_size=given.batch_size,
        reuse_prefix="off",
    )
    inputs = SweepInputs.load(options)
    model = inputs.loaded.model
    print(
        f"{given.model}, {str(model.dtype).removeprefix('torch.')}, {device_name(model.device.type)}, {_threads(model)}"
    )
    equal, words = _compare(inputs)
    print(f"{words}\n")
    if model.dtype == torch.float32 and not equal:
        return 1
    ways = _ways(inputs, [int(size) for size in given.sizes.split(",")])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(given.rounds + 1):  # the first warms up
        for name, run in ways.items():
            took = _timed(run)
            if number:
                seconds[name].append(took)
    print(_table(seconds, [len(c.input_ids) for own in _contexts(inputs) for c in own]))
    return 0


def _threads(model: PreTrainedModel) -> str:
    n_threads = f"{torch.get_num_threads()} threads, " if model.device.type == "cpu" else ""
    return f"{n_threads}torch {torch.__version__}"


def _contexts(inputs: SweepInputs) -> list[list[Context]]:
    """Of every question."""
    builder = inputs.builder()
    return [builder.build(question).contexts for question in inputs.questions]


def _groups(inputs: SweepInputs) -> list[tuple[int, ...]]:
    together = questions_together(inputs.options, inputs.loaded.model.device.type)
    return groups_of(range(len(inputs.questions)), together)


def _sweep(inputs: SweepInputs, predictor: Predictor) -> pa.Table:
    return pa.concat_tables([r.rows for group in _groups(inputs) for r in predictor.ask(inputs.questions, group)])


def _compare(inputs: SweepInputs) -> tuple[bool, str]:
    """Whether argmaxes and ranks in batches are those of one context a pass, and how far all else differs."""
    single = replace(inputs, options=replace(inputs.options, batch_size="1"))
    batched, alone = (_sweep(own, own.predictor()) for own in (inputs, single))
    flat = {
        name: [table[name].combine_chunks().flatten().to_numpy() for table in (batched, alone)]
        for name in ("argmax", "target_rank", "target_logprob")
    }
    other = [int((one != two).sum()) for one, two in (flat["argmax"], flat["target_rank"])]
    same = all(batched[name].equals(alone[name]) for name in ("question_id", "documents", "gold_position", "answer_id"))
    largest = float(np.abs(np.subtract(*flat["target_logprob"])).max())
    words = (
        f"{len(batched)} rows, {len(flat['argmax'][0])} argmaxes and ranks: {other[0]} argmaxes and {other[1]} ranks "
        f"differ from those of one context a pass, log-probabilities by {largest:.1e} nats at most"
    )
    return same and not any(other), words


def _ways(inputs: SweepInputs, sizes: list[int]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    contexts, lens, model = _contexts(inputs), inputs.logit_lens, inputs.loaded.model
    ordered = sorted((c.input_ids for own in contexts for c in own), key=len, reverse=True)
    size = None if inputs.options.batch_size == "auto" else int(inputs.options.batch_size)
    runner, predictor = ForwardRunner(lens, size), inputs.predictor()

    def plain(size: int) -> None:
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for row, own in enumerate(batch):
                ids[row, : len(own)], mask[row, : len(own)] = torch.tensor(own), 1
            run_base(model, ids.to(model.device), mask.to(model.device))

    def run(groups: list[list[Context]]) -> None:
        for own in groups:
            for _ in runner.run([ModelInput(c.input_ids, c.answer_span.positions, c.where) for c in own]):
                pass

    together = [[c for place in group for c in contexts[place]] for group in _groups(inputs)]
    return {
        **{f"plain {size}": partial(plain, size) for size in sizes},
        "a question": partial(run, contexts),
        "questions": partial(run, together),
        "sweep": partial(_sweep, inputs, predictor),
    }


def _timed(run: Callable[[], object]) -> float:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    return time.perf_counter() - start


def _table(seconds: dict[str, list[float]], lengths: list[int]) -> str:
    best = min(statistics.median(of) for name, of in seconds.items() if name.startswith("plain"))
    lines = [
        f"{len(lengths)} contexts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all\n",
        "            tokens a second               of the best plain one",
    ]
    for name, of in seconds.items():
        middle, slow, fast = (sum(lengths) / of_ for of_ in (statistics.median(of), max(of), min(of)))
        lines.append(
            f"{name:10}  {middle:9.0f} ({slow:.0f} to {fast:.0f})".ljust(42) + f"{best / statistics.median(of):8.2f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
