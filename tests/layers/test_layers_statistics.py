"""What an analysis says, against the definitions on a few numbers: lens, cost, agreement, exits, patches, figure."""

import io
import math
import re
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console
from scipy import stats

from refinelens.layers.examples import RunExamples
from refinelens.layers.measures import (
    LayerMetrics,
    agreements,
    early_exits,
    essential_layers,
    layer_statistics,
    measure_ablations,
    measure_lens,
    patchings,
)
from refinelens.report.figures import draw_layers, layers_figure
from refinelens.report.rows import (
    COST,
    GAIN,
    LENS,
    EarlyExit,
    Essential,
    LayersReport,
    LayerStatistic,
    essential_threshold,
)
from refinelens.report.tables import print_layers
from refinelens.stats import Estimate, lower_bounds, mean_estimates, share_difference, share_estimate
from refinelens.store.layers import LAYER_ROWS

RUN = {"model": {"name": "m", "n_layers": 3}, "task": {"name": "t"}, "seed": 0, "arguments": {"top": [1]}}
# Two questions, gold first and last. Ranks over layers 0 .. 3; argmax 7 is the answer.
RANKS = np.array([[9, 0, 4, 0], [9, 3, 0, 0], [5, 5, 0, 0], [8, 8, 8, 2]])


def examples(ranks=RANKS):
    n = np.arange(len(ranks))
    columns = {
        "question_id": np.array([4, 4, 6, 6]),
        "documents": np.full(4, 2),
        "gold_position": np.array([0, 1, 0, 1]),
        "answer_id": np.full(4, 7),
        "argmax": np.where(ranks == 0, 7, 1),
        "target_rank": ranks,
        "target_logprob": -np.sqrt(ranks, dtype=np.float32),
        "entropy": np.float32(5.0) - np.arange(ranks.shape[1], dtype=np.float32) * (1 + n[:, None]),
    }
    return RunExamples(RUN, "plain", columns)


def report_of(statistics, ablations=(), run=RUN, agree=(), essential=(), exits=(), **arguments):
    """What tables and figures are made of, of an analysis of one question."""
    arguments = {"interventions": list(ablations), "at": "all"} | arguments
    manifest = {"lens": "plain", "arguments": arguments, "parts": [{}], "seconds": 1.0}
    return LayersReport(
        manifest, run, list(ablations), 0.0, 0.0, statistics, list(agree), list(essential), list(exits), []
    )


def text_of(report):
    console = Console(record=True, file=io.StringIO(), width=200)
    print_layers(console, report)
    return console.export_text()


def value_of(rows, **wanted):
    (row,) = [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]
    return row.value.value


def test_the_lens_by_its_definitions():
    rows = layer_statistics(measure_lens(examples()), 0)
    for layer, first, settle in [(0, 0.0, 0.0), (1, 0.25, 0.0), (2, 0.5, 0.5), (3, 0.0, 0.25)]:
        assert value_of(rows, gold_position=None, layer=layer, statistic="first_correct_share") == first
        assert value_of(rows, gold_position=None, layer=layer, statistic="settle_share") == settle
    first = {"gold_position": 0, "layer": 1}
    assert value_of(rows, **first, statistic="logprob_gain") == pytest.approx((3 + 0) / 2)
    assert value_of(rows, **first, statistic="log_rank_gain") == pytest.approx((math.log(10) + 0) / 2)
    assert value_of(rows, **first, statistic="entropy_drop") == pytest.approx((1 + 3) / 2)
    assert math.isnan(value_of(rows, gold_position=0, layer=0, statistic="logprob_gain"))
    assert value_of(rows, gold_position=1, layer=2, statistic="exit_accuracy") == 0.5
    assert value_of(rows, gold_position=1, layer=2, statistic="exit_agreement") == 1.0
    assert {(row.documents, row.gold_position) for row in rows} == {(2, None), (2, 0), (2, 1)}
    assert all(row.questions == 2 for row in rows if row.layer > 0)


