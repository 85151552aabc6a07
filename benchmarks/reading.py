"""What a map costs beside ranks alone: all layers of SmolLM2 at every token of a text, ten likeliest tokens and KL.

    OMP_NUM_THREADS=1 python benchmarks/reading.py [--model smollm2] [--tokens 1000] [--rounds 3]

The states are those of one forward pass, which is timed too and is the same for both. Correctness first: ranks and
argmaxes of both must be equal, and each list must begin with the argmax. Takes turns, prints medians; process CPU time
on one thread on a CPU, wall time between synchronisations on a GPU.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from harness import machine, options_of, turns

from refinelens.bench.measure import torch_threads
from refinelens.data.tasks import load_task
from refinelens.lens.logit_lens import LogitLens
from refinelens.model.loading import load_model

GOAL = 1.5


def main() -> None:
    """Run the comparison and print it."""
    options = options_of(__doc__, model="smollm2", tokens=1000, rounds=3)
    loaded = load_model(options.model)
    lens = LogitLens(loaded.model, loaded.tokenizer)
    text = "\n".join(question.gold.text for question in load_task("builtin").questions)
    ids = torch.tensor([loaded.tokenizer(text)["input_ids"][: options.tokens]])
    started = time.process_time()
    hidden = lens.hidden(ids, torch.arange(ids.shape[1]))[:, 0]
    forward = time.process_time() - started
    targets = torch.cat([ids[0, 1:], ids[0, :1]])

    def ranks():
        return lens.read_states(hidden, targets, kl=False, check_last=False)

    def reading():
        return lens.read_states(hidden, targets, kl=True, top_k=10, check_last=False)

    alone, whole = ranks(), reading()
    if not torch.equal(alone.rank, whole.rank) or not torch.equal(whole.top_ids[..., 0], whole.argmax):
        raise SystemExit("expected equal ranks, and lists that begin with the argmax, got others")
    device = hidden.device.type
    seconds = {n: median(s) for n, s in turns({"ranks": ranks, "map": reading}, options.rounds, device).items()}
    started = time.process_time()
    page = whole.to_html()
    print(f"{machine(device)}; {options.model}, {ids.shape[1]} tokens x {len(hidden)} layers")
    print(f"forward pass {forward:.2f} s, ranks {seconds['ranks']:.2f} s, with lists and KL {seconds['map']:.2f} s")
    print(f"page {time.process_time() - started:.2f} s, {len(page.encode()) / 1e6:.2f} MB")
    print(f"map / ranks: {seconds['map'] / seconds['ranks']:.2f} (goal: under {GOAL})")


if __name__ == "__main__":
    with torch_threads(1):
        main()
