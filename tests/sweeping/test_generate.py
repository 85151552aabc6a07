"""Greedy texts are those of Transformers' own `generate`, whichever way contexts run; where a text ends."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from faults import at_pass
from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.data.scoring import best_subspan_em, first_line
from refinelens.lens.logit_lens import LogitLens
from refinelens.model.loading import load_model
from refinelens.sweeping.generate import Generator
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.sweep import run_sweep
from sweeps import predictions
from tiny import byte_tokenizer, save_tiny_model

N = 5


def save_writer(folder, **sizes):
    """A tiny model that writes something else after every prompt: its blocks outweigh its embedding."""
    save_tiny_model(folder, seed=2, **sizes)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter *= 15 if ".h." in name and parameter.dim() == 2 else 0 if name.endswith("ln_f.bias") else 1
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_writer(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def options(model_folder, question_file):
    return SweepConfig(str(model_folder), str(question_file), documents=(0, 1, 3), device="cpu", generate=N)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def loaded(model_folder):
    return load_model(str(model_folder), "cpu")


@pytest.fixture(scope="module")
def logit_lens(loaded):
    return LogitLens(loaded.model)


def own_text(model, tokenizer, prompt):
    """What Transformers writes behind a prompt."""
    ids = torch.tensor([prompt])
    written = model.generate(ids, max_new_tokens=N, do_sample=False, attention_mask=torch.ones_like(ids))
    return tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.medium
def test_texts_are_those_of_transformers(finished, options, model_folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_folder), AutoTokenizer.from_pretrained(model_folder)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    inputs = SweepInputs.load(options)
    contexts = [context for question in inputs.questions for context in inputs.builder().build(question).contexts]
    found = {(r["question_id"], r["documents"], r["gold_position"]): r for r in predictions(finished)}
    assert len(contexts) == len(found) == 6 * (1 + 1 + 3)
    for context in contexts:
        row = found[context.question.id, context.n_documents, context.gold_position]
        text = own_text(model, tokenizer, context.prompt_ids)
        assert row["generated"] == first_line(text)
        assert row["generated_correct"] == best_subspan_em(text, context.question.answers)
    assert len({row["generated"] for row in found.values()}) > 10
    assert finished.manifest["counts"]["tokens_generated"] == N * len(contexts)


# One at a time, whole; batches of contexts of several lengths; every token read.
@pytest.mark.parametrize("change", [{"reuse_prefix": "off"}, {"batch_size": "4"}, {"positions": "all"}])
@pytest.mark.medium
def test_however_contexts_run(finished, options, tmp_path, change):
    other = predictions(run_sweep(replace(options, **change), tmp_path / "run"))
    names = ("question_id", "documents", "gold_position", "answer_token", "generated", "generated_correct")
    ours, theirs = ([[row[n] for n in names] for row in rows] for rows in (predictions(finished), other))
    assert ours == [row for row in theirs if row[3] >= 0]


@pytest.mark.medium
def test_no_prompt_depends_on_its_answer(tmp_path):
    """Where a space is a token of its own, the answer is read behind it; a text goes on from the prompt alone."""
    folder = save_writer(tmp_path / "model", tokenizer=byte_tokenizer(), n_positions=512)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    gold = {"title": "arven", "text": "the door is red .", "isgold": True}
    records = [{"question": "which?", "answers": [answer], "ctxs": [gold]} for answer in ("red", "(red)")]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = SweepConfig(str(folder), str(path), documents=(0, 1), device="cpu", generate=N)
    inputs = SweepInputs.load(options)
    context = inputs.builder().build(inputs.questions[0]).contexts[0]
    assert context.prompt_length == len(context.prompt_ids) + 1
    rows = [row for row in predictions(run_sweep(options, tmp_path / "run")) if row["documents"] == 0]
    written = {row["question_id"]: row["generated"] for row in rows}
    own, behind = (
        first_line(own_text(model, tokenizer, ids))
        for ids in (context.prompt_ids, context.input_ids[: context.prompt_length])
    )
    assert written == {0: own, 1: own} and own != behind


# A text that begins with the prompt; one that parts from it before its end, as where the answer changes a token.
@pytest.mark.parametrize("n_shared, again", [(20, 1), (17, 3)])
def test_what_an_answer_token_costs_with_a_cache_and_without(logit_lens, loaded, n_shared, again):
    """With one it is one token; without, the whole text; the text is the same."""
    from transformers import DynamicCache

    prompt, ran, texts = list(range(5, 25)), [], []
    text = [*prompt[:n_shared], *range(30, 54 - n_shared)]
    generator = Generator.from_model(loaded, logit_lens, N)
    cache = DynamicCache()
    with at_pass(lambda ids, states: ran.append(ids.shape[1])):
        logit_lens.hidden(torch.tensor([text]), torch.tensor([len(text) - 1]), None, cache)
        for known in (cache, None):
            texts.append(generator.generate([prompt], [n_shared], known))
    assert cache.get_seq_length() == len(text) == 24, "it is copied, not added to"
    assert texts[0] == texts[1] and len(texts[0][0].ids) == N
    assert ran == [24, again, 1, 1, 1, 1, 20, 21, 22, 23, 24]


@pytest.mark.medium
def test_a_sweep_goes_on_from_the_prefix(options, tmp_path):
    """No prompt runs a second time for its text, but for its last token: one token a step."""
    one = replace(options, examples=1)
    passes = []
    for generate in (0, N):
        ran = []
        with at_pass(lambda ids, states, ran=ran: ran.append(ids.shape)):
            run = run_sweep(replace(one, generate=generate), tmp_path / f"run{generate}")
        passes.append(len(ran))
    counts = run.manifest["counts"]
    assert run.manifest["prefix_reuse"]["used"] and counts["tokens_saved"] > 0
    assert passes[1] - passes[0] == counts["contexts"] * N


class Scripted:
    """A lens whose model writes a given text, whatever came before."""

    n_layers = 1

    def __init__(self, script, model):
        self.script, self.model = iter(script), model

    def hidden(self, ids, positions, mask, cache):
        return torch.zeros(2, len(ids), 1, 4)

    def stats(self, hidden):
        return type("Stats", (), {"argmax": torch.full((len(hidden), 1), next(self.script))})


class Letters:
    """A tokenizer of one letter a token: 0 is a newline, 1 an end, 2 a space, then a, b, c."""

    eos_token_id = 1

    def decode(self, ids, skip_special_tokens):
        return "".join("\n\0 abcdef"[id] for id in ids)


@pytest.mark.parametrize(
    "script, limit, positions, text, n_tokens",
    [
        ([3, 4, 5, 6], 4, None, "abcd", 4),  # the limit
        ([3, 4, 1], 9, None, "ab", 3),  # the end of the sequence, which is not part of the text
        ([3, 4, 0], 9, None, "ab", 3),  # a newline
        ([0], 9, None, "", 1),  # a newline at once: nothing is scored
        ([1], 9, None, "", 1),  # an end at once
        ([2, 3, 2, 1], 9, None, "a", 4),  # no space around it
        ([3, 4, 5], 9, 12, "abc", 3),  # the model has 12 positions, the prompt 10 of them; the last token has none
        ([3], 1, None, "a", 1),
    ],
)
def test_where_a_text_ends(script, limit, positions, text, n_tokens):
    generator = Generator(Scripted(script, None), Letters(), limit, positions, frozenset({1}))
    (found,) = generator.generate([[7] * 10], [10], None)
    assert (found.text, len(found.ids)) == (text, n_tokens)


def test_ends_are_those_that_model_and_tokenizer_name(tmp_path):
    """Several of the generation configuration, beside the tokenizer's own."""
    folder = save_tiny_model(tmp_path / "model")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.generation_config.eos_token_id = [7, 9]
    model.save_pretrained(folder)
    tokenizer.eos_token = "gate"
    tokenizer.save_pretrained(folder)
    loaded = load_model(str(folder), "cpu")
    ends = Generator.from_model(loaded, LogitLens(loaded.model), N).end_ids
    assert ends == {7, 9, tokenizer.convert_tokens_to_ids("gate")}


def test_it_stands_in_the_tables(finished, capsys):
    assert main(["show", str(finished.path)]) == 0
    out = capsys.readouterr().out
    assert "gen." in out and f"{N * 30} tokens generated, at most {N} a context." in out
    summary = finished.path.joinpath("summary.csv").read_text()
    assert all(f"{name},{name}_low,{name}_high" in summary for name in ("accuracy", "accuracy_all"))
    assert "accuracy_generated,accuracy_generated_low,accuracy_generated_high" in summary


def test_bad_number(options):
    with pytest.raises(ValueError, match="``generate``: expected a number of tokens, 0 for none, got -1"):
        replace(options, generate=-1)
