"""Ties, values that are not finite, strides and chunks: where the Triton lens could go wrong unseen."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import (
    BF16,
    DEVICE,
    DTYPES,
    FEW_ROWS,
    NORMS,
    SMALL,
    TMA,
    check,
    operands,
    poison_buffers,
    randint,
    randn,
)  # fmt: skip
from refinelens.kernels import config
from refinelens.kernels.config import LensOptions
from refinelens.kernels.fused_lens import fused_lens_triton, reduce_rows
from refinelens.kernels.kernel import LensRows, RowStats
from refinelens.kernels.launches import forget_plans
from refinelens.kernels.norm_kernel import normed_rows
from refinelens.kernels.reference import LensHead, RMSNorm, fused_lens_reference


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_buffers(monkeypatch)


# Every kind with one split and with more than there are tiles, which is the same in every dtype.
@pytest.mark.parametrize(
    "config, dtype, splits, same_bits",
    [
        *((config, BF16, 5, same_bits) for config in (SMALL, FEW_ROWS, TMA) for same_bits in (True, False)),
        *((config, BF16, 1, True) for config in (SMALL, FEW_ROWS, TMA)),
        *((SMALL, dtype, 5, True) for dtype in DTYPES if dtype != BF16),
        *(pytest.param(config, BF16, 1, False, marks=pytest.mark.slow) for config in (SMALL, FEW_ROWS, TMA)),
        *(pytest.param(SMALL, dtype, 5, False, marks=pytest.mark.slow) for dtype in DTYPES if dtype != BF16),
        *(
            pytest.param(SMALL, dtype, 1, same_bits, marks=pytest.mark.slow)
            for dtype in DTYPES
            for same_bits in (True, False)
            if dtype != BF16
        ),
    ],
)
@pytest.mark.medium
def test_ties_rank_all_tokens_as_a_permutation(config, dtype, same_bits, splits):
    # Small integers: sums are exact in fp32, so equal logits are equal bits on every backend.
    n_vocab = 70
    unembedding = randint(-2, 3, (n_vocab, 16), seed=5).to(dtype)
    unembedding[40:60] = unembedding[5:25]
    hidden = randint(-2, 3, (1, 16), seed=6).to(dtype).expand(n_vocab, -1)
    targets = torch.arange(n_vocab, device=DEVICE)
    config = replace(config, splits=splits)
    out = fused_lens_triton(hidden, LensHead(unembedding), targets, config=config, same_bits=same_bits)
    truth = fused_lens_reference(hidden, LensHead(unembedding), targets, dtype=torch.float64)
    for name in ("argmax", "target_rank", "max_logit", "target_logit"):
        assert torch.equal(getattr(out, name).double(), getattr(truth, name).double()), name
    assert torch.equal(out.target_rank.sort().values, targets)
    assert torch.equal(out.target_rank == 0, out.argmax == targets)


def test_all_logits_equal():
    targets = torch.tensor([0, 1, 31, 32, 66], device=DEVICE)  # first, own tile, tile border, last
    hidden = torch.zeros(5, 17, device=DEVICE)
    out = fused_lens_triton(hidden, LensHead(randn(67, 17, seed=2)), targets, config=SMALL)
    assert out.argmax.tolist() == [0] * 5
    assert torch.equal(out.target_rank, targets)
    log_v = torch.full((5,), 67.0, device=DEVICE).log()
    torch.testing.assert_close(out.entropy, log_v)
    torch.testing.assert_close(out.logsumexp, log_v)


def test_peak_that_rises_in_every_tile():
    # Every tile, and every split, has to move the sums of the ones before it.
    hidden, unembedding, targets = operands(3, 17, 200, torch.float32)
    unembedding = unembedding.abs() * torch.arange(200, device=DEVICE)[:, None] / 20
    _, left_open = check(hidden.abs(), unembedding, targets=targets)
    assert left_open == 0


@pytest.mark.parametrize("splits", [1, 3])
def test_tokens_that_cannot_occur(splits):
    # A bias of -inf, here on a whole tile and the last token, takes a token out of the sums. The others
    # lie so low that the sums of the first tile, still 0, must not be scaled up to them.
    hidden, unembedding, _ = operands(3, 17, 70, torch.float32)
    bias = torch.full((70,), -300.0, device=DEVICE)
    bias[:32] = bias[69] = float("-inf")
    targets = torch.tensor([40, 0, 69], device=DEVICE)
    config = replace(SMALL, splits=splits)
    out = fused_lens_triton(hidden, LensHead(unembedding, bias=bias), targets, config=config)
    kept = fused_lens_reference(hidden, LensHead(unembedding[32:69], bias=bias[32:69]), dtype=torch.float64)
    assert torch.equal(out.argmax, kept.argmax + 32)
    torch.testing.assert_close(out.logsumexp.double(), kept.logsumexp, rtol=2**-22, atol=0)
    step = 300 * 2**-23  # of a logit in fp32
    torch.testing.assert_close(out.entropy.double(), kept.entropy, rtol=0, atol=2 * step)
    assert out.target_rank[1:].tolist() == [37, 69]  # the 37 tokens that can occur, then ids in order


def test_target_never_beats_itself():
    # Another order of summation may put the target's own product below its column of the main product.
    n_vocab = 70
    hidden = torch.ones(n_vocab, 16, device=DEVICE)
    unembedding = randint(0, n_vocab, (n_vocab, 1), seed=5) * torch.eye(16, device=DEVICE)[0]
    targets = torch.arange(n_vocab, device=DEVICE)
    z = unembedding[:, 0]
    options = LensOptions(LensHead(unembedding), SMALL, has_targets=True, same_bits=False)
    rows = LensRows(normed_rows(hidden, None, 64), targets, z - 0.5, n_vocab)
    out = RowStats.empty(n_vocab, DEVICE)
    reduce_rows(rows, out, options)
    above = (z[None] > z[:, None] - 0.5).sum(1) - 1  # all that reach the lowered logit but the target itself
    is_top = out.argmax == targets
    assert is_top.sum() == 1
    assert torch.equal(out.rank[~is_top], above[~is_top].clamp(min=1))


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_stays_in_its_row():
    hidden, unembedding, targets = operands(35, 17, 67, torch.float32)
    clean = fused_lens_triton(hidden, LensHead(unembedding, NORMS["rms"](17)), targets, config=SMALL)
    hidden[3, 5] = float("nan")
    out = fused_lens_triton(hidden, LensHead(unembedding, NORMS["rms"](17)), targets, config=SMALL)
    assert out.logsumexp.isnan().nonzero().tolist() == [[3]]
    assert 0 <= out.argmax[3] < 67
    others = torch.arange(35, device=DEVICE) != 3
    for (_, got), (_, expected) in zip(out.items(), clean.items(), strict=True):
        assert torch.equal(got[others], expected[others])


def test_nan_in_the_unembedding_reaches_every_row():
    hidden, unembedding, targets = operands(3, 17, 67, torch.float32)
    unembedding[66, 0] = float("nan")
    out = fused_lens_triton(hidden, LensHead(unembedding), targets, config=SMALL)
    assert out.logsumexp.isnan().all()


@pytest.mark.medium
def test_strides_do_not_matter():
    _, unembedding, targets = operands(5, 17, 67, torch.float32)
    hidden = randint(-4, 5, (5, 17), seed=1).float()  # exact squares: their order is the compiler's choice
    weight, bias = NORMS["layer"](17).weight, randn(67, seed=4)
    expected = fused_lens_triton(hidden, LensHead(unembedding, RMSNorm(weight), bias), targets, config=SMALL)

    def every_second(tensor):
        return torch.stack([tensor, torch.full_like(tensor, 99)], -1).flatten(-2)[..., ::2]

    head = LensHead(every_second(unembedding), RMSNorm(every_second(weight)), every_second(bias))
    got = fused_lens_triton(hidden.T.contiguous().T, head, every_second(targets), config=SMALL)
    head = LensHead(unembedding.T.contiguous().T, RMSNorm(weight), bias)
    transposed = fused_lens_triton(hidden.repeat(2, 1)[:5], head, targets, config=SMALL)
    for name, value in expected.items():
        assert torch.equal(getattr(got, name), value), name
        assert torch.equal(getattr(transposed, name), value), name


def test_one_target_for_all_rows_without_a_copy():
    hidden, unembedding, _ = operands(5, 17, 67, torch.float32)
    targets = torch.tensor([41], device=DEVICE).expand(5)
    assert check(hidden, unembedding, targets=targets)[1] == 0


@pytest.mark.medium
def test_chunks_of_rows_give_the_same_bits(monkeypatch):
    hidden, unembedding, targets = operands(70, 17, 67, torch.float32)
    whole = fused_lens_triton(hidden, LensHead(unembedding), targets, config=SMALL)
    monkeypatch.setattr(config, "X_HAT_BYTES", 1)  # one row block at a time
    forget_plans()
    chunked = fused_lens_triton(hidden, LensHead(unembedding), targets, config=SMALL)
    for (_, got), (_, expected) in zip(chunked.items(), whole.items(), strict=True):
        assert torch.equal(got, expected)


def test_target_outside_the_vocabulary_is_not_read():
    hidden, unembedding, targets = operands(3, 17, 67, torch.float32)
    expected = fused_lens_triton(hidden, LensHead(unembedding), targets, config=SMALL)
    targets[1] = 2**40
    out = fused_lens_triton(hidden, LensHead(unembedding), targets, config=SMALL)
    assert out.target_rank[[0, 2]].tolist() == expected.target_rank[[0, 2]].tolist()
    assert out.target_logit.isnan().tolist() == [False, True, False]


def whole_operands(n_vocab):
    """Small integers: a target's logit then has the bits of its column, as the kernel by TMA is told below."""
    hidden, unembedding = (randint(-2, 3, (rows, 80), seed=rows).to(BF16) for rows in (35, n_vocab))
    return hidden, unembedding, randint(0, n_vocab, (35,), seed=3)


