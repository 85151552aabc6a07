"""`lens_kl`: the divergence, and its gradient by the states, against autograd over all logits in fp64."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from refinelens.errors import InputError
from refinelens.kernels.mean_unembedding_reference import mean_unembedding_reference
from refinelens.kernels.reference import LayerNorm, LensHead, RMSNorm, apply_norm, soft_cap
from refinelens.op.divergences import kl_to_final
from refinelens.op.fused_lens import fused_lens
from refinelens.op.lens_kl import lens_kl

VOCAB, WIDTH = 131, 19  # primes: no tile, vector or chunk is whole
NEVER = 7  # a token that cannot occur
BACKENDS = ("cpp", "reference")


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make_head(kind="layer", bias=True, softcap=None, scale=0.7, dtype=torch.float64):
    norms = {
        "layer": LayerNorm(normal(WIDTH, seed=1), normal(WIDTH, seed=2)),
        "rms": RMSNorm(normal(WIDTH, seed=1), offset=1.0),
        "none": None,
    }
    own = normal(VOCAB, seed=3) if bias else None
    if own is not None and softcap is None:
        own[NEVER] = float("-inf")
    return LensHead(normal(VOCAB, WIDTH, seed=4, dtype=dtype), norms[kind], own, softcap, scale)


def from_all_logits(states, final, head):
    """KL(p_final || p_layer) by torch's own functions, fp64."""

    def log_p(x):
        x_hat = apply_norm(x, head.norm, torch.float64)
        x_hat = x_hat if head.projection is None else x_hat @ head.projection.double().T
        z = head.scale * (x_hat @ head.weight.double().T + (0.0 if head.bias is None else head.bias.double()))
        return soft_cap(z, head.softcap).log_softmax(-1)

    own, other = log_p(states), log_p(final)
    return torch.where(other > float("-inf"), other.exp() * (other - own), 0.0).sum(-1)


HEADS = {
    "plain": dict(kind="none", bias=False, scale=1.0),
    "layer norm and bias": dict(),
    "rms norm": dict(kind="rms", bias=False),
    "softcap": dict(softcap=3.0),
    "softcap without bias": dict(kind="rms", bias=False, softcap=2.0),
}


