"""Intervals, shares and cautions on hand-made ranks; the printed table and the figures of hand-made runs."""

import subprocess
import sys
from dataclasses import replace
from io import StringIO

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from scipy import stats

from refinelens.cli import in_options
from refinelens.errors import InputError
from refinelens.report.rows import counted, format_estimate
from refinelens.report.summary import layer_profiles, read_report
from refinelens.report.tables import print_table, write_outputs
from refinelens.stats import (
    Estimate,
    correlation_estimate,
    mean_estimates,
    median_estimate,
    share_difference,
    share_estimate,
)
from refinelens.store.results import FIGURES, PREDICTIONS, SCHEMA_VERSION, Run, open_run
from refinelens.store.trajectory import trajectory_tables
from tiny import write_part

SEEN_EARLY = [9, 0, 3, 0, 0]  # first 1, settle 3
FIRST_THEN_LOST = [9, 0, 7, 7, 0]  # first 1, settle at the output
UNSEEN = [9, 9, 9, 9, 0]
CENSORED = [9, 0, 0, 0, 4]
ARGUMENTS = {"model": "some/model", "target": "answer", "positions": "answer", "answer_tokens": "first", "generate": 0}
ARGUMENTS |= {"seed": 0}
MODEL = {"name": "some/model", "n_layers": 4, "dtype": "float32", "device": "cpu", "backend": "cpp"}
PARITY = {"max_difference": 0.0, "tolerance": 1e-4, "logit_range": 10.0}


def make_run(path, cells, lenses=("plain",), top=(1,), documents=3):
    """A run with one part: ``cells`` maps a gold position to the ranks of its questions, for each lens the same."""
    run = Run(path)
    run.parts_path.mkdir(parents=True)
    rows = []
    for question in range(len(next(iter(cells.values())))):
        for position, ranks in cells.items():
            rows += [_row(question, documents, position, lens, ranks[question]) for lens in lenses]
    part = write_part(run, 0, rows)
    kinds = {lens: "plain" if lens == "plain" else "linear" for lens in lenses}
    entries = [{"name": lens, "kind": kind, "sha256": None, "note": None} for lens, kind in kinds.items()]
    counts = {"questions": 4, "done": 4, "rows": len(rows), "left_out": {}, "contexts": 1, "lens_rows": 1}
    run.write_manifest(
        {
            "schema_version": SCHEMA_VERSION,
            "status": "finished",
            "seed": 0,
            "seconds": 1.0,
            "arguments": ARGUMENTS | {"top": list(top)},
            "model": MODEL | {"parity": PARITY, "unused_weights": []},
            "task": {"name": "builtin"},
            "lenses": entries,
            "counts": counts,
            "parts": [part],
        }
    )
    return open_run(path)


def _row(question, documents, position, lens, ranks):
    values = {name: [0.5 * rank for rank in ranks] for name in ("max_logprob", "entropy", "kl")}
    row = {name: 0 for name in PREDICTIONS.names} | values
    return row | {
        "question_id": question,
        "documents": documents,
        "gold_position": position,
        "lens": lens,
        "source_id": None,
        "answer_text": "a",
        "covers_before": "",
        "alias_why": "only",
        "target_text": "a",
        "generated": None,
        "generated_correct": None,
        "argmax": [int(rank > 0) for rank in ranks],
        "argmax_text": ["a" for _ in ranks],
        "target_rank": ranks,
        "target_logprob": [-0.5 * rank for rank in ranks],
    }


def printed(report):
    text = StringIO()
    print_table(Console(file=text, width=60), report)
    return text.getvalue()


def test_shares_are_of_the_settled_examples(tmp_path):
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY, FIRST_THEN_LOST, UNSEEN, CENSORED]})
    (row,) = read_report(run).rows
    assert (row.lens, row.top, row.documents, row.gold_position, row.n) == ("plain", 1, 3, 0, 4)
    assert row.accuracy.value == 0.75 and row.share_censored.value == 0.25
    assert row.share_at_output.value == pytest.approx(2 / 3) and row.share_unseen.value == pytest.approx(1 / 3)
    assert row.mean_depth.value == pytest.approx((2 + 3 + 0) / 3) and row.median_depth.value == 2
    assert row.settled == 3 and row.mean_first_correct.value == pytest.approx((1 + 1 + 4) / 3)
    assert row.mean_first_correct_all.value == pytest.approx((1 + 1 + 4 + 1) / 4), "a censored one is seen on the way"
    assert row.mean_depth.value == pytest.approx(row.mean_settle.value - row.mean_first_correct.value)
    assert row.mean_settle.value == pytest.approx((3 + 4 + 4) / 3)
    assert row.mean_largest_gain.value == pytest.approx((1 + 1 + 4 + 1) / 4)
    (wide,) = read_report(run, (5,)).rows
    assert wide.top == 5 and wide.share_censored.value == 0 and wide.share_at_output.value == 0.5
    assert wide.share_unseen.value == 0.25 and wide.accuracy == row.accuracy


