"""Where the time of a sweep goes: model, lens, contexts, rows, writing, tables.

    OMP_NUM_THREADS=1 python benchmarks/shares.py [arguments of refinelens sweep]

Runs the sweep itself, with the functions of each stage wrapped from outside; process CPU time of one thread from the
first question on, loading apart. Shares are of the forward passes.
"""

from __future__ import annotations

import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from harness import machine

from refinelens import cli
from refinelens.bench.table import aligned
from refinelens.lens import logit_lens
from refinelens.sweeping import contexts, predict, recorder, sweep

DEFAULT = ("--documents", "5,10", "--examples", "8", "--reuse-prefix", "off")
STAGES = {
    "model": (logit_lens.LogitLens, "hidden"),
    "lens, all layers": (logit_lens.LogitLens, "read_states"),
    "contexts: documents, prompt, tokens": (contexts.ContextBuilder, "build"),
    "rows": (predict, "prediction_table"),
    "writing": (recorder.RunWriter, "add"),
    "last part and manifest": (recorder.RunWriter, "close"),
    "tables and figures, once": (sweep, "write_outputs"),
    "summary, once": (sweep, "read_report"),
}
BOOKKEEPING = ("contexts: documents, prompt, tokens", "rows", "writing", "last part and manifest")
# Of a sweep that reads the answer alone: per cent of the forward passes.
GOALS = {"lens": (("lens, all layers",), 2), "writing and bookkeeping": (BOOKKEEPING, 3)}


def main() -> int:
    """Sweep with every stage timed, then print the shares."""
    seconds: Counter[str] = Counter()
    for name, (owner, function) in STAGES.items():
        setattr(owner, function, _timed(getattr(owner, function), name, seconds))
    started = []
    ask = sweep.SweepInputs.ask

    def first_question(self, *arguments, **options):
        seconds.clear()  # of the gates that ran while loading
        started.append(time.process_time())
        return ask(self, *arguments, **options)

    sweep.SweepInputs.ask = first_question
    with tempfile.TemporaryDirectory() as folder:
        options = sys.argv[1:] or DEFAULT
        code = cli.main(["sweep", *options, "--out", str(Path(folder) / "run")])
    total = time.process_time() - started[0]
    if code == 0:
        print(f"\n{machine()}: {' '.join(options)}\n")
        rows, model = [["", "seconds", "of the forward passes"]], seconds["model"]
        for name, spent in (*((name, seconds[name]) for name in STAGES), ("all else", total - sum(seconds.values()))):
            rows.append([name, f"{spent:.2f}", f"{100 * spent / model:.2f} %"])
        print(*aligned(rows), sep="\n")
        if ("--positions", "all") not in zip(options, options[1:], strict=False):
            for name, (stages, goal) in GOALS.items():
                spent = sum(seconds[stage] for stage in stages)
                print(f"{name}: {100 * spent / model:.2f} %, goal under {goal} %")
        print(f"peak of resident memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    return code


def _timed(function, name: str, seconds: Counter):
    def timed(*arguments, **options):
        start = time.process_time()
        try:
            return function(*arguments, **options)
        finally:
            seconds[name] += time.process_time() - start

    return timed


if __name__ == "__main__":
    sys.exit(main())
