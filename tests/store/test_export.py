"""A run for other programs: long tables in three formats, and data frames."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from faults import faulty_disk
from refinelens import load_run
from refinelens.cli import main
from refinelens.errors import InputError
from refinelens.store.results import open_run
from tiny import byte_tokenizer, save_tiny_model


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    model = save_tiny_model(folder / "model", tokenizer=byte_tokenizer(), n_positions=4096)
    given = ["--model", str(model), "--documents", "2", "--examples", "5", "--top", "1,5", "--generate", "3"]
    assert main(["sweep", *given, "--out", str(folder / "run")]) == 0
    return open_run(folder / "run")


def stacked(run):
    """The predictions by layer, put together row by row."""
    rows = []
    for part in run.parts(None):
        for row in part.to_pylist():
            lists = {name: value for name, value in row.items() if isinstance(value, list)}
            scalars = {name: value for name, value in row.items() if name not in lists}
            for layer, values in enumerate(zip(*lists.values(), strict=True)):
                rows.append(scalars | {"layer": layer} | dict(zip(lists, values, strict=True)))
    return rows


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_every_layer_is_a_row(run, tmp_path, kind, capsys):
    out = tmp_path / f"run.{kind}"
    assert main(["export", str(run.path), "--format", kind, "--out", str(out)]) == 0
    wanted = pd.DataFrame(stacked(run))
    assert f"{len(wanted)} rows" in capsys.readouterr().out
    if kind == "jsonl":
        lines = out.read_text(encoding="utf-8").splitlines()
        found = pd.DataFrame([json.loads(line) for line in lines])
    else:
        found = pd.read_parquet(out) if kind == "parquet" else pd.read_csv(out, keep_default_na=False)
    assert list(found.columns) == list(wanted.columns)
    for name in wanted.columns:
        if wanted[name].dtype.kind == "f":
            np.testing.assert_allclose(found[name].astype(float), wanted[name], rtol=1e-6)
        else:
            # What is absent is null, in CSV an empty cell.
            assert found[name].fillna("").tolist() == wanted[name].fillna("").tolist(), name


def test_frames(run):
    loaded = load_run(run.path)
    assert loaded.manifest == run.manifest
    n_rows = run.manifest["counts"]["rows"]
    assert len(loaded.predictions) == n_rows and len(loaded.trajectories) == 2 * n_rows
    assert len(loaded.summary) == 2 * 2  # thresholds x gold positions
    assert len(loaded.paired) == 2 * 1  # thresholds x pairs of gold positions
    assert len(loaded.layers) == len(stacked(run))
    first = loaded.predictions.iloc[0]
    assert len(first["target_rank"]) == run.manifest["model"]["n_layers"] + 1
    depth, settle = loaded.trajectories["depth"], loaded.trajectories["settle"]
    assert str(depth.dtype) == "Int32" and (depth.isna() == settle.isna()).all()


def test_names_of_lenses_are_texts(run, tmp_path):
    """Whatever they look like."""
    path = Path(shutil.copytree(run.path, tmp_path / "run"))
    for name in ("NA", "7", "plain"):
        for table in ("summary", "paired"):
            text = (run.path / f"{table}.csv").read_text()
            (path / f"{table}.csv").write_text(text.replace("\nplain,", f"\n{name},"))
            assert set(getattr(load_run(path), table)["lens"]) == {name}
    assert load_run(path).summary["mean_depth"].dtype.kind == "f"


BAD = [
    (["RUN", "--out", "THERE"], "expected a new file, got one that is there; choose another"),
    (["RUN", "--out", "nowhere/at/all.csv"], "expected a file in a folder that is there"),
    (["nowhere", "--out", "NEW"], "expected a run folder with manifest.json, got none"),
    (["RUN", "--out", "NEW", "--question", "3"], "--question: expected --format lens-json, which alone has"),
    (["RUN", "--out", "NEW", "--format", "parquet", "--k", "5"], "--k: expected --format lens-json, which alone has"),
]


@pytest.mark.parametrize("arguments, message", BAD)
def test_bad_input_is_one_line(run, tmp_path, capsys, arguments, message):
    (tmp_path / "there.csv").write_text("kept")
    places = {"RUN": str(run.path), "THERE": str(tmp_path / "there.csv"), "NEW": str(tmp_path / "new.csv")}
    assert main(["export", *(places.get(argument, argument) for argument in arguments)]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert (tmp_path / "there.csv").read_text() == "kept" and not (tmp_path / "new.csv").exists()


@pytest.mark.parametrize(
    "number, code, message",
    [
        (errno.EACCES, 2, "expected a file that can be written, got: Permission denied"),
        (errno.ENOENT, 2, "expected a file that can be written, got: No such file or directory"),  # as in /proc
        (errno.ENOSPC, 1, "no free disk left; free some"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "lens-json"])
def test_a_file_that_cannot_be_written_is_one_line(run, tmp_path, capsys, kind, number, code, message):
    def fail(step, path):
        if step == 1:  # the flush
            raise OSError(number, os.strerror(number))

    out = tmp_path / "out"
    with faulty_disk(fail):
        assert main(["export", str(run.path), "--format", kind, "--out", str(out)]) == code
    assert capsys.readouterr().err == f"refinelens: --out {out}: {message}\n"
    assert not list(tmp_path.iterdir())


def test_it_needs_no_luck_with_imports(run):
    """What it uses of pyarrow it imports, whether or not something else has."""
    code = "import sys; from refinelens.store import frames; sys.exit('pyarrow.compute' not in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_without_pandas_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(InputError, match=r"; pip install 'refinelens\[frames\]'$"):
        load_run(run.path)
