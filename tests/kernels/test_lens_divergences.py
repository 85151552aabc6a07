"""Divergences from the last layer by Triton against whole fp64 distributions of the same rounded states."""

import math

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import BF16, DEVICE, DTYPES, NORMS, poison_buffers, randn
from refinelens import fused_lens, jsd_to_final, kl_to_final
from refinelens.kernels import divergences
from refinelens.kernels.reference import LensHead, apply_norm, soft_cap

OPTIONS = {
    "plain": dict(),
    "all-linear": dict(bias=True, scale=0.5),
    "softcap": dict(softcap=5.0),
    "all": dict(bias=True, softcap=5.0, scale=0.5),
}


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_buffers(monkeypatch)


def problem(n_layers, n_positions, d_model, n_vocab, dtype, norm="none", bias=False, **options):
    """Neighbouring layers resemble each other, as in a model: the last ones are close to the final one."""
    steps = randn(n_layers, n_positions, d_model, seed=1) / torch.arange(1.0, n_layers + 1).to(DEVICE)[:, None, None]
    hidden = steps.cumsum(0).to(dtype)
    values = randn(n_vocab, seed=4) if bias else None
    return hidden, LensHead(randn(n_vocab, d_model, seed=2, dtype=dtype), NORMS[norm](d_model), values, **options)


def exact(hidden, head, last_is_normed=False):
    """fp64 logits, KL and Jensen-Shannon divergence; the normed states are rounded once, as the kernels round them."""
    x_hat = apply_norm(hidden, head.norm)
    if last_is_normed:
        x_hat[-1] = hidden[-1].float()
    logits = soft_cap(head.z(x_hat.to(hidden.dtype).double().flatten(0, 1)), head.softcap).view(*hidden.shape[:2], -1)
    log_p = logits.log_softmax(-1)
    p, q = log_p.exp(), log_p[-1].exp()
    kl = (q * (log_p[-1] - log_p).nan_to_num(0.0)).sum(-1)
    mean = (p + q) / 2
    jsd = (torch.xlogy(p, p / mean) + torch.xlogy(q, q / mean)).nan_to_num(0.0).sum(-1) / 2
    return logits, kl, jsd


def check(hidden, head, last_is_normed=False):
    logits, kl, jsd = exact(hidden, head, last_is_normed)
    parts = [(hidden, head)]
    if last_is_normed:
        parts = [(hidden[:-1], head), (hidden[-1:], LensHead(head.weight, None, head.bias, head.softcap, head.scale))]
    stats = [fused_lens(states, own, backend="triton") for states, own in parts]
    stats = stats[0] if len(stats) == 1 else type(stats[0]).cat(stats)
    options = dict(last_is_normed=last_is_normed, backend="triton")
    size = 1 + logits[logits.isfinite()].abs().max().item()
    # Probabilities of bfloat16 have 17 bits, 16 in the interpreter, and weigh differences of logits.
    slack = (2.0**-18 if hidden.dtype == BF16 else 0.0) * size * 4 + 40 * 2.0**-23 * size
    got = kl_to_final(hidden, stats, head, **options)
    assert (got - kl).abs().max() <= slack and (got >= 0).all() and (got[-1] == 0).all()
    got = jsd_to_final(hidden, stats, head, **options)
    assert (got - jsd).abs().max() <= 40 * 2.0**-23 * size
    assert (got >= 0).all() and (got <= math.log(2)).all() and (got[-1] == 0).all()
    return kl, jsd


@pytest.mark.medium
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [BF16, *(pytest.param(d, marks=pytest.mark.slow) for d in DTYPES if d != BF16)])
def test_agrees_with_whole_distributions(name, dtype):
    """A prime of rows, a width and a vocabulary that divide nothing."""
    kl, jsd = check(*problem(4, 5, 17, 67, dtype, **OPTIONS[name]))
    assert kl[0].mean() > 0.2 and 0.05 < jsd[0].mean() < 0.69  # the first layer differs: a constant cannot pass


@pytest.mark.parametrize("n_layers, n_positions, n_vocab", [(1, 1, 1), (2, 65, 129), (3, 43, 128)])
@pytest.mark.medium
def test_sizes(n_layers, n_positions, n_vocab):
    """One of each; a row and a token more than a block; layers whose rows end inside one, a whole tile of tokens."""
    for softcap in (None, 5.0):
        check(*problem(n_layers, n_positions, 16, n_vocab, torch.float32, softcap=softcap))


@pytest.mark.medium
@pytest.mark.parametrize("last_is_normed", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_norms(last_is_normed, softcap):
    check(*problem(3, 5, 17, 67, BF16, "layer", bias=True, softcap=softcap), last_is_normed=last_is_normed)


def test_tokens_that_cannot_occur():
    hidden, head = problem(3, 5, 17, 67, torch.float32, bias=True)
    head.bias[::3] = float("-inf")
    check(hidden, head)


def test_distributions_that_share_no_token():
    hidden = torch.tensor([[[40.0]], [[-40.0]]], device=DEVICE)
    head = LensHead(torch.tensor([[3.0], [-3.0]], device=DEVICE))
    stats = fused_lens(hidden, head, backend="triton")
    assert float(jsd_to_final(hidden, stats, head, backend="triton")[0]) == pytest.approx(math.log(2), abs=1e-6)
    assert float(kl_to_final(hidden, stats, head, backend="triton")[0]) == pytest.approx(240, rel=1e-6)


@pytest.mark.medium
def test_chunks_give_the_same(monkeypatch):
    """Of positions, and of the vocabulary."""
    hidden, head = problem(3, 7, 17, 300, torch.float32, bias=True, softcap=5.0)
    whole = [run(hidden, fused_lens(hidden, head), head, backend="triton") for run in (kl_to_final, jsd_to_final)]
    monkeypatch.setattr(divergences, "X_HAT_BYTES", 3 * 3 * 64 * 4)
    monkeypatch.setattr(divergences, "SCRATCH_BYTES", 1)
    parts = [run(hidden, fused_lens(hidden, head), head, backend="triton") for run in (kl_to_final, jsd_to_final)]
    for one, other in zip(parts, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6)


@pytest.mark.medium
def test_strides_and_shapes_do_not_matter():
    hidden, head = problem(3, 6, 17, 67, torch.float32, bias=True, softcap=5.0)
    stats = fused_lens(hidden, head)
    apart = torch.stack([hidden, torch.full_like(hidden, 99)], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1)
    for run in (kl_to_final, jsd_to_final):
        expected = run(hidden, stats, head, backend="triton")
        column_major = LensHead(head.weight.T.contiguous().T, None, head.bias, head.softcap, head.scale)
        assert torch.equal(run(apart, stats, column_major, backend="triton"), expected)
        shaped = stats.map(lambda value: value.view(3, 2, 3))
        assert torch.equal(run(hidden.view(3, 2, 3, 17), shaped, head, backend="triton"), expected.view(3, 2, 3))
        assert run(hidden[:, :0], stats.map(lambda value: value[:, :0]), head, backend="triton").shape == (3, 0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device; too large for the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_model_sized(dtype, softcap):
    hidden, head = problem(5, 131, 768, 50257, dtype, "layer", softcap=softcap, scale=768**-0.5)
    check(hidden, head)
