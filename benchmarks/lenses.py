"""What refinement depth is under each lens of a run, from the same forward passes, beside the lens's own quality.

    python benchmarks/lenses.py RUN [--layer 24]

Means over the examples that settle (the model's own prediction is the first answer token, the same for every lens), all
context sizes and gold positions together, with 95 % intervals over questions. KL and top-1 are those of held-out text,
at one layer, as the fits of the lenses report them.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
from harness import options_of

from refinelens.stats import Estimate, mean_estimates, sums_and_counts
from refinelens.store.results import open_run
from refinelens.store.trajectory import choose_tokens, read_trajectories

COLUMNS = ("first_correct", "settle", "depth")


def in_words(found: Estimate) -> str:
    """Value and interval."""
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def main() -> None:
    """Print the table, in Markdown, and differences of depth between lenses, paired over the examples."""
    options = options_of(__doc__, folder=True, layer=24)
    run = open_run(options.folder)
    table, seed = choose_tokens(read_trajectories(run, (1,)), "first"), run.manifest["seed"]
    depths: dict[str, np.ndarray] = {}
    print(f"| lens | KL at layer {options.layer} | top-1 | examples | first correct | settle | depth |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    quality = {}
    for entry, path in zip(run.manifest["lenses"], run.manifest["arguments"]["lens"], strict=True):
        if (manifest := Path(path, "manifest.json")).exists():
            of_fit = json.loads(manifest.read_text())["quality"]
            quality |= {"plain": of_fit["plain"], entry["name"]: of_fit[entry["kind"]]}
    for lens in (entry["name"] for entry in run.manifest["lenses"]):
        own = table.filter(pc.and_(pc.equal(table["lens"], lens), table["final_correct"]))
        ids, owner = np.unique(own["question_id"].to_numpy(), return_inverse=True)
        values = np.stack([own[name].to_numpy().astype(float) for name in COLUMNS], axis=1)
        means = mean_estimates(*sums_and_counts(values, owner, len(ids)), seed)
        depths[lens] = values[:, -1]
        numbers = [f"{quality[lens][name][options.layer]:.2f}" for name in ("kl", "top1")]
        cells = [lens, *numbers, f"{len(own)} of {len(ids)} questions", *map(in_words, means)]
        print(f"| {' | '.join(cells)} |")
    print()
    for a, b in combinations(depths, 2):
        sums = sums_and_counts((depths[b] - depths[a])[:, None], owner, len(ids))
        print(f"depth, {b} less {a}: {in_words(mean_estimates(*sums, seed)[0])} layers")


if __name__ == "__main__":
    main()
