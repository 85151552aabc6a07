"""Top-k lists: whole-logit truth, ties, chunk borders."""

import pytest
import torch

import refinelens
from refinelens import LensHead, lens_top_k
from refinelens.bench.measure import torch_threads
from refinelens.errors import InputError
from refinelens.op.vocabulary import MOST_LISTED, fused_lens_top_k
from tiny import skip_unless_isa_runs


def whole(hidden, unembedding, k, bias=None, scale=1.0):
    """The definition: a stable sort of all logits."""
    z = (hidden.double() @ unembedding.double().T + (0.0 if bias is None else bias.double())) * scale
    return z.sort(descending=True, stable=True)


@pytest.mark.parametrize("k", [1, 5, 32, 200])  # the last one in plain torch
@pytest.mark.parametrize("vocab", [32, 97, 20011])  # all of it, a prime, several chunks of 8192 with a rest
def test_agrees_with_sorting_all_logits(k, vocab):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, 2, 33, generator=generator)
    unembedding, bias = torch.randn(vocab, 33, generator=generator), torch.randn(vocab, generator=generator)
    k = min(k, vocab)
    top = lens_top_k(hidden, unembedding, k, bias=bias, softcap=9.0, logit_scale=0.5)
    z, ids = whole(hidden, unembedding, k, bias, 0.5)
    assert top.ids.shape == (7, 2, k)
    assert torch.equal(top.ids, ids[..., :k])
    torch.testing.assert_close(top.logits.double(), 9 * torch.tanh(z[..., :k] / 9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("k", [8, 128, MOST_LISTED + 1])
@pytest.mark.parametrize("seed", range(5))
def test_equal_logits_come_in_order_of_id(seed, k):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randint(-1, 2, (513, 3), generator=generator).float()  # more rows than a block of 512
    unembedding = torch.randint(-1, 2, (4099, 3), generator=generator).float()  # chunks of 2048 tokens, and a rest
    ids = whole(hidden, unembedding, k)[1][:, :k]
    assert torch.equal(lens_top_k(hidden, unembedding, k).ids, ids)


@pytest.mark.parametrize("name", ["baseline", "v3", "v4"])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_kernel_and_any_threads_list_the_same(monkeypatch, name, threads):
    """Small whole numbers, whose products are exact: many equal logits, tokens that cannot occur, more than a range."""
    monkeypatch.setenv("REFINELENS_ISA", name)
    skip_unless_isa_runs()
    generator = torch.Generator().manual_seed(threads)
    hidden = torch.randint(-2, 3, (401, 16), generator=generator).float()
    unembedding = torch.randint(-2, 3, (9001, 16), generator=generator).float()
    bias = torch.where(torch.rand(9001, generator=generator) < 0.2, float("-inf"), 0.0)
    stats, top = fused_lens_top_k(hidden, LensHead(unembedding, bias=bias), 100, targets=7)
    with torch_threads(threads):
        same, again = fused_lens_top_k(hidden, LensHead(unembedding, bias=bias), 100, targets=7)
    assert torch.equal(top.ids, again.ids) and torch.equal(top.logits, again.logits)
    assert torch.equal(top.ids, whole(hidden, unembedding, 100, bias)[1][:, :100])
    assert torch.equal(top.ids[:, 0], stats.argmax) and torch.equal(same.target_rank, stats.target_rank)
    alone = refinelens.fused_lens(hidden, unembedding, bias=bias, precision="fp32")
    assert torch.equal(stats.logsumexp, alone.logsumexp)


def test_a_list_of_tokens_that_mostly_cannot_occur():
    """Those of probability 0 come last, in the order of ids."""
    bias = torch.full((50,), float("-inf"))
    bias[[7, 31]] = 0.0
    top = lens_top_k(torch.ones(1, 4), torch.zeros(50, 4), 6, bias=bias)
    assert top.ids.tolist() == [[7, 31, 0, 1, 2, 3]]
    assert top.logits.tolist() == [[0.0, 0.0] + [float("-inf")] * 4]


def test_first_of_the_list_is_the_argmax_of_the_op():
    hidden, unembedding = torch.randn(40, 16), torch.randn(500, 16)
    norm = refinelens.RMSNorm(torch.rand(16))
    stats = refinelens.fused_lens(hidden, unembedding, norm)
    top = lens_top_k(hidden, unembedding, 3, norm)
    assert torch.equal(top.ids[:, 0], stats.argmax)
    for place in range(3):
        ranks = refinelens.fused_lens(hidden, unembedding, norm, top.ids[:, place]).target_rank
        assert (ranks == place).all()


def test_no_rows():
    assert lens_top_k(torch.empty(0, 4), torch.randn(9, 4), 2).ids.shape == (0, 2)


@pytest.mark.parametrize("k", [0, 10])
def test_k_outside_the_vocabulary(k):
    with pytest.raises(InputError, match=f"k: expected 1 to 9.*got {k}"):
        lens_top_k(torch.randn(2, 4), torch.randn(9, 4), k)


def test_a_broken_row_is_named():
    hidden = torch.randn(3, 4)
    hidden[1, 2] = float("nan")
    with pytest.raises(InputError, match="(?i)nan in row 1"):
        lens_top_k(hidden, torch.randn(9, 4), 2)
