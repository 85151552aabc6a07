"""Several targets a row from one product by Triton: the fp64 truth, each target's own bits, ties and ranks of 0."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import (
    BF16,
    DEVICE,
    DTYPES,
    EVERY_VERSION,
    SMALL,
    TMA,
    check_order,
    operands,
    poison_buffers,
    randint,
    randn,
    tiles_of,
)
from refinelens.kernels import config
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.fused_more import fused_lens_more_triton, more_config, targets_match
from refinelens.kernels.reference import LensHead, fused_lens_reference
from refinelens.op.vocabulary import fused_lens_targets

MEDIUM = pytest.mark.medium
PLAIN = replace(TMA, kind="plain")  # as `more_config` makes it of the configuration by TMA


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_buffers(monkeypatch)


def several_of(n_rows, n_vocab, n_targets):
    ids = randint(0, n_vocab, (n_rows, n_targets), seed=9)
    ids[:, -1] = ids[:, 0]  # duplicates
    return ids


def assert_each_is_the_target_alone(hidden, head, ids, **options):
    stats, logit, rank, _, _ = fused_lens_more_triton(hidden, head, ids, 0, **options)
    for i, own in enumerate(ids.unbind(1)):
        alone = fused_lens_triton(hidden, head, own.contiguous(), config=options["config"])
        assert torch.equal(rank[:, i], alone.target_rank) and torch.equal(logit[:, i], alone.target_logit)
        for name in ("argmax", "max_logit", "logsumexp", "entropy"):
            assert torch.equal(getattr(stats, name), getattr(alone, name)), name
        assert torch.equal(rank[:, i] == 0, stats.argmax == own)
    return stats, logit, rank


@MEDIUM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows, d_model, n_vocab, n_targets", [(1, 1, 1, 1), (2, 17, 67, 9), (33, 64, 33, 2)])
def test_sizes(n_rows, d_model, n_vocab, n_targets, dtype):
    """Everything below its block; a prime width, all targets there can be; a row and a token more than a block."""
    hidden, unembedding, _ = operands(n_rows, d_model, n_vocab, dtype)
    ids = several_of(n_rows, n_vocab, n_targets)
    stats, logit, rank = assert_each_is_the_target_alone(hidden, LensHead(unembedding), ids, config=SMALL)
    z = LensHead(unembedding).z(hidden.double())
    error = 16 * 2.0**-23 * z.abs().max().clamp(min=1)
    for i, own in enumerate(ids.unbind(1)):
        truth = fused_lens_reference(hidden, LensHead(unembedding), own, dtype=torch.float64)
        one = replace(stats, target_logit=logit[:, i], target_rank=rank[:, i])
        assert check_order(one, truth, z, own, error) <= 1
        assert (logit[:, i] - truth.target_logit).abs().max() <= error


@MEDIUM
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version, generation", EVERY_VERSION)
def test_tiles_of_every_version_and_generation(version, generation, dtype, monkeypatch):
    tiles_of(monkeypatch, version, generation)
    hidden, unembedding, _ = operands(2, 64, 331, dtype)
    call = (hidden, LensHead(unembedding), several_of(2, 331, 3), 3)
    found, expected = fused_lens_more_triton(*call), fused_lens_more_triton(*call, config=SMALL)
    assert torch.equal(found[0].argmax, expected[0].argmax)
    assert torch.equal(found[2], expected[2]) and torch.equal(found[4], expected[4])
    for name in ("max_logit", "logsumexp", "entropy"):
        torch.testing.assert_close(getattr(found[0], name), getattr(expected[0], name), rtol=1e-5, atol=1e-5)
    for index in (1, 3):
        torch.testing.assert_close(found[index], expected[index], rtol=1e-5, atol=1e-5)


@MEDIUM
@pytest.mark.parametrize("options", [dict(), dict(softcap=5.0), dict(bias=True, softcap=5.0, scale=0.5)])
def test_options(options):
    hidden, unembedding, _ = operands(5, 17, 70, BF16)
    bias = randn(70, seed=4) if options.pop("bias", False) else None
    head = LensHead(unembedding, bias=bias, **options)
    assert_each_is_the_target_alone(hidden, head, several_of(5, 70, 3), config=SMALL)


@MEDIUM
@pytest.mark.parametrize("lists", [0, 3])
@pytest.mark.parametrize("same_bits", [True, False])
@pytest.mark.parametrize("config", [replace(SMALL, splits=5), replace(PLAIN, splits=1)], ids=["5", "1"])
def test_ties_rank_all_tokens_as_a_permutation(config, same_bits, lists):
    """Products are exact; tokens equal others of their own tile, of other tiles, and of the rest of the vocabulary."""
    n_vocab = 70
    unembedding = randint(-2, 3, (n_vocab, 16), seed=5).to(BF16)
    unembedding[40:60] = unembedding[5:25]
    unembedding[66:] = unembedding[3]
    hidden = randint(-2, 3, (1, 16), seed=6).to(BF16).expand(n_vocab, -1)
    every = torch.arange(n_vocab, device=DEVICE)
    ids = torch.stack([every, every.flip(0), every.roll(7)], 1)
    found = fused_lens_more_triton(hidden, LensHead(unembedding), ids, lists, config=config, same_bits=same_bits)
    stats, logit, rank, _, listed = found
    z = hidden.double() @ unembedding.double().T
    own = z.gather(1, ids)[..., None]
    beats = (z[:, None] > own) | ((z[:, None] == own) & (every < ids[..., None]))
    assert torch.equal(rank, beats.sum(-1)) and torch.equal(logit.double(), own[..., 0])
    assert torch.equal(rank[:, 0].sort().values, every)
    assert torch.equal(rank == 0, ids == stats.argmax[:, None])
    assert torch.equal(listed, z.sort(descending=True, stable=True).indices[:, :lists])


@MEDIUM
@pytest.mark.parametrize("same_bits", [True, False])
def test_all_logits_equal(same_bits):
    ids = torch.tensor([[0, 1, 31, 32, 66]], device=DEVICE).expand(3, -1)  # first, own tile, tile border, last
    head = LensHead(randn(67, 17, seed=2))
    hidden = torch.zeros(3, 17, device=DEVICE)
    rank = fused_lens_more_triton(hidden, head, ids, 0, config=PLAIN, same_bits=same_bits)[2]
    assert torch.equal(rank, ids)


@MEDIUM
def test_tokens_that_cannot_occur():
    hidden, unembedding = randint(-2, 3, (5, 16), seed=6).float(), randint(-2, 3, (70, 16), seed=5).float()
    bias = torch.zeros(70, device=DEVICE)
    bias[:32] = bias[69] = float("-inf")
    ids = torch.tensor([[40, 0, 31, 69]], device=DEVICE).expand(5, -1)
    rank = assert_each_is_the_target_alone(hidden, LensHead(unembedding, bias=bias), ids, config=SMALL)[2]
    assert rank[:, 1:].tolist() == [[37, 37 + 31, 69]] * 5  # the 37 tokens that can occur, then ids in order


@MEDIUM
def test_chunks_of_rows_give_the_same_bits(monkeypatch):
    hidden, unembedding, _ = operands(70, 17, 67, torch.float32)
    ids = several_of(70, 67, 2)
    whole = fused_lens_more_triton(hidden, LensHead(unembedding), ids, 0, config=SMALL)
    monkeypatch.setattr(config, "X_HAT_BYTES", 1)  # one row block at a time
    chunked = fused_lens_more_triton(hidden, LensHead(unembedding), ids, 0, config=SMALL)
    for name, value in whole[0].items():
        assert torch.equal(getattr(chunked[0], name), value), name
    assert torch.equal(chunked[1], whole[1]) and torch.equal(chunked[2], whole[2])


def test_a_target_outside_is_not_read():
    hidden, unembedding, _ = operands(3, 17, 67, torch.float32)
    ids = torch.tensor([[5, 67, -1]], device=DEVICE).expand(3, -1)
    head = LensHead(unembedding)
    rank = fused_lens_more_triton(hidden, head, ids, 0, config=SMALL)[2]
    assert torch.equal(rank[:, 0], fused_lens_triton(hidden, head, ids[:, 0], config=SMALL).target_rank)


def test_where_bits_are_not_known_to_be_equal_columns_are_left_out():
    """And with a bias or a scale, whose ties no kernel tells apart."""
    head = LensHead(randn(9, 4, seed=1))
    if DEVICE == "cpu":
        assert not targets_match(head, more_config(head.weight))
    for options in (dict(bias=randn(9, seed=2)), dict(scale=2.0)):
        assert not targets_match(replace(head, **options), more_config(head.weight))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device; too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [dict(), dict(softcap=30.0), dict(scale=0.5)])
def test_model_sized(options, dtype):
    """Against the kernel of one target, which may be another one: equal bits of logits, so that ranks are the same."""
    hidden, unembedding, _ = operands(1024 + 3, 768, 50257, dtype)
    head = LensHead(unembedding * 768**-0.5, **options)
    ids = several_of(1027, 50257, 8)
    stats, several = fused_lens_targets(hidden, head, ids)
    for i, own in enumerate(ids.unbind(1)):
        alone = fused_lens_triton(hidden, head, own.contiguous())
        assert torch.equal(several.rank[:, i], alone.target_rank)
        assert torch.equal(several.logit[:, i], alone.target_logit)
        torch.testing.assert_close(stats.logsumexp, alone.logsumexp, rtol=1e-6, atol=1e-5)
    assert torch.equal(several.rank == 0, ids == stats.argmax[:, None])
