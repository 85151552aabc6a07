"""Measures of every layer that a sweep stores on request: against whole distributions, in tables and in exports."""

import csv
import json
import math
import re
import shutil

import numpy as np
import pytest

import refinelens
from refinelens.cli import main
from refinelens.read import read_context
from refinelens.run_page import report_page
from refinelens.store.results import open_run
from refinelens.store.trajectory import LATE, SETTLED
from refinelens.view_config import ReadConfig

pytestmark = pytest.mark.medium
ASKED = {"documents": (3,), "examples": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def lens_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("lens") / "linear"
    refinelens.fit("tiny", out=out, tokens=4000, device="cpu")
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory, lens_folder):
    path = tmp_path_factory.mktemp("runs") / "measured"
    refinelens.sweep("tiny", out=path, lens=("plain", lens_folder), measures="top5,jsd", **ASKED)
    return open_run(path)


def rows_of(run):
    return [row for part in run.parts() for row in part.to_pylist()]


def test_they_are_those_of_whole_distributions(run, lens_folder):
    loaded = refinelens.load_model("tiny", "cpu")
    plain = refinelens.LogitLens(loaded.model, loaded.tokenizer)
    n_vocab, checked = plain.head.vocab_size, 0
    for lens, row in ((row["lens"], row) for row in rows_of(run)[:12]):
        where = {"question": row["question_id"], "documents": 3, "gold_position": row["gold_position"]}
        ids = read_context(run, ReadConfig(**where)).tokens
        own = plain if lens == "plain" else plain.with_lens(lens_folder)
        reading = own.read(ids, positions=row["position"], top_k=n_vocab, kl=False)
        p = np.zeros((len(reading), n_vocab))
        np.put_along_axis(p, reading.top_ids[:, 0].numpy(), np.exp(reading.top_logprobs[:, 0].double().numpy()), 1)
        mean = (p + p[-1]) / 2
        jsd = (p * np.log(p / mean) + p[-1] * np.log(p[-1] / mean)).sum(1) / 2
        np.testing.assert_allclose(row["jsd"], jsd, atol=1e-5)
        best = np.argsort(-p, axis=1, kind="stable")[:, :5]
        assert row["top5"] == pytest.approx([len(set(one) & set(best[-1])) / 5 for one in best.tolist()])
        checked += max(row["jsd"]) > 0.1
    assert checked > 6


def test_they_change_nothing_else(run, tmp_path, lens_folder):
    refinelens.sweep("tiny", out=tmp_path / "run", lens=("plain", lens_folder), **ASKED)
    other = open_run(tmp_path / "run")
    names = [name for name in rows_of(other)[0]]
    assert [{name: row[name] for name in names} for row in rows_of(run)] == rows_of(other)
    assert "jsd" in rows_of(run)[0] and "jsd" not in names
    assert not (other.path / "measures.csv").exists() and not (other.path / "settling.csv").exists()
    assert (other.path / "summary.csv").read_bytes() == (run.path / "summary.csv").read_bytes()


def test_tables_are_means_over_questions(run):
    with (run.path / "measures.csv").open() as file:
        table = list(csv.DictReader(file))
    first = [row for row in rows_of(run) if row["lens"] == "plain" and row["answer_token"] == 0]
    own = [row for row in first if row["gold_position"] == 1]
    shown = [row for row in table if row["lens"] == "plain" and row["gold_position"] == "1"]
    assert len(own) == 6 and [int(row["layer"]) for row in shown] == list(range(9))
    for name in ("jsd", "top5", "kl", "entropy"):
        means = np.mean([row[name] for row in own], axis=0)
        np.testing.assert_allclose([float(row[name]) for row in shown], means, rtol=1e-4, atol=1e-5)
        assert all(float(row[f"{name}_low"]) <= float(row[name]) <= float(row[f"{name}_high"]) for row in shown)
    with (run.path / "settling.csv").open() as file:
        (settling,) = [row for row in csv.DictReader(file) if row["lens"] == "plain" and row["gold_position"] == "1"]
    layers = []
    for row in own:
        layers.append(next(layer for layer, value in enumerate(row["jsd"]) if value <= SETTLED))
    assert float(settling["mean_settle_jsd"]) == pytest.approx(np.mean(layers), rel=1e-5)
    late = np.mean([layer >= math.ceil(LATE * 8) for layer in layers])
    assert float(settling["deep_thinking"]) == pytest.approx(late, abs=1e-6)
    assert 0 < SETTLED < math.log(2) and np.mean(layers) > 0


def test_frames_exports_and_pages_have_them(run, tmp_path):
    loaded = refinelens.load_run(run.path)
    assert {"jsd", "top5"} <= set(loaded.layers.columns) and {"jsd", "top5"} <= set(loaded.predictions.columns)
    out = tmp_path / "rows.jsonl"
    assert main(["export", str(run.path), "--format", "jsonl", "--out", str(out)]) == 0
    assert {"jsd", "top5"} <= set(json.loads(out.read_text().splitlines()[0]))
    text, _ = report_page([run])
    (head,) = json.loads(re.search(r'id="head">(.*?)</script>', text, re.DOTALL)[1])["runs"]
    assert head["measures"] == ["jsd", "top5"] and len(head["settling"]) == 6
    assert len(head["profiles"][0]["jsd"]) == 9


def test_what_is_missing_is_written_again(run, tmp_path, capsys):
    copy = shutil.copytree(run.path, tmp_path / "copy")
    (copy / "measures.csv").unlink()
    assert main(["show", str(copy)]) == 0
    assert (copy / "measures.csv").read_bytes() == (run.path / "measures.csv").read_bytes()


@pytest.mark.parametrize("given", ["jsd,jsd", "depth", ""])
def test_other_measures_are_refused(given, capsys):
    assert main(["sweep", "--model", "tiny", "--measures", given]) == 2
    error = capsys.readouterr().err
    assert "--measures: expected" in error and error.count("\n") == 1
