"""Public names: imported when first used, known to type checkers, documented; the stub of the extension fits it."""

import ast
import inspect
from pathlib import Path

import pytest

import refinelens

PACKAGE = Path(refinelens.__file__).parent
NAMES = [name for name in refinelens.__all__ if name != "__version__"]


def test_type_checkers_see_what_runs():
    """The imports under TYPE_CHECKING are those of first use, name by name."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == refinelens._PUBLIC
    assert refinelens.__all__ == [*refinelens._PUBLIC, "__version__"]
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_there_and_says_what_it_is(name):
    assert inspect.getdoc(getattr(refinelens, name))


def test_another_name_is_none():
    with pytest.raises(AttributeError, match="module 'refinelens' has no attribute 'nothing'"):
        refinelens.nothing  # noqa: B018


def test_every_name_stands_in_the_api_reference():
    page = (PACKAGE.parent / "docs" / "api.md").read_text()
    documented = [line.removeprefix("::: refinelens.") for line in page.splitlines() if line.startswith(":::")]
    assert sorted(name for name in documented if "." not in name) == sorted(NAMES)


def test_the_stub_of_the_extension_fits():
    """The same names, with the same arguments in their order."""
    extension = pytest.importorskip("refinelens._C")
    tree = ast.parse((PACKAGE / "_C.pyi").read_text())
    functions = {node.name: arguments(node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert functions.keys() | classes.keys() == {name for name in dir(extension) if not name.startswith("_")}
    for name, wanted in functions.items():
        assert documented_arguments(getattr(extension, name)) == wanted, name
    for name, node in classes.items():
        own = getattr(extension, name)
        members = {each.name: arguments(each) for each in node.body}
        assert members.keys() - {"__init__"} == {name for name in dir(own) if not name.startswith("_")}
        for member, wanted in members.items():
            if callable(found := getattr(own, member)):
                assert documented_arguments(found) == wanted, member


def arguments(node):
    return [argument.arg for argument in node.args.args]


def documented_arguments(function):
    """Of the first line of the docstring, which pybind11 writes as a stub would have it."""
    line = inspect.getdoc(function).splitlines()[0].replace("refinelens._C.", "").replace("numpy.typing.", "")
    return arguments(ast.parse(f"def {line}: ...").body[0])
