"""Which folder of the package may import which: questions and models below, what asks and draws above, no way back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "refinelens"
KERNELS = PACKAGE.parent / "kernels"
# Besides `ANYWHERE`. The commands (modules at the top that are not in it) import what they compose.
MAY_IMPORT = {
    "kernels": set(),
    "op": {"kernels"},
    "model": {"kernels"},
    "tasks": set(),
    "prompts": {"model", "tasks"},
    "runs": set(),
    "lenses": {"model", "op", "runs"},
    "report": {"op", "runs"},
    "sweep": {"lenses", "model", "op", "prompts", "report", "runs", "tasks"},
    "fit": {"lenses", "model", "report", "runs", "tasks"},
    "layers": {"lenses", "model", "op", "prompts", "report", "runs", "sweep", "tasks"},
    "bench": {"kernels", "lenses", "model", "op", "tasks"},
    "data": set(),
}
SETUP = PACKAGE.parent / "setup.py"
ANYWHERE = {"errors", "conditions", "options", "machine", "processes", "progress", "_C", "__version__"}


def imported_rooms(path):
    """Rooms and top modules of refinelens that a file imports, its own room left out."""
    package = ["refinelens"] if path.parent == PACKAGE else ["refinelens", path.parent.name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found = [".".join([*base, name]) for name in names]
        elif isinstance(node, ast.ImportFrom):
            found = [node.module] if node.module != "refinelens" else [f"refinelens.{a.name}" for a in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        rooms = {name.split(".")[1] for name in found if name.startswith("refinelens.")}
        yield from rooms - set(package)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_what_stands_below_it(room):
    files = sorted((KERNELS if room == "kernels" else PACKAGE / room).glob("*.py"))
    assert files
    found = {other for path in files for other in imported_rooms(path)}
    assert found - ANYWHERE == MAY_IMPORT[room]


def test_what_any_room_imports_imports_no_room():
    for name in ANYWHERE - {"_C", "__version__"}:
        found = set(imported_rooms(PACKAGE / f"{name}.py")) - ANYWHERE
        assert found == ({"tasks"} if name == "options" else set()), name  # the templates' names


def test_every_folder_is_a_room_and_no_arrow_leads_back():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)
    (installed,) = [ast.literal_eval(node.value.func.value) for node in ast.parse(SETUP.read_text()).body
                    if isinstance(node, ast.Assign) and node.targets[0].id == "ROOMS"]  # fmt: skip
    assert set(installed.split()) == folders
    below, rooms = set(), dict(MAY_IMPORT)
    while rooms:
        ready = {room for room, needs in rooms.items() if needs <= below}
        assert ready, f"a circle among {sorted(rooms)}"
        below |= ready
        rooms = {room: needs for room, needs in rooms.items() if room not in ready}


def test_runs_and_reports_need_no_torch():
    files = [path for room in ("runs", "report") for path in (PACKAGE / room).glob("*.py")]
    modules = [f"refinelens.{path.parent.name}.{path.stem}" for path in files]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"
