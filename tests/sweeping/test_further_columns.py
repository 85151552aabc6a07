"""What rows have of frequencies and states: their values, when they are there, a run that goes on, bad input."""

import hashlib
import json
import os

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import refinelens
from refinelens import config
from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.errors import FaultError, InputError
from refinelens.model.loading import TINY, load_model
from refinelens.read import read_context
from refinelens.store.process import Interrupted
from refinelens.store.results import open_run
from refinelens.sweeping.sweep import _bytes_needed, resume_sweep, run_sweep
from refinelens.view_config import ReadConfig
from sweeps import stop_after

pytestmark = pytest.mark.medium
MEASURES = "jsd,frequency,states"
ASKED = {"documents": ("closed-book", 3), "examples": 4, "device": "cpu", "generate": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Some words of the tiny task, far from all of them."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(
        "Corwen Ashwell has ribbon as badge. " * 9 + "What is the badge of Corwen Ashwell? Answer: ribbon\n"
    )
    return path


@pytest.fixture(scope="module")
def lens(tmp_path_factory):
    out = tmp_path_factory.mktemp("lens") / "linear"
    refinelens.fit("tiny", out=out, tokens=4000, device="cpu")
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory, text, lens):
    path = tmp_path_factory.mktemp("runs") / "run"
    given = {"lens": ("plain", lens), "measures": MEASURES, "frequencies": text}
    refinelens.sweep("tiny", out=path, **given, **ASKED)
    return open_run(path)


def rows_of(run):
    return [row for part in run.parts() for row in part.to_pylist()]


def test_buckets_are_those_of_the_text(run, text):
    tokenizer = load_model("tiny", "cpu").tokenizer
    ids = tokenizer(text.read_text(), add_special_tokens=False)["input_ids"]
    ranked = sorted(set(ids), key=lambda id: (-ids.count(id), id))

    def bucket(id):
        return 3 if id not in ranked else sum(ranked.index(id) + 1 > end for end in (10, 100, 1000))

    rows = rows_of(run)
    for row in rows:
        assert row["argmax_bucket"] == [bucket(id) for id in row["argmax"]]
        assert row["target_bucket"] == bucket(row["target_id"])
    assert len({b for row in rows for b in row["argmax_bucket"]}) == 3
    entry = run.manifest["frequencies"]
    assert entry["sha256"] == hashlib.sha256(text.read_bytes()).hexdigest() and entry["tokens"] == len(ids)


def test_states_are_those_before_the_answer_once_a_context(run):
    model = AutoModelForCausalLM.from_pretrained(TINY).float()
    rows = rows_of(run)
    kept = [row for row in rows if row["states"] is not None]
    assert {(row["lens"], row["answer_token"]) for row in kept} == {("plain", 0)}
    assert len(kept) == 4 * (1 + 3) < len(rows)
    for row in kept[:3]:
        where = {"documents": row["documents"], "gold_position": row["gold_position"]}
        ids = read_context(run, ReadConfig(question=row["question_id"], **where)).tokens
        states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        own = np.asarray(row["states"]).reshape(9, 128)
        for layer in range(8):  # the last one of Transformers is behind the norm
            np.testing.assert_allclose(own[layer], states[layer][0, row["position"]].detach(), rtol=1e-3, atol=1e-4)
        normed = model.transformer.ln_f(torch.tensor(own[8], dtype=torch.float32))
        np.testing.assert_allclose(normed.detach(), states[8][0, row["position"]].detach(), rtol=1e-2, atol=1e-2)