def test_what_each_layer_adds(tmp_path):
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY, CENSORED]})
    (table,) = trajectory_tables(run, (1, 5))
    assert table["logprob_gain"].to_pylist() == [[4.5, -1.5, 1.5, 0.0]] * 2 + [[4.5, 0.0, 0.0, -2.0]] * 2
    assert table["largest_gain"].to_pylist() == [1] * 4 and table["top"].to_pylist() == [1, 5] * 2
    assert table["settle"].to_pylist() == [3, 1, None, 1]


@pytest.mark.parametrize(
    "ranks, lens, expected",
    [
        ([UNSEEN, UNSEEN, SEEN_EARLY], "plain", "2 of 3 (rank <= 1) settled examples settle only at the output"),
        ([UNSEEN, UNSEEN, SEEN_EARLY], "plain", "refinelens fit --model some/model --out LENS, then sweep with --lens"),
        ([UNSEEN, UNSEEN, SEEN_EARLY], "linear", "Remedy: a larger --top, or more tokens in the fit of the lens."),
        ([UNSEEN, SEEN_EARLY, CENSORED], "plain", None),  # exactly half
        ([CENSORED, CENSORED, CENSORED], "plain", None),
    ],
)
def test_cautions(tmp_path, ranks, lens, expected):
    report = read_report(make_run(tmp_path / "run", {0: ranks}, (lens,)))
    text = printed(report)
    assert bool(report.cautions) == ("cannot resolve refinement depth" in text) == (expected is not None)
    if expected:
        assert expected in text


def test_one_caution_line_per_lens(tmp_path):
    run = make_run(tmp_path / "run", {0: [UNSEEN, UNSEEN, SEEN_EARLY]}, ("plain", "linear"), top=(1, 5, 100))
    report = read_report(run)
    assert list(report.cautions) == [(lens, top) for lens in ("plain", "linear") for top in (1, 5)]
    lines = [line for line in printed(report).splitlines() if line.startswith("Caution")]
    assert len(lines) == 2 and "2 of 3 (rank <= 1), 2 of 3 (rank <= 5) settled" in lines[0]


def test_table_names_lens_and_top_only_where_there_are_several(tmp_path):
    cells = {p: [SEEN_EARLY, UNSEEN, SEEN_EARLY] for p in range(3)}
    one = printed(read_report(make_run(tmp_path / "one", cells)))
    headings = "docs gold n accuracy all settled depth median first settle at out. unseen"
    assert one.splitlines()[2].split() == headings.split()
    assert "rank <= 1, answer tokens: first, seed 0. Lens: plain logit lens, backend" in one
    long = "a-lens-of-a-very-long-[name]"
    several = printed(read_report(make_run(tmp_path / "several", cells, ("plain", long), top=(1, 500))))
    table = several.split("gold: 0-based")[0]
    assert table.splitlines()[2].split()[:4] == ["lens", "top", "docs", "gold"]
    assert max(map(len, table.splitlines())) <= 120 and "…" not in table
    assert long in "".join(line.split(" ")[0] for line in table.splitlines()), "folded, not cut"
    assert "rank <= 1, 500" in several and f"Lens: plain logit lens, {long} (linear lens)" in several


@pytest.mark.medium
@pytest.mark.parametrize(
    "cells, lenses",
    [
        ({p: [SEEN_EARLY, UNSEEN] for p in range(3)}, ("plain",)),
        ({p: [SEEN_EARLY, UNSEEN] for p in range(3)}, ("plain", "$linear_$")),
        ({p: [CENSORED, CENSORED] for p in range(3)}, ("plain", "linear")),
        ({1: [SEEN_EARLY]}, ("plain",)),
        ({p: [SEEN_EARLY, UNSEEN] * 3 for p in range(3)}, ("plain",)),
    ],
    ids=["one lens", "two lenses", "all censored", "one position", "with intervals"],
)
@pytest.mark.filterwarnings("error")
@pytest.mark.usefixtures("drawn")
def test_figures(tmp_path, cells, lenses):
    run = make_run(tmp_path / "run", cells, lenses, top=(1, 5))
    write_outputs(run, read_report(run))
    for name in FIGURES:
        assert (run.path / name).read_bytes().startswith(b"\x89PNG") and (run.path / name).stat().st_size > 5000


