"""The trained model in the package: what it is, that it answers, and that everything runs on it out of the box."""

import csv
import json
import random
import re
import signal
from collections import defaultdict
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from transformers import AutoTokenizer

from refinelens import fused_lens
from refinelens.cli import main
from refinelens.config import FitConfig, LayersConfig, SweepConfig
from refinelens.data.generated import ANSWER, FRIENDS, HELD_OUT, HOPS, context_text, generate_task, vocabulary
from refinelens.fitting.fit import fit_lens
from refinelens.kernels.reference import LayerNorm, LensHead, fused_lens_reference
from refinelens.layers.analysis import run_layers
from refinelens.lens.logit_lens import LogitLens
from refinelens.model.loading import TINY, load_model
from refinelens.store.results import open_run
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from tiny_card import friend_question, measure, two_hop_question

pytestmark = pytest.mark.medium


@pytest.fixture(scope="session")
def loaded():
    return load_model("tiny", "cpu")


def test_weights_are_small_and_in_half_precision():
    path = TINY / "model.safetensors"
    assert path.stat().st_size <= 4_000_000
    with safe_open(path, "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}


def test_the_architecture_is_gpt2s(loaded):
    lens = LogitLens(loaded.model)
    assert type(loaded.model).__name__ == "GPT2LMHeadModel" and isinstance(lens.head.norm, LayerNorm)
    assert (lens.n_layers, lens.d_model, loaded.model.config.n_head) == (8, 128, 4)
    assert loaded.model.lm_head.weight is loaded.model.transformer.wte.weight
    assert 1.6e6 < loaded.model.num_parameters() < 1.8e6


def test_the_tokenizer_has_a_token_for_every_word():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    assert set(vocabulary()) < set(tokenizer.get_vocab()) and len(tokenizer) == len(vocabulary()) + 2
    questions = [q for task in ("tiny", FRIENDS, HOPS) for q in generate_task(task, 20, 20, seed=0).questions]
    for question in questions:
        ids = tokenizer("\n".join([d.text for d in question.distractors] + [question.question]))["input_ids"]
        assert tokenizer.unk_token_id not in ids


@pytest.mark.parametrize(
    "n_documents, at_least", [(1, 0.97), (5, 0.97), pytest.param(10, 0.95, marks=pytest.mark.slow)]
)
def test_it_answers_questions_about_entities_it_never_saw(loaded, n_documents, at_least):
    found = measure(loaded.model, loaded.tokenizer, "test", n_documents, 50 * n_documents)
    assert found.accuracy >= at_least and min(found.by_gold) > 0.85
    assert len(found.by_gold) == n_documents


@pytest.mark.parametrize(
    "n_documents, at_least", [(2, 0.95), (5, 0.95), (10, 0.9), pytest.param(20, 0.8, marks=pytest.mark.slow)]
)
def test_it_answers_in_two_hops(loaded, n_documents, at_least):
    found = measure(loaded.model, loaded.tokenizer, "test", n_documents, 50 * n_documents, two_hop_question)
    assert found.accuracy >= at_least and min(found.by_gold) > at_least - 0.15
    assert len(found.by_gold) == n_documents


def test_it_answers_who_the_friend_is(loaded):
    found = measure(loaded.model, loaded.tokenizer, "test", 10, 500, friend_question)
    assert found.accuracy >= 0.95 and min(found.by_gold) > 0.85


def test_it_needs_the_bridge(loaded):
    """Without it no value is likelier to be right than another."""
    tokenizer, right = loaded.tokenizer, 0
    questions = generate_task(HOPS, 60, 11, seed=5).questions
    for question in questions:
        lines = [document.text for document in (question.gold, *question.distractors[1:])]
        random.Random(question.id).shuffle(lines)
        ids = tokenizer("\n".join([*lines, question.question + ANSWER]), return_tensors="pt")["input_ids"]
        with torch.no_grad():
            right += tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == question.answers[0]
    assert right / len(questions) < 0.4, "of six facts one is right"


@pytest.fixture(scope="session")
def hops(loaded):
    """Every layer's reading behind 40 questions in two hops, and the friends that the bridges name."""
    lens, found = LogitLens(loaded.model, loaded.tokenizer), []
    for question in generate_task(HOPS, 40, 10, seed=7).questions:
        lines = [document.text for document in question.distractors]
        lines.insert(question.id % 10, question.gold.text)
        text = "\n".join([*lines, question.question + ANSWER])
        reading = lens.read(text, targets=" " + question.answers[0], positions=[-1], top_k=10)
        friend = loaded.tokenizer(question.gold.title)["input_ids"]
        found.append((reading, friend))
    return found


def test_the_bridge_comes_before_the_answer(hops):
    """Behind the question the friend is likeliest in middle layers, and then the friend's value."""
    best, ten, settled = 0, 0, []
    for reading, friend in hops:
        right = (reading.rank[:, -1] == 0).tolist()
        if not right[-1]:
            continue
        settle = next(layer for layer in range(9) if all(right[layer:]))
        settled.append(settle)
        best += any(int(reading.argmax[layer, -1]) in friend for layer in range(settle))
        ten += any(set(reading.top_ids[layer, -1].tolist()) & set(friend) for layer in range(1, settle))
    assert len(settled) >= 34
    assert sum(settled) / len(settled) > 4.5, "one hop settles below layer 3"
    assert best / len(settled) >= 0.5 and ten / len(settled) >= 0.9


def test_parity_on_trained_states(loaded):
    """At every position of a context the lens at the last layer is the model, and below it is not."""
    lens = LogitLens(loaded.model)
    text, _ = context_text(random.Random(0), 10, 10, HELD_OUT)
    ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
    positions, targets = torch.arange(ids.shape[1] - 1), ids[:, 1:]
    stats = lens.read(ids, targets, positions).stats
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


def test_who_the_friend_is_is_known_early_lost_and_known_again(tmp_path):
    """The model takes the second hop before it settles on what was asked, so that depth is not 0."""
    options = SweepConfig("tiny", FRIENDS, (10,), gold_positions="ends-middle", examples=12, device="cpu")
    run = run_sweep(options, tmp_path / "run")
    with (run.path / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3 and min(float(line["accuracy"]) for line in lines) >= 0.9
    assert min(float(line["mean_depth"]) for line in lines) > 1.0


def test_every_document_size_it_was_trained_on_fits(tmp_path):
    options = SweepConfig(
        "tiny", "tiny", (0, 1, 20, 30, 45), gold_positions="ends-middle", examples=2, device="cpu", positions="answer"
    )
    run = run_sweep(options, tmp_path / "run")
    assert run.manifest["counts"]["left_out"] == {"45 documents: a context longer than the model's positions": [0, 1]}
    rows = pq.read_table(run.path / "predictions").to_pylist()
    assert max(row["n_tokens"] for row in rows) <= run.manifest["model"]["max_tokens"]
    assert not any(row["argmax"][-1] == row["answer_id"] for row in rows if row["documents"] == 0)


def rows_of(run):
    return pq.read_table(run.path / "predictions").to_pylist()


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A sweep of six documents without prefixes in common."""
    options = SweepConfig("tiny", "tiny", (6,), examples=4, device="cpu", reuse_prefix="off")
    return options, run_sweep(options, tmp_path_factory.mktemp("whole") / "run")


def test_shared_prefixes_change_nothing_on_trained_states(whole, tmp_path):
    options, run = whole
    branched = run_sweep(replace(options, reuse_prefix="on"), tmp_path / "run")
    assert branched.manifest["counts"]["tokens_computed"] < run.manifest["counts"]["tokens_computed"]
    for ours, alone in zip(rows_of(branched), rows_of(run), strict=True):
        assert ours["argmax"] == alone["argmax"]
        assert ours["target_logprob"] == pytest.approx(alone["target_logprob"], abs=1e-4)


def test_a_killed_sweep_goes_on_to_the_same_rows(whole, tmp_path, fork_server):
    """SIGKILL in the third question, when one is written and the second is being written."""
    options, run = whole
    arguments = ["--documents", "6", "--examples", str(options.examples), "--device", "cpu", "--reuse-prefix", "off"]
    command = ["sweep", "--model", "tiny", *arguments, "--out", tmp_path / "run"]
    killed = fork_server.run(*command, log=tmp_path / "log", part=1, signal_at=[(3, signal.SIGKILL)])
    assert killed == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert rows_of(open_run(tmp_path / "run")) in (rows_of(run)[:6], rows_of(run)[:12])
    assert rows_of(resume_sweep(tmp_path / "run")) == rows_of(run)


def test_words_that_it_does_not_know_are_one_line(tmp_path, capfd):
    arguments = ["--task", "builtin", "--documents", "2", "--device", "cpu", "--out", str(tmp_path / "run")]
    assert main(["sweep", "--model", "tiny", *arguments]) == 2
    error = capfd.readouterr().err
    assert re.search(r"of --model tiny has, got 100 of the first 100 with others, .*; use --task tiny$", error)
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session", params=[5_000, pytest.param(20_000, marks=pytest.mark.slow)])
def fitted(request, tmp_path_factory):
    """The folder of a lens fitted to so many tokens of the model's own text."""
    folder = tmp_path_factory.mktemp("fitted") / "lens"
    fit_lens(FitConfig(model="tiny", text="tiny", tokens=request.param, device="cpu"), str(folder))
    return folder


def test_a_fitted_lens_reads_more_of_trained_states(fitted, tmp_path):
    """At every layer below the output its report says so, of held-out text; of the answers a sweep does from layer 2.

    At layer 1 neither reads anything of them; from layer 6 on both are within 0.06 nats.
    """
    quality = json.loads((fitted / "manifest.json").read_text())["quality"]
    for layer in range(8):
        assert quality["linear"]["kl"][layer] < quality["plain"]["kl"][layer]
    options = SweepConfig("tiny", "tiny", (5,), examples=4, device="cpu", lens=("plain", str(fitted)))
    rows = rows_of(run_sweep(options, tmp_path / "run"))
    plain, lens = ([row for row in rows if (row["lens"] == "plain") == is_plain] for is_plain in (True, False))
    assert len(plain) == len(lens) == 20
    kl = [[sum(row["kl"][layer] for row in each) for layer in range(9)] for each in (plain, lens)]
    assert all(of_lens < of_plain for of_plain, of_lens in list(zip(*kl, strict=True))[2:6])
    assert max(max(each[6:]) for each in kl) < 20 * 0.06
    for one, other in zip(plain, lens, strict=True):
        assert one["target_rank"][-1] == other["target_rank"][-1] == 0


@pytest.fixture(scope="session", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def layers(request, tmp_path_factory):
    """Of so many questions mean statistics over the layers, from 0 or from 1, by what was done and their names."""
    options = SweepConfig("tiny", "tiny", (5,), examples=request.param, device="cpu")
    run = run_sweep(options, tmp_path_factory.mktemp("layers") / "run")
    folder, report = run_layers(run.path, LayersConfig(("skip", "mean", "attn")))
    assert report.largest_difference < 1e-4 and report.manifest["status"] == "finished"
    means = defaultdict(list)
    with (folder.path / "layers.csv").open() as file:
        for line in csv.DictReader(file):
            if line["gold_position"] == "" and line["value"] != "":
                means[line["of"], line["statistic"]].append(float(line["value"]))
    return means


def test_the_first_blocks_are_essential_by_intervention_and_by_lens(layers):
    """They find the entity and copy its value; by layer 4 the answer stands, and later blocks may go."""
    for name in ("skip", "mean", "attn"):
        cost = layers[name, "logprob_cost"]
        assert len(cost) == 8 and cost[0] > 5 and cost.index(max(cost)) == 0
        assert max(map(abs, cost[4:])) < 0.1
        assert layers[name, "accuracy"][0] < 0.5 and min(layers[name, "accuracy"][4:]) == 1.0
    gain = layers["lens", "logprob_gain"]
    assert gain.index(max(gain)) == 0 and sum(gain[:2]) > 0.8 * sum(gain)
    assert sum(gain[6:]) < 0.01 * sum(gain), "blocks 6 and 7 add nothing"


def test_the_answer_stands_before_the_last_layers(layers):
    assert layers["lens", "exit_accuracy"][:2] == [0.0, 0.0]
    assert layers["lens", "exit_accuracy"][5:] == [1.0] * 4
    assert sum(layers["lens", "settle_share"]) == pytest.approx(1.0)


@pytest.mark.parametrize("precision", ["fp32", "certified"])
def test_ranks_of_trained_states_are_those_of_fp64(loaded, precision):
    """Certified to the last one; fp32 but for near-ties, of which half-precision weights leave some."""
    lens = LogitLens(loaded.model)
    ids = loaded.tokenizer(context_text(random.Random(1), 10, 10, HELD_OUT)[0], return_tensors="pt")["input_ids"]
    hidden = lens.hidden(ids[:, :-1], torch.arange(ids.shape[1] - 1)).flatten(0, 2)
    targets = ids[0, 1:].repeat(9)
    unembedding, norm = lens.head.weight, lens.head.norm
    stats = fused_lens(hidden, unembedding, norm, targets, precision=precision)
    exact = fused_lens_reference(hidden, LensHead(unembedding, norm), targets, dtype=torch.float64)
    differ = (stats.target_rank != exact.target_rank) | (stats.argmax != exact.argmax)
    assert differ.float().mean() <= (0.0 if precision == "certified" else 0.01)
