"""Tokens a second of a sweep whose batches hold contexts of several questions, beside plain forward passes.

    OMP_NUM_THREADS=1 python benchmarks/batching.py [--model tiny] [--documents closed-book,oracle,3] [--questions 24]
        [--batch-size 16] [--sizes 1,4,16,64] [--device auto] [--dtype auto] [--rounds 5]

``--batch-size`` is the sweep's (auto fills batches by tokens on a GPU), ``--sizes`` are those of plain passes.

Rows come first: argmax and rank of every layer must be those of contexts that run one by one; in half precision, where
rounding may change a rank, a line says how many differ. Then all ways take turns, a round at a time:

- *plain N*: the model without its unembedding, N contexts a pass, sorted by length, padded; nothing is kept or read;
- *a question*: forward passes of the runner, of which none leaves its question;
- *questions*: the same with those questions together that a sweep runs together;
- *sweep*: all of it, from the questions' texts to rows: contexts, passes, lens at every layer.

Tokens are those of the contexts, without padding. Process CPU time of one thread, else wall clock; medians over rounds,
the slowest and the fastest beside them, and as a share of the best plain one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import pyarrow as pa
import torch
from harness import contexts_of, machine, options_of, turns

from refinelens.bench.table import aligned
from refinelens.config import SweepConfig
from refinelens.data.prompts import Context
from refinelens.lens.runner import ForwardRunner, ModelInput
from refinelens.model.hooks import run_base
from refinelens.model.positions import padded
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.predict import Predictor, groups_of, questions_together


def main() -> int:
    """Compare, then time, and print both."""
    given = options_of(
        __doc__, model="tiny", task="tiny", documents="closed-book,oracle,3", questions=24, batch_size="16",
        sizes="1,4,16,64", device="auto", dtype="auto", rounds=5,
    )  # fmt: skip
    options = SweepConfig(
        given.model, given.task, given.documents, examples=given.questions, device=given.device, dtype=given.dtype,
        batch_size=given.batch_size, reuse_prefix="off",
    )  # fmt: skip
    inputs = SweepInputs.load(options)
    model = inputs.loaded.model
    print(f"{given.model}, {str(model.dtype).removeprefix('torch.')}, {machine(model.device.type)}")
    equal, words = _compare(inputs)
    print(f"{words}\n")
    if model.dtype == torch.float32 and not equal:
        return 1
    contexts = contexts_of(inputs)
    lengths = [len(context.input_ids) for own in contexts for context in own]
    print(f"{len(lengths)} contexts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all\n")
    ways = _ways(inputs, contexts, [int(size) for size in given.sizes.split(",")])
    seconds = turns(ways, given.rounds, model.device.type, torch.get_num_threads())
    best = min(median(of) for name, of in seconds.items() if name.startswith("plain"))
    rows = [["", "tokens a second", "slowest", "fastest", "of the best plain one"]]
    for name, of in seconds.items():
        rates = (sum(lengths) / one for one in (median(of), max(of), min(of)))
        rows.append([name, *(f"{rate:.0f}" for rate in rates), f"{best / median(of):.2f}"])
    print("\n".join(aligned(rows)))
    return 0


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


def _ways(inputs: SweepInputs, contexts: list[list[Context]], sizes: list[int]) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    lens, model = inputs.logit_lens, inputs.loaded.model
    ordered = sorted((c.input_ids for own in contexts for c in own), key=len, reverse=True)
    size = None if inputs.options.batch_size == "auto" else int(inputs.options.batch_size)
    runner, predictor = ForwardRunner(lens, size), inputs.predictor()

    def plain(size: int) -> None:
        for start in range(0, len(ordered), size):
            ids, mask = padded(ordered[start : start + size])
            run_base(model, ids.to(model.device), None if mask is None else mask.to(model.device))

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


if __name__ == "__main__":
    sys.exit(main())
