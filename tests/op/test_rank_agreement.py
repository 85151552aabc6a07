"""Spearman, Kendall and top-k overlap: hand-made cases, C++ against numpy bit by bit, both against SciPy."""

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from refinelens import _C
from refinelens.errors import InputError
from refinelens.op import ranks
from refinelens.op.ranks import between_layers, kendall_tau_b, spearman, top_k_overlap
from refinelens.store.trajectory import trajectories

BIG = 2**53
INT64 = np.iinfo(np.int64)
TWINS = {
    spearman: ranks.spearman_numpy,
    kendall_tau_b: ranks.kendall_tau_b_numpy,
    top_k_overlap: ranks.top_k_overlap_numpy,
}


@pytest.fixture(params=["cpp", "numpy"])
def backend(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(ranks, "_C", None)


def scipy_rows(compare, a, b):
    """SciPy's value row by row, broadcast."""
    if a.dtype != b.dtype:  # SciPy would make fp64 of both, in which large integers tie
        a, b = (np.unique(x, return_inverse=True)[1].reshape(x.shape) for x in (a, b))
    a, b = np.broadcast_arrays(a, b)
    rows = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
    with warnings.catch_warnings(action="ignore", category=stats.ConstantInputWarning):
        return np.array([compare(x, y).statistic for x, y in rows]).reshape(a.shape[:-1])


def assert_is_scipys(a, b):
    for ours, theirs in ((spearman, stats.spearmanr), (kendall_tau_b, stats.kendalltau)):
        np.testing.assert_allclose(ours(a, b), scipy_rows(theirs, a, b), rtol=0, atol=1e-12)


def assert_is_reference(a, b):
    """The same bits, for every comparison."""
    n = a.shape[-1]
    options = [(spearman,), (kendall_tau_b,), *((top_k_overlap, k) for k in {1, (n + 1) // 2, n} if 1 <= k <= n)]
    with warnings.catch_warnings(action="error"):
        for compare, *k in options:
            ours = compare(a, b, *k)
            np.testing.assert_array_equal(ours, TWINS[compare](a, b, *k))
            assert ours.dtype == np.float64
            assert np.all(np.isnan(ours) | (np.abs(ours) <= 1))


# a, b, rho, tau-b: in order, in opposite order, tied by hand (Kendall's own counts), constant, one entry, none.
CASES = [
    ([1, 2, 3, 4], [10, 20, 30, 40], 1, 1),
    ([1, 2, 3], [9, 5, 1], -1, -1),
    ([1, 1, 2, 2], [1, 2, 1, 2], 0, 0),
    ([1, 2, 2, 3], [1, 2, 3, 3], 15 / 18, 4 / 5),
    ([0, 0, 0, 1], [0, 1, 2, 3], 12 / 240**0.5, 3 / 18**0.5),
    ([7, 7, 7], [1, 2, 3], np.nan, np.nan),
    ([7, 7, 7], [1, 1, 1], np.nan, np.nan),
    ([3], [4], np.nan, np.nan),
    ([], [], np.nan, np.nan),
    ([1, 2], [3, 4], 1, 1),
    ([1, 2], [4, 3], -1, -1),
    ([BIG, BIG + 1, BIG + 2], [1, 2, 3], 1, 1),  # as fp64 the first two would tie
    ([INT64.min, INT64.max, 0], [-1, 1, 0], 1, 1),  # differences overflow
    ([-np.inf, -0.0, 0.0, np.inf], [1, 2, 2, 3], 1, 1),
    ([1.0, np.nan, 2.0], [1, 2, 3], np.nan, np.nan),
]


@pytest.mark.parametrize("a, b, rho, tau", CASES)
def test_definitions(a, b, rho, tau, backend):
    for x, y in ((a, b), (b, a)):
        assert spearman(x, y) == pytest.approx(rho, abs=1e-15, nan_ok=True)
        assert kendall_tau_b(x, y) == pytest.approx(tau, abs=1e-15, nan_ok=True)


def test_top_k_overlap_by_hand(backend):
    a, b = [3, 1, 2, 0], [0, 1, 2, 3]
    assert [top_k_overlap(a, b, k) for k in (1, 2, 3, 4)] == [0, 0.5, 2 / 3, 1]
    assert top_k_overlap([5, 5, 5], [1, 2, 0], 2) == 0.5  # equal entries: {0, 1} against {2, 0}
    assert top_k_overlap([0.0, -0.0], [1, 2], 1) == 1  # equal, too
    assert np.isnan(top_k_overlap([1.0, np.nan], [1.0, 2.0], 1))


# No entry, one, two, three; around the length from which rows are sorted by bytes; around a power of two of runs.
LENGTHS = [0, 1, 2, 3, 16, 17, 31, 127, 128, 129, 257, 1000]


@pytest.mark.medium
@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("values", [1, 2, 5, 300, 2**62])
def test_random_rows(n, values):
    generator = np.random.default_rng(n)
    a, b = generator.integers(-values, values, (2, 3, n))
    for x, y in ((a, b), (a, a), (a, -a), (a, b.astype(float)), (a * 0.1, b), (a, np.sort(b)), (a[0], b)):
        assert_is_reference(x, y)
        if n > 1:
            assert_is_scipys(x, y)


def test_real_ranks():
    """Ranks as a lens gives them: a rank of 0 in most examples of the last layers."""
    generator = np.random.default_rng(2)
    ranks = np.floor(50257 ** (generator.random((200, 13)) * np.linspace(1, 0.1, 13)) - 1).astype(int)
    assert (ranks[:, -1] == 0).mean() > 0.5
    layers = ranks.T
    assert_is_reference(layers[:, None], layers[None])
    assert_is_scipys(layers[:, None], layers[None])


INTEGERS = st.integers(0, 3) | st.sampled_from([INT64.min, INT64.max, BIG, BIG + 1, -BIG - 1]) | st.integers(-999, 999)
FLOATS = st.sampled_from([0.0, -0.0, 1.0, 2.0, np.inf, -np.inf, 5e-324, 1e308]) | st.floats(allow_nan=False)


@st.composite
def row_pairs(draw):
    """Two arrays with one length of rows and leading dimensions that broadcast, either of integers or floats."""
    lead = draw(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=3, min_side=0, max_side=3)).input_shapes
    n = draw(st.integers(0, 12) | st.sampled_from([127, 128, 131]))
    kinds = [(np.int64, INTEGERS), (np.float64, FLOATS)]
    pair = []
    for shape in lead:
        dtype, elements = draw(st.sampled_from(kinds))
        fill = draw(elements)
        pair.append(draw(hnp.arrays(dtype, (*shape, n), elements=elements, fill=st.just(fill))))
    return pair


@pytest.mark.medium
@settings(deadline=None)
@given(row_pairs())
def test_property(pair):
    a, b = pair
    assert_is_reference(a, b)
    if a.shape[-1] > 1 and np.broadcast_shapes(a.shape, b.shape).count(0) == 0:
        assert_is_scipys(a, b)


@pytest.mark.medium
@settings(deadline=None)
@given(row_pairs(), st.randoms(use_true_random=False))
def test_order_is_all_that_counts(pair, random):
    """The same permutation of both, and anything that keeps the order, change nothing; the reverse order negates."""
    a, b = pair
    n = a.shape[-1]
    permutation = np.array(random.sample(range(n), n), int)
    rank_of_a = ranks._centred_ranks(a)
    for compare in (spearman, kendall_tau_b):
        expected = compare(a, b)
        np.testing.assert_array_equal(compare(b, a), expected)
        np.testing.assert_array_equal(compare(a[..., permutation], b[..., permutation]), expected)
        np.testing.assert_array_equal(compare(rank_of_a, b), expected)
        np.testing.assert_array_equal(compare(-rank_of_a, b), -expected)
        itself = compare(a, a)
        assert np.all(np.isnan(itself) | (itself == 1))


@pytest.mark.parametrize("place", [0, 5, 9])
@pytest.mark.parametrize("sign", [1, -1])
def test_nan_propagates_to_its_row_only(place, sign, backend):
    generator = np.random.default_rng(0)
    a, b = generator.random((2, 3, 10))
    a[1, place] = np.copysign(np.nan, sign)
    for compare in (spearman, kendall_tau_b, partial(top_k_overlap, k=4)):
        result = compare(a, b)
        assert np.isnan(result).tolist() == [False, True, False]
        np.testing.assert_array_equal(result[[0, 2]], compare(a[[0, 2]], b[[0, 2]]))


VIEWS = {
    "transposed": lambda x: np.asfortranarray(x),
    "strided": lambda x: np.repeat(np.repeat(x, 2, 0), 3, -1)[::2, ..., ::3],
    "reversed": lambda x: x[::-1, ..., ::-1].copy()[::-1, ..., ::-1],
    "byte-swapped": lambda x: x.astype(x.dtype.newbyteorder(">")),
    "unaligned": lambda x: np.frombuffer(b"." + x.tobytes(), x.dtype, offset=1).reshape(x.shape),
    "read-only": lambda x: np.broadcast_to(x, x.shape),
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [np.int64, np.float64, np.int16, np.uint8, np.float16, np.float32])
def test_memory_layouts(name, dtype):
    generator = np.random.default_rng(4)
    a, b = generator.integers(0, 9, (2, 4, 3, 50)).astype(dtype)
    for compare in (spearman, kendall_tau_b, partial(top_k_overlap, k=7)):
        expected = compare(a.astype(float), b.astype(float))
        np.testing.assert_array_equal(compare(VIEWS[name](a), VIEWS[name](b)), expected)


def test_broadcasting_ranks_each_row_once(backend):
    """Layers x positions x questions against each other, in every way the docstring of the module shows."""
    generator = np.random.default_rng(5)
    ranks, others = generator.integers(0, 20, (2, 3, 40, 5))  # positions, questions, layers
    layers, other_layers = np.moveaxis(ranks, -1, 0), np.moveaxis(others, -1, 0)
    between = between_layers(ranks)
    positions = kendall_tau_b(layers[:, :, None], layers[:, None])
    runs = kendall_tau_b(layers, other_layers)
    assert (between.shape, positions.shape, runs.shape) == ((3, 5, 5), (5, 3, 3), (5, 3))
    for p in range(3):
        for layer in range(5):
            x = ranks[p, :, layer]
            assert runs[layer, p] == kendall_tau_b(x, others[p, :, layer])
            assert between[p, layer].tolist() == [kendall_tau_b(x, ranks[p, :, other]) for other in range(5)]
            assert positions[layer, p].tolist() == [kendall_tau_b(x, ranks[q, :, layer]) for q in range(3)]


@pytest.mark.parametrize("compare", [spearman, kendall_tau_b, partial(top_k_overlap, k=3)])
def test_between_layers(compare, backend):
    ranks = np.random.default_rng(6).integers(0, 9, (30, 4))
    matrix = between_layers(ranks, compare)
    assert matrix.shape == (4, 4)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_array_equal(np.diag(matrix), 1)


def test_between_layers_of_little(backend):
    assert between_layers(np.array([[3], [1], [2]])).tolist() == [[1]]  # one layer
    assert np.isnan(between_layers(np.zeros((0, 4), int))).all()  # no example
    assert np.isnan(between_layers(np.zeros((5, 4), int))).all()  # all equal
    assert between_layers(np.zeros((0, 6, 4), int)).shape == (0, 4, 4)
    assert between_layers(np.zeros((6, 0), int)).shape == (0, 0)


@pytest.mark.medium
@pytest.mark.parametrize("n", [1 << 17, (1 << 21) + 3])  # pairs beyond 2^32; sums of products beyond 2^63
def test_long_rows(n):
    """A rotation by s has n s (n - s) as its sum of squared rank differences, and s (n - s) discordant pairs."""
    s = n // 3
    a = np.arange(n) + BIG
    b = np.roll(a, s)
    assert spearman(a, b) == pytest.approx(1 - 6 * s * (n - s) / (n * n - 1), abs=1e-12)
    assert kendall_tau_b(a, b) == pytest.approx(1 - 4 * s * (n - s) / (n * (n - 1)), abs=1e-12)
    assert spearman(a, -a) == kendall_tau_b(a, -a) == -1
    assert top_k_overlap(a, b, n // 2) == (n // 2 - s) / (n // 2)


@pytest.mark.medium
def test_reference_of_rows_too_long_for_integers():
    a, b = np.random.default_rng(7).integers(0, 50, (2, ranks.EXACT_LENGTH + 1))
    np.testing.assert_allclose(ranks.spearman_numpy(a, b), spearman(a, b), rtol=0, atol=1e-12)


def test_many_threads():
    def all_three(pair):
        return spearman(*pair), kendall_tau_b(*pair), top_k_overlap(*pair, 9)

    pairs = np.random.default_rng(8).integers(0, 40, (24, 2, 20, 300))
    expected = [all_three(pair) for pair in pairs]
    with ThreadPoolExecutor(8) as pool:
        np.testing.assert_array_equal(list(pool.map(all_three, pairs)), expected)


CALLS = {
    "spearman": lambda rows: spearman(rows[:3], rows[0]),
    "kendall_tau_b": lambda rows: kendall_tau_b(rows[:3], rows[0]),
    "top_k_overlap": lambda rows: top_k_overlap(rows[:3], rows[0], 10),
    "trajectories": lambda rows: trajectories(rows.reshape(-1, 10), axis=-1),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", CALLS)
def test_another_thread_runs_meanwhile(name):
    """Ticks of another thread in the middle half of calls, where with the GIL held there could be none."""
    ticks, done = [], threading.Event()

    def tick():
        while not done.wait(1e-4):
            ticks.append(time.perf_counter())

    rows = np.random.default_rng(9).integers(0, 1 << 40, (20, 200_000))
    thread = threading.Thread(target=tick)
    thread.start()
    try:
        calls_with_ticks = 0
        for _ in range(40):  # a busy machine may let the other thread wait
            start = time.perf_counter()
            CALLS[name](rows)
            quarter = (time.perf_counter() - start) / 4
            calls_with_ticks += any(start + quarter < t < start + 3 * quarter for t in ticks)
            if calls_with_ticks == 10:  # the system may also hold up this thread, but not that often
                return
    finally:
        done.set()
        thread.join()
    pytest.fail(f"ticks in {calls_with_ticks} of 40 calls")


BAD = [
    (spearman, (1, [1]), r"a: expected shape \[..., n\], got a single value"),
    (spearman, ([1, 2], [1, 2, 3]), r"last axes of one length, got shapes \[2\] and \[3\]"),
    (kendall_tau_b, ([1, 2], [1]), r"last axes of one length, got shapes \[2\] and \[1\]"),
    (spearman, (np.zeros((2, 3)), np.zeros((4, 3))), r"broadcast, got shapes \[2, 3\] and \[4, 3\]"),
    (spearman, ([1], ["x"]), "b: expected integers below .* or floats of at most 64 bits, got <U1"),
    (spearman, ([1j], [1]), "got complex128"),
    (spearman, ([True], [1]), "got bool"),
    (spearman, (np.zeros(1, np.longdouble), [1]), "got (float128|longdouble|float96)"),
    (spearman, (np.array([2**63], np.uint64), [1]), "got uint64"),
    (top_k_overlap, ([1, 2], [1, 2], 0), "k: expected an integer from 1 to the length of the last axis, 2, got 0"),
    (top_k_overlap, ([1, 2], [1, 2], 3), "last axis, 2, got 3"),
    (top_k_overlap, ([1, 2], [1, 2], 1.0), "got 1.0"),
    (top_k_overlap, ([], [], 1), "last axis, 0, got 1"),
    (between_layers, ([1, 2],), r"ranks: expected shape \[..., n, n_layers \+ 1\], got \[2\]"),
]


@pytest.mark.parametrize("compare, arguments, message", BAD)
def test_bad_input(compare, arguments, message, backend):
    with pytest.raises(InputError, match=message) as caught:
        compare(*arguments)
    assert "\n" not in str(caught.value)


ROWS, INDEX = np.zeros((2, 3), int), np.array([0, 1])
BAD_BINDING = [
    ((ROWS[0], INDEX, ROWS, INDEX), "a: expected int64 or float64"),
    ((ROWS, INDEX, ROWS.astype(np.int32), INDEX), "b: expected int64 or float64"),
    ((ROWS.T, INDEX, ROWS.T, INDEX), "C-contiguous"),
    ((ROWS, INDEX, ROWS[:, :2].copy(), INDEX), "rows of one length, got 3 and 2"),
    ((ROWS, INDEX, ROWS, INDEX[:1]), r"b_index: expected shape \(2,\)"),
    ((ROWS, INDEX, ROWS, INDEX + 1), "b_index: expected rows below 2, got 2"),
    ((ROWS, INDEX - 1, ROWS, INDEX), "a_index: expected rows below 2, got -1"),
]


@pytest.mark.parametrize("arguments, message", BAD_BINDING)
def test_the_binding_trusts_nobody(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.kendall_tau_b(*arguments)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k: expected 1 to the length of a row, got {k}"):
            _C.top_k_overlap(ROWS, INDEX, ROWS, INDEX, k)