def rows_of(intervention, ranks_before, ranks, source=None):
    """Rows over three layers of examples with the keys of `examples`."""
    lines = []
    for i, (before, after) in enumerate(zip(ranks_before, ranks, strict=True)):
        for layer, rank in enumerate(after, 1):
            line = dict.fromkeys(LAYER_ROWS.names)
            line |= {"question_id": [4, 4, 6, 6][i], "documents": 2, "gold_position": i % 2, "layer": layer}
            line |= {"intervention": intervention, "target_rank": rank, "rank_change": rank - before}
            line |= {"target_logprob": -float(rank), "logprob_change": float(before - rank), "correct": rank == 0}
            line |= {"correct_change": int(rank == 0) - int(before == 0), "source_position": source and source[i]}
            lines.append(line)
    return pa.Table.from_pylist(lines, schema=LAYER_ROWS)


def test_what_an_intervention_costs():
    rows = rows_of("skip", [0, 0, 0, 2], [[1, 0, 5], [0, 0, 0], [3, 0, 0], [2, 1, 0]])
    found = layer_statistics(measure_ablations(LayerMetrics.of_rows(rows, "skip", 3)), 0)
    assert value_of(found, gold_position=None, layer=1, statistic=COST) == (1 + 0 + 3 + 0) / 4
    assert value_of(found, gold_position=1, layer=3, statistic=COST) == -1
    assert value_of(found, gold_position=0, layer=1, statistic="log_rank_cost") == pytest.approx(math.log(2 * 4) / 2)
    assert value_of(found, gold_position=None, layer=1, statistic="accuracy") == 0.25
    assert value_of(found, gold_position=None, layer=1, statistic="correct_change") == -0.5
    assert math.isnan(value_of(found, gold_position=None, layer=1, statistic="settle_change"))


def measured(of, first_layer, statistics, seed):
    generator = np.random.default_rng(seed)
    n = 40
    keys = (np.repeat(np.arange(20), 2), np.full(n, 5), np.tile([0, 4], 20))
    width = 9 - first_layer
    values = {s: np.arange(width) + 6 * generator.standard_normal((n, width)) for s in statistics}
    return LayerMetrics(of, first_layer, *keys, values)


def test_agreement_is_scipys_with_an_interval_around_it():
    lens, cost = measured(LENS, 0, (GAIN, "log_rank_gain", "entropy_drop"), 1), measured("skip", 1, (COST,), 2)
    rows = agreements(lens, [cost], seed=0)
    assert len(rows) == 3 * 2 * 3  # statistics, coefficients, both gold positions together and each
    for position in (None, 4):
        inside = np.full(40, True) if position is None else lens.gold_position == position
        means = lens.values["entropy_drop"][inside].mean(0)[1:], cost.values[COST][inside].mean(0)
        for coefficient, of_scipy in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
            wanted = {"gold_position": position, "lens_statistic": "entropy_drop", "coefficient": coefficient}
            (row,) = [row for row in rows if all(getattr(row, k) == v for k, v in wanted.items())]
            assert row.value.value == pytest.approx(of_scipy(*means).statistic)
            assert -1 <= row.value.low <= row.value.value <= row.value.high <= 1


def test_few_layers_have_no_agreement():
    """Of three layers the means are in one order, or in the reverse one, once in three times."""
    for layers, expected in ((4, 0), (5, 3 * 2)):
        gain, keys = np.tile(np.arange(layers), (9, 1)), (np.arange(9), np.full(9, 5), np.zeros(9, dtype=int))
        lens = LayerMetrics(LENS, 1, *keys, dict.fromkeys((GAIN, "log_rank_gain", "entropy_drop"), gain))
        rows = agreements(lens, [LayerMetrics("skip", 1, *keys, {COST: gain})], seed=0)
        assert len([row for row in rows if row.gold_position is None]) == expected


