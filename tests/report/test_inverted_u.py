"""The test of the inverted U against enumeration and hand computation, and where there is none."""

import math
import re
from itertools import product

import numpy as np
import pyarrow as pa
import pytest

from refinelens.report.summary import VOID, inverted_u_tests, middle_positions, read_cells
from refinelens.report.tables import inverted_u_line
from refinelens.stats import holm, sign_flip


def trajectories(depths, documents=3, lens="plain", top=1):
    """A table from ``{gold position: depth of each question}``; None for censored."""
    rows = [
        {
            "question_id": question,
            "documents": documents,
            "gold_position": position,
            "answer_token": 0,
            "lens": lens,
            "top": top,
            "depth": depth,
            "final_correct": depth is not None,
        }
        for position, of_questions in depths.items()
        for question, depth in enumerate(of_questions)
    ]
    return pa.Table.from_pylist(rows)


def run_tests(*tables, blind=frozenset(), lenses=("plain",), tops=(1,)):
    return inverted_u_tests(read_cells(pa.concat_tables(tables), lenses, tops), blind, seed=0)


def enumerated(differences):
    sums = [np.dot(signs, differences) for signs in product((1, -1), repeat=len(differences))]
    return np.mean(np.array(sums) >= sum(differences) - 1e-9)


def test_middle_third():
    sizes = {1: [], 2: [], 3: [1], 4: [1, 2], 5: [2], 7: [2, 3, 4], 10: [3, 4, 5, 6], 20: list(range(7, 13))}
    assert {size: middle_positions(size) for size in sizes} == sizes


@pytest.mark.parametrize(
    "d", [[1, 2, 3, 4, 5], [1, 1, 1, 1, 1], [3, -1, 2, 0, 0, -4, 1], [0.5, -0.5], [2, 7], [-1, -2, 1]]
)
def test_exact_p_by_enumeration(d):
    p, method = sign_flip(np.array(d, dtype=float), seed=0)
    assert method == "exact sign-flip" and p == pytest.approx(enumerated(d))


@pytest.mark.parametrize("d", [[3.0], [2.0, 2, -1, 4, 4]])
def test_zeros_do_not_count_towards_the_limit(d):
    """Forty questions, most without a difference: as exact as the few alone."""
    p, method = sign_flip(np.array(d + [0.0] * (40 - len(d))), seed=0)
    assert method == "exact sign-flip" and p == pytest.approx(enumerated(d))


def test_five_positive_differences():
    (test,) = run_tests(trajectories({0: [0] * 5, 1: [1, 2, 3, 4, 5], 2: [0] * 5}))
    assert test.p == test.p_holm == test.first.p == test.last.p == pytest.approx(1 / 32)
    assert test.method == "exact sign-flip"
    assert test.first.difference.value == test.last.difference.value == 3
    assert test.first.d_z == pytest.approx(3 / np.std([1, 2, 3, 4, 5], ddof=1))
    assert (test.first.questions, test.last.differ, test.questions_asked, test.middle) == (5, 5, 5, (1,))
    assert 1 < test.first.difference.low < 3 < test.first.difference.high < 5
    side = r"\+3.00 \[[\d.]+,[\d.]+\] layers d_z 1.90 \(differs in 5 of 5 questions\)"
    line = rf"Inverted U, plain, rank <= 1, 3 documents: middle - first {side}, middle - last {side}; p = 0.031 "
    assert re.fullmatch(rf"{line}\(Holm 0.031; exact sign-flip\)\.", inverted_u_line(test))


def test_equal_differences_have_no_spread():
    """A third of a layer for all: 4/3 - 1 and 7/3 - 2 differ in their last bit, which is no standard deviation."""
    middle = {2: [1, 2, 5], 3: [1, 2, 5], 4: [2, 3, 6]}
    (test,) = run_tests(trajectories({0: [1, 2, 5], **middle, 6: [1, 2, 5]}, documents=7))
    assert test.middle == (2, 3, 4) and test.first.difference.value == pytest.approx(1 / 3)
    assert math.isnan(test.first.d_z) and math.isnan(test.last.d_z)


@pytest.mark.parametrize("last", [[3] * 8, [9] * 8])
def test_depth_that_only_grows_is_no_inverted_u(last):
    """Larger in the middle than at the first position, and not larger than, or below, the last."""
    middle = [3, 4, 2, 3, 4, 3, 2, 3]
    (test,) = run_tests(trajectories({0: [0] * 8, 1: middle, 2: last}))
    assert test.first.p == pytest.approx(1 / 256) and test.first.difference.value == 3
    assert test.p == test.last.p > (0.99 if last[0] == 9 else 0.5)
    assert inverted_u_line(test).endswith("; the middle is shallower than the last position.") == (last[0] == 9)


