"""Tables of frequency buckets: against counts by hand over the rows of runs."""

import csv
import json
import math
import re

import numpy as np
import pytest

import refinelens
from refinelens.cli import main
from refinelens.report.further_rows import BUCKETS
from refinelens.run_page import report_page
from refinelens.store.results import open_run

pytestmark = pytest.mark.medium
N_LAYERS = 8


@pytest.fixture(scope="module", params=["answer", "prediction"])
def run(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / request.param
    asked = {"documents": ("closed-book", 3), "examples": 7, "top": (1, 5), "target": request.param, "device": "cpu"}
    refinelens.sweep("tiny", out=path, measures="frequency", answer_tokens="all", **asked)
    return open_run(path)


def rows_of(run):
    return [row for part in run.parts() for row in part.to_pylist()]


def table_of(run, name):
    with (run.path / name).open() as file:
        return list(csv.DictReader(file))


def inside(row, line):
    gold = line["gold_position"]
    return row["documents"] == int(line["documents"]) and gold in ("", str(row["gold_position"]))


def same(text, value):
    return text == "" if math.isnan(value) else float(text) == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_buckets_by_layer_are_shares_of_best_tokens(run):
    rows, table = rows_of(run), table_of(run, "frequency.csv")
    assert len(table) == (1 + 1 + 3) * (N_LAYERS + 1) * len(BUCKETS)
    assert BUCKETS == ("1-10", "11-100", "101-1000", "rest")
    shares = 0
    for line in table:
        layer, bucket = int(line["layer"]), BUCKETS.index(line["bucket"])
        own = [row for row in rows if inside(row, line)]
        of_bucket = [row for row in own if row["argmax_bucket"][layer] == bucket]
        flipped = [row["argmax"][layer] != row["argmax"][-1] for row in of_bucket]
        assert same(line["share"], len(of_bucket) / len(own)) and line["questions"] == "7"
        assert same(line["flipped"], np.mean(flipped) if flipped else math.nan)
        shares += 0 < len(of_bucket) < len(own)
    assert shares > 10


def test_predictions_come_up_where_they_first_have_the_rank(run):
    rows, table = rows_of(run), table_of(run, "frequency_depth.csv")
    assert len(table) == (1 + 1 + 3) * len(BUCKETS) * 2
    fewer = 0
    for line in table:
        top, bucket = int(line["top"]), BUCKETS.index(line["bucket"])
        own = [row for row in rows if inside(row, line) and row["argmax_bucket"][-1] == bucket]
        if top == 1:
            layers = [row["argmax"].index(row["argmax"][-1]) for row in own]
        else:
            used = [row for row in own if row["target_id"] == row["argmax"][-1]]
            layers = [next(i for i, rank in enumerate(row["target_rank"]) if rank < top) for row in used]
            fewer += len(used) < len(own)
        assert line["examples"] == str(len(layers)) and same(
            line["mean_first"], np.mean(layers) if layers else math.nan
        )
    assert (fewer > 0) == (run.manifest["arguments"]["target"] == "answer")


def test_other_thresholds_are_shown_and_change_no_file(run, capsys):
    written = (run.path / "frequency_depth.csv").read_bytes()
    assert main(["show", str(run.path), "--top", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("Frequent tokens, ") == 1 and "Frequent tokens, 3 documents, lens plain: among the 10 most" in out
    assert (run.path / "frequency_depth.csv").read_bytes() == written


def test_the_page_has_a_curve_per_bucket(run):
    text, _ = report_page([run])
    (head,) = json.loads(re.search(r'id="head">(.*?)</script>', text, re.DOTALL)[1])["runs"]
    curves = {(c["documents"], c["bucket"]): c for c in head["frequency"]}
    assert set(curves) == {(documents, bucket) for documents in (0, 3) for bucket in BUCKETS}
    total = np.sum([[value for value, *_ in curves[3, bucket]["share"]] for bucket in BUCKETS], axis=0)
    np.testing.assert_allclose(total, np.ones(N_LAYERS + 1), atol=1e-5)
    assert head["probe"] == [] and any("Frequent tokens" in note for note in head["notes"])
