"""The notebooks of `examples/`: every cell runs, and what is stored in them was written by running them."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))


def run_cell(source, names):
    """Like a notebook: the value of a last expression is the result."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def code_of(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_as_it_was_run(path):
    """From top to bottom."""
    assert [cell["execution_count"] for cell in code_of(path)] == list(range(1, len(code_of(path)) + 1))


@pytest.mark.medium
@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=pytest.mark.slow if "sweep" in p.stem else [], id=p.stem) for p in NOTEBOOKS]
)
def test_every_cell_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in code_of(path):
        result = run_cell("".join(cell["source"]), names)
        assert (result is not None) == any(output["output_type"] == "execute_result" for output in cell["outputs"])


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["a_sweep_read_in_pandas", "logit_lens_in_five_lines"]
