"""A sweep of the questions that a model answers with the gold document alone, or needs it for."""

import json
import re
from dataclasses import replace

import pytest
import torch

import refinelens
from refinelens.cli import main
from refinelens.config import LayersConfig, SweepConfig
from refinelens.data.generated import generate_task
from refinelens.errors import InputError
from refinelens.layers.analysis import run_layers
from refinelens.report.scope import KNOWN, NOT_ANSWERED
from refinelens.run_page import report_page
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions

pytestmark = pytest.mark.medium
N = 12


def line_of(number, question):
    """A question of the tiny model as it is, with the value that it says of itself, or with a value nobody tells."""
    (answer,), text = question.answers, question.gold.text
    if number % 3 == 1:
        text, answer = text.replace(answer, "onyx"), "onyx"
    answer = "walnut" if number % 3 == 2 else answer
    gold = {"title": question.gold.title, "text": text, "isgold": True}
    other = {"title": "Alena Ashbury", "text": f"Alena Ashbury has maple as motto{' .' * number}"}
    return {"question": question.question, "answers": [answer], "ctxs": [gold, other]}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A task whose questions the model answers, needs no document for, or does not answer; and its template."""
    folder = tmp_path_factory.mktemp("task")
    questions = enumerate(generate_task("tiny", N, 1, 5).questions)
    (folder / "task.jsonl").write_text("".join(json.dumps(line_of(*one)) + "\n" for one in questions))
    (folder / "template.txt").write_text("{documents}\n{question}\nAnswer:")
    return folder


@pytest.fixture(scope="module")
def options(files):
    where = {"task": str(files / "task.jsonl"), "template": str(files / "template.txt")}
    return SweepConfig("tiny", documents=(2,), device="cpu", **where)


@pytest.fixture(scope="module")
def expected(files):
    """By ``keep`` the questions that should be kept, from the model as Transformers runs it."""
    loaded = refinelens.load_model("tiny", "cpu")
    records = [json.loads(line) for line in (files / "task.jsonl").read_text().splitlines()]
    kept = {"all": set(range(N)), "answered": set(), "needs-document": set()}
    for number, record in enumerate(records):
        (gold, _), asked = record["ctxs"], record["question"]
        oracle = f"Document [1](Title: {gold['title']}) {gold['text']}\n{asked}\nAnswer:"
        said = []
        for prompt in (oracle, f"Question: {asked}\nAnswer:"):
            ids = loaded.tokenizer(prompt, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                said.append(loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()).strip())
        kept["answered"] |= {number} if said[0] == record["answers"][0] else set()
        kept["needs-document"] |= {number} if said[0] == record["answers"][0] != said[1] else set()
    assert 0 < len(kept["needs-document"]) < len(kept["answered"]) < N
    return kept


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return run_sweep(replace(options, keep="needs-document"), tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.parametrize("keep", ["all", "answered", "needs-document"])
def test_questions_are_kept_by_what_the_model_says(options, expected, tmp_path, keep):
    """The rows of those are what they are without the option, and the others are left out by reason."""
    run = run_sweep(replace(options, keep=keep), tmp_path / "run")
    left_out = run.manifest["counts"]["left_out"]
    whole = run if keep == "all" else run_sweep(options, tmp_path / "whole")
    assert predictions(run) == [row for row in predictions(whole) if row["question_id"] in expected[keep]]
    reasons = {NOT_ANSWERED: expected["all"] - expected["answered"], KNOWN: expected["answered"] - expected[keep]}
    wanted = {f"2 documents: {why}": sorted(ids) for why, ids in reasons.items() if ids and keep != "all"}
    assert left_out == wanted


def test_what_is_asked_of_the_model_is_counted(finished, options, expected, tmp_path):
    """One context with the gold document alone of every question, and one without documents of those answered."""
    short = {"documents": (0, 1), "reuse_prefix": "off"}
    whole = predictions(run_sweep(replace(options, **short), tmp_path / "whole"))
    n_tokens = {(r["question_id"], r["documents"]): r["n_tokens"] for r in whole if r["answer_token"] == 0}
    n_asked = sum(n_tokens[id, 1] for id in range(N)) + sum(n_tokens[id, 0] for id in expected["answered"])
    counts = finished.manifest["counts"]
    own = predictions(finished)
    run = sum({(r["question_id"], r["gold_position"]): r["n_tokens"] for r in own}.values()) - counts["tokens_saved"]
    assert counts["tokens_computed"] == n_asked + run


def test_a_question_is_decided_by_itself(finished, options, tmp_path):
    """With other questions beside it, in batches, and by a run that goes on, it is kept or left out alike."""
    few = run_sweep(replace(options, keep="needs-document", examples=5, seed=3), tmp_path / "few")
    batched = run_sweep(replace(options, keep="needs-document", batch_size="8"), tmp_path / "batched")
    ids = {row["question_id"] for row in predictions(finished)}
    few_left_out = {id for own in few.manifest["counts"]["left_out"].values() for id in own}
    few_ids = {row["question_id"] for row in predictions(few)}
    assert few_ids <= ids and not few_left_out & ids and len(few_ids) + len(few_left_out) == 5
    assert batched.manifest["counts"]["left_out"] == finished.manifest["counts"]["left_out"]
    parted = run_sweep(replace(options, keep="needs-document"), tmp_path / "run", questions_per_part=4)
    first, *others = parted.manifest["parts"]
    for part in others:
        (parted.parts_path / part["file"]).unlink()
    parted.write_manifest(parted.manifest | {"status": "interrupted", "parts": [first]})
    resume_sweep(parted.path)
    assert predictions(parted) == predictions(finished)
    assert parted.manifest["counts"]["left_out"] == finished.manifest["counts"]["left_out"]


def test_tables_and_page_say_that_they_are_about_the_kept_questions(finished, expected, capsys):
    n_kept, n_known = len(expected["needs-document"]), len(expected["answered"]) - len(expected["needs-document"])
    words = (
        "All numbers are about the questions whose first answer token is the model's own prediction after the gold "
        f"document alone, and is not without documents, and not about the task: of {N} questions {N - n_kept} were "
        f"left out for that ({N - len(expected['answered'])} with {NOT_ANSWERED}, {n_known} with {KNOWN})."
    )
    assert main(["show", str(finished.path)]) == 0
    assert words in capsys.readouterr().out
    text, _ = report_page([finished])
    (head,) = json.loads(re.search(r'id="head">(.*?)</script>', text, re.DOTALL)[1])["runs"]
    assert words in head["finding"]


def test_a_run_that_keeps_all_says_nothing_of_it(options, tmp_path, capsys):
    run = run_sweep(replace(options, examples=2), tmp_path / "run")
    arguments = {name: value for name, value in run.manifest["arguments"].items() if name != "keep"}
    run.write_manifest(run.manifest | {"arguments": arguments})  # as of a run before there was a choice
    assert main(["show", str(run.path)]) == 0
    assert "All numbers are about" not in capsys.readouterr().out


def test_layers_are_of_the_kept_questions(finished, expected, tmp_path):
    folder, found = run_layers(finished.path, LayersConfig("skip", examples=2), tmp_path / "layers")
    assert set(folder.manifest["questions"]) < expected["needs-document"]
    assert max(row.questions for row in found.statistics if row.of == "skip") == 2


def test_a_task_that_cannot_be_asked_closed_book(capsys, no_model, tmp_path):
    command = ["sweep", "--model", "tiny", "--task", "kv", "--keep", "needs-document", "--out", str(tmp_path / "run")]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error == "refinelens: --keep needs-document: expected a task that can be asked closed-book, got kv\n"


def test_no_question_is_kept(options, files, tmp_path):
    records = [json.loads(line) for line in (files / "task.jsonl").read_text().splitlines()]
    (tmp_path / "task.jsonl").write_text(json.dumps(records[2]) + "\n")
    given = replace(options, keep="answered", task=str(tmp_path / "task.jsonl"), documents=(1,))
    with pytest.raises(
        InputError, match=rf"got none \(1 at oracle: {NOT_ANSWERED}\); change ``documents`` or ``keep``"
    ):
        run_sweep(given, tmp_path / "run")


def test_a_gold_document_that_is_too_long(options, files, tmp_path):
    """The context that decides does not fit: the question is left out for that."""
    record = json.loads((files / "task.jsonl").read_text().splitlines()[0])
    record["ctxs"][0]["text"] += " is" * 320
    lines = [json.dumps(record), *(files / "task.jsonl").read_text().splitlines()[:1]]
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    given = replace(options, keep="answered", task=str(tmp_path / "task.jsonl"), documents=(0,))
    run = run_sweep(given, tmp_path / "run")
    reason = "closed-book: a context longer than the model's positions"
    assert run.manifest["counts"]["left_out"] == {reason: [0]}
