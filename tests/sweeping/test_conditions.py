"""Closed-book and oracle as rows of the same tables, query-aware prompts, aliases and chats."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.data.prompts import DEFAULT_TEMPLATE, Chat, Template, build_context, render_chat
from refinelens.data.questions import QA, QUERY_AWARE, Document, Question
from refinelens.errors import InputError
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.runner import ForwardRunner
from refinelens.model.loading import load_model
from refinelens.placement import condition_name, gold_positions
from refinelens.store.results import open_run
from refinelens.sweeping.contexts import alias_scores
from refinelens.sweeping.sweep import run_sweep
from sweeps import predictions
from tiny import byte_tokenizer, save_tiny_model, word_tokenizer

GOLD, OTHER = Document("arven", "the door of arven is red ."), Document("brosk", "white .")
QUESTION = Question(0, "what is the door ?", ("red", "black iron"), "", "", GOLD, (OTHER,))
CHAT = "{% for m in messages %}<pad> {{ m.role }}: {{ m.content }} <unk>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<pad> assistant: {% endif %}"


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    return SweepConfig(str(tiny_model), str(question_file), documents=(0, 1, 3), device="cpu")


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def aliases(tmp_path_factory):
    """Questions with one answer, with several of one word, and with several of different lengths."""
    path = tmp_path_factory.mktemp("task") / "aliases.jsonl"
    with path.open("w") as file:
        for i, answers in enumerate([["red"], ["green", "white", "brown"], ["black iron gate", "blue", "stone"]]):
            gold = {"title": f"arven {i}", "text": f"the door is {answers[-1]} .", "isgold": True}
            file.write(json.dumps({"question": f"what is the door {i} ?", "answers": answers, "ctxs": [gold]}) + "\n")
    return path


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("chat"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def summary(run):
    with (run.path / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_names_of_conditions():
    assert SweepConfig(documents="10,oracle,closed-book,5,10").documents == (0, 1, 5, 10)
    assert [condition_name(n) for n in (0, 1, 5)] == ["closed-book", "oracle", "5 documents"]
    assert gold_positions("0,4", 0) == [-1] and gold_positions("0,4", 1) == [0]
    message = "``documents``: expected closed-book, oracle or sizes such as 5,10, got 'open'"
    with pytest.raises(InputError, match=message):
        SweepConfig(documents="open")


def test_closed_book_and_oracle_are_rows_of_the_same_tables(finished, options):
    """Every number of a closed-book row is the model's own on the prompt of the paper, without documents."""
    rows = predictions(finished)
    assert {(r["documents"], r["gold_position"]) for r in rows} == {(0, -1), (1, 0), (3, 0), (3, 1), (3, 2)}
    assert all((r["gold_start"] is None) == (r["documents"] == 0) for r in rows)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    prompt = tokenizer("Question: what is the door of dorra ?\nAnswer:")["input_ids"]
    answer = tokenizer(" black iron gate")["input_ids"]
    with torch.no_grad():
        logprobs = model(torch.tensor([[*prompt, *answer[:-1]]])).logits[0, len(prompt) - 1 :].log_softmax(-1)
    found = [r for r in rows if (r["question_id"], r["documents"]) == (3, 0)]
    assert [r["argmax"][-1] for r in found] == logprobs.argmax(-1).tolist()
    wanted = logprobs.gather(1, torch.tensor(answer)[:, None])[:, 0]
    np.testing.assert_allclose([r["target_logprob"][-1] for r in found], wanted, atol=1e-5)


def test_oracle_is_the_gold_document_alone(finished, options):
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    oracle = {r["n_tokens"]: r for r in predictions(finished) if (r["question_id"], r["documents"]) == (0, 1)}
    question = Question(0, "what is the door of arven ?", ("red",), "", "", GOLD, ())
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, [], 0)
    assert oracle.keys() == {len(context.input_ids)}
    assert all((r["gold_start"], r["gold_end"]) == context.gold_span for r in oracle.values())


def test_in_summary_and_table(finished, capsys):
    assert [(row["documents"], row["gold_position"]) for row in summary(finished)] == [
        *[("0", "-1"), ("1", "0")],
        *[("3", str(position)) for position in range(3)],
    ]
    assert main(["show", str(finished.path)]) == 0
    out = capsys.readouterr().out
    assert "\n   0     -  6  " in out and "docs: documents, 0 is closed-book, 1 oracle, the gold one alone." in out
    with (finished.path / "paired.csv").open() as file:
        assert {row["documents"] for row in csv.DictReader(file)} == {"3"}, "one position has no other to differ from"


