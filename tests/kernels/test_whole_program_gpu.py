"""The commands on a GPU: what a CPU finds, memory that runs out, lenses and layers; skipped without a CUDA device."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch

from refinelens.cli import main
from refinelens.store.results import PREDICTIONS, open_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
MEGABYTE = 2**20
SWEEP = ["sweep", "--model", "tiny", "--documents", "5,20", "--examples", "4", "--dtype", "float32"]


def swept(path, *options):
    assert main([*SWEEP, *options, "--out", str(path)]) == 0
    return open_run(path)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    return swept(tmp_path_factory.mktemp("gpu") / "run", "--device", "cuda")


def column(run, name):
    """``[row, layer]``."""
    return np.array(pa.concat_tables(run.parts(PREDICTIONS.names))[name].to_pylist())


def same(ours, theirs):
    """Shares of argmaxes and of ranks that are equal."""
    return [np.mean(column(ours, name) == column(theirs, name)) for name in ("argmax", "target_rank")]


def test_a_gpu_finds_what_a_cpu_finds(on_gpu, tmp_path):
    on_cpu = swept(tmp_path / "cpu", "--device", "cpu")
    assert on_gpu.manifest["model"]["backend"] == "triton" and len(column(on_gpu, "argmax")) == 4 * 25
    argmaxes, ranks = same(on_gpu, on_cpu)
    print(f"equal on both: {argmaxes:.4f} of argmaxes, {ranks:.4f} of ranks")
    assert argmaxes > 0.99 and ranks > 0.95
    gap = column(on_gpu, "target_logprob") - column(on_cpu, "target_logprob")
    assert np.abs(gap).max() < 0.02


def test_half_precision_answers_alike(on_gpu, tmp_path):
    run = swept(tmp_path / "half", "--device", "cuda", "--dtype", "bfloat16")
    assert run.manifest["model"]["dtype"] == "bfloat16"
    assert np.mean(column(run, "argmax")[:, -1] == column(on_gpu, "argmax")[:, -1]) > 0.9


def test_memory_that_runs_out_costs_no_row(on_gpu, tmp_path, capfd):
    """The device itself refuses: all contexts of a question at once, then halves until they fit."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 48 * MEGABYTE) / total)
    try:
        run = swept(tmp_path / "small", "--device", "cuda", "--batch-size", "20")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory with 20 contexts" in capfd.readouterr().err
    assert run.manifest["status"] == "finished"
    assert min(same(run, on_gpu)) > 0.95


def test_a_lens_and_the_layers(tmp_path):
    lens = tmp_path / "lens"
    fit = ["fit", "--model", "tiny", "--text", "tiny", "--tokens", "20000", "--device", "cuda"]
    assert main([*fit, "--out", str(lens)]) == 0
    swept(tmp_path / "run", "--device", "cuda", "--lens", f"plain,{lens}")
    assert main(["layers", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "layers" / "manifest.json").read_text())
    assert found["status"] == "finished"
