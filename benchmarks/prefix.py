"""Contexts that branch off what they share, beside the same contexts run whole: a real model, all gold positions.

    OMP_NUM_THREADS=1 python benchmarks/prefix.py [--model smollm2] [--task builtin] [--documents 10,20] [--questions 5]
        [--seed 0]

``--seed`` is that of the questions and their distractors. Both ways take turns, a question at a time; process CPU time
of one thread, medians over questions, the range of their ratios in brackets. What they gave is compared: argmax and
rank of the answer at every layer of every context, and the hidden states. Only the runs of the model are timed, not the
lens, which both need alike.
"""

from __future__ import annotations

import sys
from functools import partial
from statistics import median

import torch
from harness import contexts_of, machine, options_of
from torch import Tensor

from refinelens.bench.measure import take_turns, torch_threads
from refinelens.bench.table import aligned
from refinelens.config import SweepConfig
from refinelens.data.prompts import Context
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.prefix import PrefixReuse, check_branching
from refinelens.lens.runner import ForwardRunner, ModelInput, ModelStates
from refinelens.model.hooks import difference
from refinelens.sweeping.inputs import SweepInputs

GOALS = {10: 1.3, 20: 1.5}  # documents: times faster


def main() -> None:
    """Time, then compare, and print both."""
    given = options_of(__doc__, model="smollm2", task="builtin", documents="10,20", questions=5, seed=0)
    options = SweepConfig(
        given.model, given.task, given.documents, examples=given.questions, seed=given.seed, device="cpu"
    )
    inputs = SweepInputs.load(options)
    lens = inputs.logit_lens
    print(f"{given.model} on {given.task}, {machine()}")
    reuse = check_branching(lens)
    print(f"gate: {reuse.why}\n")
    contexts = contexts_of(inputs)
    for size in options.documents:
        of_size = ([context for context in own if context.n_documents == size] for own in contexts)
        print(_measure(lens, reuse, size, list(filter(None, of_size))), flush=True)


def _run(runner: ForwardRunner, contexts: list[Context]) -> list[ModelStates]:
    """As a sweep does, but in the order of the contexts."""
    ran = runner.run([ModelInput(c.input_ids, c.answer_span.positions, c.where) for c in contexts])
    return sorted(ran, key=lambda one: one.index)


def _measure(lens: LogitLens, reuse: PrefixReuse, size: int, questions: list[list[Context]]) -> str:
    runners = {"whole": ForwardRunner(lens), "branched": ForwardRunner(lens, reuse=reuse)}
    _run(runners["branched"], questions[0])  # whose first contexts are also run whole, as a proof
    ran: dict[str, list[list[ModelStates]]] = {name: [] for name in runners}

    def next_question(name: str) -> None:
        ran[name].append(_run(runners[name], questions[len(ran[name])]))

    seconds = take_turns({name: partial(next_question, name) for name in runners}, rounds=len(questions))
    contexts = [context for own in questions for context in own]
    whole, branched = ([one for own in ran[name] for one in own] for name in runners)
    found = [_compare(lens, c, w.hidden, b.hidden) for c, w, b in zip(contexts, whole, branched, strict=True)]
    tokens, saved = sum(len(c.input_ids) for c in contexts), sum(one.n_saved for one in branched)
    ratios = [w / b for w, b in zip(seconds["whole"], seconds["branched"], strict=True)]
    ratio, token_ratio = median(ratios), tokens / (tokens - saved)
    goal = f"; goal {GOALS[size]}" if size in GOALS else ""
    rows = [["", "s a question", "tokens computed", "tokens saved"]]
    for name, less in (("whole", 0), ("branched", saved)):
        rows.append([name, f"{median(seconds[name]):.2f}", str(tokens - less), str(less)])
    return "\n  ".join([
        f"{size} documents, {len(questions)} questions: {_differences(found)}",
        *aligned(rows),
        f"{ratio:.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}{goal}); token ratio {token_ratio:.2f}, of "
        f"which {100 * ratio / token_ratio:.0f} %\n",
    ])  # fmt: skip


def _compare(lens: LogitLens, context: Context, whole: Tensor, branched: Tensor) -> list[float]:
    """Argmaxes compared, argmaxes and ranks that differ; by how much at most, and how good the best such rank is; the
    largest difference of a state and of a log-probability."""
    one, two = (lens.stats(states, torch.tensor(context.answer_ids)) for states in (whole, branched))
    other = one.target_rank != two.target_rank
    return [
        one.argmax.numel(),
        int((one.argmax != two.argmax).sum()),
        int(other.sum()),
        int((one.target_rank - two.target_rank).abs().max()),
        int(one.target_rank[other].min()) + 1 if other.any() else sys.maxsize,
        difference(branched, whole),
        float((one.target_logprob - two.target_logprob).abs().max()),
    ]


def _differences(found: list[list[float]]) -> str:
    compared, argmaxes, ranks, places, best, states, logprobs = zip(*found, strict=True)
    which = f" (by {max(places)} at most, the best of them rank {min(best)})" if any(ranks) else ""
    return (
        f"{sum(compared)} argmaxes and ranks compared, {sum(argmaxes)} argmaxes and {sum(ranks)} ranks differ{which};\n"
        f"  largest difference of a state {max(states):.1e} of its layer's largest, of a log-probability of the answer "
        f"{max(logprobs):.1e} nats"
    )


if __name__ == "__main__":
    with torch_threads(1):
        main()
