"""Peak memory is flat: measured in fresh processes at two sizes, as the kernel accounts it."""

import subprocess
import sys

import pytest

from tiny import save_tiny_model

OP = """
import resource, sys, torch, refinelens
rows = int(sys.argv[1])
hidden, unembedding = torch.randn(rows, 16), torch.randn(50257, 16)
refinelens.fused_lens(hidden[:4], unembedding, targets=5, backend=sys.argv[2])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
refinelens.fused_lens(hidden, unembedding, targets=5, backend=sys.argv[2])
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(after - before)
"""

SWEEP = """
import resource, sys, tracemalloc
import pyarrow
from refinelens import sweep
sweep.QUESTIONS_PER_PART = int(sys.argv[4])
options = sweep.SweepOptions(
    model=sys.argv[1], task=sys.argv[2], documents=(3,), device="cpu", batch_size=sys.argv[5], positions=sys.argv[6]
)
tables, held = [], []
def report(progress):
    tables.append(pyarrow.total_allocated_bytes())
    if progress.done == 0:
        tracemalloc.start()  # the task is loaded: from here on nothing should stay
    if progress.done == progress.questions:
        held.append((tracemalloc.get_traced_memory()[1] + max(tables)) // 1024)
        tracemalloc.stop()
sweep.run_sweep(options, sys.argv[3], report=report)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, *held)
"""


def kilobytes(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


@pytest.mark.parametrize("backend, limit", [("cpp", 30_000), ("twin", 40_000)])
def test_op_never_holds_rows_by_vocabulary(backend, limit):
    """Whole logits would be 206 and 823 MB."""
    peaks = [kilobytes(OP, rows, backend)[0] for rows in (1024, 4096)]
    assert max(peaks) < limit, f"{peaks} kB at 1024 and 4096 rows"


def sweep_growth(tiny_model, question_file, folder, questions_per_part, positions="answer", repeats=(8, 64)):
    """Growth from 48 to 384 questions, kB: (peak resident set, peak of objects and tables over the questions)."""
    lines, peaks = question_file.read_text().splitlines(), []
    for times in repeats:
        path = folder / f"{times}.jsonl"
        path.write_text("\n".join(lines * times))
        peaks.append(kilobytes(SWEEP, tiny_model, path, folder / f"run{times}", questions_per_part, 1, positions))
    return [large - small for small, large in zip(*peaks, strict=True)]


def test_sweep_does_not_grow_with_questions(tiny_model, question_file, tmp_path):
    """What stays is the normalised text of the passages; holding every row would show."""
    (tmp_path / "leak").mkdir()
    resident, objects = sweep_growth(tiny_model, question_file, tmp_path, 8)
    _, leaking = sweep_growth(tiny_model, question_file, tmp_path / "leak", 10**9)
    assert resident < 25_000
    assert objects < 700 < leaking, f"objects grow by {objects} kB, and by {leaking} kB when rows are kept"


def test_reading_every_token_does_not_grow_with_questions(tiny_model, question_file, tmp_path):
    """From 24 to 96 questions: only the rows of one of them are held."""
    resident, objects = sweep_growth(tiny_model, question_file, tmp_path, 8, "all", (4, 16))
    assert resident < 25_000 and objects < 700


def test_sweep_does_not_grow_with_layers_times_positions_times_vocabulary(question_file, tmp_path):
    """All logits of a batch would be 60,000 ids x 4 bytes x (3 or 13 layers) x (1 or 3 contexts) x 3 tokens."""
    peaks = []
    for n_layer, contexts in ((2, 1), (12, 3)):
        folder = save_tiny_model(tmp_path / f"model{n_layer}", vocab_size=60_000, n_layer=n_layer, n_embd=8)
        peaks.append(kilobytes(SWEEP, folder, question_file, tmp_path / f"run{n_layer}", 8, contexts, "answer")[0])
    assert 60_000 * 4 * (13 * 3 - 3 * 1) * 3 / 1024 > 25_000 > peaks[1] - peaks[0], f"{peaks} kB"
