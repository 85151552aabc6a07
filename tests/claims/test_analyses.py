"""What each analysis makes of a run, against plain loops over its rows."""

import csv
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

import refinelens
from refinelens.claims.analyses import Evidence, analyse, read_evidence
from refinelens.claims.readings import Reading
from refinelens.claims.recipe import Primary
from refinelens.claims.verdict import CANNOT_TELL, CONTRADICTED, SUPPORTED, Rule
from refinelens.errors import InputError
from refinelens.store.results import open_run

pytestmark = pytest.mark.medium
READING = Reading(documents=4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "measured"
    asked = {"task": "tiny-friends", "documents": (4,), "examples": 12, "device": "cpu"}
    refinelens.sweep("tiny", out=path, measures="frequency,sublayers,states", **asked)
    refinelens.essential_layers(path, interventions=("skip",), at="answer", examples=6)
    return open_run(path)


def rows_of(run):
    rows = [row for part in run.parts() for row in part.to_pylist()]
    return [row for row in rows if row["answer_token"] == 0]


def finding(run, analysis, **words):
    rule = Rule(**words.pop("rule", {}))
    return analyse(read_evidence(run), Primary(analysis, READING, rule, words), READING)


def by_question(rows, values):
    ids = sorted({row["question_id"] for row in rows})
    return [np.nanmean([v for row, v in zip(rows, values, strict=True) if row["question_id"] == id]) for id in ids]


def test_early_layers_and_frequent_tokens(run):
    found, rows = finding(run, "frequent-early"), rows_of(run)
    early = 8 // 3
    buckets = [row["argmax_bucket"] for row in rows]
    values = [np.mean([bucket == 0 for bucket in own[:early]]) - (own[-1] == 0) for own in buckets]
    assert found.n == 12 and found.estimate.value == pytest.approx(np.mean(by_question(rows, values)))
    assert f"layers 0 to {early - 1}" in found.sides[0].name


def test_the_later_half_of_the_blocks(run):
    found, rows = finding(run, "later-half"), rows_of(run)
    values = []
    for row in rows:
        size = np.asarray(row["attn_size"][1:]) + np.asarray(row["mlp_size"][1:])
        assert len(size) == 8
        values.append(size[:4].mean() / 2 - size[4:].mean())
    assert found.estimate.value == pytest.approx(np.mean(by_question(rows, values)), rel=1e-6)
    opposite = CONTRADICTED if found.sides[0].p_opposite < 0.05 else CANNOT_TELL
    assert found.verdict == (SUPPORTED if found.p < 0.05 else opposite)


def planted(hits, told, seed=0):
    """The verdict of states whose probe is right where ``hits`` says, of answers that settle at ``told``."""
    n, n_contexts, n_points = hits.shape
    source = np.random.default_rng(seed)
    positions = np.tile(np.arange(n_contexts), (n, 1))
    states = source.standard_normal((n, n_contexts, n_points, n_contexts))
    states += 20.0 * hits[..., None] * np.eye(n_contexts)[positions][:, :, None]
    ranks = (np.arange(n_points) < told).astype(int)
    rows = {
        "question_id": np.repeat(np.arange(n), n_contexts),
        "documents": np.full(n * n_contexts, 4),
        "gold_position": positions.ravel(),
        "answer_token": np.zeros(n * n_contexts, int),
        "lens": np.repeat("plain", n * n_contexts),
        "answer_id": np.zeros(n * n_contexts, int),
        "argmax": [[0] * n_points] * (n * n_contexts),
        "target_rank": [ranks.tolist()] * (n * n_contexts),
        "states": states.reshape(n * n_contexts, -1).astype(np.float16).tolist(),
    }
    table = pa.table({name: pa.array(list(values)) for name, values in rows.items()})
    run = SimpleNamespace(
        manifest={"seed": 0, "model": {"n_layers": n_points - 1}, "lenses": [{"name": "plain"}]},
        extras=("states",),
        parts=lambda columns: [table.select(columns)],
        path="planted",
    )
    primary = Primary("known-before-told", READING, Rule(margin=0.5))
    return analyse(Evidence(run), primary, READING)


def test_what_is_known_before_it_is_told():
    hits = np.zeros((12, 4, 9), bool)
    hits[..., 3:] = True  # the probe knows from layer 3 on
    found = planted(hits, told=6)
    assert found.estimate.value == 3 and found.verdict == SUPPORTED and found.n == 12
    assert planted(hits, told=2).verdict == CONTRADICTED
    assert planted(np.zeros((12, 4, 9), bool), told=6).verdict == CANNOT_TELL, "a probe that finds nothing"
    assert planted(hits[:9], told=6).n == 0, "fewer than 10 questions"


def test_gain_and_cost(run):
    with (run.path / "layers" / "agreement.csv").open() as file:
        rows = list(csv.DictReader(file))
    (row,) = [
        row
        for row in rows
        if (row["gold_position"], row["lens_statistic"], row["coefficient"]) == ("", "logprob_gain", "spearman")
    ]
    value, low = float(row["value"]), float(row["value_low"])
    found = finding(run, "gain-and-cost", intervention="skip", threshold=low - 0.1)
    assert found.estimate.value == value and found.verdict == SUPPORTED and found.n == 6
    assert finding(run, "gain-and-cost", threshold=value).verdict == CANNOT_TELL
    assert finding(run, "gain-and-cost", intervention="mean").verdict == CANNOT_TELL, "which was not done"


def test_a_run_that_lacks_what_is_asked_is_refused(tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", documents=(4,), examples=5, device="cpu")
    plain = open_run(tmp_path / "run")
    needed = {"frequent-early": "frequency", "later-half": "sublayers", "known-before-told": "states"}
    for analysis, name in needed.items():
        with pytest.raises(InputError, match=f"expected a run with ``measures`` {name}"):
            finding(plain, analysis)
    with pytest.raises(InputError, match="expected the table of an analysis of layers"):
        finding(plain, "gain-and-cost")
    reading = Reading(documents=4, target="prediction")
    with pytest.raises(InputError, match="expected a run with ``measures`` prediction"):
        analyse(read_evidence(plain), Primary("middle-above-ends", reading, Rule()), reading)
    reading = Reading(documents=7)
    assert analyse(read_evidence(plain), Primary("middle-above-ends", reading, Rule()), reading).verdict == CANNOT_TELL


def test_a_position_at_which_nothing_settles_has_no_value(run):
    """Random ranks through the embedding are right nowhere."""
    evidence = read_evidence(run)
    evidence.examples.columns["target_rank"] = np.full_like(evidence.examples.columns["target_rank"], 7)
    (first, *_) = evidence.curve(READING)
    assert (first["questions"], first["value"], first["low"]) == (0, None, None)
    found = analyse(evidence, Primary("middle-above-ends", READING, Rule()), READING)
    assert found.verdict == CANNOT_TELL and found.n == 0
