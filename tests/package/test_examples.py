"""The notebooks of `examples/`: every cell runs, and what is stored in them was written by running them.

Here by the shell of a kernel in this process, of fewer questions; slow in kernels of their own, as they run for users.
"""

import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.ipynb"))
MAP = '<iframe sandbox="allow-scripts"'  # how a map begins


def run_here(notebook, folder, patch):
    """Of each cell what its last expression shows, by kind: a list of one, or of none."""
    patch.chdir(folder)
    shell, shown = InteractiveShell.instance(), []
    shell.history_manager.enabled = False
    try:
        for cell in code_cells(notebook):
            done = shell.run_cell(re.sub(r"examples=\d", "examples=2", cell.source))
            done.raise_error()
            shown.append([] if done.result is None else [shell.display_formatter.format(done.result)[0]])
    finally:
        shell.restore_sys_module_state()
        InteractiveShell.clear_instance()
    return shown


def run_in_a_kernel(notebook, folder, patch):
    """As `run_here`."""
    for cell in code_cells(notebook):
        cell.outputs = []
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()
    return [results(cell) for cell in code_cells(notebook)]


HOW = [pytest.param(run_here, id="here"), pytest.param(run_in_a_kernel, id="kernel", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=HOW)
def run(request):
    return request.param


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def cells(request, run, tmp_path_factory):
    """The cells of a notebook as they are stored, and what each shows when they run in an empty folder."""
    folder = tmp_path_factory.mktemp(request.param.stem)
    stored, again = (nbformat.read(request.param, as_version=4) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR"):
            patch.setenv(name, str(folder / name))
        return code_cells(stored), run(again, folder, patch)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def results(cell):
    """By kind, what the last expression of a cell shows."""
    return [output.data for output in cell.outputs if output.output_type == "execute_result"]


@pytest.mark.medium
def test_every_cell_runs_and_is_stored_as_it_ran(cells):
    for number, (was, now) in enumerate(zip(*cells, strict=True), 1):
        assert was.execution_count == number, "stored as it was run, from top to bottom"
        assert [set(data) for data in results(was)] == [set(data) for data in now]
        assert all(output.output_type == "execute_result" for output in was.outputs), "no progress bars"


@pytest.mark.medium
def test_a_reading_shows_its_map(cells):
    """The page with its code, not a link to it: as stored, a notebook shows it to whoever opens it."""
    stored, shown = cells
    for data in (data for cell in [*map(results, stored), *shown] for data in cell):
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
