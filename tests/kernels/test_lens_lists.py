"""Lists of the likeliest tokens by Triton against a stable sort of all fp64 logits."""

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import BF16, DEVICE, DTYPES, NORMS, SMALL, operands, poison_buffers, randint, randn
from refinelens import fused_lens, lens_top_k
from refinelens.errors import InputError
from refinelens.kernels import fused_more, lists
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.fused_more import fused_lens_more_triton
from refinelens.kernels.lists import choose_groups
from refinelens.kernels.lists_reference import MOST_LISTED
from refinelens.kernels.reference import LensHead, LensStats
from refinelens.op import gpu
from refinelens.op.vocabulary import fused_lens_top_k, fused_lens_with

MEDIUM = pytest.mark.medium


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_buffers(monkeypatch)


def whole_numbers(n_rows, n_vocab, dtype=torch.float32, width=3):
    """Products are exact: many equal logits, equal bits on every backend."""
    return randint(-1, 2, (n_rows, width), seed=1).to(dtype), randint(-1, 2, (n_vocab, width), seed=2).to(dtype)


def sorted_logits(hidden, head):
    return head.z(hidden.double()).sort(descending=True, stable=True)


def check(hidden, head, k, **options):
    """Lists alone and beside statistics are those of the definition."""
    z, ids = sorted_logits(hidden, head)
    _, _, _, *alone = fused_lens_more_triton(hidden, head, None, k, with_stats=False, **options)
    stats, _, _, *beside = fused_lens_more_triton(hidden, head, None, k, **options)
    assert torch.equal(alone[0], beside[0]) and torch.equal(alone[1], beside[1])
    assert alone[1].dtype == torch.int64 and torch.equal(alone[1], ids[:, :k])
    torch.testing.assert_close(alone[0].double(), z[:, :k], rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.argmax, ids[:, 0])
    if DEVICE == "cpu" or hidden.dtype != torch.float32:  # whose products of lists add up in another order on a GPU
        assert torch.equal(stats.max_logit, alone[0][:, 0])
    return stats


@MEDIUM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "n_rows, d_model, n_vocab, k",
    [
        (1, 1, 1, 1),  # every dimension far below its block
        (2, 17, 67, 10),  # nothing divides anything, a last group of three tokens
        (65, 64, 257, 1),  # one row and one token more than a block
    ],
)
def test_sizes(n_rows, d_model, n_vocab, k, dtype):
    hidden, unembedding, _ = operands(n_rows, d_model, n_vocab, dtype)
    check(hidden, LensHead(unembedding), k)


@MEDIUM
@pytest.mark.parametrize("k", [1, 10, MOST_LISTED])
@pytest.mark.parametrize("n_vocab", [32, 33, 300])  # all of it, several tiles with a rest
def test_ties_go_to_the_lower_id(n_vocab, k):
    """Most groups have the same largest logit, in which only the order of ids decides."""
    hidden, unembedding = whole_numbers(5, n_vocab, BF16)
    check(hidden, LensHead(unembedding, scale=0.5), k, config=SMALL)


@MEDIUM
def test_all_logits_equal():
    hidden = torch.zeros(3, 17, device=DEVICE)
    check(hidden, LensHead(randn(300, 17, seed=2)), 32, config=SMALL)


@MEDIUM
def test_tokens_that_cannot_occur_come_last():
    hidden, unembedding = whole_numbers(5, 100)
    bias = torch.full((100,), float("-inf"), device=DEVICE)
    bias[[7, 31, 96]] = 0.0
    head = LensHead(unembedding, bias=bias)
    stats = check(hidden, head, 12, config=SMALL)
    assert torch.equal(stats.logsumexp, fused_lens_triton(hidden, head, config=SMALL).logsumexp)


@MEDIUM
@pytest.mark.parametrize("n_groups", [1, 127, 129, 5000])
def test_groups_are_the_first_by_maximum(n_groups):
    """In fewer groups than segments, and in many to a segment; infinities and either zero."""
    maxima = randint(-3, 4, (4, n_groups + 5), seed=3).float()
    maxima[1] *= torch.where(randint(0, 2, (n_groups + 5,), seed=4) == 0, 1.0, float("inf")).nan_to_num(1e30)
    maxima[2] = -0.0
    maxima[2, ::3] = 0.0
    maxima[3] = float("-inf")
    maxima[:, n_groups:] = 99.0  # of no group
    k = min(n_groups, 32)
    expected = maxima[:, :n_groups].sort(descending=True, stable=True).indices[:, :k]
    assert torch.equal(choose_groups(maxima, 4, n_groups, k).long(), expected)


@MEDIUM
def test_chunks_of_rows(monkeypatch):
    """A row block at a time."""
    hidden, unembedding = whole_numbers(67, 33)
    monkeypatch.setattr(fused_more, "SCRATCH_BYTES", 1)
    check(hidden, LensHead(unembedding), 1, config=SMALL)