@pytest.mark.medium
def test_figures_leave_the_settings_of_whoever_calls_alone(tmp_path):
    """Another backend than a file's, and no figure that pyplot keeps; in a process that has drawn nothing yet."""
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY, UNSEEN]})
    code = f"""if True:
        import sys, matplotlib
        matplotlib.use("svg")
        before = matplotlib.rcParams.copy()
        from refinelens.report.summary import read_report
        from refinelens.report.tables import write_outputs
        from refinelens.store.results import open_run
        run = open_run({str(run.path)!r})
        write_outputs(run, read_report(run))
        assert matplotlib.rcParams == before and "matplotlib.pyplot" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {path.name for path in run.path.glob("*.png")} == set(FIGURES)


def test_layer_profiles(tmp_path):
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY, FIRST_THEN_LOST, UNSEEN]}, ("plain", "linear"))
    rows = pq.read_table(run.part_path(0)).to_pylist()
    for row in rows:
        row["answer_token"] = 1
        row["target_rank"] = [100] * 5
    manifest = run.manifest
    run.write_manifest(manifest | {"parts": [*manifest["parts"], write_part(run, 1, rows)]})
    first, other = layer_profiles(run, ("linear", "plain"), "first")
    assert (first.lens, first.examples, other.lens) == ("linear", 3, "plain")
    ranks = np.array([SEEN_EARLY, FIRST_THEN_LOST, UNSEEN])
    np.testing.assert_allclose(first.rank_quartiles[1], np.median(ranks, axis=0))
    np.testing.assert_allclose(first.mean_kl, 0.5 * ranks.mean(axis=0))
    (every,) = layer_profiles(run, ("plain",), "all")
    assert every.examples == 6
    with pytest.raises(ValueError, match="expected shape"):
        replace(first, mean_kl=first.mean_kl[1:])


# Enough questions for an interval, odd and even numbers of values, more than one or none of a question.
FIVE, SIX = [[1], [2], [4], [4], [0]], [[0, 5], [2], [7, 7], [1], [3], [2]]


@pytest.mark.parametrize("values", [FIVE, SIX, [[0, 9], [], [4, 1], [3], [], [8], [0, 0, 2]]])
def test_bootstrap_against_plain_resampling(values):
    """Means and medians of the same draws, question by question, with numpy's own reductions."""
    sums = np.array([[float(sum(own))] for own in values])
    counts = np.array([[float(len(own))] for own in values])
    histogram = np.array([np.bincount(own, minlength=10) for own in values])
    generator = np.random.default_rng(3)
    means, medians = [], []
    for _ in range(2000):
        drawn = [x for i in generator.integers(0, len(values), len(values)) for x in values[i]]
        if drawn:
            means.append(np.mean(drawn))
            medians.append(np.median(drawn))
    (mean,), median = mean_estimates(sums, counts, seed=3), median_estimate(histogram, seed=3)
    every = [x for own in values for x in own]
    for ours, value, resampled in ((mean, np.mean(every), means), (median, np.median(every), medians)):
        assert ours.value == pytest.approx(value)
        questions = sum(map(bool, values))
        tail = stats.norm.cdf(-np.sqrt(questions / (questions - 1)) * stats.t.ppf(0.975, questions - 1))
        assert [ours.low, ours.high] == pytest.approx(np.quantile(resampled, [tail, 1 - tail]).tolist())


@pytest.mark.parametrize("questions, at_least", [(5, 0.87), (12, 0.93), (40, 0.93)])
def test_intervals_of_a_mean_hold_it_as_often_as_they_say(questions, at_least):
    """Of normal values; plain percentiles hold it 84, 91 and 94 times of 100."""
    values = np.random.default_rng(questions).standard_normal((questions, 1000))
    found = mean_estimates(values, np.ones_like(values), seed=0)
    assert at_least < np.mean([one.low <= 0 <= one.high for one in found]) < 0.97


