"""Settling by divergence: its definition, and the layers at which the tokens that a model generates settle."""

import csv
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import refinelens
from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.errors import InputError
from refinelens.model.loading import TINY
from refinelens.store.process import Interrupted
from refinelens.store.results import open_run
from refinelens.store.trajectory import is_deep, settle_by_divergence
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import stop_after

N = 6
ASKED = {"documents": (0, 3), "examples": 5, "device": "cpu", "generate": N}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    refinelens.sweep("tiny", out=path, measures="jsd", **ASKED)
    return open_run(path)


def rows_of(run):
    return [row for part in run.parts() for row in part.to_pylist()]


def key_of(row):
    return row["question_id"], row["documents"], row["gold_position"]


def test_the_first_layer_counts_though_later_ones_are_further_away():
    half = math.log(2) / 2
    jsd = np.array([[0.6, half, 0.5, 0.1, 0.0], [0.6, 0.5, 0.5, 0.5, 0.0], [0.1, 0.6, 0.6, 0.6, 0.0]])
    assert settle_by_divergence(jsd).tolist() == [1, 4, 0]


# 0.85 of 20 layers is 17 exactly; of 8 it is 6.8, of 30 25.5, of 1 0.85.
@pytest.mark.parametrize("n_layers, first", [(20, 17), (8, 7), (30, 26), (1, 1)])
def test_tokens_are_deep_from_the_rounded_up_layer_on(n_layers, first):
    assert is_deep(np.arange(n_layers + 1), n_layers).tolist() == [layer >= first for layer in range(n_layers + 1)]


@pytest.mark.medium
def test_generated_tokens_settle_where_whole_distributions_say(run):
    """Held against Transformers: its own greedy text, its hidden states, softmax over the vocabulary in fp64."""
    model = AutoModelForCausalLM.from_pretrained(TINY).double()
    inputs = SweepInputs.load(SweepConfig("tiny", **ASKED))
    contexts = [one for question in inputs.questions for one in inputs.builder().build(question).contexts]
    found = {key_of(row): row for row in rows_of(run) if row["answer_token"] == 0}
    assert len(contexts) == len(found) == 20
    several = set()
    for context in contexts:
        prompt = torch.tensor([context.prompt_ids])
        with torch.no_grad():
            whole = model.generate(prompt, max_new_tokens=N, do_sample=False, attention_mask=torch.ones_like(prompt))
            states = model(whole, output_hidden_states=True).hidden_states
            # The last of the hidden states is behind the norm already.
            behind = [*(model.transformer.ln_f(state) for state in states[:-1]), states[-1]]
            p = torch.stack([model.lm_head(state)[0].softmax(-1) for state in behind])
        p = p[:, prompt.shape[1] - 1 : -1].numpy()
        mean = (p + p[-1]) / 2
        jsd = (p * np.log(p / mean) + p[-1] * np.log(p[-1] / mean)).sum(-1) / 2
        own = [next(i for i, value in enumerate(column) if value <= math.log(2) / 2) for column in jsd.T]
        stored = found[context.question.id, context.n_documents, context.gold_position]["generated_settle_jsd"]
        assert stored == own[: len(stored)] and 1 <= len(stored) <= N
        several |= set(stored)
    assert len(several) > 2


@pytest.mark.medium
def test_batches_and_other_rows_change_nothing(run, tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", measures="jsd", positions="all", batch_size=4, **ASKED)
    other = {key_of(row): row["generated_settle_jsd"] for row in rows_of(open_run(tmp_path / "run"))}
    assert other == {key_of(row): row["generated_settle_jsd"] for row in rows_of(run)}


def test_the_ratio_is_a_mean_over_texts(run):
    with (run.path / "settling.csv").open() as file:
        table = {(int(row["documents"]), int(row["gold_position"])): row for row in csv.DictReader(file)}
    rows = [row for row in rows_of(run) if row["answer_token"] == 0]
    for where, shown in table.items():
        own = [row["generated_settle_jsd"] for row in rows if key_of(row)[1:] == where]
        ratio = np.mean([np.mean([layer >= 7 for layer in layers]) for layers in own])
        assert len(own) == 5 and float(shown["deep_thinking_generated"]) == pytest.approx(ratio, abs=1e-6)
    assert len(table) == 4 and max(float(row["deep_thinking_generated"]) for row in table.values()) > 0


@pytest.mark.medium
@pytest.mark.parametrize("asked", [{"measures": "jsd"}, {"generate": 2}])
def test_without_both_there_is_no_such_column(asked, tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", documents=(3,), examples=1, device="cpu", **asked)
    assert "generated_settle_jsd" not in rows_of(open_run(tmp_path / "run"))[0]


def test_exports_by_layer_leave_it_out(run, tmp_path):
    loaded = refinelens.load_run(run.path)
    assert "generated_settle_jsd" in loaded.predictions.columns
    assert "generated_settle_jsd" not in loaded.layers.columns and "jsd" in loaded.layers.columns
    assert main(["export", str(run.path), "--out", str(tmp_path / "rows.csv")]) == 0


@pytest.mark.medium
def test_a_run_of_before_is_read_and_does_not_go_on(tmp_path):
    """Its manifest does not say what its rows have: they have no layers of generated tokens."""
    options = SweepConfig("tiny", measures="jsd", **ASKED | {"documents": (3,)})
    with pytest.raises(Interrupted):
        run_sweep(options, tmp_path / "run", progress=stop_after(1))
    run = open_run(tmp_path / "run")
    assert run.extras == ("jsd", "generated_settle_jsd")
    run.write_manifest({name: value for name, value in run.manifest.items() if name != "extras"})
    assert run.extras == ("jsd",) and "jsd" in refinelens.load_run(run.path).predictions.columns
    with pytest.raises(InputError, match="expected extras None, as the run has it, got"):
        resume_sweep(run.path)
