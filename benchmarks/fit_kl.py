"""What training a lens costs beside all logits by autograd, on the same states: `python benchmarks/fit_kl.py`.

    python benchmarks/fit_kl.py [--model smollm2] [--tokens 16000] [--steps 100]

Both begin at the linear lens of the same statistics, take as many optimiser steps and are read on the same held-out
tokens, over the whole vocabulary. "All logits" is what refinelens did before: 128 tokens of a sequence a step, logits
of all of them over the whole vocabulary, layer by layer, differentiated by torch, and the model run again for every
sequence, in its time; ours has kept what the statistics were made of. Process CPU time on one thread, one run of each,
as either takes minutes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from itertools import cycle

import torch
from harness import machine, options_of
from torch.nn import functional as F

from refinelens.bench.measure import torch_threads
from refinelens.config import FitConfig
from refinelens.data.texts import load_text
from refinelens.fitting.fit import REPORT_TOKENS
from refinelens.fitting.objectives import Statistics, _Correction, solve, train
from refinelens.fitting.quality import measure
from refinelens.fitting.text import States
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.translators import Translators
from refinelens.model.loading import load_model

ROWS = 128


def main() -> None:
    """Train both ways and print the table."""
    options = options_of(__doc__, model="smollm2", tokens=16000, steps=100)
    config = FitConfig(model=options.model, tokens=options.tokens, objective="kl", steps=options.steps)
    text, loaded = load_text(config.text), load_model(config.model, **config.loading)
    lens = LogitLens(loaded.model)
    states = States(config, text, loaded, lens)
    fit, choose = (Statistics.empty(lens.n_layers, lens.d_model) for _ in range(2))
    for number, hidden in enumerate(states.of(range(states.split.choose.stop))):
        (fit if number in states.split.fit else choose).add(hidden)
    start, _ = solve(fit, choose)
    lenses, seconds = {"linear": start}, {}
    runs_again = States(replace(config, objective="linear"), text, loaded, lens)  # the model, for every sequence
    for name, run, own in (("all logits", train_on_all_logits, runs_again), ("refinelens", train, states)):
        begin = time.process_time()
        lenses[name] = run(lens, start, fit, partial(own.of, own.split.fit), config.steps, config.seed)
        seconds[name] = time.process_time() - begin
    quality = measure(lens, states.sample(states.split.report, REPORT_TOKENS), lenses)
    print(f"{machine()}; {options.model}, {lens.n_layers} layers, {config.steps} steps, {config.tokens} tokens of text")
    for name, of_lens in quality.items():
        kl = torch.tensor(of_lens.kl[:-1])
        cost = f", {seconds[name]:.0f} s of training" if name in seconds else ""
        print(f"  {name:<10} held-out KL {kl.mean():.4f} nats, mean over layers{cost}")
    theirs, ours = (torch.tensor(quality[name].kl[:-1]) for name in seconds)
    better = int((ours <= theirs).sum())
    print(f"all logits / refinelens: {seconds['all logits'] / seconds['refinelens']:.2f} (goal: at least 3)")
    most = float((ours / theirs).max())
    print(f"held-out KL no higher at {better} of {lens.n_layers} layers, at most {most:.3f} times theirs")


def train_on_all_logits(lens: LogitLens, start: Translators, statistics: Statistics, sequences, steps, seed):
    """What `train` did before `lens_kl`."""
    corrections = [_Correction(layer, start, statistics, steps) for layer in range(start.n_layers)]
    head = replace(lens.head, weight=lens.head.weight.float())
    generator = torch.Generator().manual_seed(seed)
    endless = (hidden for _ in cycle([None]) for hidden in sequences())
    for _, hidden in zip(range(steps), endless, strict=False):
        rows = torch.randperm(hidden.shape[1], generator=generator)[:ROWS]
        final = head.logits(hidden[-1, rows].float()).log_softmax(-1)
        for layer, correction in enumerate(corrections):
            own = head.logits(correction(hidden[layer, rows].float())).log_softmax(-1)
            F.kl_div(own, final, reduction="batchmean", log_target=True).backward()
            correction.update()
    return Translators(*(torch.stack(part) for part in zip(*(c.folded() for c in corrections), strict=True)))


if __name__ == "__main__":
    with torch_threads(1):
        main()