@pytest.mark.medium
def test_closed_book_alone(options, tmp_path, capsys):
    """Nothing to move: the tables and figures say what there is."""
    run = run_sweep(replace(options, documents=(0,)), tmp_path / "run")
    assert len(summary(run)) == 1 and (run.path / "layers.png").exists()
    assert main(["show", str(run.path)]) == 0
    assert "Accuracy, gold at one position" not in capsys.readouterr().out


def test_query_aware_prompt_is_the_papers():
    template = Template(QA, QA.templates[QUERY_AWARE])
    text, start, end = template.fill(QUESTION, [OTHER, GOLD], 1)
    assert text == (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\nQuestion: what is the door ?\n\nDocument [1](Title: brosk) white .\n"
        "Document [2](Title: arven) the door of arven is red .\n\nQuestion: what is the door ?\nAnswer:"
    )
    assert text[start:end] == "Document [2](Title: arven) the door of arven is red ."
    assert template.fill(QUESTION, [], -1)[0] == "Question: what is the door ?\nAnswer:"


@pytest.mark.medium
def test_query_aware_sweep_by_its_word(options, tmp_path):
    run = run_sweep(replace(options, template="query-aware", documents=(2,)), tmp_path / "run")
    assert run.manifest["template"] == QA.templates[QUERY_AWARE]
    plain = run_sweep(replace(options, documents=(2,)), tmp_path / "plain")
    longer = [a["n_tokens"] - b["n_tokens"] for a, b in zip(predictions(run), predictions(plain), strict=True)]
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    assert set(longer) == {len(tokenizer("Question: what is the door of arven ?")["input_ids"])}


def test_first_alias(options, aliases, tmp_path):
    rows = predictions(run_sweep(replace(options, task=str(aliases)), tmp_path / "run"))
    assert {(r["question_id"], r["alias"], r["alias_why"]) for r in rows} == {
        *[(0, 0, "only"), (1, 0, "first"), (2, 0, "first")]
    }
    assert [r["answer_text"] for r in rows if (r["question_id"], r["documents"]) == (2, 0)] == ["black", "iron", "gate"]


@pytest.mark.medium
def test_best_alias_is_the_likeliest_after_the_oracle_context(options, aliases, tmp_path):
    """One answer of a question everywhere, of the highest mean log-probability per token, against the model's own."""
    run = run_sweep(replace(options, task=str(aliases), alias="best"), tmp_path / "run")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(options.model), AutoTokenizer.from_pretrained(options.model)
    rows = predictions(run)
    for record, line in enumerate(aliases.read_text().splitlines()):
        line = json.loads(line)
        gold = Document(line["ctxs"][0]["title"], line["ctxs"][0]["text"])
        question = Question(record, line["question"], tuple(line["answers"]), "", "", gold, ())
        scores = []
        for alias in range(len(line["answers"])):
            context = build_context(tokenizer, DEFAULT_TEMPLATE, question, [], 0, alias)
            with torch.no_grad():
                logits = model(torch.tensor([context.input_ids])).logits[0, list(context.answer_span.positions)]
            logprobs = logits.log_softmax(-1)
            scores.append(float(logprobs.gather(1, torch.tensor(context.answer_ids)[:, None]).mean()))
        own = [r for r in rows if r["question_id"] == record]
        best = int(np.argmax(scores))
        assert {r["alias"] for r in own} == {best}, "the same at every context size and position"
        (why,) = {r["alias_why"] for r in own}
        *_, second, first = [0, *sorted(scores)]
        words = f"best of {len(scores)}: {first:.2f} against {second:.2f} nats a token"
        assert why == (words if len(scores) > 1 else "only")
    assert any(r["alias"] > 0 for r in rows), "not always the first"
    plain = run_sweep(replace(options, task=str(aliases)), tmp_path / "plain")
    assert run.manifest["counts"]["tokens_computed"] > plain.manifest["counts"]["tokens_computed"], "they are counted"


def test_no_alias_is_given_a_space(tmp_path):
    """Where the space before an answer is a token of its own, the score of the answer is that of the space too."""
    loaded = load_model(str(save_tiny_model(tmp_path, tokenizer=byte_tokenizer(), n_positions=512)), "cpu")
    question = Question(0, "which?", ("red",), "", "", Document("arven", "red"), ())
    context = build_context(loaded.tokenizer, DEFAULT_TEMPLATE, question, [], 0)
    prompt, whole = list(context.prompt_ids), [*context.input_ids, context.answer_ids[-1]]
    assert loaded.tokenizer.decode(whole[len(prompt) :]) == " red"
    with torch.no_grad():
        logprobs = loaded.model(torch.tensor([whole])).logits[0].log_softmax(-1)
    expected = [float(logprobs[place - 1, whole[place]]) for place in range(len(prompt), len(whole))]
    runner = ForwardRunner(LogitLens(loaded.model))
    assert alias_scores(runner, [context]) == pytest.approx([np.mean(expected)], abs=1e-5)


