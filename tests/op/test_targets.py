"""Several targets a row from one product: the fp64 truth, and the bits of each target alone."""

from dataclasses import replace

import pytest
import torch

from refinelens import LayerNorm, LensHead, RMSNorm, fused_lens
from refinelens.bench.measure import torch_threads
from refinelens.errors import InputError
from refinelens.op import cpu, vocabulary
from refinelens.op import fused_lens as op
from refinelens.op.vocabulary import MOST_TARGETS, fused_lens_targets, fused_lens_top_k, fused_lens_with
from tiny import assert_matches_truth, truth

# A block of tokens is 96 or fewer; one of packed rows 768 at a width of 4096; a panel has 8, 16 or 64 rows.
SIZES = [(1, 1, 1), (2, 7, 2), (17, 16, 97), (65, 33, 1031), (70, 300, 20011), (769, 4096, 97)]


def make(rows, d_model, vocab, dtype=torch.float32, n=MOST_TARGETS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, unembedding = (torch.randn(count, d_model, generator=generator).to(dtype) for count in (rows, vocab))
    several = torch.randint(0, vocab, (rows, n), generator=generator)
    several[:, -1] = several[:, 0]  # duplicates
    return hidden, unembedding, several


def assert_each_is_the_target_alone(stats, several, hidden, head, ids, same_sums=True, **options):
    assert torch.equal(several.ids, ids) and several.rank.dtype == torch.int64 and several.logit.dtype == torch.float32
    for i, own in enumerate(ids.unbind(-1)):
        alone = fused_lens(hidden, head, targets=own, **options)
        assert torch.equal(several.rank[..., i], alone.target_rank)
        assert torch.equal(several.logit[..., i], alone.target_logit)
        assert torch.equal(stats.argmax, alone.argmax) and torch.equal(stats.max_logit, alone.max_logit)
        if same_sums:
            assert torch.equal(stats.logsumexp, alone.logsumexp) and torch.equal(stats.entropy, alone.entropy)
            assert torch.equal(several.logprob[..., i], alone.target_logprob)


@pytest.mark.parametrize("rows, d_model, vocab", SIZES)
@pytest.mark.parametrize("n", [1, 2, MOST_TARGETS])
def test_each_has_the_bits_of_the_target_alone(isa, rows, d_model, vocab, n):
    hidden, unembedding, ids = make(rows, d_model, vocab, n=n)
    head = LensHead(unembedding, RMSNorm(torch.rand(d_model)), torch.randn(vocab), softcap=9.0, scale=0.5)
    stats, several = fused_lens_targets(hidden, head, ids)
    assert stats.target_rank is None and stats.target_logit is None
    assert_each_is_the_target_alone(stats, several, hidden, head, ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_agrees_with_fp64(isa, dtype):
    hidden, unembedding, ids = make(70, 48, 4099, dtype)
    norm, bias = LayerNorm(torch.rand(48), torch.randn(48)), torch.randn(4099)
    with torch_threads(3):
        stats, several = fused_lens_targets(hidden, LensHead(unembedding, norm, bias), ids)
    for i, own in enumerate(ids.unbind(-1)):
        exact, same = (truth(hidden, unembedding, norm, own, bias, dtype=d) for d in (torch.float64, torch.float32))
        one = replace(stats, target_logit=several.logit[:, i], target_rank=several.rank[:, i])
        assert_matches_truth(one, exact, same, own)


def test_ties_go_to_the_lower_id(isa):
    """Small whole numbers, whose products are exact: many equal logits, tokens that cannot occur, more than a range."""
    generator = torch.Generator().manual_seed(1)
    hidden, unembedding = (torch.randint(-2, 3, (rows, 16), generator=generator).float() for rows in (35, 9001))
    bias = torch.where(torch.rand(9001, generator=generator) < 0.2, float("-inf"), 0.0)
    ids = torch.randint(0, 9001, (35, MOST_TARGETS), generator=generator)
    z, tokens = hidden @ unembedding.T + bias, torch.arange(9001)
    ids[:, 0] = torch.where(z == z.amax(1, keepdim=True), tokens, 9001).amin(1)
    for threads in (1, 2, 3):
        with torch_threads(threads):
            stats, several = fused_lens_targets(hidden, LensHead(unembedding, bias=bias), ids)
        for i, own in enumerate(ids.T[..., None]):
            beats = (z > z.gather(1, own)) | ((z == z.gather(1, own)) & (tokens < own))
            assert torch.equal(several.rank[:, i], beats.sum(1))
        assert torch.equal(several.rank == 0, ids == stats.argmax[:, None])
        assert not several.rank[:, 0].any()


@pytest.mark.parametrize("k", [0, 5, 200])  # the last one in a product of its own
def test_beside_the_target_of_the_statistics_and_lists(k):
    hidden, unembedding, ids = make(65, 33, 1031)
    targets, head = ids[:, 3], LensHead(unembedding)
    hidden, ids, targets = hidden.view(5, 13, 33), ids.view(5, 13, -1), targets.view(5, 13)
    stats, several, top = fused_lens_with(hidden, head, targets, ids, k)
    assert several.rank.shape == (5, 13, MOST_TARGETS)
    assert_each_is_the_target_alone(stats, several, hidden, head, ids)
    assert torch.equal(stats.target_rank, several.rank[..., 3])
    assert torch.equal(stats.target_logit, several.logit[..., 3])
    assert stats.target_logit.is_contiguous() and stats.target_rank.is_contiguous()
    if k:
        wanted = fused_lens_top_k(hidden, head, k)[1]
        assert torch.equal(top.ids, wanted.ids) and torch.equal(top.logits, wanted.logits)
    else:
        assert top is None


def test_nothing_added_is_the_op():
    hidden, unembedding, ids = make(17, 16, 97)
    stats, several, top = fused_lens_with(hidden, LensHead(unembedding), ids[:, 0])
    assert several is top is None
    assert torch.equal(stats.target_rank, fused_lens(hidden, unembedding, targets=ids[:, 0]).target_rank)


def test_shapes_that_broadcast():
    hidden, unembedding, _ = make(30, 8, 50)
    hidden = hidden.view(3, 10, 8)
    head = LensHead(unembedding)
    for given in ([4, 7], torch.tensor([[4, 7]]), torch.tensor([4, 7], dtype=torch.int32).expand(10, 2)):
        stats, several = fused_lens_targets(hidden, head, given)
        ids = torch.tensor([4, 7]).expand(3, 10, 2)
        assert_each_is_the_target_alone(stats, several, hidden, head, ids)
    row = fused_lens_targets(hidden[0, 0], head, [4, 7], 5)
    assert row[1].rank.shape == (2,) and row[0].target_rank.shape == ()
    assert torch.equal(row[1].rank, fused_lens_targets(hidden, head, [4, 7])[1].rank[0, 0])
    empty = fused_lens_targets(hidden[:, :0], head, [4, 7])[1]
    assert empty.rank.shape == empty.logprob.shape == (3, 0, 2)


def test_through_a_projection():
    hidden, unembedding, ids = make(20, 8, 50)
    head = LensHead(unembedding, LayerNorm(None), projection=torch.randn(8, 8))
    assert_each_is_the_target_alone(*fused_lens_targets(hidden, head, ids), hidden, head, ids)


def test_one_product(monkeypatch):
    """However many targets, C++ is called once."""
    calls = []
    extension = cpu._C.fused_lens
    monkeypatch.setattr(cpu._C, "fused_lens", lambda *given: calls.append(given) or extension(*given))
    hidden, unembedding, ids = make(17, 16, 97)
    fused_lens_with(hidden, LensHead(unembedding), ids[:, 1], ids, 5)
    assert len(calls) == 1


def test_plain_torch_calls_the_op_for_each():
    hidden, unembedding, ids = make(17, 16, 97)
    head = LensHead(unembedding, LayerNorm(None))
    stats, several = fused_lens_targets(hidden, head, ids, ids[:, 2], backend="reference")
    assert_each_is_the_target_alone(stats, several, hidden, head, ids, backend="reference")
    assert torch.equal(stats.target_rank, several.rank[:, 2])
    assert fused_lens_targets(hidden, head, ids, backend="reference")[0].target_rank is None


@pytest.mark.parametrize("k", [0, 200])
def test_where_certified_ranks_are_chosen_each_target_has_them(monkeypatch, k):
    for module in (vocabulary, op):
        monkeypatch.setattr(module, "choose_precision", lambda *_, **__: ("certified", "for this test"))
    hidden, unembedding, ids = make(17, 16, 297, n=3)
    head = LensHead(unembedding)
    stats, several, _ = fused_lens_with(hidden, head, None, ids, k)
    # Its sums have fp64 in place of the target's screened logit.
    assert_each_is_the_target_alone(stats, several, hidden, head, ids, same_sums=False)
    certified = fused_lens(hidden, head, targets=ids[:, 1], precision="certified")
    assert torch.equal(several.rank[:, 1], certified.target_rank)
    torch.testing.assert_close(several.logprob[:, 1], certified.target_logprob, rtol=0, atol=0.05)


@pytest.mark.medium
def test_by_triton():
    """In the interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, unembedding, ids = (tensor.to(device) for tensor in make(5, 16, 40, n=2))
    head = LensHead(unembedding)
    stats, several = fused_lens_targets(hidden, head, ids, backend="triton")
    # On a GPU another kernel adds up in another order.
    assert_each_is_the_target_alone(stats, several, hidden, head, ids, same_sums=device == "cpu", backend="triton")


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize(
    "ids, message",
    [
        (range(9), r"alternatives: expected 1 to 8 ids on the last axis, got \[9\]"),
        ([], r"alternatives: expected integer ids, got torch.float32"),
        (torch.zeros(3, 0).long(), r"alternatives: expected 1 to 8 ids on the last axis, got \[3, 0\]"),
        (4, r"alternatives: expected 1 to 8 ids on the last axis, got \[\]"),
        ([4, 9], "alternatives: expected ids from 0 to 8, got 9 at row 0"),
        ([[0, 1], [2, 3], [4, -1]], "alternatives: expected ids from 0 to 8, got -1 at row 2"),
        ([[0, 1], [2, 3]], r"alternatives: expected a shape that broadcasts to \[3, 2\], got \[2, 2\]"),
        ([0.5], "alternatives: expected integer ids, got torch.float32"),
        (["a"], "alternatives: expected integer ids, got"),
    ],
    ids=str,
)
def test_what_is_refused(backend, ids, message):
    ids = list(ids) if isinstance(ids, range) else ids
    with pytest.raises(InputError, match=message) as refused:
        fused_lens_targets(torch.randn(3, 4), LensHead(torch.randn(9, 4)), ids, backend=backend, check_values=False)
    assert "\n" not in str(refused.value)


def test_a_broken_row_is_named():
    hidden = torch.randn(3, 4)
    hidden[1, 2] = float("nan")
    with pytest.raises(InputError, match="got NaN in row 1"):
        fused_lens_targets(hidden, LensHead(torch.randn(9, 4)), [1, 2])