@pytest.mark.parametrize("n_vocab", [1, 50257, 128256, 262144])
def test_maxima_take_bounded_memory(n_vocab):
    head = LensHead(torch.zeros(1, 64).expand(n_vocab, -1))
    rows = fused_more._rows_at_a_time(10**6, torch.zeros(1, 64), head, 128, 10)
    assert rows >= 128 and 4 * rows * -(-n_vocab // lists.GROUP) <= 32 * 2**20


@MEDIUM
def test_strides_and_norms():
    hidden, unembedding, _ = operands(5, 17, 67, torch.float32)
    bias = randn(67, seed=4)
    expected = lens_top_k(hidden, unembedding, 9, NORMS["layer"](17), bias, 7.0, 0.5, backend="triton")
    apart = torch.stack([unembedding, torch.full_like(unembedding, 99)], -1).flatten(-2)[..., ::2]
    for weight in (apart, unembedding.T.contiguous().T):
        found = lens_top_k(hidden.T.contiguous().T, weight, 9, NORMS["layer"](17), bias, 7.0, 0.5, backend="triton")
        assert torch.equal(found.ids, expected.ids) and torch.equal(found.logits, expected.logits)
    plain = lens_top_k(hidden, unembedding, 9, NORMS["layer"](17), bias, 7.0, 0.5, backend="reference")
    assert torch.equal(plain.ids, expected.ids)
    torch.testing.assert_close(plain.logits, expected.logits, rtol=1e-5, atol=1e-5)


@MEDIUM
def test_place_in_the_list_is_the_rank():
    hidden, unembedding = whole_numbers(7, 67, BF16)
    stats, top = fused_lens_top_k(hidden.view(1, 7, 3), LensHead(unembedding), 6, backend="triton")
    assert torch.equal(top.ids[..., 0], stats.argmax) and torch.equal(top.logits[..., 0], stats.max_logit)
    for place in range(6):
        own = fused_lens(hidden, unembedding, targets=top.ids[0, :, place], backend="triton")
        assert (own.target_rank == place).all()
        assert torch.equal(own.target_logit, top.logits[0, :, place])  # of whole numbers


@MEDIUM
def test_longer_lists_are_those_of_plain_torch():
    hidden, unembedding, ids = operands(3, 17, 67, torch.float32)
    stats, several, top = fused_lens_with(hidden, LensHead(unembedding), ids, ids[:, None], 40, backend="triton")
    assert torch.equal(top.ids, sorted_logits(hidden, LensHead(unembedding)).indices[:, :40])
    assert torch.equal(several.rank[:, 0], stats.target_rank)


def test_a_list_begins_with_the_argmax_whatever_bits_it_was_given():
    stats = LensStats(torch.tensor([4, 7, 1]), *torch.tensor([[3.0, 2.0, 5.0]] * 3))
    ids = torch.tensor([[4, 2, 0], [3, 7, 9], [8, 6, 5]])
    logits = torch.tensor([[3.0, 2.5, 1.0], [2.5, 2.0, 1.0], [5.5, 4.0, 3.0]])
    for check_values in (True, False):
        found, values = gpu.argmax_first(ids, logits, stats, check_values)
        assert found.tolist() == [[4, 2, 0], [7, 3, 9], [1, 8, 6]]
        assert values.tolist() == [[3.0, 2.5, 1.0], [2.0, 2.0, 1.0], [5.0, 5.0, 4.0]]
    same = gpu.argmax_first(ids[:1], logits[:1], stats.map(lambda value: value[:1]), True)
    assert same[0].data_ptr() == ids.data_ptr()  # as it was: nothing to do


@MEDIUM
@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value encountered")
@pytest.mark.parametrize("broken", ["hidden", "weight"])
def test_what_is_not_finite_is_refused(broken):
    hidden, unembedding, _ = operands(3, 17, 67, torch.float32)
    (hidden if broken == "hidden" else unembedding)[1, 2] = float("nan")
    with pytest.raises(InputError, match="(?i)nan"):
        lens_top_k(hidden, unembedding, 2, backend="triton")
    with pytest.raises(InputError, match="(?i)nan|not finite"):
        fused_lens_top_k(hidden, LensHead(unembedding), 2, backend="triton")


def test_no_rows():
    assert lens_top_k(torch.empty(0, 4, device=DEVICE), randn(9, 4, seed=1), 2, backend="triton").ids.shape == (0, 2)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device; too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [10, 32])
def test_model_sized(k, dtype):
    """Beside the main kernel of the lens: its argmax, and ranks that are places, which needs equal bits."""
    hidden, unembedding, _ = operands(1024 + 3, 768, 50257, dtype)
    head = LensHead(unembedding * 768**-0.5)
    stats, top = fused_lens_top_k(hidden, head, k)
    assert torch.equal(top.ids[:, 0], stats.argmax)
    assert (lens_top_k(hidden, head, k).ids == top.ids).float().mean() > 0.999
    assert (top.logits.diff(dim=1) <= 0).all()
    z = sorted_logits(hidden, head)[0]
    torch.testing.assert_close(top.logits.double(), z[:, :k], rtol=1e-5, atol=1e-4)
    ranks = fused_lens(hidden, head, targets=top.ids[:, k - 1]).target_rank
    assert (ranks == k - 1).float().mean() > 0.99  # equal bits of two kernels; rounding may part some without them


def test_groups_hold_the_first_tokens():
    """The lemma: a token among the first k lies in one of the first k groups, with ties of every kind."""
    logits = randint(0, 3, (200, 96), seed=7)
    order = logits.sort(descending=True, stable=True).indices
    groups = logits.view(200, -1, lists.GROUP).amax(2).sort(descending=True, stable=True).indices
    for k in (1, 3, 10):
        assert all(set((order[i, :k] // lists.GROUP).tolist()) <= set(groups[i, :k].tolist()) for i in range(200))