def by_tma(hidden, unembedding, targets, splits=TMA.splits):
    return fused_lens_triton(
        hidden, LensHead(unembedding), targets, config=replace(TMA, splits=splits), same_bits=targets is not None
    )


# No whole tile, exactly one, one and one token more, several and a rest; more splits than tiles with the first ones.
@pytest.mark.parametrize("n_vocab", [31, 32, 33, 70])
@pytest.mark.medium
def test_tma_with_targets(n_vocab):
    hidden, unembedding, targets = whole_operands(n_vocab)
    targets[:3] = torch.tensor([0, n_vocab - 1, n_vocab - 1])  # the last ones lie in the rest
    truth = fused_lens_reference(hidden, LensHead(unembedding), targets, dtype=torch.float64)
    for splits in (1, 3):
        out = by_tma(hidden, unembedding, targets, splits)
        plain = by_tma(hidden, unembedding, None, splits)
        for name in ("argmax", "target_rank", "max_logit", "target_logit"):
            assert torch.equal(getattr(out, name).double(), getattr(truth, name).double()), name
        assert torch.equal(out.argmax, plain.argmax) and torch.equal(out.logsumexp, plain.logsumexp)
        torch.testing.assert_close(out.logsumexp.double(), truth.logsumexp, rtol=1e-6, atol=1e-6)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at NaN
def test_tma_keeps_what_is_wrong_in_its_row():
    hidden, unembedding, targets = whole_operands(70)
    clean = by_tma(hidden, unembedding, targets)
    hidden[3, 5] = float("nan")
    targets[7], targets[8] = 2**40, -1
    out = by_tma(hidden, unembedding, targets)
    assert out.logsumexp.isnan().nonzero().tolist() == [[3]] and 0 <= out.argmax[3] < 70
    assert out.target_logit.isnan().nonzero()[:, 0].tolist() == [3, 7, 8]
    others = torch.tensor([row not in (3, 7, 8) for row in range(35)], device=DEVICE)
    for (_, got), (_, expected) in zip(out.items(), clean.items(), strict=True):
        assert torch.equal(got[others], expected[others])
    assert torch.equal(out.argmax[7:9], clean.argmax[7:9]) and torch.equal(out.entropy[7:9], clean.entropy[7:9])