def test_p_is_that_of_the_end_that_says_less():
    depths = {0: [0] * 6, 1: [1, 2, 3, 4, 5, 6], 2: [0, 1, 4, 3, 6, 4]}
    (test,) = run_tests(trajectories(depths))
    assert test.first.p == pytest.approx(enumerated([1, 2, 3, 4, 5, 6]))
    assert test.last.p == pytest.approx(enumerated([1, 1, -1, 1, -1, 2]))
    assert test.p == test.last.p > test.first.p


def test_an_upright_u_is_no_inverted_u():
    (test,) = run_tests(trajectories({0: [4] * 6, 1: [1, 0, 1, 2, 1, 1], 2: [5] * 6}))
    assert test.p == test.p_holm == 1.0 and test.first.difference.value < 0 > test.last.difference.value
    line = inverted_u_line(test)
    assert line.endswith("p = 1.000 (Holm 1.000; exact sign-flip); the middle is shallower than both ends.")


def test_beyond_the_limit_patterns_are_drawn():
    d = np.array([2.0, 1, -1, 3, 2, -2, 1, 1])
    exact, _ = sign_flip(d, seed=0)
    drawn, method = sign_flip(d, seed=0, exact_questions=7)
    assert method == "sign-flip, 9999 patterns, seed 0" and drawn == pytest.approx(exact, abs=0.02)
    assert sign_flip(d, seed=0, exact_questions=7)[0] == drawn


def test_means_over_settled_examples_and_censored_questions():
    """Ten documents: ends 0 and 9, middle 3 to 6; 1, 2, 7 and 8 do not count."""
    depths = {
        0: [0, None, 4, None, 1],
        1: [9, 9, 9, 9, 9],
        4: [2, 3, None, 5, 2],
        5: [4, None, None, 5, None],
        9: [2, 1, 0, None, 4],
    }
    (test,) = run_tests(trajectories(depths, documents=10))
    assert (test.first.questions, test.last.questions, test.questions_asked) == (2, 3, 5)
    assert test.first.difference.value == pytest.approx(np.mean([3 - 0, 2 - 1]))
    assert test.last.difference.value == pytest.approx(np.mean([3 - 2, 3 - 1, 2 - 4]))
    assert test.last.p == pytest.approx(enumerated([1, 2, -2]))
    assert "(differs in 3 of 3 questions)" in inverted_u_line(test)


@pytest.mark.parametrize(
    "depths, reason",
    [
        ({0: [1, 2], 1: [1, 2], 2: [0, 1]}, "depth in the middle nowhere differs from that at the first position"),
        ({0: [0, 1], 1: [1, 2], 2: [1, 2]}, "depth in the middle nowhere differs from that at the last position"),
        ({0: [1, 2], 1: [3, None], 2: [1, 2]}, "fewer than 2 questions have a depth in the middle and at the first"),
        ({0: [1, 2], 1: [3, 2], 2: [None, 2]}, "fewer than 2 questions have a depth in the middle and at the last"),
        ({0: [None, 2], 1: [3, None], 2: [None, 2]}, "no test: fewer than 2 questions"),
    ],
)
def test_no_number_without_a_test(depths, reason):
    (test,) = run_tests(trajectories(depths))
    assert math.isnan(test.p) and math.isnan(test.p_holm) and math.isnan(test.first.p) and test.method == ""
    line = inverted_u_line(test)
    assert reason in test.reason and reason in line and "p =" not in line and "nan" not in line


@pytest.mark.parametrize("positions", [(0, 1), (1, 2), (0, 2), (1,)])
def test_ends_and_middle_must_have_been_asked(positions):
    assert run_tests(trajectories({position: [1, 2, 3] for position in positions})) == []


def test_void_where_the_lens_cannot_resolve_depth():
    table = trajectories({0: [0] * 5, 1: [1, 2, 3, 4, 5], 2: [0] * 5})
    (test,) = run_tests(table, blind={("plain", 1)})
    assert test.reason == VOID and math.isnan(test.p) and "void: this lens cannot resolve" in inverted_u_line(test)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.02, 0.015]) == pytest.approx([0.03, 0.03]), "adjusted values never fall"
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    with_none = holm([0.02, math.nan, 0.5])
    assert with_none[0] == pytest.approx(0.04) and math.isnan(with_none[1]) and with_none[2] == 0.5
    assert holm([]) == []


def test_holm_runs_over_the_sizes_of_one_lens_and_threshold():
    up = {0: [0] * 5, 1: [1, 2, 3, 4, 5], 2: [0] * 5}
    size_four = {0: up[0], 1: up[1], 2: up[1], 3: up[2]}
    tables = [
        trajectories(depths, documents, lens, top)
        for documents, depths in ((3, up), (4, size_four))
        for lens in ("plain", "linear")
        for top in (1, 5)
    ]
    found = run_tests(*tables, lenses=("linear", "plain"), tops=(5, 1))
    order = [(lens, top, size) for lens in ("linear", "plain") for top in (5, 1) for size in (3, 4)]
    assert [(test.lens, test.top, test.documents) for test in found] == order
    assert all(test.p == 1 / 32 and test.p_holm == 2 / 32 for test in found)
