"""What the command line runs, as functions of Python."""

import subprocess
import sys
import warnings

import matplotlib
import pytest
import torch

import refinelens
from refinelens import InputError


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "run"
    return refinelens.sweep("tiny", out=path, documents=(3,), examples=3, device="cpu")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return refinelens.fit("tiny", out=tmp_path_factory.mktemp("api") / "mine", tokens=2000, device="cpu")


@pytest.mark.medium
def test_a_sweep_gives_frames(run):
    assert len(run.summary) == 3 and list(run.summary.gold_position) == [0, 1, 2]
    assert len(run.trajectories) == len(run.predictions) >= 9
    assert refinelens.load_run(run.run.path).summary.equals(run.summary)
    lines = repr(run).splitlines()
    assert len(lines) == 2 and "tiny on tiny, finished, 3 of 3 questions; lenses plain" in lines[0]
    assert refinelens.sweep(resume=run.run.path).summary.equals(run.summary)


@pytest.mark.medium
def test_the_command_line_writes_the_same(run, tmp_path):
    from refinelens.cli import main

    words = ["--model", "tiny", "--documents", "3", "--examples", "3", "--device", "cpu"]
    assert main(["sweep", *words, "--out", str(tmp_path / "run")]) == 0
    assert refinelens.load_run(tmp_path / "run").predictions.equals(run.predictions)
    manifest = refinelens.load_run(tmp_path / "run").manifest
    assert manifest["arguments"] == run.manifest["arguments"] and run.manifest["argv"] is None


def test_a_fitted_lens_reads_its_model_and_no_other(fitted, tmp_path):
    loaded = refinelens.load_model("tiny", "cpu")
    lens = refinelens.LogitLens(loaded.model, loaded.tokenizer)
    text = "The password of Alena Ashbury is acorn."
    reading = lens.with_lens(fitted.lens).read(text, "acorn")
    assert reading == lens.with_lens(fitted.path).read(text, "acorn") and reading.lens == "mine"
    assert "linear lens of tiny" in repr(fitted)
    half = refinelens.load_model("tiny", "cpu", "bfloat16")
    found = refinelens.LogitLens(half.model, half.tokenizer).with_lens(fitted.path).read(text, "acorn")
    assert (found.argmax == reading.argmax).float().mean() > 0.9, "dtype and device follow the model"
    with torch.no_grad():
        loaded.model.transformer.h[3].mlp.c_fc.weight.mul_(1.01)
    with pytest.raises(InputError, match="expected a lens made for"):
        refinelens.LogitLens(loaded.model, loaded.tokenizer).with_lens(fitted.path)


@pytest.mark.medium
def test_a_sweep_through_a_fitted_lens(fitted, tmp_path):
    run = refinelens.sweep("tiny", out=tmp_path / "run", documents=3, examples=2, lens=["plain", fitted.path])
    assert set(run.summary.lens) == {"plain", "mine"}


@pytest.mark.medium
def test_essential_layers(run):
    found = refinelens.essential_layers(run, interventions=("skip",), examples=2)
    assert len(found.rows) and len(found.layers) and found.rows.equals(run.interventions)
    assert len(repr(found).splitlines()) == 2 and "finished, 2 questions, interventions skip" in repr(found)
    assert refinelens.essential_layers(run.run.path, interventions="skip", examples=2).layers.equals(found.layers)


def test_depth_of_a_reading():
    loaded = refinelens.load_model("tiny", "cpu")
    lens = refinelens.LogitLens(loaded.model, loaded.tokenizer)
    text = "The password of Alena Ashbury is acorn.\nWhat is the password of Alena Ashbury?\nAnswer:"
    found = refinelens.trajectories(lens.read(text, "acorn").rank)
    assert (found.first_correct[-1], found.settle[-1], found.depth[-1]) == (2, 2, 0) and not found.censored[-1]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: refinelens.sweep("tiny"), "``out``: expected the folder to write, got none"),
        (lambda: refinelens.sweep("tiny", out="x", document=3), "``document``: expected one of model, task, documents"),
        (lambda: refinelens.sweep("tiny", out="x", documents="three"), "``documents``: expected closed-book, oracle"),
        (lambda: refinelens.sweep(resume="x", documents=3), "``resume``: expected no other option but ``workers``"),
        (lambda: refinelens.sweep("tiny", resume="x"), "``resume``: expected no other option .*, got model"),
        (lambda: refinelens.sweep(resume="x", overwrite=True), "``resume``: expected no other .*, got overwrite"),
        (lambda: refinelens.fit("tiny", out="x", steps=3), "``steps``: expected ``objective='kl'``"),
        (lambda: refinelens.essential_layers("none"), "none: expected a run folder"),
        (lambda: refinelens.essential_layers("none", intervention="skip"), "``intervention``: expected one of"),
    ],
)
def test_errors_name_the_parameter(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "--" not in str(error.value)


@pytest.mark.medium
def test_lines_on_the_way_are_warnings(question_file, tiny_model, tmp_path):
    text = question_file.read_text()
    twice = tmp_path / "twice.jsonl"
    twice.write_text(text + text)
    with pytest.warns(UserWarning, match="6 of them distinct"):
        refinelens.sweep(tiny_model, out=tmp_path / "run", task=twice, documents=1, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        refinelens.load_run(tmp_path / "run")


LIGHT = """
import logging, sys
level = logging.getLogger().level, len(logging.getLogger().handlers)
import refinelens
assert not {"torch", "transformers", "matplotlib", "pandas"} & set(sys.modules)
assert (logging.getLogger().level, len(logging.getLogger().handlers)) == level
"""
COMPLETE = f"""{LIGHT}
assert callable(refinelens.sweep) and callable(refinelens.fit)
import refinelens.sweeping.sweep, refinelens.fitting.fit
assert callable(refinelens.sweep) and callable(refinelens.fit)
assert (logging.getLogger().level, len(logging.getLogger().handlers)) == level
"""


@pytest.mark.parametrize("code", [LIGHT, pytest.param(COMPLETE, marks=pytest.mark.slow)], ids=["light", "complete"])
def test_importing_is_light_and_changes_nothing(code):
    """Neither of the package, nor of all that its functions need."""
    before = matplotlib.get_backend()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert matplotlib.get_backend() == before