def test_the_other_columns_are_those_of_a_run_without(run, lens, tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", lens=("plain", lens), **ASKED)
    other = open_run(tmp_path / "run")
    names = [*rows_of(other)[0]]
    assert [{name: row[name] for name in names} for row in rows_of(run)] == rows_of(other)
    assert set(rows_of(run)[0]) - set(names) == {
        *("jsd", "argmax_bucket", "target_bucket", "states", "generated_settle_jsd")
    }
    for file in ("summary.csv", "paired.csv", "inverted_u.csv", "trajectories.parquet"):
        assert (other.path / file).read_bytes() == (run.path / file).read_bytes()
    names = {"measures.csv", "settling.csv", "frequency.csv", "frequency_depth.csv", "probe.csv"}
    assert names <= {path.name for path in run.path.iterdir()} and not names & set(os.listdir(other.path))


def test_entropy_by_gold_position_comes_with_any_measure(tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", measures="states", **ASKED | {"generate": 0})
    header = (tmp_path / "run" / "measures.csv").read_text().splitlines()[0].split(",")
    assert {"gold_position", "layer", "entropy", "entropy_low", "entropy_high"} <= set(header)


@pytest.mark.parametrize("change", [{"positions": "all"}, {"batch_size": 5}])
def test_they_do_not_depend_on_batches_or_other_rows(run, text, lens, tmp_path, change):
    given = {"lens": ("plain", lens), "measures": MEASURES, "frequencies": text}
    refinelens.sweep("tiny", out=tmp_path / "run", **given, **ASKED, **change)
    other = [row for row in rows_of(open_run(tmp_path / "run")) if row["answer_token"] >= 0]
    for row, again in zip(rows_of(run), other, strict=True):
        for name in ("argmax_bucket", "target_bucket", "generated_settle_jsd"):
            assert row[name] == again[name]
        assert (row["states"] is None) == (again["states"] is None)
        if row["states"] is not None:  # sums of larger products are rounded otherwise
            np.testing.assert_allclose(again["states"], row["states"], rtol=2e-3, atol=1e-4)


def test_a_run_that_goes_on_has_the_same_bytes(run, text, lens, tmp_path):
    options = SweepConfig("tiny", lens=("plain", lens), measures=MEASURES, frequencies=text, **ASKED)
    with pytest.raises(Interrupted):
        run_sweep(options, tmp_path / "run", progress=stop_after(3))
    assert open_run(tmp_path / "run").manifest["status"] == "interrupted"
    resumed = resume_sweep(tmp_path / "run")
    for path in sorted(run.path.rglob("*.parquet")) + sorted(run.path.glob("*.csv")):
        assert (resumed.path / path.relative_to(run.path)).read_bytes() == path.read_bytes(), path.name


def test_a_text_that_changed_is_refused(text, tmp_path, capsys):
    own = tmp_path / "text.txt"
    own.write_text(text.read_text())
    options = SweepConfig("tiny", measures="frequency", frequencies=own, **ASKED)
    with pytest.raises(Interrupted):
        run_sweep(options, tmp_path / "run", progress=stop_after(1))
    own.write_text("another text")
    with pytest.raises(InputError, match="expected frequencies.sha256 [0-9a-f]{12}, as the run has it, got"):
        resume_sweep(tmp_path / "run")
    own.unlink()
    assert read_context(open_run(tmp_path / "run"), ReadConfig()).tokens  # for which it is not needed


@pytest.mark.parametrize(
    "given, error",
    [
        (["--frequencies", "tiny"], "--frequencies: expected --measures frequency, which alone has this option"),
        (["--measures", "jsd", "--frequencies", "tiny"], "--frequencies: expected --measures frequency"),
        (["--measures", "frequency", "--frequencies", "no.txt"], "--frequencies: expected builtin, tiny or a file"),
        (["--measures", "state"], "--measures: expected some of jsd,"),
    ],
)
def test_bad_input_is_a_line(given, error, tmp_path, capsys):
    asked = ["--device", "cpu", "--examples", "1", "--out", str(tmp_path / "run")]
    assert main(["sweep", "--model", "tiny", *asked, *given]) == 2
    said = capsys.readouterr().err
    assert error in said and said.count("\n") == 1 and not (tmp_path / "run").exists()


def test_states_beyond_float16_are_refused(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(TINY).float()
    with torch.no_grad():
        model.transformer.h[5].mlp.c_proj.bias[3] += 70_000
    model.save_pretrained(tmp_path / "model")
    load_model("tiny", "cpu").tokenizer.save_pretrained(tmp_path / "model")
    given = {"model": tmp_path / "model", "task": "tiny", "documents": (3,), "examples": 1, "device": "cpu"}
    refinelens.sweep(out=tmp_path / "without", **given)
    with pytest.raises(FaultError, match=r"expected states up to 65504, which float16 holds, got 7\d{4} at layer"):
        refinelens.sweep(out=tmp_path / "run", measures="states", **given)


def test_the_estimate_of_the_disk_knows_states():
    manifest = {"counts": {"questions": 3}, "model": {"n_layers": 30, "d_model": 576}}
    with_states, without = (
        _bytes_needed(SweepConfig("tiny", documents=(5,), lens=("plain", "x"), measures=measures), manifest)
        for measures in ("jsd,states", "jsd")
    )
    assert with_states - without == 3 * 5 * 31 * 576 * 2  # once a context, whatever the lenses


def test_frames_and_exports(run, tmp_path):
    loaded = refinelens.load_run(run.path)
    assert "states" not in loaded.predictions.columns and "states" in repr(loaded)
    frame = loaded.states
    assert len(frame) == 16 and {one.shape for one in frame.states} == {(9, 128)}
    assert {one.dtype for one in frame.states} == {np.dtype(np.float16)}
    for kind in ("csv", "jsonl"):
        out = tmp_path / f"rows.{kind}"
        assert main(["export", str(run.path), "--format", kind, "--out", str(out)]) == 0
        with out.open() as file:
            first = file.readline()
        names = set(json.loads(first)) if kind == "jsonl" else set(first.strip().replace('"', "").split(","))
        assert {"argmax_bucket", "target_bucket", "jsd"} <= names
        assert not names & {"states", "generated_settle_jsd"}


@pytest.mark.medium
@pytest.mark.parametrize("task", ["tiny", "tiny-cues"])
def test_everything_at_once(tmp_path, task):
    """Every measure beside generation and decoys: written, read again, and alike in any order of their names."""
    asked = {"task": task, "documents": (3,), "examples": 2, "generate": 2, "device": "cpu"}
    for name, measures in (("run", config.MEASURES), ("other", [*reversed(config.MEASURES)])):
        refinelens.sweep("tiny", out=tmp_path / name, measures=measures, **asked)
    run, other = (open_run(tmp_path / name) for name in ("run", "other"))
    assert [part.to_pylist() for part in run.parts()] == [part.to_pylist() for part in other.parts()]
    assert all((run.path / name).exists() for name in run.derived)
    assert main(["show", str(run.path)]) == main(["report", str(run.path)]) == 0
    assert len(refinelens.load_run(run.path).layers) == 9 * sum(map(len, run.parts()))