def test_shares_of_one_example_each_have_the_intervals_of_shares():
    """Of all gold positions together a question has several examples, which are resampled with it."""
    n = 12
    keys = (np.repeat(np.arange(n), 2), np.full(2 * n, 2), np.tile([0, 1], n))
    right = np.repeat([[1.0], [0.0], [1.0]], [8, 1, 15], axis=0)
    change = np.repeat([[0.0], [-1.0], [1.0]], [14, 8, 2], axis=0)
    values = {"accuracy": right, "correct_change": change, COST: right}
    rows = {(r.statistic, r.gold_position): r for r in layer_statistics(LayerMetrics("skip", 1, *keys, values), 0)}
    for position, hits, gained, lost in ((0, 11, 1, 4), (1, 12, 1, 4)):
        assert rows["accuracy", position].value == share_estimate(hits, n)
        assert rows["correct_change", position].value == share_difference(gained, lost, n)
        assert rows[COST, position].value != share_estimate(hits, n)
    for name, values in (("accuracy", right), ("correct_change", change)):
        sums = values.reshape(n, 2).sum(1, keepdims=True)
        assert rows[name, None].value == mean_estimates(sums, np.full((n, 1), 2), 0)[0]


@pytest.mark.medium
def test_the_interval_of_an_agreement_holds_what_noise_hides():
    """Gains and costs that agree by 0.8; means of 12 noisy questions agree by less, their resamples by less still."""
    generator, held = np.random.default_rng(0), 0
    for seed in range(12):
        true = generator.multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]], size=30).T
        gain, cost = true[:, None] + 1.5 * generator.standard_normal((2, 12, 30))
        keys = (np.arange(12), np.full(12, 5), np.zeros(12, dtype=int))
        gains = dict.fromkeys((GAIN, "log_rank_gain", "entropy_drop"), gain)
        rows = agreements(LayerMetrics(LENS, 1, *keys, gains), [LayerMetrics("skip", 1, *keys, {COST: cost})], seed)
        wanted = stats.spearmanr(*true).statistic
        value = next(row.value for row in rows if row.coefficient == "spearman")
        held += value.low <= wanted <= value.high
    assert held >= 9, "the percentiles of the resamples hold it once in four times"


def of_questions(of, means, spread, questions=8):
    """Every question twice: at every layer the mean of that layer, plus and minus the spread."""
    values = np.array(means) + spread * np.where(np.arange(questions) % 2, 1, -1)[:, None]
    keys = (np.repeat(np.arange(questions), 2), np.full(2 * questions, 2), np.tile([0, 1], questions))
    return LayerMetrics(of, 0 if of == LENS else 1, *keys, {GAIN if of == LENS else COST: np.repeat(values, 2, 0)})


def test_essential_is_a_mean_above_the_threshold_for_sure():
    """The bounds are t bounds of 8 questions, for three layers at once."""
    below = stats.t.ppf(1 - 0.05 / 3, 7) * 0.1 / math.sqrt(7)
    lens = of_questions(LENS, [np.nan, 0.1 + 1.01 * below, 0.5, 0.1 + 0.99 * below], 0.1)
    cost = of_questions("skip", [0.0, 0.5, 0.5], 0.1)
    (found,) = essential_layers(lens, [cost], threshold=0.1)
    assert found == Essential(2, "skip", both=(2,), lens_only=(1,), intervention_only=(3,))


def test_no_layer_is_essential_of_fewer_than_five_questions():
    lens, cost = (of_questions(of, [1.0, 1.0, 1.0, 1.0][of != LENS :], 0.0, questions=4) for of in (LENS, "skip"))
    assert essential_layers(lens, [cost], threshold=0.01) == []
    lens, cost = (of_questions(of, [1.0, 1.0, 1.0, 1.0][of != LENS :], 0.0, questions=5) for of in (LENS, "skip"))
    assert essential_layers(lens, [cost], threshold=0.01)[0].both == (1, 2, 3)


@pytest.mark.parametrize("questions", [5, 12])
def test_bounds_hold_for_all_layers_at_once(questions):
    """Thirty layers without any effect: one is found in a twentieth of the columns, by its own interval in most."""
    generator = np.random.default_rng(questions)
    columns = (generator.standard_normal((questions, 30)) for _ in range(400))
    false = [(lower_bounds(values, np.ones_like(values)) > 0).any() for values in columns]
    assert 0.01 < np.mean(false) < 0.09


