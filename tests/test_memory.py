"""Peak memory is flat: measured in fresh processes at two sizes, as the kernel accounts it."""

import json
import subprocess
import sys

import pytest

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
import resource, sys
from refinelens.sweep import SweepOptions, run_sweep
options = SweepOptions(model=sys.argv[1], task=sys.argv[2], documents=(3,), device="cpu")
run_sweep(options, sys.argv[3])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def kilobytes(code, *arguments):
    done = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.mark.parametrize("backend, limit", [("cpp", 30_000), ("twin", 150_000)])
def test_op_never_holds_rows_by_vocabulary(backend, limit):
    """Whole logits would be 206 and 823 MB; what is needed is bounded, the twin's by what the allocator keeps."""
    peaks = [kilobytes(OP, rows, backend) for rows in (1024, 4096)]
    assert max(peaks) < limit, f"{peaks} kB at 1024 and 4096 rows"


def test_sweep_does_not_grow_with_questions(tiny_model, question_file, tmp_path):
    """Eight times the questions, the same memory but for allocator noise."""
    lines = question_file.read_text().splitlines()
    peaks = []
    for repeats in (8, 64):
        records = [json.loads(line) for _ in range(repeats) for line in lines]
        path = tmp_path / f"{repeats}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        peaks.append(kilobytes(SWEEP, tiny_model, path, tmp_path / f"run{repeats}"))
    assert peaks[1] - peaks[0] < 25_000, f"{peaks} kB at 48 and 384 questions"