@pytest.mark.medium
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_gradcheck_in_fp64(head):
    head, final = make_head(**head), normal(3, WIDTH, seed=6)
    states = normal(2, 3, WIDTH, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: lens_kl(x, final, head), (states,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shape", [(1,), (2, 1), (3, 37)], ids=str)
def test_divergence_and_gradient_in_fp32(backend, head, shape):
    head = make_head(**head)
    states, final = normal(*shape, WIDTH, seed=5), normal(*shape[1:], WIDTH, seed=6)
    weights = normal(*shape, seed=7)
    truth = states.clone().requires_grad_()
    expected = from_all_logits(truth, final, head)
    (expected * weights).sum().backward()
    own = states.float().requires_grad_()
    narrow = replace(head, weight=head.weight.float())
    found = lens_kl(own, final.float(), narrow, backend=backend)
    (found * weights).sum().backward()
    assert found.dtype == own.grad.dtype == torch.float32 and found.shape == states.shape[:-1]
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(own.grad.double(), truth.grad, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_as_near_to_fp64_as_that_of_torch(backend):
    head, shape = make_head(kind="layer"), (4, 65)
    states, final = 3 * normal(*shape, WIDTH, seed=5), 3 * normal(shape[1], WIDTH, seed=6)

    def gradient(run, dtype):
        x = states.clone().to(dtype).detach().requires_grad_()
        run(x).sum().backward()
        return x.grad.double()

    truth = gradient(lambda x: from_all_logits(x, final, head), torch.float64)

    def by_torch(x):
        def log_p(y):
            return (head.scale * (apply_norm(y, head.norm) @ head.weight.float().T + head.bias.float())).log_softmax(-1)

        own, other = log_p(x), log_p(final.float())
        return torch.where(other > float("-inf"), other.exp() * (other - own), 0.0).sum(-1)

    theirs = (gradient(by_torch, torch.float32) - truth).abs().max()
    narrow = replace(head, weight=head.weight.float())
    ours = gradient(lambda x: lens_kl(x, final.float(), narrow, backend=backend), torch.float32)
    assert (ours - truth).abs().max() <= 2 * theirs


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_gradient_the_numbers_are_those_with_one(backend):
    head = replace(make_head(), weight=make_head().weight.float())
    states, final = normal(3, 5, WIDTH, seed=5).float(), normal(5, WIDTH, seed=6).float()
    with_one = lens_kl(states.clone().requires_grad_(), final, head, backend=backend)
    without = lens_kl(states, final, head, backend=backend)
    assert with_one.requires_grad and not without.requires_grad
    torch.testing.assert_close(without, with_one.detach(), rtol=1e-5, atol=1e-5)


def test_agrees_with_kl_to_final():
    head = make_head(kind="rms", bias=False, dtype=torch.float32)
    hidden = normal(4, 6, WIDTH, seed=5).float()
    expected = kl_to_final(hidden, fused_lens(hidden, head), head)
    torch.testing.assert_close(lens_kl(hidden, hidden[-1], head), expected, rtol=1e-5, atol=1e-5)
    assert float(lens_kl(hidden[-1], hidden[-1], head).abs().max()) < 1e-5


def test_final_states_that_are_normed_and_a_projection():
    head = replace(make_head(), projection=normal(WIDTH, 23, seed=8))
    head = replace(head, norm=RMSNorm(normal(23, seed=1)))
    states, final = normal(2, 3, 23, seed=5).requires_grad_(), normal(3, 23, seed=6)
    normed = apply_norm(final, head.norm, torch.float64) @ head.projection.T
    expected = from_all_logits(states, final, head)
    torch.testing.assert_close(lens_kl(states, final, head), expected)
    torch.testing.assert_close(lens_kl(states, normed, head, final_is_normed=True), expected)
    assert torch.autograd.gradcheck(lambda x: lens_kl(x, final, head), (states,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_half_precision_beside_fp32_states(dtype):
    head = make_head(dtype=dtype)
    states, final = normal(2, 9, WIDTH, seed=5).float(), normal(9, WIDTH, seed=6).float()
    expected = from_all_logits(states.double(), final.double(), head)
    torch.testing.assert_close(lens_kl(states, final, head).double(), expected, rtol=1e-5, atol=2e-5)


def test_states_of_half_precision_get_gradients_of_theirs():
    head, states = make_head(dtype=torch.bfloat16), normal(2, 3, WIDTH, seed=5).bfloat16().requires_grad_()
    lens_kl(states, states[-1].detach(), head).sum().backward()
    assert states.grad.dtype == torch.bfloat16 and bool(states.grad.isfinite().all())


def test_frozen_head_and_final_states_get_no_gradient():
    head, final = make_head(), normal(3, WIDTH, seed=6).requires_grad_()
    weight = head.weight.clone().requires_grad_()
    states = normal(3, WIDTH, seed=5).requires_grad_()
    lens_kl(states, final, replace(head, weight=weight)).sum().backward()
    assert states.grad is not None and final.grad is None and weight.grad is None


def test_twice_differentiable_it_is_not():
    states = normal(3, WIDTH, seed=5).requires_grad_()
    kl = lens_kl(states, normal(3, WIDTH, seed=6), make_head())
    with pytest.raises(InputError, match="a first derivative alone"):
        torch.autograd.grad(kl.sum(), states, create_graph=True)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(states=torch.zeros(3, WIDTH + 1)), r"states: expected shape \[\.\.\., 19\], got \[3, 20\]"),
        (dict(states=torch.zeros(3, WIDTH, dtype=torch.int64)), "states: expected a floating tensor, got torch.int64"),
        (dict(final_states=torch.zeros(4, WIDTH)), r"broadcasts to \[3, 19\], got \[4, 19\]"),
        (dict(final_states=torch.zeros(2, 3, WIDTH)), r"broadcasts to \[3, 19\], got \[2, 3, 19\]"),
        (dict(final_states=torch.zeros(3, 1)), r"final_states: expected shape \[\.\.\., 19\], got \[3, 1\]"),
        (dict(head=torch.zeros(VOCAB, WIDTH)), "head: expected a LensHead, got Tensor"),
        (dict(states=torch.full((3, WIDTH), float("nan"))), r"expected finite values, got .* at \[0\]; 3 rows"),
        (dict(backend="cuda"), "backend: expected one of"),
    ],
)
def test_refuses_in_one_line(change, words):
    given = dict(states=torch.zeros(3, WIDTH), final_states=torch.zeros(3, WIDTH), head=make_head(dtype=torch.float32))
    with pytest.raises(InputError, match=words):
        lens_kl(**(given | change))


def test_no_rows():
    states = torch.zeros(2, 0, WIDTH, requires_grad=True)
    kl = lens_kl(states, torch.zeros(0, WIDTH), make_head(dtype=torch.float32))
    kl.sum().backward()
    assert kl.shape == (2, 0) and states.grad.shape == states.shape


@pytest.mark.parametrize("bias", [False, True])
def test_reference_of_the_averages(bias):
    head = make_head("none", bias)
    x_hat = 4 * normal(29, WIDTH, seed=5)
    p = head.z(x_hat).softmax(-1)
    weights, mean_bias, logsumexp = mean_unembedding_reference(x_hat, head)
    torch.testing.assert_close(weights, p @ head.weight)
    own = torch.zeros(VOCAB, dtype=p.dtype) if head.bias is None else head.bias.nan_to_num(neginf=0.0)
    torch.testing.assert_close(mean_bias, p @ own)
    torch.testing.assert_close(logsumexp, head.z(x_hat).logsumexp(-1))


def test_training_descends_as_with_all_logits():
    """A few steps of SGD on a translator end at the same place."""
    head, final = make_head("rms", False), normal(11, WIDTH, seed=6)
    x = normal(11, WIDTH, seed=5)

    def trained(kl_of):
        matrix = torch.eye(WIDTH, dtype=torch.float64, requires_grad=True)
        for _ in range(5):
            loss = kl_of(x @ matrix).mean()
            (gradient,) = torch.autograd.grad(loss, matrix)
            matrix = (matrix - 0.05 * gradient).detach().requires_grad_()
        return matrix.detach(), loss.detach()

    (ours, loss), (theirs, _) = (
        trained(lambda y: lens_kl(y, final, head)),
        trained(lambda y: F.kl_div(_log_p(y, head), _log_p(final, head), reduction="none", log_target=True).sum(-1)),
    )
    torch.testing.assert_close(ours, theirs)
    assert float(loss) < float(lens_kl(x, final, head).mean())


def _log_p(states, head):
    return head.z(apply_norm(states, head.norm, torch.float64)).log_softmax(-1)


def test_autocast_changes_nothing():
    head = replace(make_head(), projection=normal(WIDTH, 23, seed=8).float(), norm=None)
    head = replace(head, weight=head.weight.float())
    states, final = normal(3, 23, seed=5).float().requires_grad_(), normal(3, 23, seed=6).float()
    plain = lens_kl(states, final, head)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = lens_kl(states, final, head)
    assert torch.equal(cast, plain)
    assert torch.equal(*(torch.autograd.grad(kl.sum(), states)[0] for kl in (cast, plain)))


def test_a_norm_that_is_trained_gets_no_gradient():
    weight = torch.nn.Parameter(torch.ones(WIDTH))
    head = replace(make_head(dtype=torch.float32), norm=RMSNorm(weight))
    assert not lens_kl(normal(3, WIDTH).float(), normal(3, WIDTH).float(), head).requires_grad


@pytest.mark.parametrize("n_layers", [13, 40])
def test_kl_to_final_has_the_same_bits_beside_other_positions(n_layers):
    head, hidden = make_head(dtype=torch.float32), normal(n_layers, 9, WIDTH, seed=5).float()
    whole = kl_to_final(hidden, fused_lens(hidden, head), head)
    for place in range(hidden.shape[1]):
        one = hidden[:, place : place + 1].clone()
        assert torch.equal(kl_to_final(one, fused_lens(one, head), head), whole[:, place : place + 1])
