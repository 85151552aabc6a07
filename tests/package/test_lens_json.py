"""One context for logit-lens widgets: the fields of their format, and every number against the model's own."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refinelens.cli import main
from refinelens.lens_json import DIGITS, _names
from refinelens.store.results import open_run
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.run_spec import RunSpec
from tiny import save_tiny_lens


@pytest.fixture(scope="module")
def run(tiny_model, question_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lens-json")
    lens = save_tiny_lens(folder / "mine", tiny_model, scale=0.1)
    command = ["sweep", "--model", tiny_model, "--task", question_file, "--documents", "2,3", "--device", "cpu"]
    assert main([*map(str, command), "--lens", f"plain,{lens}", "--out", str(folder / "run")]) == 0
    return open_run(folder / "run")


def exported(run, path, *options):
    assert main(["export", str(run.path), "--format", "lens-json", "--out", str(path), *map(str, options)]) == 0
    return json.loads(path.read_text(encoding="utf-8"))


def context_of(run, question, documents, gold_position):
    spec = RunSpec(run.path, run.manifest, "export")
    inputs = SweepInputs.load(spec.options, spec)
    contexts = inputs.builder().build(inputs.questions[question]).contexts
    return next(c for c in contexts if (c.n_documents, c.gold_position) == (documents, gold_position))


def test_fields_of_version_2(run, tmp_path, capsys):
    data = exported(run, tmp_path / "widget.json", "--tokens", 5, "--k", 3)
    assert "question 0, 2 documents, gold position 0, plain: the last 5 of" in capsys.readouterr().out
    assert list(data) == ["meta", "layers", "input", "tracked", "topk"]
    assert data["meta"]["version"] == 2 and data["meta"]["model"] == run.manifest["model"]["name"]
    assert data["layers"] == [0, 1, 2, 3] and len(data["input"]) == len(data["tracked"]) == 5
    assert [len(row) for row in data["topk"]] == [5] * 4 and {len(cell) for row in data["topk"] for cell in row} == {3}
    for place, curves in enumerate(data["tracked"]):
        assert {name for row in data["topk"] for name in row[place]} <= curves.keys()
        assert {len(curve) for curve in curves.values()} == {4}


def test_no_more_tokens_than_the_context_has(run, tmp_path, capsys):
    """And as many likely ones as the vocabulary has."""
    data = exported(run, tmp_path / "widget.json", "--tokens", 99999, "--k", run.vocab_size)
    n_tokens = len(context_of(run, 0, 2, 0).input_ids)
    assert f"plain: all {n_tokens} tokens x 4 layers" in capsys.readouterr().out
    assert len(data["input"]) == n_tokens and len(data["topk"][0][0]) == run.vocab_size


def test_the_output_is_the_models_own(run, tiny_model, tmp_path):
    data = exported(run, tmp_path / "widget.json", "--question", 3, "--documents", 3, "--gold-position", 1)
    context = context_of(run, 3, 3, 1)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    with torch.no_grad():
        p = model(torch.tensor([context.input_ids])).logits[0].softmax(-1)[-32:]
    assert data["input"] == [tokenizer.decode([id]) for id in context.input_ids[-32:]]
    following = [*context.input_ids, context.answer_ids[-1]][-32:]
    for place, (curves, row) in enumerate(zip(data["tracked"], p, strict=True)):
        assert data["topk"][-1][place] == [tokenizer.decode([id]) for id in row.topk(5).indices.tolist()]
        assert tokenizer.decode([following[place]]) in curves, "what follows is tracked, however unlikely"
        for name, curve in curves.items():
            assert curve[-1] == pytest.approx(float(row[tokenizer.convert_tokens_to_ids(name)]), abs=10.0**-DIGITS)


def test_it_agrees_with_the_rows_of_the_run(run, tmp_path):
    """At every layer of either lens: what the run says of the answer token and of the argmax."""
    curves = {}
    for lens in ("plain", "mine"):
        which = ("--lens", lens, "--question", 3, "--documents", 2, "--tokens", 1)
        data = exported(run, tmp_path / f"{lens}.json", *which)
        curves[lens] = data["tracked"][0]
        rows = [row for part in run.parts() for row in part.to_pylist() if row["lens"] == lens]
        rows = [r for r in rows if (r["question_id"], r["documents"], r["gold_position"]) == (3, 2, 0)]
        last = max(rows, key=lambda row: row["answer_token"])
        assert [cell[0][0] for cell in data["topk"]] == last["argmax_text"]
        wanted = torch.tensor(last["target_logprob"]).exp()
        assert curves[lens][last["target_text"]] == pytest.approx(wanted.tolist(), abs=10.0**-DIGITS)
    assert curves["plain"] != curves["mine"]


@pytest.fixture(scope="module")
def first_is_left_out(tiny_model, question_file, tmp_path_factory):
    """Runs over questions whose first answer is in every passage: with other documents it cannot be asked."""
    folder = tmp_path_factory.mktemp("left-out")
    lines = question_file.read_text().splitlines()
    (folder / "task.jsonl").write_text("\n".join([lines[0].replace("red", "door"), *lines[1:]]))
    command = ["sweep", "--model", tiny_model, "--task", folder / "task.jsonl", "--device", "cpu", "--documents"]

    def sweep(documents):
        path = folder / documents
        if not path.exists():
            assert main([*map(str, command), documents, "--out", str(path)]) == 0
        return open_run(path)

    return sweep


@pytest.mark.medium
@pytest.mark.parametrize(
    "documents, options, shown",
    [
        ("2,3", [], "question 1, 2 documents, gold position 0,"),
        ("closed-book,oracle,2,3", [], "question 1, 2 documents, gold position 0,"),
        ("closed-book,oracle,2,3", ["--documents", "3", "--gold-position", "2"], "question 1, 3 documents, gold posit"),
        ("closed-book,oracle,2,3", ["--question", "0"], "question 0, oracle, gold position 0,"),
        ("closed-book,oracle,2,3", ["--documents", "0"], "question 0, closed-book,"),
        ("closed-book,oracle", [], "question 0, oracle, gold position 0,"),
        ("closed-book", [], "question 0, closed-book,"),
    ],
)
def test_what_is_shown_unless_told_otherwise(first_is_left_out, tmp_path, capsys, documents, options, shown):
    """The fewest documents among which the gold one may move, and the first question that could be asked so."""
    run = first_is_left_out(documents)
    capsys.readouterr()
    exported(run, tmp_path / "widget.json", *options)
    assert f": {shown}" in capsys.readouterr().out


def test_a_question_that_was_left_out_is_refused(first_is_left_out, tmp_path, capsys):
    path = str(first_is_left_out("closed-book,oracle,2,3").path)
    options = ["--question", "0", "--documents", "3"]
    capsys.readouterr()
    assert main(["export", path, "--format", "lens-json", "--out", str(tmp_path / "x.json"), *options]) == 2
    message = "--question: expected one that the run could ask with 3 documents, got question 0, which was left out\n"
    assert capsys.readouterr().err.endswith(message)


def test_texts_that_two_tokens_share_are_told_apart():
    texts = {1: "a", 2: "\ufffd", 3: "\ufffd"}
    assert _names([1, 2, 3], texts.get) == {1: "a", 2: "\ufffd #2", 3: "\ufffd #3"}


@pytest.mark.parametrize(
    "options, message",
    [
        (["--question", "99"], "--question: expected one that the run has, such as 0, 1, 2, 3, 4, 5, got 99"),
        (["--documents", "7"], "--documents: expected one that the run has, such as 2, 3, got 7"),
        (["--gold-position", "2"], "--gold-position: expected one that the run has, such as 0, 1, got 2"),
        (["--lens", "other"], "--lens: expected one that the run has, such as plain, mine, got other"),
        (["--tokens", "0"], "--tokens: expected 1 or more, got 0"),
        (["--k", "0"], "--k: expected 1 or more, got 0"),
        (["--k", "99999"], "tokens of the vocabulary, got 99999"),
    ],
)
def test_bad_input_is_one_line(run, tmp_path, capsys, options, message):
    assert main(["export", str(run.path), "--format", "lens-json", "--out", str(tmp_path / "x.json"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_another_model_is_refused(run, tmp_path, capsys):
    manifest = run.manifest
    run.write_manifest(manifest | {"model": manifest["model"] | {"weights_sha256": "0" * 64}})
    assert main(["export", str(run.path), "--format", "lens-json", "--out", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"refinelens: export {run.path}: expected model.weights_sha256 000000000000, as the run ")
    run.write_manifest(manifest)
