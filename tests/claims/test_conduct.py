"""A recipe through the whole pipeline, of models whose depth is known; stopped and gone on with; at its rates."""

import json
import re

import numpy as np
import pytest
from planted import save_planted_model

from refinelens.claims.analyses import read_evidence
from refinelens.claims.conduct import CLAIM, run_recipe
from refinelens.claims.readings import Examples, Reading, by_position, contrasts, values_of
from refinelens.claims.verdict import CANNOT_TELL, CONTRADICTED, SUPPORTED, Rule, judge
from refinelens.cli import main
from refinelens.config import RecipeConfig
from refinelens.errors import InputError
from refinelens.run_page import report_page
from refinelens.store.results import RECIPE, RECIPE_RUN, Run

pytestmark = pytest.mark.medium
TEXT = """
claim = "Depth is larger in the middle than at either end."
source = "a planted model"
fixed = 2026-11-29
[sweep]
task = "tiny"
documents = [5]
gold_positions = "quarters"
examples = {examples}
top = [1, 5]
measures = ["prediction"]
[primary]
analysis = "middle-above-ends"
documents = 5
margin = 0.25
[readings]
target = ["answer", "prediction"]
tokens = ["first", "whole"]
top = [1, 5]
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("planted")
    return {shape: save_planted_model(folder / shape, shape) for shape in ("inverted-u", "u", "rising")}


def recipe(folder, examples):
    path = folder / "planted.toml"
    path.write_text(TEXT.format(examples=examples))
    return str(path)


def conduct(folder, model, examples=24, **words):
    options = RecipeConfig(str(model), device="cpu", budget=words.pop("budget", None))
    return run_recipe(options, recipe(folder, examples), folder / "out", **words)


@pytest.mark.parametrize(
    "shape, examples, verdict",
    [
        ("inverted-u", 24, SUPPORTED),
        ("u", 24, CONTRADICTED),
        ("rising", 80, CONTRADICTED),
        ("inverted-u", 4, CANNOT_TELL),
    ],
)
def test_what_was_planted_is_found(models, tmp_path, shape, examples, verdict):
    claim, run = conduct(tmp_path, models[shape], examples)
    assert claim["verdict"] == verdict
    assert json.loads((tmp_path / "out" / CLAIM).read_text()) == claim
    assert claim["n"] == examples and claim["questions_asked"] == examples
    assert [side["name"] for side in claim["sides"]] == ["middle less first", "middle less last"]
    assert len(claim["secondary"]) == 7 and len(claim["positions"]) == 5
    own = [one for one in claim["secondary"] if one["target"] == "prediction" and one["top"] == 1]
    assert {json.dumps(one["estimate"]) for one in own} == {json.dumps(claim["estimate"])}, "the model is always right"
    assert all(one["p_holm"] is None or one["p_holm"] >= one["p"] for one in claim["secondary"])


def test_a_recipe_that_was_stopped_comes_to_the_same_end(models, tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    conduct(tmp_path / "whole", models["inverted-u"], 12)
    whole, out = tmp_path / "whole" / "out", tmp_path / "stopped" / "out"

    def stop_at(stage, number):
        def progress(now, done, total, *more):
            if (now, done) == (stage, number):
                raise KeyboardInterrupt

        return progress

    given = (tmp_path / "stopped", models["inverted-u"], 12)
    for resume, place in enumerate((("questions", 1), ("questions", 9), ("readings", 3))):
        with pytest.raises(KeyboardInterrupt):
            conduct(*given, resume=bool(resume), progress=stop_at(*place))
        assert (out / RECIPE).exists() and not (out / CLAIM).exists()
    conduct(tmp_path / "stopped", models["inverted-u"], 12, resume=True)
    assert (out / CLAIM).read_bytes() == (whole / CLAIM).read_bytes()
    conduct(tmp_path / "stopped", models["inverted-u"], 12, resume=True)
    assert (out / CLAIM).read_bytes() == (whole / CLAIM).read_bytes()


def test_a_folder_is_held_to_what_it_was_begun_with(models, tmp_path):
    conduct(tmp_path, models["u"], 4)
    with pytest.raises(InputError, match="got one with a recipe; choose another or pass ``resume=True``"):
        conduct(tmp_path, models["u"], 4)
    with pytest.raises(InputError, match="begun with sha256"):
        conduct(tmp_path, models["u"], 5, resume=True)
    with pytest.raises(InputError, match="begun with model"):
        conduct(tmp_path, models["rising"], 4, resume=True)
    with pytest.raises(InputError, match="``resume``: expected the folder of a recipe"):
        run_recipe(RecipeConfig("tiny"), recipe(tmp_path, 4), tmp_path / "none", resume=True)
    with pytest.raises(InputError, match="holds something"):
        run_recipe(RecipeConfig("tiny"), recipe(tmp_path, 4), tmp_path)
    (tmp_path / "out" / RECIPE).write_text("{}")
    with pytest.raises(InputError, match="expected what a recipe wrote there"):
        conduct(tmp_path, models["u"], 4, resume=True)


def test_a_budget_asks_fewer_questions_and_a_resumed_one_the_same(models, tmp_path):
    said = []
    claim, run = conduct(tmp_path, models["u"], 2000, budget="4s", say=said.append)
    asked = run.manifest["counts"]["questions"]
    assert 0 < asked < 2000 and any(f"{asked} of 2000" in line for line in said)
    assert json.loads((tmp_path / "out" / RECIPE).read_text())["examples"] == asked
    again, _ = conduct(tmp_path, models["u"], 2000, resume=True)
    assert again == claim


def test_a_lens_that_a_recipe_fits_is_read_through(tmp_path):
    text = TEXT.format(examples=6) + 'lens = ["plain", "linear"]\n[lenses.linear]\ntokens = 4000\n'
    path = tmp_path / "own.toml"
    path.write_text(text.replace('"rising"', '"tiny"'))
    out = tmp_path / "out"
    assert main(["recipe", str(path), "--model", "tiny", "--device", "cpu", "--out", str(out)]) == 0
    claim = json.loads((out / CLAIM).read_text())
    assert claim["lenses"] == ["plain", "linear"] and len(claim["secondary"]) == 15
    assert (out / "linear" / "lens.safetensors").exists()
    head = json.loads(re.search(r'id="head">(.*?)</script>', (out / "report.html").read_text(), re.DOTALL)[1])
    assert head["claim"] == claim and head["runs"][0]["name"] == RECIPE_RUN


def test_the_command_line_says_what_came_out(models, tmp_path, capsys):
    path, out = recipe(tmp_path, 8), tmp_path / "out"
    assert main(["recipe", path, "--model", str(models["inverted-u"]), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Claim: Depth is larger" in printed and "Verdict: SUPPORTED." in printed
    assert "middle less first: +" in printed and "Other readings: " in printed and "report.html" in printed
    assert main(["show", str(out)]) == 2
    assert f"got that of a recipe; its run is {out / RECIPE_RUN}" in capsys.readouterr().err
    assert main(["show", str(out / RECIPE_RUN)]) == 0


def test_a_page_begins_with_the_verdict(models, tmp_path):
    claim, run = conduct(tmp_path, models["u"], 6)
    text, _ = report_page([run], claim=claim)
    head = json.loads(re.search(r'id="head">(.*?)</script>', text, re.DOTALL)[1])
    assert head["claim"]["verdict"] == claim["verdict"]


# What a reading finds.


@pytest.fixture(scope="module")
def answers(tiny_model, question_file, tmp_path_factory):
    """A run of a random model whose answers have several tokens."""
    from refinelens.config import SweepConfig
    from refinelens.sweeping.sweep import run_sweep

    path = tmp_path_factory.mktemp("answers") / "run"
    options = SweepConfig(
        str(tiny_model), str(question_file), (3,), top=(1, 20), measures="prediction", answer_tokens="all", device="cpu"
    )
    return run_sweep(options, path)


def depth_of(ranks, k, censored):
    right = [rank < k for rank in ranks]
    if True not in right:
        return np.nan
    settle = len(right)
    while settle and right[settle - 1]:
        settle -= 1
    if not right[-1] and censored == "out":
        return np.nan
    return settle - right.index(True)


@pytest.mark.parametrize("target", ["answer", "prediction"])
@pytest.mark.parametrize("tokens", ["first", "each", "whole"])
@pytest.mark.parametrize("censored", ["out", "after"])
def test_depth_of_every_reading(answers, target, tokens, censored):
    rows = [row for part in answers.parts() for row in part.to_pylist() if row["answer_token"] >= 0]
    assert max(row["answer_token"] for row in rows) > 0
    column = {"answer": "target_rank", "prediction": "prediction_rank"}[target]
    wanted = []
    for row in rows:
        same = [
            other[column]
            for other in rows
            if all(other[key] == row[key] for key in ("question_id", "documents", "gold_position"))
        ]
        if tokens == "first" and row["answer_token"] == 0:
            wanted.append(depth_of(row[column], 20, censored))
        elif tokens == "each":
            wanted.append(depth_of(row[column], 20, censored))
        elif tokens == "whole" and row["answer_token"] == 0:
            wanted.append(depth_of(np.max(same, axis=0), 20, censored))
    reading = Reading(documents=3, top=20, target=target, tokens=tokens, censored=censored)
    found = values_of(Examples.read(answers), reading)["value"]
    np.testing.assert_array_equal(found, wanted)
    assert np.isfinite(found).any()


def test_the_prediction_is_ranked_at_every_layer(answers):
    for part in answers.parts():
        for row in part.to_pylist():
            best = np.asarray(row["argmax"])
            assert ((np.asarray(row["prediction_rank"]) == 0) == (best == best[-1])).all()


def test_accuracies_and_positions(answers):
    rows = [row for part in answers.parts() for row in part.to_pylist() if row["answer_token"] == 0]
    examples = Examples.read(answers)
    found = values_of(examples, Reading("accuracy", documents=3))["value"]
    assert found.tolist() == [float(row["argmax"][-1] == row["answer_id"]) for row in rows]
    positions = by_position(examples, Reading("accuracy", documents=3))
    assert [position for position, _ in positions] == [0, 1, 2]
    differences = contrasts(examples, Reading("accuracy", documents=3), middle_above=False)
    for name, place in (("first less middle", 0), ("last less middle", 2)):
        np.testing.assert_array_equal(differences[name], positions[place][1] - positions[1][1])
    assert contrasts(examples, Reading(documents=7), middle_above=True) == {}


@pytest.mark.slow
@pytest.mark.parametrize("shape, wanted", [("inverted-u", SUPPORTED), ("u", CONTRADICTED), ("flat", CANNOT_TELL)])
def test_verdicts_over_two_hundred_draws(tmp_path, shape, wanted):
    """Questions are drawn again and again of one large run; where nothing was planted, support is rare."""
    model = save_planted_model(tmp_path / shape, shape)
    _, run = conduct(tmp_path, model, 600)
    differences = contrasts(read_evidence(Run(run.path)).examples, Reading(documents=5), middle_above=True)
    verdicts = []
    for seed in range(200):
        drawn = np.random.default_rng(seed).choice(600, 30, replace=False)
        verdicts.append(judge({name: d[drawn] for name, d in differences.items()}, Rule(margin=0.0), seed).verdict)
    if wanted == CANNOT_TELL:  # at the nominal rates, with room for what 200 draws of one run show
        assert verdicts.count(SUPPORTED) <= 20 and verdicts.count(CONTRADICTED) <= 20
    else:
        assert verdicts.count(wanted) >= 190
    for start in range(200):
        few = {name: d[start : start + 4] for name, d in differences.items()}
        assert judge(few, Rule(), 0).verdict == CANNOT_TELL