def test_fewer_than_five_questions_have_no_interval():
    """What the range of so few values misses too often; nor does it count that a question has many values."""
    four, five = np.arange(4.0)[:, None], np.arange(5.0)[:, None]
    assert np.isnan([getattr(mean_estimates(four, np.ones((4, 1)), 0)[0], end) for end in ("low", "high")]).all()
    assert np.isnan(median_estimate(np.eye(4), 0).low) and not np.isnan(median_estimate(np.eye(5), 0).low)
    (with_one_empty,) = mean_estimates(five, np.array([[0.0], *[[9.0]] * 4]), 0)
    assert with_one_empty.value == 10 / 36 and np.isnan(with_one_empty.low)


def test_a_reflected_interval_ends_at_the_limits_and_holds_the_value():
    def of(value, questions):
        correlations = np.array([value, *np.linspace(0.2, 0.7, 2000)])
        return correlation_estimate(correlations, correlations, lambda a, b: a, questions)

    found = of(0.6, 1000)
    assert [found.low, found.high] == pytest.approx([1.2 - 0.6875, 1.2 - 0.2125], abs=1e-3)
    assert of(0.9, 1000) == Estimate(0.9, 0.9, 1.0)
    assert np.isnan([of(0.9, 4).low, of(0.9, 4).high]).all()


@pytest.mark.parametrize("hits, n", [(0, 1), (0, 12), (5, 12), (12, 12), (199, 200)])
def test_intervals_of_shares_against_scipys(hits, n):
    expected = stats.binomtest(hits, n).proportion_ci(method="wilson")
    found = share_estimate(hits, n)
    assert found.value == hits / n and [found.low, found.high] == pytest.approx([expected.low, expected.high], abs=1e-9)


def test_all_of_a_few_is_not_certain(tmp_path):
    """A resample of twelve right answers has twelve right answers; Wilson's interval ends at 0.76."""
    (row,) = read_report(make_run(tmp_path / "run", {0: [SEEN_EARLY] * 12})).rows
    assert row.accuracy.value == row.accuracy.high == 1.0 and row.accuracy.low == pytest.approx(0.757, abs=1e-3)
    assert row.share_censored.value == row.share_censored.low == 0.0 and row.share_censored.high > 0.2


def test_shares_of_several_tokens_of_a_question_are_resampled_with_it(tmp_path):
    """They are not independent, so that Wilson's interval is not theirs."""
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY, CENSORED] * 6})
    rows = pq.read_table(run.part_path(0)).to_pylist()
    again = [row | {"answer_token": 1} for row in rows]
    manifest = run.manifest
    arguments = manifest["arguments"] | {"answer_tokens": "all"}
    parts = [*manifest["parts"], write_part(run, 1, again)]
    (once,) = read_report(run).rows
    run.write_manifest(manifest | {"arguments": arguments, "parts": parts})
    (twice,) = read_report(run).rows
    assert once.accuracy == twice.accuracy == share_estimate(6, 12)
    assert twice.settled == 12 and twice.share_censored.value == 0.5
    wilson = share_estimate(12, 24)
    assert twice.share_censored.high - twice.share_censored.low > 1.2 * (wilson.high - wilson.low)


# No question that differs; some; all in one direction, cut off at 1; a single one.
@pytest.mark.parametrize("gained, lost, n", [(0, 0, 12), (3, 1, 12), (1, 7, 21), (5, 0, 5), (0, 1, 1)])
def test_intervals_of_paired_shares(gained, lost, n):
    a, b = (gained + 1) / (n + 2), (lost + 1) / (n + 2)
    half = 1.959964 * np.sqrt((a + b - (a - b) ** 2) / (n + 2))
    found = share_difference(gained, lost, n)
    assert found.value == (gained - lost) / n
    assert [found.low, found.high] == pytest.approx([max(-1, a - b - half), min(1, a - b + half)], abs=1e-6)
    assert -1 <= found.low < found.high <= 1 and found.low <= found.value <= found.high


@pytest.mark.parametrize("n, gains, loses", [(12, 0.08, 0.02), (12, 0.5, 0.3), (50, 0.04, 0.01), (200, 0.3, 0.1)])
def test_intervals_of_paired_shares_hold_the_difference(n, gains, loses):
    """Over all outcomes, by their probability; a bootstrap of 12 questions, of which few differ, does half the time."""
    distribution = stats.multinomial(n, [gains, loses, 1 - gains - loses])
    held = 0.0
    for gained in range(n + 1):
        for lost in range(n + 1 - gained):
            found = share_difference(gained, lost, n)
            if found.low <= gains - loses <= found.high:
                held += distribution.pmf([gained, lost, n - gained - lost])
    assert held > 0.945


