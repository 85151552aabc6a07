"""Divergences from the final layer against whole fp64 distributions."""

import pytest
import torch

from refinelens import LayerNorm, RMSNorm, fused_lens, jsd_to_final, kl_to_final
from refinelens.errors import InputError
from tiny import truth


def problem(n_layers=4, rows=(2, 5), d_model=24, vocab=301, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    # Neighbouring layers resemble each other, as in a model: the last ones are close to the final one.
    steps = (
        torch.randn(n_layers, *rows, d_model, generator=generator)
        / torch.arange(1.0, n_layers + 1)[:, None, None, None]
    )
    unembedding = torch.randn(vocab, d_model, generator=generator)
    return steps.cumsum(0).to(dtype), unembedding.to(dtype), torch.randn(vocab, generator=generator)


def log_probabilities(hidden, unembedding, **options):
    """fp64 ``[n_layers + 1, ..., vocab_size]``."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    exact = truth(flat, unembedding, targets=torch.zeros(len(flat), dtype=torch.int64), **options)
    z = exact["z"]
    cap = options.get("softcap")
    logits = z if cap is None else cap * torch.tanh(z / cap)
    return logits.log_softmax(-1).view(*hidden.shape[:-1], -1)


def whole(hidden, unembedding, **options):
    log_p = log_probabilities(hidden, unembedding, **options)
    p = log_p[-1].exp()
    return (p * (log_p[-1] - log_p).masked_fill(p == 0, 0.0)).sum(-1)


def whole_jsd(hidden, unembedding, **options):
    p = log_probabilities(hidden, unembedding, **options).exp()
    mean = (p + p[-1]) / 2
    return (torch.xlogy(p, p / mean) + torch.xlogy(p[-1], p[-1] / mean)).nan_to_num(0.0).sum(-1) / 2


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@pytest.mark.parametrize("with_bias, softcap, scale", [(False, None, 1.0), (True, None, 0.5), (True, 12.0, 2.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_whole_distributions(norm, with_bias, softcap, scale, dtype):
    hidden, unembedding, bias = problem(dtype=dtype)
    weight = torch.linspace(0.5, 1.5, hidden.shape[-1])
    spec = {None: None, "layer": LayerNorm(weight, weight - 1), "rms": RMSNorm(weight)}[norm]
    options = dict(norm=spec, bias=bias if with_bias else None, softcap=softcap, logit_scale=scale)
    stats = fused_lens(hidden, unembedding, **options)
    kl = kl_to_final(hidden, stats, unembedding, **options)
    exact = whole(hidden, unembedding, **options)
    assert exact[0].mean() > 0.5  # the first layers differ, so that a constant cannot pass
    slack = 20 * torch.finfo(torch.float32).eps * float(stats.logsumexp.abs().max().clamp(min=1))
    assert (kl - exact).abs().max() < slack
    assert (kl >= 0).all() and (kl[-1] == 0).all()
    jsd, exact = jsd_to_final(hidden, stats, unembedding, **options), whole_jsd(hidden, unembedding, **options)
    assert 0.1 < exact[0].mean() < 0.69
    assert (jsd - exact).abs().max() < slack and (jsd >= 0).all() and (jsd[-1] == 0).all()


def test_tokens_that_cannot_occur():
    hidden, unembedding, bias = problem()
    bias[::3] = float("-inf")
    stats = fused_lens(hidden, unembedding, bias=bias)
    kl = kl_to_final(hidden, stats, unembedding, bias=bias)
    jsd = jsd_to_final(hidden, stats, unembedding, bias=bias)
    torch.testing.assert_close(jsd.double(), whole_jsd(hidden, unembedding, norm=None, bias=bias), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(kl.double(), whole(hidden, unembedding, norm=None, bias=bias), rtol=1e-4, atol=1e-4)


def test_more_rows_than_a_block():
    hidden, unembedding, _ = problem(rows=(3, 400), vocab=50)
    for softcap in (None, 5.0):
        stats = fused_lens(hidden, unembedding, softcap=softcap)
        jsd = jsd_to_final(hidden, stats, unembedding, softcap=softcap)
        exact = whole_jsd(hidden, unembedding, norm=None, softcap=softcap)
        torch.testing.assert_close(jsd.double(), exact, rtol=1e-4, atol=1e-6)
        kl = kl_to_final(hidden, stats, unembedding, softcap=softcap)
        exact = whole(hidden, unembedding, norm=None, softcap=softcap)
        torch.testing.assert_close(kl.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("divergence", [kl_to_final, jsd_to_final])
def test_statistics_of_other_rows_are_refused(divergence):
    hidden, unembedding, _ = problem()
    stats = fused_lens(hidden[:, :1], unembedding)
    with pytest.raises(InputError, match=r"got \[4, 2, 5, 24\] and statistics of \[4, 1, 5\]"):
        divergence(hidden, stats, unembedding)


@pytest.mark.parametrize("divergence", [kl_to_final, jsd_to_final])
def test_layers_are_at_least_one(divergence):
    hidden, unembedding, _ = problem()
    with pytest.raises(InputError, match=r"expected hidden \[n_layers \+ 1, .*got \[0, 2, 5, 24\]"):
        divergence(hidden[:0], fused_lens(hidden[:0], unembedding), unembedding)


@pytest.mark.parametrize("softcap", [None, 12.0])
@pytest.mark.parametrize("divergence", [kl_to_final, jsd_to_final])
@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_dtypes_that_hold_elsewhere_change_nothing(softcap, divergence, default):
    """The default dtype, and autocast."""
    hidden, unembedding, bias = problem()
    stats = fused_lens(hidden, unembedding, bias=bias, softcap=softcap)
    expected = divergence(hidden, stats, unembedding, bias=bias, softcap=softcap)
    torch.set_default_dtype(default)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            again = divergence(hidden, stats, unembedding, bias=bias, softcap=softcap)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(again, expected)
