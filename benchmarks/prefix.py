"""Contexts that branch off what they share, beside the same contexts run whole: a real model, all gold positions.

    OMP_NUM_THREADS=1 python benchmarks/prefix.py [--model smollm2] [--task builtin] [--documents 10,20] [--questions 5]
        [--seed 0]

Both ways take turns, a question at a time; process CPU time of one thread, medians over questions, the range of their
ratios in brackets. What they gave is compared first: argmax and rank of the answer at every layer of every context,
and the hidden states. Only the runs of the model are timed, not the lens, which both need alike.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import torch
from torch import Tensor

from refinelens.data.prompts import DEFAULT_TEMPLATE, Context, build_context
from refinelens.data.tasks import DistractorSource, choose_questions, load_task
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.prefix import PrefixReuse, check_branching, difference
from refinelens.lens.runner import ForwardRunner, ModelInput
from refinelens.machine import device_name
from refinelens.model.loading import LoadedModel, load_model

GOALS = {10: 1.3, 20: 1.5}  # documents: times faster
Runs = tuple[list[Tensor], int]  # hidden states of every context, tokens computed


def main() -> None:
    """Compare, then time, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="builtin")
    parser.add_argument("--documents", default="10,20")
    parser.add_argument("--questions", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="of the questions and their distractors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_model(options.model, "cpu")
    lens = LogitLens(loaded.model)
    print(f"{options.model} on {options.task}, {device_name('cpu')}, 1 thread, torch {torch.__version__}")
    reuse = check_branching(lens)
    print(f"gate: {reuse.why}\n")
    for size in map(int, options.documents.split(",")):
        print(_measure(lens, reuse, size, _contexts(loaded, options, size)), flush=True)


def _contexts(loaded: LoadedModel, options: argparse.Namespace, size: int) -> list[list[Context]]:
    """All gold positions of each question."""
    task = load_task(options.task)
    source = DistractorSource(task, options.seed)
    questions = choose_questions(task, options.questions, options.seed)
    asked = [(q, source.choose(q, size - 1)) for q in questions]
    return [
        [build_context(loaded.tokenizer, DEFAULT_TEMPLATE, q, others, p) for p in range(size)]
        for q, others in asked
        if others is not None
    ]


def _run(runner: ForwardRunner, contexts: list[Context]) -> Runs:
    """As a sweep does."""
    ran = list(runner.run([ModelInput(c.input_ids, c.answer_span.positions, c.where) for c in contexts]))
    states = {one.index: one.hidden for one in ran}
    tokens = sum(len(c.input_ids) for c in contexts) - sum(one.n_saved for one in ran)
    return [states[index] for index in range(len(contexts))], tokens


def _measure(lens: LogitLens, reuse: PrefixReuse, size: int, questions: list[list[Context]]) -> str:
    runners = {"whole": ForwardRunner(lens), "branched": ForwardRunner(lens, reuse=reuse)}
    _run(runners["branched"], questions[0])  # whose first contexts are also run whole, as a proof
    timed, found = {name: [] for name in runners}, []
    for index, contexts in enumerate(questions):
        states = {}
        for name in list(runners)[:: -1 if index % 2 else 1]:
            start = time.process_time()
            states[name], tokens = _run(runners[name], contexts)
            timed[name].append((time.process_time() - start, tokens))
        for context, *pair in zip(contexts, states["whole"], states["branched"], strict=True):
            found.append(_compare(lens, context, *pair))
    return f"{size} documents, {len(questions)} questions: {_differences(found)}\n{_table(size, timed)}"


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


def _table(size: int, timed: dict[str, list[tuple[float, int]]]) -> str:
    (whole, tokens), (branched, computed) = (zip(*of, strict=True) for of in timed.values())
    ratios = [w / b for w, b in zip(whole, branched, strict=True)]
    ratio, token_ratio = statistics.median(ratios), sum(tokens) / sum(computed)
    goal = f"; goal {GOALS[size]}" if size in GOALS else ""
    lines = [
        "            s a question  tokens computed  tokens saved",
        f"  whole     {statistics.median(whole):12.2f}  {sum(tokens):15}  {0:12}",
        f"  branched  {statistics.median(branched):12.2f}  {sum(computed):15}  {sum(tokens) - sum(computed):12}",
        f"  {ratio:.2f} times faster ({min(ratios):.2f} to {max(ratios):.2f}{goal}); token ratio {token_ratio:.2f}, of "
        f"which {100 * ratio / token_ratio:.0f} %\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