def test_numbers_in_words():
    assert format_estimate(Estimate(-0.001, -0.004, 0.0), 2, interval=True) == "0.00 [0.00,0.00]"
    assert format_estimate(Estimate(-0.001, -0.01, 0.5), 2, interval=True, sign=True) == "+0.00 [-0.01,0.50]"
    assert format_estimate(Estimate(1.0, np.nan, np.nan), 1, interval=True) == "1.0"
    assert format_estimate(Estimate(np.nan, np.nan, np.nan), 1) == "-"
    assert [counted(n, "question") for n in (0, 1, 12)] == ["0 questions", "1 question", "12 questions"]


def test_the_legend_says_what_one_document_is(tmp_path):
    for documents in (1, 3):
        text = printed(read_report(make_run(tmp_path / str(documents), {0: [SEEN_EARLY]}, documents=documents)))
        assert ("docs: documents, 0 is closed-book, 1 oracle, the gold one alone. gold:" in text) == (documents == 1)


def test_one_question_is_one(tmp_path):
    text = printed(read_report(make_run(tmp_path / "run", {0: [SEEN_EARLY]})))
    assert "1 context, 1 row of the lens in" in text


def test_an_unfinished_run_names_the_parameter_that_goes_on_with_it(tmp_path):
    """The command line, which prints the same line, makes an option of it."""
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY]})
    run.write_manifest(run.manifest | {"status": "interrupted"})
    line = "This run is interrupted: 4 of 4 questions; ``sweep(resume)`` goes on with it."
    assert line in printed(read_report(run)).splitlines()
    assert in_options(line).endswith("; refinelens sweep --resume goes on with it.")


@pytest.mark.medium
def test_several_tokens_of_few_questions_have_no_interval_of_depth(tmp_path):
    """Eight settled examples, but of four questions."""
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY] * 2 + [FIRST_THEN_LOST] * 2 + [CENSORED] * 2})
    rows = pq.read_table(run.part_path(0)).to_pylist()
    manifest = run.manifest
    parts = [*manifest["parts"], write_part(run, 1, [row | {"answer_token": 1} for row in rows])]
    run.write_manifest(manifest | {"arguments": manifest["arguments"] | {"answer_tokens": "all"}, "parts": parts})
    report = read_report(run)
    (row,) = report.rows
    assert (row.settled, row.settled_questions) == (8, 4) and np.isnan(row.mean_depth.low)
    assert " 8 2.5 2.5 " in " ".join(printed(report).split())
    write_outputs(run, report)
    header, line = (run.path / "summary.csv").read_text().splitlines()
    assert dict(zip(header.split(","), line.split(","), strict=True))["settled_questions"] == "4"


def test_no_value_has_no_estimate():
    (mean,) = mean_estimates(np.zeros((3, 1)), np.zeros((3, 1)), 0)
    assert np.isnan(share_estimate(0, 0).value)
    assert np.isnan([mean.value, mean.low, mean.high, median_estimate(np.zeros((3, 4)), 0).value]).all()


@pytest.mark.parametrize(
    "place, value, message",
    [
        (("lenses",), [], "expected lenses in .* to be a list"),
        (("lenses", 0), {"name": "plain"}, "expected kind in entry 0 of lenses of .*, got none"),
        (("arguments", "top"), 1, "expected top in arguments of .* to be a list"),
        (("arguments", "top", 0), "x", "expected entry 0 in top of arguments of .* to be a whole number, got 'x'"),
        (("model", "n_layers"), None, "expected n_layers in model of .* to be a whole number, got None"),
        (("model", "parity"), {}, "expected max_difference in parity of model of .*, got none"),
        (("seed",), -1, "expected seed in .* to be a whole number, got -1"),
        (("counts",), {}, "expected questions in counts of .*, got none"),
    ],
)
def test_a_manifest_edited_by_hand_is_one_line(tmp_path, place, value, message):
    run = make_run(tmp_path / "run", {0: [SEEN_EARLY], 1: [SEEN_EARLY]})
    manifest = run.manifest
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    run.write_manifest(manifest)
    with pytest.raises(InputError, match=message):
        open_run(run.path)