def test_bounds_of_questions_with_different_numbers_of_values():
    """The standard error of a ratio, by hand."""
    sums, counts = np.array([[2.0], [9.0], [1.0]]), np.array([[1.0], [3.0], [2.0]])
    mean = 12 / 6
    error = math.sqrt(3 / 2 * ((2 - mean) ** 2 + (9 - 3 * mean) ** 2 + (1 - 2 * mean) ** 2)) / 6
    assert lower_bounds(sums, counts) == pytest.approx([mean - stats.t.ppf(0.95, 2) * error])


def test_what_nobody_notices_is_not_essential():
    assert essential_threshold(noise=1e-6) == 0.01 and essential_threshold(noise=0.5) == 0.5


def test_the_first_layer_that_keeps_95_percent():
    ranks = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    exits = {row.gold_position: row for row in early_exits(layer_statistics(measure_lens(examples(ranks)), 0))}
    assert (exits[None].layer, exits[None].accuracy.value, exits[None].agreement_there.value) == (2, 0.75, 1.0)
    assert exits[0].layer == 2 and exits[1].layer == 1
    never = early_exits(layer_statistics(measure_lens(examples(np.ones((4, 4), dtype=int))), 0))
    assert {row.layer for row in never} == {None}


def test_early_exit_and_absent_patches_in_words():
    """Closed-book there is no gold position to name."""
    for position, words in ((-1, "the model's own)."), (3, "the model's own); by gold position 3: 2.")):
        share = Estimate(0.8, 0.5, 1.0)
        exits = [EarlyExit(0, gold, 9, share, 2, share, share) for gold in (None, position)]
        statistics = [replace(row, documents=0) for row in layer_statistics(measure_lens(examples()), 0)]
        text = text_of(report_of(statistics, exits=exits, interventions=["patch"]))
        assert "Essential" not in text, "nothing was intervened in"
        assert words in text and "Patching: no question is answered at one gold position and not at another." in text


@pytest.mark.parametrize("interval", [True, False])
def test_an_agreement_says_over_how_many_layers_and_of_what_its_interval_is(interval):
    run = RUN | {"model": {"name": "m", "n_layers": 5}}
    of_five = replace(examples(np.hstack([RANKS, RANKS[:, -2:]])), manifest=run)
    rows = rows_of("skip", [0] * 4, [[9, 8, 7, 6, 5]] * 4)
    lens, cost = measure_lens(of_five), measure_ablations(LayerMetrics.of_rows(rows, "skip", 5))
    statistics = [row for measured in (lens, cost) for row in layer_statistics(measured, 0)]
    rows = agreements(lens, [cost], 0)
    if interval:  # these two questions are too few for one
        rows = [replace(row, value=Estimate(0.5, 0.25, 0.75)) for row in rows]
    text = text_of(report_of(statistics, ["skip"], run, agree=rows, exits=early_exits(statistics)))
    one = r"0.50 \[0.25,0.75\]" if interval else r"-?[\d.]+"
    words = f"Spearman {one}, Kendall {one}{'; intervals over questions' if interval else ''}"
    assert re.search(rf"\nAgreement of gain and skip over 5 layers: {words}\.\n", text)


def test_of_one_question_there_is_no_interval_and_no_verdict():
    """However large gain and cost: no brackets, no star, and one question, not 1 questions."""
    one = examples().of_questions([4])
    rows = rows_of("skip", [0] * 4, [[9, 9, 9]] * 4)
    lens, cost = measure_lens(one), measure_ablations(LayerMetrics.of_rows(rows.slice(0, 6), "skip", 3))
    statistics = [row for measured in (lens, cost) for row in layer_statistics(measured, 0)]
    found = (agreements(lens, [cost], 0), essential_layers(lens, [cost], 0.01), early_exits(statistics))
    text = text_of(report_of(statistics, ["skip"], RUN, *found))
    assert "2 documents, 1 question, plain lens" in text and "\n1 question in 1 s." in text
    assert "Agreement: none over 3 layers; fewer than 5 agree by chance too often." in text
    assert "Essential: no verdict on fewer than 5 questions." in text
    assert "[" not in text and "*" not in text.split("Agreement")[0] and "nan" not in text


