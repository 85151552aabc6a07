"""First-correct, settle, depth, flips and censoring: hand-made cases, and C++ against numpy."""

import numpy as np
import pytest

from refinelens.trajectory import NONE, largest_gain, summarise_numpy, trajectories

CASES = [
    # ranks by layer, first-correct, settle, depth, flips
    ([5, 3, 0, 0, 0], 2, 2, 0, 0),
    ([5, 0, 2, 0, 0], 1, 3, 2, 2),
    ([0, 0, 0, 0, 0], 0, 0, 0, 0),
    ([9, 9, 9, 9, 0], 4, 4, 0, 0),
    ([0, 1, 0, 1, 0], 0, 4, 4, 4),
    ([0, 0, 0, 0, 7], 0, NONE, NONE, 1),  # correct on the way, censored at the output
    ([9, 9, 9, 9, 9], NONE, NONE, NONE, NONE),
]


@pytest.mark.parametrize("ranks, first, settle, depth, flips", CASES)
def test_definitions(ranks, first, settle, depth, flips):
    result = trajectories(np.array([ranks]))
    found = [int(a[0]) for a in (result.first_correct, result.settle, result.depth, result.flips)]
    assert found == [first, settle, depth, flips]
    assert result.censored[0] == (settle == NONE)


def test_top_k():
    result = trajectories(np.array([[9, 4, 2, 4, 0]]), k=5)
    assert (result.first_correct[0], result.settle[0]) == (1, 1)


@pytest.mark.parametrize(
    "ranks, layer",
    [([9, 5, 5, 0, 0], 3), ([9, 5, 1, 0, 0], 1), ([0, 3, 3, 3, 3], NONE), ([4, 4, 4, 4, 4], NONE), ([2, 9, 8, 7], 2)],
)
def test_largest_gain(ranks, layer):
    """The lowest layer among equals; none where no layer improves."""
    assert largest_gain(np.array([ranks])).tolist() == [layer]
    assert largest_gain(np.array([ranks])[:, :1]).tolist() == [NONE], "no layer but the output"
    assert largest_gain(np.zeros((0, 5), dtype=np.int64)).shape == (0,)


# One layer; a few; more examples than any vector width; no example at all.
@pytest.mark.parametrize("shape", [(5, 1), (7, 3), (1000, 31), (0, 4)])
@pytest.mark.parametrize("k", [1, 3])
def test_cpp_equals_numpy(shape, k):
    from refinelens import _C

    ranks = np.random.default_rng(0).integers(0, 5, shape)
    for ours, twin in zip(_C.summarise_trajectories(ranks, k), summarise_numpy(ranks, k), strict=True):
        np.testing.assert_array_equal(ours, twin)


@pytest.mark.parametrize("ranks, k, message", [(np.zeros(3), 1, r"got \[3\]"), (np.zeros((2, 3)), 0, "got 0")])
def test_bad_input(ranks, k, message):
    with pytest.raises(ValueError, match=message):
        trajectories(ranks, k)
