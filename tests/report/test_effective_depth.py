"""Effective depth on curves made by hand, and its interval against resamples that are taken one by one."""

import numpy as np
import pytest

from refinelens.report.effective_depth import cosine_layers, effective_depth_lines, effective_depths, kl_layers
from refinelens.report.effective_depth import overlap_layers as top5_layers
from refinelens.report.further_rows import MeasuredCell
from refinelens.report.rows import Report
from refinelens.stats import RESAMPLES, _tail

NONE = float("nan")
# Of layers 0 .. 4, but for one; the first one of cosines does not exist.
CURVES = {
    cosine_layers: [
        ([NONE, -0.1, -0.2, 0.3, 0.1], 2),
        ([NONE, -0.1, 0.0, -0.1, 0.2], 3),  # 0 is no longer below, and the last turn counts
        ([NONE, 0.1, 0.2, 0.3, 0.1], NONE),
        ([NONE, -0.1, -0.2, -0.3, -0.1], NONE),
        ([NONE, 0.1, 0.2, -0.3, -0.1], NONE),  # the other way round
        ([NONE, -0.1], NONE),  # a single block
    ],
    kl_layers: [
        ([9.0, 8.0, 4.4, 2.0, 0.0], 2),
        ([6.0, 9.0, 4.5, 4.4, 0.0], 3),  # half of the largest is not below it
        ([8.0, 9.0, 9.0, 7.0, 0.0], 4),
        ([1.0, 9.0, 9.0, 7.0, 0.0], 0),
        ([0.0, 0.0, 0.0, 0.0, 0.0], NONE),
    ],
    top5_layers: [
        ([0.0, 0.2, 0.6, 0.2, 1.0], 2),
        ([0.0, 0.3, 0.3, 0.4, 1.0], 3),  # the threshold is not above itself
        ([0.0, 0.1, 0.1, 0.1, 1.0], 4),
    ],
}


@pytest.mark.parametrize("layers, curve, wanted", [(f, *one) for f, several in CURVES.items() for one in several])
def test_of_a_curve(layers, curve, wanted):
    both = layers(np.array([curve, curve[:1] * len(curve), curve], dtype=float))  # each row by itself
    np.testing.assert_array_equal(both[[0, 2]], [wanted, wanted])


def test_a_mean_that_is_the_threshold_but_for_rounding_is_not_above_it():
    shares = np.mean(np.float32([[0.2, 1.0], [0.4, 1.0]]), axis=0, dtype=float)
    assert shares[0] > 0.3 and top5_layers(shares[None]) == 1


def cell(position, ids, **values):
    return MeasuredCell("plain", 2, position, np.array(ids), {k: np.array(v, float) for k, v in values.items()})


def index_and_ratio(cosines):
    """As the code of the paper counts: blocks from 0, the last turn, (index + 1) / blocks."""
    index = max(i for i in range(len(cosines) - 1) if cosines[i] < 0 <= cosines[i + 1])
    return index, (index + 1) / len(cosines)


def test_the_ratio_by_cosine_is_that_of_the_papers_code():
    own = [-0.3, -0.1, -0.2, 0.1, 0.2, -0.1, 0.1]
    part = {name: [[NONE, *own]] * 5 for name in ("attn_cosine", "mlp_cosine", "block_cosine")}
    row = effective_depths([cell(0, range(5), **part)], 0)[0]
    index, ratio = index_and_ratio(own)
    assert (row.method, row.layer.value, row.ratio.value) == ("cosine", index + 1, pytest.approx(ratio))


def test_the_cosine_is_the_mean_of_three():
    part = {"attn_cosine": [[NONE, -3, -3, 1]], "mlp_cosine": [[NONE, 1, 1, 1]], "block_cosine": [[NONE, 1, 3, 1]]}
    row = effective_depths([cell(0, [0], **part)], 0)[0]
    assert row.layer.value == 1 and row.questions == 1 and np.isnan(row.layer.low)  # no interval of one question


def test_intervals_are_of_resampled_mean_curves():
    """Six questions, one of them with two examples, each of which falls at a layer of its own."""
    ids, falls = [3, 3, 4, 5, 7, 8, 9], np.array([1, 2, 1, 3, 2, 3, 4])
    curves = np.random.default_rng(5).uniform(8, 9, (7, 5)) * (np.arange(5) < falls[:, None])
    (whole, one) = effective_depths([cell(0, ids, kl=curves)], 4)
    assert (whole.gold_position, one.gold_position) == (None, 0) and whole.layer == one.layer

    def layer(chosen):
        rows = np.concatenate([curves[np.array(ids) == id] for id in chosen])
        mean = rows.mean(0)
        return next(i for i, value in enumerate(mean) if value < 0.5 * mean.max())

    questions = sorted(set(ids))
    drawn = np.random.default_rng(4).integers(0, 6, (RESAMPLES, 6))
    found = [layer([questions[i] for i in resample]) for resample in drawn]
    assert one.layer.value == layer(questions) and len(set(found)) > 1
    low, high = np.quantile(found, [_tail(6), 1 - _tail(6)])
    assert (one.layer.low, one.layer.high) == (low, high) and one.ratio.high == high / 4


def test_resamples_without_a_layer_are_left_out():
    """One question of five turns; in a third of the resamples it is not, and no mean curve turns."""
    cosine = np.array([[NONE, -5.0, 0.5, 0.5]] + [[NONE, 0.1, 0.1, 0.1]] * 4)
    part = dict.fromkeys(("attn_cosine", "mlp_cosine", "block_cosine"), cosine)
    row = effective_depths([cell(0, range(5), **part)], 0)[0]
    assert vars(row.layer) == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_positions_together_come_first_and_the_line_has_them():
    cells = [cell(p, range(5), kl=[[4, k, 0]] * 5, top5=[[0, 0.2, 1]] * 5) for p, k in ((0, 1), (1, 3))]
    rows = effective_depths(cells, 0)
    assert [(row.gold_position, row.method, row.layer.value) for row in rows] == [
        (None, "kl", 2), (None, "top5", 2), (0, "kl", 1), (0, "top5", 2), (1, "kl", 2), (1, "top5", 2)
    ]  # fmt: skip
    report = Report({"model": {"n_layers": 2}}, [], [], [], {}, effective=rows)
    (line,) = effective_depth_lines(report)
    assert "lens plain, layer of 2 (share): 2 documents kl 2.0 [2.0,2.0] (1.00), top5 2.0 [2.0,2.0] (1.00);" in line
    assert effective_depth_lines(Report({"model": {"n_layers": 2}}, [], [], [], {})) == []
