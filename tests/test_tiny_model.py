"""The trained model in the package: what it is, that it answers, and that everything runs on it out of the box."""

import csv
import random
import re
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from refinelens.cli import main
from refinelens.fit.options import FitOptions
from refinelens.fit.session import fit_lens
from refinelens.kernels.norms import LayerNorm
from refinelens.logit_lens import LogitLens
from refinelens.models import TINY, load_model
from refinelens.options import SweepOptions
from refinelens.results import open_run
from refinelens.sweep import resume_sweep, run_sweep
from refinelens.tiny_task import HELD_OUT, context_text, generate_task, vocabulary
from tiny_card import measure


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny", "cpu")


def test_weights_are_small_and_in_half_precision():
    path = TINY / "model.safetensors"
    assert path.stat().st_size <= 4_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_the_architecture_is_gpt2s(loaded):
    lens = LogitLens.from_model(loaded.model)
    assert type(loaded.model).__name__ == "GPT2LMHeadModel" and isinstance(lens.parts.norm, LayerNorm)
    assert (lens.n_layers, lens.d_model, loaded.model.config.n_head) == (8, 128, 4)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert 1.6e6 < loaded.model.num_parameters() < 1.8e6


def test_the_tokenizer_has_a_token_for_every_word():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert set(vocabulary()) < set(tokenizer.get_vocab()) and len(tokenizer) == len(vocabulary()) + 2
    for question in generate_task(20, 20, seed=0).questions:
        ids = tokenizer("\n".join([d.text for d in question.distractors] + [question.question]))["input_ids"]
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize("n_documents, at_least", [(1, 0.97), (5, 0.97), (10, 0.95)])
def test_it_answers_questions_about_entities_it_never_saw(loaded, n_documents, at_least):
    found = measure(loaded.model, loaded.tokenizer, "test", n_documents, 50 * n_documents)
    assert found.accuracy >= at_least and min(found.by_gold) > 0.85
    assert len(found.by_gold) == n_documents


def test_parity_on_trained_states(loaded):
    """At every position of a context the lens at the last layer is the model, and below it is not."""
    lens = LogitLens.from_model(loaded.model)
    text, _ = context_text(random.Random(0), 10, 10, HELD_OUT)
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    positions, targets = torch.arange(ids.shape[1] - 1), ids[:, 1:]
    stats = lens.trajectory(ids, positions, targets)
    with torch.no_grad():
        logits = loaded.model(ids).logits[:, :-1]
    assert torch.equal(stats.argmax[-1], logits.argmax(-1))
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(
        stats.target_logprob[-1], log_p.gather(-1, targets[..., None])[..., 0], rtol=0, atol=1e-4
    )
    asked = ids[:, :-1] == loaded.tokenizer.convert_tokens_to_ids(":")
    right = (stats.target_rank == 0)[:, asked].float().mean(-1)
    assert right[-1] >= 0.8 and right[0] == 0.0


def test_a_sweep_needs_no_more_than_its_name(tmp_path, capsys):
    arguments = ["--documents", "5", "--examples", "8", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["sweep", "--model", "tiny", *arguments]) == 0
    assert "tiny on tiny" in capsys.readouterr().out
    run = open_run(tmp_path / "run")
    assert run.manifest["task"]["name"] == run.manifest["task"]["format"] == "tiny"
    with (run.path / "summary.csv").open() as file:
        assert all(float(line["accuracy"]) >= 0.75 for line in csv.DictReader(file))


def test_every_document_size_it_was_trained_on_fits(tmp_path):
    options = SweepOptions(
        "tiny", "tiny", (0, 1, 20, 30, 45), gold_positions="ends-middle", examples=2, device="cpu", positions="answer"
    )
    run = run_sweep(options, tmp_path / "run")
    assert run.manifest["counts"]["left_out"] == {"45 documents: a context longer than the model's positions": [0, 1]}
    rows = pq.read_table(run.path / "predictions").to_pylist()
    assert max(row["n_tokens"] for row in rows) <= run.manifest["model"]["max_tokens"]
    assert not any(row["argmax"][-1] == row["answer_id"] for row in rows if row["documents"] == 0)


def rows_of(run):
    return pq.read_table(run.path / "predictions").to_pylist()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A sweep of six documents without prefixes in common."""
    options = SweepOptions("tiny", "tiny", (6,), examples=4, device="cpu", reuse_prefix="off")
    return options, run_sweep(options, tmp_path_factory.mktemp("whole") / "run")


def test_shared_prefixes_change_nothing_on_trained_states(whole, tmp_path):
    options, run = whole
    branched = run_sweep(replace(options, reuse_prefix="on"), tmp_path / "run")
    assert branched.manifest["counts"]["tokens_computed"] < run.manifest["counts"]["tokens_computed"]
    for ours, alone in zip(rows_of(branched), rows_of(run), strict=True):
        assert ours["argmax"] == alone["argmax"]
        assert ours["target_logprob"] == pytest.approx(alone["target_logprob"], abs=1e-4)


def test_a_stopped_sweep_goes_on_to_the_same_rows(whole, tmp_path, monkeypatch):
    monkeypatch.setattr("refinelens.sweep.QUESTIONS_PER_PART", 1)
    options, run = whole

    def stop(progress):
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(options, tmp_path / "run", report=stop)
    assert len(rows_of(open_run(tmp_path / "run"))) == 12
    assert rows_of(resume_sweep(tmp_path / "run")) == rows_of(run)


def test_words_that_it_does_not_know_are_one_line(tmp_path, capfd):
    arguments = ["--task", "builtin", "--documents", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["sweep", "--model", "tiny", *arguments]) == 2
    error = capfd.readouterr().err
    assert re.search(r"that the tokenizer of --model tiny has, got 100 of 100 with others, .*; use --task tiny$", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_lens_is_fitted_to_its_own_text(tmp_path):
    """Of trained states a fitted lens reads more than the plain one at every layer below the output."""
    options = FitOptions(model="tiny", text="tiny", tokens=20_000, device="cpu")
    quality = fit_lens(options, str(tmp_path / "lens")).manifest["quality"]
    for layer in range(8):
        assert quality["linear"]["kl"][layer] < quality["plain"]["kl"][layer]
