"""First-correct, settle, depth, flips, censoring and largest gain: hand-made cases, and C++ against numpy."""

from dataclasses import astuple
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refinelens import InputError
from refinelens.store import trajectory
from refinelens.store.trajectory import INT64_MAX, NONE, Trajectories, summarise_numpy, trajectories

CASES = [
    # ranks by layer, first-correct, settle, depth, flips, largest gain
    ([5, 3, 0, 0, 0], 2, 2, 0, 0, 2),
    ([5, 0, 2, 0, 0], 1, 3, 2, 2, 1),
    ([0, 0, 0, 0, 0], 0, 0, 0, 0, NONE),
    ([9, 9, 9, 9, 0], 4, 4, 0, 0, 4),
    ([0, 1, 0, 1, 0], 0, 4, 4, 4, 2),  # two equal gains: the lower layer
    ([0, 0, 0, 0, 7], 0, NONE, NONE, 1, NONE),  # correct on the way, censored at the output
    ([9, 9, 9, 9, 9], NONE, NONE, NONE, NONE, NONE),
    ([9, 8, 4, 3, 2], NONE, NONE, NONE, NONE, 2),  # never correct, and yet it gains
    ([0], 0, 0, 0, 0, NONE),
    ([3], NONE, NONE, NONE, NONE, NONE),
    ([INT64_MAX, 0, INT64_MAX], 1, NONE, NONE, 1, 1),
]


settled = partial(trajectories, axis=-1)  # layers last


def use_reference(monkeypatch):
    monkeypatch.setattr(trajectory, "_C", None)


def columns(result):
    return [result.first_correct, result.settle, result.depth, result.flips, result.largest_gain]


@pytest.mark.parametrize("ranks, first, settle, depth, flips, gain", CASES)
@pytest.mark.parametrize("backend", ["cpp", "numpy"])
def test_definitions(ranks, first, settle, depth, flips, gain, backend, monkeypatch):
    if backend == "numpy":
        use_reference(monkeypatch)
    for lead in ((), (1,), (1, 1, 1)):
        result = settled(np.array(ranks).reshape(*lead, -1))
        found = [int(column.item()) for column in columns(result)]
        assert found == [first, settle, depth, flips, gain]
        assert result.censored.item() == (settle == NONE)
        assert all(column.shape == result.censored.shape == lead for column in columns(result))


def test_top_k():
    result = settled(np.array([[9, 4, 2, 4, 0]]), k=5)
    assert (result.first_correct[0], result.settle[0]) == (1, 1)


def assert_equals_reference(ranks, k):
    references = summarise_numpy(np.asarray(ranks, np.int64), k)
    for ours, reference in zip(astuple(settled(ranks, k)), references, strict=True):
        assert ours.dtype == reference.dtype == np.int64
        np.testing.assert_array_equal(ours, reference)


# One layer; a few; more examples than any vector width; no example at all; one; several leading dimensions, one empty.
SHAPES = [(5, 1), (7, 3), (1000, 31), (0, 4), (31,), (3, 5, 7, 13), (2, 0, 3)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 3, INT64_MAX])
def test_cpp_equals_numpy(shape, k):
    assert_equals_reference(np.random.default_rng(0).integers(0, 5, shape), k)


def test_all_censored():
    ranks = np.random.default_rng(0).integers(1, 5, (50, 9))
    assert_equals_reference(ranks, 1)
    result = settled(ranks)
    assert result.censored.all() and (result.depth == NONE).all() and (result.flips == NONE).all()


RANKS = hnp.arrays(
    hnp.integer_dtypes() | hnp.unsigned_integer_dtypes(),
    hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=6).filter(lambda shape: shape[-1] > 0),
    elements=st.integers(0, 3) | st.integers(0, 127),
)


@pytest.mark.medium
@settings(deadline=None)
@given(RANKS, st.integers(1, 130))
def test_cpp_equals_numpy_property(ranks, k):
    assert_equals_reference(ranks, k)


def strided_views(ranks):
    """The values of ``ranks`` [examples, layers], of which the first three of both are the same, without contiguity."""
    unaligned = np.zeros(ranks.size * 8 + 1, np.uint8)[1:].view(np.int64).reshape(ranks.shape)
    unaligned[...] = ranks
    return {
        "transposed": np.asfortranarray(ranks),
        "strided": np.repeat(np.repeat(ranks, 2, 0), 3, 1)[::2, ::3],
        "reversed": ranks[::-1, ::-1].copy()[::-1, ::-1],
        "byte-swapped": ranks.astype(">i8"),
        "unaligned": unaligned,
    }


@pytest.mark.parametrize("name", list(strided_views(np.zeros((1, 1), int))))
def test_memory_layouts(name):
    ranks = np.random.default_rng(1).integers(0, 4, (13, 7))
    view = strided_views(ranks)[name]
    np.testing.assert_array_equal(astuple(settled(view)), astuple(settled(ranks)))


def test_broadcast_view():
    ranks = np.broadcast_to(np.array([4, 0, 2, 0]), (3, 2, 4))
    assert (settled(ranks).settle == 3).all() and settled(ranks).settle.shape == (3, 2)


BAD = [
    (np.int64(3), 1, r"n_layers \+ 1 along axis -1, one or more, got \[\]"),
    (np.zeros((2, 0), int), 1, r"got \[2, 0\]"),
    (np.zeros((2, 3)), 1, "expected integers below .*, got float64"),
    (np.zeros((2, 3), bool), 1, "got bool"),
    (np.full((2, 3), 2**63, np.uint64), 1, "got uint64"),
    (np.array([[0, 1], [2, -7]]), 1, "ranks: expected 0 or more, got -7; leave out"),
    (np.zeros((2, 3), int), 0, "k: expected an integer of at least 1, got 0"),
    (np.zeros((2, 3), int), 1.5, "got 1.5"),
    (np.zeros((2, 3), int), 2**63, "got 9223372036854775808"),
]


@pytest.mark.parametrize("backend", ["cpp", "numpy"])
@pytest.mark.parametrize("ranks, k, message", BAD)
def test_bad_input(ranks, k, message, backend, monkeypatch):
    if backend == "numpy":
        use_reference(monkeypatch)
    with pytest.raises(ValueError, match=message) as caught:
        settled(ranks, k)
    assert "\n" not in str(caught.value)


def test_columns_of_unequal_shape():
    with pytest.raises(ValueError, match="equal shapes"):
        Trajectories(*(np.zeros(n, int) for n in (2, 2, 2, 3)))


def test_layers_come_first_as_in_a_reading():
    ranks = np.random.default_rng(0).integers(0, 4, (7, 3, 5))
    for held in (ranks, torch.tensor(ranks)):
        found = trajectories(held, k=2)
        np.testing.assert_array_equal(astuple(found), astuple(settled(np.moveaxis(ranks, 0, -1), k=2)))
        assert found.depth.shape == (3, 5)
    line = repr(trajectories(np.array([[3, 2], [0, 1], [0, 0]])))
    assert line == "Trajectories [2]: 2 of 2 settled; mean first_correct 1.50, settle 1.50, depth 0.00"
    assert repr(trajectories(np.ones((2, 3), int))) == "Trajectories [3]: 0 of 3 settled"
    with pytest.raises(InputError, match="ranks: expected those of targets, got None"):
        trajectories(None)
