"""Which package may import which: questions and models below, what asks and draws above, no way back."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "refinelens"
# A package must not import one that stands after it, nor one beside it on its line.
LINES = ("kernels", "op", "model store", "pages", "lens data", "report", "sweeping fitting bench", "layers", "claims")
ORDER = [line.split() for line in LINES]
# Which any package may import.
BASE = {"errors", "options", "placement", "config", "view_config", "machine", "progress", "stats", "_C"}
COMMANDS = {"api", "cli", "parser", "doctor", "lens_json", "model_drift", "read", "run_page"}  # which nothing imports


def modules():
    """Every module by its dotted name below refinelens."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__":
            yield name, path
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        yield f"kernels.{path.stem}".removesuffix(".__init__"), path


MODULES = dict(modules())


def imported(name):
    """What a module imports of refinelens, as dotted names below it; also what it imports within functions."""
    package = ["refinelens", *name.split(".")]
    package = package if MODULES[name].stem == "__init__" else package[:-1]
    tree = ast.parse(MODULES[name].read_text())
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    for_types = {id(one) for block in blocks for one in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        else:
            continue
        yield from (full.removeprefix("refinelens.") for full in found if full.startswith("refinelens."))


def place(package):
    """Of a package in `ORDER`."""
    return next(index for index, line in enumerate(ORDER) if package in line)


def test_every_package_has_its_place():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {package for line in ORDER for package in line}
    tops = {name for name in MODULES if "." not in name} - folders
    assert tops == (BASE | COMMANDS) - {"_C"}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    own = name.split(".")[0]
    for other in {full.split(".")[0] for full in imported(name)} - BASE - {own}:
        assert own not in BASE, f"{other}: nothing that any package may import may import a package"
        assert own in COMMANDS or other not in COMMANDS, f"{other}: a command is imported by nobody"
        if own not in COMMANDS:
            assert place(other) < place(own), f"{other} stands beside or above {own}"


@pytest.mark.medium
def test_no_two_modules_import_each_other():
    """Of imports at the top of modules, which would fail or depend on who comes first."""
    graph = {name: set() for name in MODULES}
    for name in MODULES:
        for full in imported(name):
            graph[name] |= {other for other in (full, full.rpartition(".")[0]) if other in MODULES and other != name}
    below = set()
    while remaining := set(graph) - below:
        ready = {name for name in remaining if graph[name] - {name.split(".")[0]} <= below}
        assert ready, f"a circle among {sorted(remaining)}"
        below |= ready


def test_stores_and_reports_need_no_torch():
    names = [f"refinelens.{name}" for name in MODULES if name.startswith(("store.", "report."))]
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"
