"""Recipes: those of the package are sound, and one that is not is told so in a line."""

from pathlib import Path

import pytest

from refinelens.claims.conduct import seconds_of
from refinelens.claims.readings import Reading, every_reading
from refinelens.claims.recipe import built_in, load_recipe
from refinelens.cli import main
from refinelens.errors import InputError

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.toml"))
GOOD = """
claim = "c"
source = "s"
fixed = 2026-11-29
[sweep]
task = "tiny"
documents = [5]
examples = 6
[lenses.linear]
tokens = 4000
[primary]
analysis = "middle-above-ends"
documents = 5
lens = "linear"
margin = 0.25
[readings]
top = [1, 5]
"""


def write(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", [*built_in(), *map(str, EXAMPLES)])
def test_recipes_of_the_package_and_examples(name):
    recipe = load_recipe(name)
    assert recipe.name == Path(name).stem and recipe.claim.endswith(".") and "arXiv" in recipe.source and recipe.fixed
    assert recipe.primary.reading.documents in recipe.sweep["documents"]
    assert set(recipe.readings.get("documents", [])) <= set(recipe.sweep["documents"])
    if "prediction" in recipe.readings.get("target", []):
        assert "prediction" in recipe.sweep["measures"]


def test_the_list_names_them_all(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == built_in() and all("arXiv" in line for line in lines)


def test_a_file_of_ones_own(tmp_path):
    recipe = load_recipe(write(tmp_path, GOOD))
    assert recipe.primary.reading == Reading(documents=5, lens="linear")
    assert (recipe.primary.rule.alpha, recipe.primary.rule.margin) == (0.05, 0.25)
    assert recipe.lenses == {"linear": {"tokens": 4000}} and recipe.layers is None


@pytest.mark.parametrize(
    "old, new, words",
    [
        ('claim = "c"', "claim = 3", "[claim] expected a string, got 3"),
        ('source = "s"\n', "", "[source] expected a string, got None"),
        ("[sweep]", "[swep]", "[swep] expected one of claim, source"),
        ('task = "tiny"', 'model = "tiny"', "[sweep.model] expected one of"),
        ("documents = [5]\n", "documents = [-1]\n", "[sweep] ``documents``: expected"),
        ("tokens = 4000", "tokens = 4", "[lenses.linear] ``tokens``: expected"),
        ("[lenses.linear]", "[lenses.plain]", "[lenses.plain] expected a name of letters"),
        ('"middle-above-ends"', '"middle"', "[primary.analysis] expected one of middle-above-ends"),
        ('lens = "linear"', 'lens = "tuned"', "[primary.lens] expected one of plain, linear, got 'tuned'"),
        ("margin = 0.25", 'margin = "much"', "[primary.margin] expected a number"),
        ("[lenses.linear]", "[lenses.run]", "[lenses.run] expected a name of letters"),
        ("[lenses.linear]", '[lenses."../away"]', "[lenses.../away] expected a name of letters"),
        ('"middle-above-ends"', '["middle-above-ends"]', "[primary.analysis] expected one of middle-above-ends"),
        ("margin = 0.25", "margin = nan", "[primary.margin] expected a number"),
        ("margin = 0.25", "margin = -1", "[primary.margin] expected a number"),
        ("margin = 0.25", "alpha = 2", "[primary.alpha] expected a number between 0 and 1"),
        ("margin = 0.25", "threshold = 0.5", "[primary.threshold] expected one of"),
        ("top = [1, 5]", "top = 5", "[readings.top] expected a list of values"),
        ("top = [1, 5]", "top = [0]", "[readings.top] expected a number of 1 or more"),
        ("top = [1, 5]", 'token = ["first"]', "[readings.token] expected one of"),
        ("[readings]", "[[readings]]", "[readings] expected a table"),
        ('claim = "c"', "claim = ", "expected TOML"),
        ("documents = 5\n", "documents = 7\n", "[primary.documents] expected one of the sweep's, 5, got 7"),
        ("top = [1, 5]", "documents = [5, 10]", "[readings.documents] expected one of the sweep's, 5, got 10"),
        ("top = [1, 5]", 'target = ["prediction"]', "[sweep.measures] expected prediction"),
        ("top = [1, 5]", 'statistic = ["accuracy_generated"]', "[sweep.generate] expected a number of tokens"),
        ('"middle-above-ends"', '"later-half"', "[sweep.measures] expected sublayers, which later-half is about"),
        ('"middle-above-ends"', '"gain-and-cost"', "[layers.interventions] expected skip, whose cost is compared"),
    ],
)
def test_what_is_wrong_is_named_with_file_and_key(tmp_path, capsys, old, new, words):
    assert old in GOOD
    path = write(tmp_path, GOOD.replace(old, new))
    with pytest.raises(InputError) as error:
        load_recipe(path)
    assert path in str(error.value) and words in str(error.value)
    assert main(["recipe", path, "--out", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line and not (tmp_path / "out").exists()


def test_a_verdict_without_a_p_value_has_no_other_readings(tmp_path):
    """Corrected together with nothing, each would say in silence that it does not support the claim."""
    layers = '[layers]\ninterventions = ["skip"]\n[primary]'
    measured = 'examples = 6\nmeasures = ["states"]'
    changes = {"gain-and-cost": ("[primary]", layers), "known-before-told": ("examples = 6", measured)}
    for analysis, change in changes.items():
        text = GOOD.replace("middle-above-ends", analysis).replace(*change)
        with pytest.raises(InputError, match=rf"\[readings\] expected none beside {analysis}, .* got some"):
            load_recipe(write(tmp_path, text))
        assert load_recipe(write(tmp_path, text.partition("[readings]")[0])).primary.analysis == analysis


def test_no_such_recipe(capsys):
    assert main(["recipe", "inverted-v"]) == 2
    assert "expected a recipe, one of depth-use, effective-depth" in capsys.readouterr().err


def test_every_other_reading_once():
    primary = Reading(documents=5)
    found = every_reading(primary, {"target": ["answer", "prediction"], "top": [1, 5], "censored": ["out", "after"]})
    assert len(found) == len(set(found)) == 5, "of the model's own prediction nothing is censored"
    accuracy = Reading("accuracy", documents=5)
    assert every_reading(accuracy, {"top": [1, 5], "censored": ["out", "after"]}) == [], "which change no accuracy"
    own = Reading(target="prediction", censored="after")
    assert every_reading(own, {"target": ["prediction"]}) == []
    assert primary not in found and Reading(documents=5, top=5, censored="after") in found
    assert every_reading(primary, {}) == []


def test_budgets():
    assert [seconds_of(text) for text in ("90s", "30m", "1.5h")] == [90.0, 1800.0, 5400.0]
    for text in ("30", "0m", "m", "1d"):
        with pytest.raises(InputError, match="``budget``: expected a time"):
            seconds_of(text)
