"""The notebooks of `examples/`: every cell runs in a kernel, and what is stored in them was written by running them."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))
MAP = '<iframe sandbox="allow-scripts"'  # how a map begins


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebooks(request, tmp_path_factory):
    """A notebook as it is stored, and as it comes out of a kernel in an empty folder."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    stored, run = (nbformat.read(request.param, as_version=4) for _ in range(2))
    for cell in code_cells(run):
        cell.outputs = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / name))
        NotebookClient(run, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return stored, run


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def results(cell):
    """By kind, what the last expression of a cell shows."""
    return [output.data for output in cell.outputs if output.output_type == "execute_result"]


@pytest.mark.medium
def test_every_cell_runs_and_is_stored_as_it_ran(notebooks):
    stored, run = map(code_cells, notebooks)
    for number, (was, now) in enumerate(zip(stored, run, strict=True), 1):
        assert was.execution_count == number, "stored as it was run, from top to bottom"
        assert [set(data) for data in results(was)] == [set(data) for data in results(now)]
        assert all(output.output_type == "execute_result" for output in was.outputs), "no progress bars"


@pytest.mark.medium
def test_a_reading_shows_its_map(notebooks):
    """The page with its code, not a link to it: as stored, a notebook shows it to whoever opens it."""
    for notebook in notebooks:
        for data in (data for cell in code_cells(notebook) for data in results(cell)):
            is_reading = data["text/plain"].startswith("LayerReading")
            assert data.get("text/html", "").startswith(MAP) == is_reading
            assert not is_reading or "&lt;main id=&quot;app&quot;&gt;" in data["text/html"]


def test_there_are_two():
    assert [path.stem for path in NOTEBOOKS] == ["a_sweep_read_in_pandas", "logit_lens_in_five_lines"]


def test_one_stores_a_map_and_both_are_small():
    assert [MAP in "".join(str(results(c)) for c in code_cells(nbformat.read(p, as_version=4))) for p in NOTEBOOKS] == [
        False,
        True,
    ]
    assert all(path.stat().st_size < 100_000 for path in NOTEBOOKS)
