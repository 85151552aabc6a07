"""The op on inputs that real programs produce: no rows, odd strides, huge offsets, threads, forks, broken numbers."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from refinelens import LayerNorm, fused_lens
from refinelens.errors import InputError
from refinelens.kernels.reference import LensStats
from tiny import assert_matches_truth, screening_error, truth

pytestmark = pytest.mark.usefixtures("every_core")

# Tokens that are all equal: both rows fall back, for which a thread takes 40 MB or more at a time. The first call makes
# what stays: the index, threads' own memory. The second may take 30 MB: less than that, more than all the rest.
TOO_LITTLE_MEMORY = """
import resource, torch, refinelens
torch.set_num_threads(2)
hidden, unembedding = torch.ones(2, 1), torch.ones(5_000_000, 1)
def ranks():
    return refinelens.fused_lens(hidden, unembedding, targets=7, precision="certified").target_rank.tolist()
assert ranks() == [7, 7]
with open("/proc/self/statm") as file:
    in_use = int(file.read().split()[0]) * resource.getpagesize()
before = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (in_use + 30_000_000, before[1]))
try:
    print(ranks())
except MemoryError:
    print("MemoryError")
resource.setrlimit(resource.RLIMIT_AS, before)
print(ranks())
"""

WAYS = {
    "cpp": dict(backend="cpp", precision="fp32"),
    "certified": dict(backend="cpp", precision="certified"),
    "reference": dict(backend="reference"),
}
FIELDS = ("argmax", "max_logit", "logsumexp", "entropy", "target_logit", "target_rank", "target_logprob")


@pytest.fixture(params=WAYS)
def way(request):
    """Keyword arguments that choose one implementation of the op."""
    return WAYS[request.param]


def make(rows=9, d_model=24, vocab=301, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, d_model, generator=generator).to(dtype)
    unembedding = torch.randn(vocab, d_model, generator=generator).to(dtype)
    return hidden, unembedding, torch.randint(0, vocab, (rows,), generator=generator)


def assert_same(stats: LensStats, other: LensStats):
    """Equal ids; numbers equal up to the order of additions, which a matrix product chooses by layout."""
    for name in FIELDS:
        torch.testing.assert_close(getattr(stats, name), getattr(other, name), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
def test_no_rows(way, shape):
    stats = fused_lens(torch.empty(*shape, 8), torch.randn(50, 8), LayerNorm(None), targets=7, **way)
    assert all(getattr(stats, name).shape == shape for name in FIELDS)
    assert fused_lens(torch.empty(*shape, 8), torch.randn(50, 8), **way).target_rank is None


# One row, one column, one dimension; fewer tokens than any tile; sizes one off a vector, a panel and a tile.
@pytest.mark.parametrize(
    "rows, d_model, vocab", [(1, 1, 1), (1, 5, 2), (3, 1, 4), (17, 33, 15), (13, 7, 129), (2, 65, 513)]
)
def test_small_sizes(way, rows, d_model, vocab):
    hidden, unembedding, targets = make(rows, d_model, vocab)
    stats = fused_lens(hidden, unembedding, LayerNorm(None), targets, **way)
    exact = truth(hidden, unembedding, LayerNorm(None), targets)
    assert_matches_truth(
        stats, exact, truth(hidden, unembedding, LayerNorm(None), targets, dtype=torch.float32), targets
    )
    if vocab == 1:
        assert stats.entropy.abs().max() < 1e-30 and stats.target_logprob.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_and_storage_do_not_matter(way, dtype):
    hidden, unembedding, targets = make(dtype=dtype)
    plain = fused_lens(hidden, unembedding, None, targets, **way)

    def transposed(t):
        return t.T.contiguous().T

    def every_second(t):
        wide = t.new_full((2 * t.shape[0], 3 * t.shape[1]), float("nan"))
        wide[::2, ::3] = t
        return wide[::2, ::3]

    def misaligned(t):
        storage = t.new_empty(t.numel() + 1)
        storage[1:] = t.flatten()
        return storage[1:].view(t.shape)

    for view in (transposed, every_second, misaligned):
        assert_same(fused_lens(view(hidden), view(unembedding), None, targets, **way), plain)
        odd_targets = torch.stack([targets, targets + 1], 1)[:, 0]
        assert_same(fused_lens(view(hidden), unembedding, None, odd_targets, **way), plain)


def test_expanded_inputs(way):
    hidden, unembedding, targets = make(1, 16, 40)
    one = fused_lens(hidden, unembedding, None, targets, **way)
    many = fused_lens(hidden.expand(700, 16), unembedding, None, targets.expand(700), **way)
    assert_same(many, LensStats(*(getattr(one, name).expand(700) for name in FIELDS)))
    whole = hidden.round()  # products of small integers are exact in any order
    same = fused_lens(whole, unembedding[:1].round().expand(40, 16), None, torch.tensor([39]), **way)
    assert (int(same.argmax), int(same.target_rank)) == (0, 39)  # forty equal logits: ties by id


@pytest.mark.slow
@pytest.mark.parametrize("way", ["cpp", "reference"], indirect=True)  # minutes of packing otherwise
def test_more_numbers_in_hidden_than_an_int32_counts(way):
    d_model = 4096
    rows = 2**31 // d_model + 3
    hidden, unembedding, _ = make(1, d_model, 3)
    stats = fused_lens(hidden.expand(rows, d_model), unembedding, targets=1, **way)
    one = fused_lens(hidden, unembedding, targets=1, **way)
    assert_same(stats, LensStats(*(getattr(one, name).expand(rows) for name in FIELDS)))


def test_offsets_beyond_an_int32(way):
    """Rows that lie 2^31 numbers apart; pages between them are never touched."""
    hidden, unembedding, targets = make(2, 8, 3)
    far = torch.empty(2 * 2**31 + 8)

    def spread(t):
        view = far.as_strided(t.shape, (2**31, 1))
        view.copy_(t)
        return view

    expected = fused_lens(hidden, unembedding, None, targets, **way)
    assert_same(fused_lens(spread(hidden), unembedding, None, targets, **way), expected)
    assert_same(fused_lens(hidden, spread(unembedding), None, targets, **way), expected)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_hidden_rows_are_counted_and_named(way, value):
    hidden, unembedding, targets = make()
    hidden[4, 0] = hidden[7, 3] = value
    word = "NaN" if value != value else "infinity"
    with pytest.raises(InputError, match=f"got {word} in row 4 of 9.*2 rows are affected"):
        fused_lens(hidden, unembedding, None, targets, **way)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_broken_unembedding_is_not_blamed_on_hidden(way, value):
    hidden, unembedding, targets = make()
    hidden[:, 0] = 1.0 if value != float("-inf") else -1.0  # the product is NaN or +inf in every row
    unembedding[300, 0] = value
    with pytest.raises(InputError, match="hidden row 0 are not finite although the row is"):
        fused_lens(hidden, unembedding, None, targets, **way)


def test_a_logit_of_minus_infinity_is_a_token_that_cannot_occur(way):
    """What IEEE arithmetic gives: probability 0, last rank, no NaN."""
    hidden, unembedding, _ = make()
    hidden[:, 0] = 1.0
    unembedding[5] = 0.0
    unembedding[5, 0] = float("-inf")
    stats = fused_lens(hidden, unembedding, targets=5, **way)
    rest = fused_lens(hidden, torch.cat([unembedding[:5], unembedding[6:]]), **way)
    assert (stats.target_rank == 300).all() and (stats.target_logit == float("-inf")).all()
    off = 1e-5 + screening_error(stats)
    torch.testing.assert_close(stats.logsumexp, rest.logsumexp, rtol=1e-6, atol=off)
    torch.testing.assert_close(stats.entropy, rest.entropy, rtol=1e-6, atol=off)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_bias(way, value):
    hidden, unembedding, targets = make()
    bias = torch.zeros(301)
    bias[300] = value
    with pytest.raises(InputError, match="not finite although the row is"):
        fused_lens(hidden, unembedding, None, targets, bias, **way)


def test_huge_and_tiny_numbers(way):
    """Logits up to 1e30 and down to denormals stay ordered; nothing overflows before the logits do."""
    unembedding = torch.eye(5)
    hidden = torch.tensor([[1e30, 9e29, -1e30, 0.0, 1.0], [1e-40, 2e-40, 0.0, -1e-40, 3e-40]])
    stats = fused_lens(hidden, unembedding, None, torch.tensor([1, 1]), **way)
    assert stats.argmax.tolist() == [0, 4] and stats.target_rank.tolist() == [1, 1]
    assert stats.logsumexp[0] == 1e30 and 0 <= stats.entropy[0] < 1e-30
    torch.testing.assert_close(stats.entropy[1], torch.tensor(5.0).log())


@pytest.mark.medium
def test_calls_from_several_python_threads(way):
    problems = [make(40, 32, 2000, seed=seed) for seed in range(8)]
    alone = [fused_lens(hidden, unembedding, None, targets, **way) for hidden, unembedding, targets in problems]

    def repeat(problem):
        hidden, unembedding, targets = problem
        return [fused_lens(hidden, unembedding, None, targets, **way) for _ in range(10)]

    with ThreadPoolExecutor(8) as pool:
        for expected, results in zip(alone, pool.map(repeat, problems), strict=True):
            for stats in results:
                assert_same(stats, expected)


def test_after_a_fork(way):
    """A child of a process that has used the op on several threads can use it too."""
    hidden, unembedding, targets = make(600, 64, 3000)
    expected = fused_lens(hidden, unembedding, None, targets, **way)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a deadlock must not outlive the test
        torch.set_num_threads(1)  # OpenMP's pool does not survive a fork; PyTorch's own workers do the same
        try:
            assert_same(fused_lens(hidden, unembedding, None, targets, **way), expected)
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs RLIMIT_AS, and to know what is in use")
@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer would end it")
def test_too_little_memory_for_a_thread_is_an_exception():
    """Whichever thread meets it; and the process goes on."""
    done = subprocess.run(
        [sys.executable, "-c", TOO_LITTLE_MEMORY],
        capture_output=True,
        text=True,
        env=os.environ | {"REFINELENS_ISA": "baseline"},  # whose index is the smallest
    )
    assert (done.returncode, done.stdout) == (0, "MemoryError\n[7, 7]\n"), done.stderr
