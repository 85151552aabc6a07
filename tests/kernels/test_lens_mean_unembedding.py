"""The softmax average of the unembedding's rows against whole fp64 distributions, by Triton and in plain torch."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import BF16, DEVICE, DTYPES, EVERY_VERSION, SMALL, operands, poison_buffers, randn, tiles_of
from refinelens.kernels import mean_unembedding, tiles
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.mean_unembedding import mean_unembedding_triton
from refinelens.kernels.mean_unembedding_reference import mean_unembedding_reference
from refinelens.kernels.reference import LensHead, RMSNorm
from refinelens.op.lens_kl import lens_kl

EPS = 2.0**-23
# Of a probability in two numbers of half precision; the interpreter cuts bfloat16 off where a GPU rounds.
ROUNDING = {torch.float32: EPS, torch.float16: 2.0**-22, BF16: 2.0**-16}


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_buffers(monkeypatch)


def whole(x_hat, head):
    """fp64 probabilities, the three results, and by how much fp32 logits may move the averages, [R]."""
    z = head.z(x_hat.double())
    p = z.softmax(-1)
    bias = torch.zeros(head.vocab_size, dtype=torch.float64, device=x_hat.device)
    if head.bias is not None:
        bias = head.bias.double().masked_fill(head.bias == float("-inf"), 0.0)
    mean = p @ head.weight.double()
    # A logit that is off by ``e`` makes its probability off by ``e`` of itself, and moves the average towards its row.
    size = (x_hat.double().abs() @ head.weight.double().abs().T).mul(head.scale).amax(1) + bias.abs().max()
    return p, mean, p @ bias, z.logsumexp(-1), 8 * EPS * (1 + size)


def check(x_hat, head, found):
    p, mean, mean_bias, logsumexp, error = whole(x_hat, head)
    step = (error + 2 * ROUNDING[x_hat.dtype])[:, None]
    # Each average within that share of the mean distance of its rows from 0.
    assert ((found[0] - mean).abs() <= step * (p @ head.weight.double().abs()) + 1e-30).all()
    spread = head.bias.double().nan_to_num(neginf=0.0).abs().max() if head.bias is not None else 0.0
    assert ((found[1] - mean_bias).abs() <= step[:, 0] * spread).all()
    assert ((found[2] - logsumexp).abs() <= error + EPS * logsumexp.abs()).all()
    assert [value.dtype for value in found] == [torch.float32] * 3
    assert [value.shape for value in found] == [mean.shape, mean_bias.shape, logsumexp.shape]


SIZES = [
    pytest.param(1, 1, 1, id="all-one"),  # every dimension far below its block
    pytest.param(2, 17, 67, id="prime-width"),  # a width that divides nothing: the unaligned loads
    pytest.param(129, 64, 129, id="one-more-row-and-token"),  # one row and one token more than a block
    pytest.param(3, 65, 257, id="one-more-column"),  # one column more than the padding
]


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows, d_model, n_vocab", SIZES)
def test_agrees_with_whole_distributions(n_rows, d_model, n_vocab, dtype):
    hidden, unembedding, _ = operands(n_rows, d_model, n_vocab, dtype)
    check(hidden, LensHead(unembedding, scale=0.25), mean_unembedding_triton(hidden, LensHead(unembedding, scale=0.25)))


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("version, generation", EVERY_VERSION)
def test_tiles_of_every_version_and_generation(version, generation, dtype, monkeypatch):
    """Of 331 tokens, an odd number of tiles of 32 columns, and of aligned rows."""
    tiles_of(monkeypatch, version, generation)
    hidden, unembedding, _ = operands(2, 64, 331, dtype)
    head = LensHead(unembedding, scale=0.25)
    check(hidden, head, mean_unembedding_triton(hidden, head))


def test_a_width_that_averages_cannot_take_is_refused():
    p = torch.zeros(128, 96, device=DEVICE)
    options = tiles.LensOptions(LensHead(torch.zeros(96, 64, device=DEVICE)), SMALL)
    wide = replace(options, config=replace(SMALL, block_k=64))
    with pytest.raises(ValueError, match="p: expected a multiple of 64 tokens, got 96"):
        mean_unembedding.add_averages(p, torch.zeros(1, 128, 64, device=DEVICE), 0, wide)


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("run", [mean_unembedding_triton, mean_unembedding_reference])
def test_tokens_that_cannot_occur_add_nothing(run, dtype):
    hidden, unembedding, _ = operands(5, 17, 67, dtype)
    bias = randn(67, seed=4)
    bias[:3] = bias[66] = float("-inf")
    head = LensHead(unembedding, RMSNorm(None), bias, scale=0.5)  # the norm is not applied: rows are normed
    found = run(hidden, head)
    check(hidden, head, found)
    given = run(hidden, head, found[2])
    assert all(torch.equal(one, other) for one, other in zip(given, found, strict=True))


def test_a_given_logsumexp_is_not_found_again(monkeypatch):
    hidden, unembedding, _ = operands(5, 17, 67, torch.float32)
    logsumexp = fused_lens_triton(hidden, LensHead(unembedding)).logsumexp
    monkeypatch.setattr(mean_unembedding, "fused_lens_triton", None)
    # Averages are divided by the sum of probabilities: a logsumexp that is off changes nothing.
    found = mean_unembedding_triton(hidden, LensHead(unembedding), logsumexp + 0.5)
    check(hidden, LensHead(unembedding), (*found[:2], logsumexp))


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_truth_in_fp64(dtype):
    hidden, unembedding, _ = operands(7, 17, 67, dtype)
    head = LensHead(unembedding, bias=randn(67, seed=4))
    _, mean, mean_bias, logsumexp, _ = whole(hidden, head)
    found = mean_unembedding_reference(hidden.double(), head)
    for one, other in zip(found, (mean, mean_bias, logsumexp), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    check(hidden, head, mean_unembedding_reference(hidden, head))


@pytest.mark.medium
@pytest.mark.parametrize("scratch", [1, 2**17])  # a tile at a time, and several with a rest; rows in blocks, too
def test_chunks(monkeypatch, scratch):
    hidden, unembedding, _ = operands(150, 33, 400, torch.float16)
    bias = randn(400, seed=4)
    head = LensHead(unembedding, bias=bias, scale=0.25)
    monkeypatch.setattr(mean_unembedding, "SCRATCH_BYTES", scratch)
    check(hidden, head, mean_unembedding_triton(hidden, head))


@pytest.mark.medium
def test_strides_do_not_matter():
    hidden, unembedding, _ = operands(5, 17, 67, torch.float32)
    bias = randn(67, seed=4)
    expected = mean_unembedding_triton(hidden, LensHead(unembedding, bias=bias))

    def every_second(tensor):
        return torch.stack([tensor, torch.full_like(tensor, 99)], -1).flatten(-2)[..., ::2]

    for weight in (every_second(unembedding), unembedding.T.contiguous().T):
        found = mean_unembedding_triton(every_second(hidden), LensHead(weight, bias=every_second(bias)))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("run", [mean_unembedding_triton, mean_unembedding_reference])
def test_no_rows_and_a_softcap(run):
    hidden, unembedding, _ = operands(0, 17, 67, torch.float32)
    assert [value.shape for value in run(hidden, LensHead(unembedding))] == [(0, 17), (0,), (0,)]
    with pytest.raises(ValueError, match=r"softcap: expected None, got 5.0"):
        run(hidden, LensHead(unembedding, softcap=5.0))


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 20.0])
def test_divergence_and_gradient_through_it(dtype, softcap):
    """`lens_kl` of three layers beside one output, with weights of half precision and states of fp32, too."""
    hidden, unembedding, _ = operands(3 * 7, 33, 131, dtype)
    head = LensHead(unembedding / 4, RMSNorm(randn(33, seed=5).float()), randn(131, seed=4), softcap, 0.5)
    states, final = hidden.view(3, 7, 33).float().requires_grad_(), operands(7, 33, 131, dtype)[0].float() - 1

    def gradient(kl, at):
        return torch.autograd.grad(kl.sum(), at)[0]

    found = lens_kl(states, final, head, backend="triton")
    wide = states.detach().double().requires_grad_()
    expected = lens_kl(wide, final.double(), head, backend="reference")
    rounding = 2.0**-7 if dtype == BF16 else 2.0**-10 if dtype == torch.float16 else 1e-5  # of states behind the norm
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=4 * rounding)
    own, true = gradient(found, states).double(), gradient(expected, wide)
    assert float((own - true).abs().max()) <= 4 * rounding * float(true.abs().max())


def test_chunks_are_even():
    assert tiles.even_chunks(10, 4) == 4 and tiles.even_chunks(9, 4) == 3
    assert tiles.even_chunks(3, 0) == 1 and tiles.even_chunks(0, 5) == 1


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device; too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
def test_model_sized(dtype):
    hidden, unembedding, _ = operands(2048 + 3, 768, 50257, dtype)
    head = LensHead(unembedding * 768**-0.5, bias=randn(50257, seed=4))
    check(hidden, head, mean_unembedding_triton(hidden, head))