@pytest.mark.parametrize("name, zero", [("restore", 0), ("destroy", 1)])
def test_from_the_layer_on_from_which_every_patch_has_the_effect(name, zero):
    one = 1 - zero
    ranks = [[zero, one, zero], [one, zero, zero], [zero, zero, zero], [one, one, zero]]
    rows = rows_of(name, [one] * 4, ranks, source=[1, 0, 1, 0])
    whole, *pairs = patchings(LayerMetrics.of_rows(rows, name, 3), 0)
    assert (whole.from_layer.value, whole.examples, whole.questions) == ((3 + 2 + 1 + 3) / 4, 4, 2)
    assert {(p.gold_position, p.source_position): p.from_layer.value for p in pairs} == {(0, 1): 2.0, (1, 0): 2.5}
    assert patchings(LayerMetrics.of_rows(rows, "other", 3), 0) == []


@pytest.mark.medium
@pytest.mark.usefixtures("drawn")
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("half", [1.0, math.nan])
def test_a_figure_of_many_gold_positions_and_of_the_lens_alone(tmp_path, half):
    """More lines than there are colours, costs of very different size, no intervention at all, and no intervals."""
    statistics = [
        LayerStatistic(of, 9, position, layer, name, 9, Estimate(v, v - half, v + half))
        for of, name in ((LENS, GAIN), ("skip", COST))
        for layer in (1, 2, 3)
        for position, v in [(None, 10.0**layer), *((p, 10.0**layer - p) for p in range(9))]
    ]
    for ablations in (["skip"], []):
        path = tmp_path / f"{len(ablations)}.png"
        draw_layers(path, report_of(statistics, ablations))
        assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize("peak", [3.0, 12.0], ids=["linear", "logarithmic"])
@pytest.mark.parametrize("half", [0.0, 0.5, math.nan])
def test_every_marker_is_whole(peak, half):
    """A bar that ends where a line does takes no room from it."""
    statistics = [
        LayerStatistic(LENS, 5, position, layer, GAIN, 9, Estimate(v, v - half, v + half))
        for position in (None, 0, 4)
        for layer, v in ((1, peak), (2, -0.3), (3, 0.1))
    ]
    figure = layers_figure(report_of(statistics))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    ends = axes.transAxes.inverted().transform(axes.transData.transform([(1, peak), (2, -0.3)]))[:, 1]
    assert 0.02 < ends[1] < ends[0] < 0.98 and axes.get_yscale() == ("linear" if peak < 4 else "symlog")


@pytest.mark.medium
@pytest.mark.usefixtures("drawn")
@pytest.mark.filterwarnings("error")
def test_a_gold_position_looks_the_same_at_every_context_size():
    asked = {0: [-1], 3: [0, 1, 2], 5: [0, 2, 4]}
    statistics = [
        LayerStatistic(of, documents, position, layer, name, 9, Estimate(1.0, 0.0, 2.0))
        for of, name, sizes in ((LENS, GAIN, asked), ("restore", "accuracy", {5: asked[5]}))
        for documents, positions in sizes.items()
        for position in (None, *positions)
        for layer in (1, 2, 3)
    ]
    figure = layers_figure(report_of(statistics))
    (legend,) = figure.legends
    shown = dict(zip([t.get_text() for t in legend.get_texts()], legend.legend_handles, strict=True))
    assert len(shown) == 1 + 4 + 1  # closed-book, gold positions, the interval
    for axes, positions in zip(figure.axes[:3], asked.values(), strict=True):
        lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
        assert set(lines) == {"closed-book" if p == -1 else f"gold position {p}" for p in positions}
        for label, line in lines.items():
            assert (line.get_color(), line.get_marker()) == (shown[label].get_color(), shown[label].get_marker())
    assert len({handle.get_color() for label, handle in shown.items() if "interval" not in label}) == 5
