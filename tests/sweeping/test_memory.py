"""Peak memory is flat: measured in a fresh process at two sizes, as the kernel accounts it."""

import json
import subprocess
import sys

import pytest

from tiny import save_tiny_model

pytestmark = pytest.mark.medium

RESIDENT = """
import resource, sys
def resident():  # the largest resident set so far, kB; macOS counts it in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
"""

# Each measurement in a fork, whose peak is its own: rows that fell back, if any can, and kB that the op needed. With
# ``certified`` first all tokens are equal, and every row falls back; then a row has as many equal tokens as it may
# without.
OP = """
import os, torch, refinelens
def growth(name, hidden, unembedding, threads, **how):
    if os.fork() == 0:
        torch.set_num_threads(threads)
        hidden, unembedding = hidden(), unembedding()
        refinelens.fused_lens(hidden[:4], unembedding, targets=0, **how)
        before = resident()
        stats = refinelens.fused_lens(hidden, unembedding, targets=0, **how)
        fell_back = None if stats.fell_back is None else int(stats.fell_back.sum())
        print(f'["{name}", {fell_back or 0}, {resident() - before}]', flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
torch.manual_seed(0)  # of some draws one row does fall back
refinelens.fused_lens(torch.zeros(1, 16), torch.zeros(2, 16), targets=0)  # what a first call imports
for backend in ("cpp", "reference"):
    growth(backend, lambda: torch.randn(513, 16), lambda: torch.randn(50257, 16), 2, backend=backend)
every_12th = lambda: (torch.arange(30_000) % 12 == 0).float()[:, None].repeat(1, 16)
for name, unembedding in (("all equal", lambda: torch.ones(30_000, 16)), ("most", every_12th)):
    growth(name, lambda: torch.rand(513, 16), unembedding, 2, precision="certified")
"""

# Every sweep in turn but for its figures, [folder, questions per part, options]: the peak of the resident set and that
# of objects and tables, kB, when a quarter of the questions is asked and when all are; and of the resident set at the
# end. A sweep before them imports what it needs, which takes longer once objects are counted.
SWEEPS = """
import json, tracemalloc
import pyarrow, torch
from refinelens.report import tables as outputs
from refinelens.sweeping import sweep
torch.set_num_threads(1)  # models so small gain nothing from more
outputs.draw_figures = lambda *drawn: None
def progress(stage, done, total, *so_far):
    global tables
    tables = max(tables, pyarrow.total_allocated_bytes())
    if done == 0:
        tracemalloc.start()  # the task is loaded: from here on nothing should stay
    elif done in (total // 4, total):
        peaks.append((resident(), (tracemalloc.get_traced_memory()[1] + tables) // 1024))
    if done == total:
        tracemalloc.stop()
given = json.loads(sys.argv[1])
sweep.run_sweep(sweep.SweepConfig(documents=(3,), device="cpu", examples=1, **given[0][2]), given[0][0] + " before")
for folder, questions_per_part, options in given:
    peaks, tables, options = [], 0, sweep.SweepConfig(documents=(3,), device="cpu", **options)
    sweep.run_sweep(options, folder, progress=progress, questions_per_part=questions_per_part)
    print(json.dumps([peaks, resident()]))
"""


@pytest.fixture(scope="session")
def op_growth(measured):
    """What `OP` prints, by name."""
    return {name: found for name, *found in measured[0]}


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_op_never_holds_rows_by_vocabulary(backend, op_growth):
    """Whole logits would be 103 MB."""
    assert op_growth[backend][1] < 40_000


def test_certified_ranks_hold_no_tokens_of_rows_that_fall_back(op_growth):
    """Lists of all rows would be 81 MB; those of rows that do not fall back are 21, and 4 more of each thread."""
    (all_equal, equal), (none, most) = op_growth["all equal"], op_growth["most"]
    assert (all_equal, none) == (513, 0)
    assert equal < 20_000 and most < 40_000


@pytest.fixture(scope="session")
def peaks(measured):
    """What `SWEEPS` prints, by name."""
    return measured[1]


@pytest.fixture(scope="session")
def measured(tiny_model, question_file, tmp_path_factory):
    """All that `OP` and `SWEEPS` print: one process, which takes seconds to start; the sweep that leaks comes last."""
    folder = tmp_path_factory.mktemp("memory")

    def sweep(times, model=tiny_model, **options):
        path = folder / f"{times}.jsonl"
        path.write_text("\n".join(question_file.read_text().splitlines() * times))
        return {"model": str(model), "task": str(path), "batch_size": "1", **options}

    together = {"batch_size": "3", "reuse_prefix": "off"}
    sweeps = {"questions": (8, sweep(12, **together)), "every token": (8, sweep(2, positions="all"))}
    for n_layer, contexts in ((2, 1), (12, 3)):
        model = save_tiny_model(folder / f"model{n_layer}", vocab_size=60_000, n_layer=n_layer, n_embd=8)
        sweeps[f"{n_layer} layers"] = 8, sweep(1, model, batch_size=str(contexts))
    sweeps["leak"] = 10**9, sweep(12, **together)
    given = [(str(folder / name), *options) for name, options in sweeps.items()]
    command = [sys.executable, "-c", RESIDENT + OP + SWEEPS, json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    return lines[: -len(sweeps)], dict(zip(sweeps, lines[-len(sweeps) :], strict=True))


def growth(peaks):
    """From the first quarter of the questions to all: peak resident set, and objects and tables, kB."""
    (resident, objects), (last_resident, last_objects) = peaks[0]
    return last_resident - resident, last_objects - objects


def test_sweep_does_not_grow_with_questions(peaks):
    """From 18 to 72: what stays is the normalised text of the passages; holding every row would show."""
    (resident, objects), (_, leaking) = growth(peaks["questions"]), growth(peaks["leak"])
    assert resident < 25_000
    assert objects < 250 < leaking, f"objects grow by {objects} kB, and by {leaking} kB when rows are kept"


def test_reading_every_token_does_not_grow_with_questions(peaks):
    """From 3 to 12 questions: only the rows of one that is asked and of one that is written are held."""
    resident, objects = growth(peaks["every token"])
    assert resident < 25_000 and objects < 300


def test_sweep_does_not_grow_with_layers_times_positions_times_vocabulary(peaks):
    """All logits of a batch would be 60,000 ids x 4 bytes x (3 or 13 layers) x (1 or 3 contexts) x 3 tokens."""
    grown = peaks["12 layers"][1] - peaks["2 layers"][1]
    assert 60_000 * 4 * (13 * 3 - 3 * 1) * 3 / 1024 > 25_000 > grown