def test_unknown_alias(options):
    with pytest.raises(InputError, match="``alias``: expected first, best, got 'all'"):
        replace(options, alias="all")


def test_a_chat_is_the_tokenizers_own(chat_model, question_file, tmp_path):
    """The prompt is what `apply_chat_template` makes of it, token by token, special tokens once; the answer follows."""
    command = ["sweep", "--model", str(chat_model), "--task", str(question_file), "--documents", "closed-book,2"]
    assert main([*command, "--device", "cpu", "--chat", "--out", str(tmp_path / "run")]) == 0
    run = open_run(tmp_path / "run")
    assert run.manifest["chat"]["text"] == "<pad> user: {prompt} <unk>\n<pad> assistant: "
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    template = Template(QA, DEFAULT_TEMPLATE.text, render_chat(tokenizer))
    context = build_context(tokenizer, template, QUESTION, [OTHER], 1)
    prompt, *_ = DEFAULT_TEMPLATE.fill(QUESTION, [OTHER, GOLD], 1)
    turn = [{"role": "user", "content": prompt}]
    own = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(context.input_ids[: context.prompt_length]) == list(own)
    assert tokenizer.decode(context.answer_ids) == "red"
    start, end = context.gold_span
    span = tokenizer.decode(context.input_ids[start:end])
    assert span.startswith("Document [ 2 ") and span.endswith("the door of arven is red .")
    closed_book = next(r for r in predictions(run) if r["documents"] == 0)
    bare = tokenizer("Question: what is the door of arven ?\nAnswer:")["input_ids"]
    assert closed_book["n_tokens"] == len(bare) + len(tokenizer("<pad> user: <unk>\n<pad> assistant:")["input_ids"])


def test_a_reply_begins_with_the_answer_prefix(chat_model):
    tokenizer = AutoTokenizer.from_pretrained(chat_model)
    question = replace(QUESTION, answer_prefix=" the door is")
    context = build_context(tokenizer, Template(QA, DEFAULT_TEMPLATE.text, render_chat(tokenizer)), question, [], 0)
    assert tokenizer.decode(context.input_ids).endswith("the door is")
    assert tokenizer.decode(context.input_ids[-5:]).startswith("<unk> : the")


@pytest.mark.medium
def test_a_resume_keeps_the_text_that_a_template_wrote(chat_model, question_file, tmp_path, capsys):
    """A template may write the date: the run's own text goes on. Another template is refused."""
    folder = tmp_path / "model"
    save_tiny_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{{ strftime_now('%S') }} " + CHAT
    tokenizer.save_pretrained(folder)
    command = ["sweep", "--model", str(folder), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
    assert main([*command, "--chat", "--out", str(tmp_path / "run")]) == 0
    run = open_run(tmp_path / "run")
    whole = predictions(run)
    old = run.manifest["chat"] | {"text": "00" + run.manifest["chat"]["text"][2:]}
    run.write_manifest(run.manifest | {"status": "interrupted", "parts": [], "chat": old})
    (run.parts_path / "part-00000.parquet").unlink()
    assert main(["sweep", "--resume", str(run.path)]) == 0
    assert run.manifest["chat"] == old and [r["n_tokens"] for r in predictions(run)] == [r["n_tokens"] for r in whole]
    run.write_manifest(run.manifest | {"status": "interrupted"})
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    capsys.readouterr()
    assert main(["sweep", "--resume", str(run.path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "as the run has it, got" in line


@pytest.mark.parametrize(
    "template, message",
    [
        (None, "``chat``: expected a tokenizer with a chat template, got"),
        ("{{ messages[0].content }} {{ messages[0].content }}", "that writes the user's turn once"),
        ("{{ raise_exception('no turn of a user') }}", "expected a chat template that renders a user's turn, got"),
    ],
)
def test_a_tokenizer_without_a_chat(options, tmp_path, template, message):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=message):
        run_sweep(replace(options, model=str(folder), chat=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_space_that_a_template_puts_before_a_reply_is_kept():
    """As Llama 2 does: what a reply begins with is not the answer's."""
    tokenizer = word_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[ {{ m.content }} ]{% else %} {{ m.content }}{% endif %}"
        "{% endfor %}"
    )
    assert render_chat(tokenizer) == Chat(render_chat(tokenizer).template_sha256, "[ {prompt} ] ")
