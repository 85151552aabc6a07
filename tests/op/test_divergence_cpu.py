"""`divergence_cpu` against whole fp64 distributions and plain torch, and what the kernel promises beyond."""

import math

import pytest
import torch

from refinelens import _C, fused_lens, jsd_to_final, kl_to_final
from refinelens.kernels.reference import LensHead
from refinelens.op import divergences
from refinelens.op.cpu import divergence_cpu, fused_lens_cpu

pytestmark = pytest.mark.usefixtures("every_core")


def problem(n_layers=5, rows=14, d_model=40, vocab=1009, dtype=torch.float32, size=1.0, **options):
    """Normed rows whose layers come ever closer to the last, their logsumexps, and a head."""
    generator = torch.Generator().manual_seed(0)
    final = torch.randn(rows, d_model, generator=generator)
    distance = torch.logspace(0, -3, n_layers)[:, None, None]
    x_hat = size * (final + distance * torch.randn(n_layers, rows, d_model, generator=generator))
    weight = (torch.randn(vocab, d_model, generator=generator) * 4 / d_model**0.5).to(dtype)
    head = LensHead(weight, bias=torch.randn(vocab, generator=generator), **options)
    logsumexp = fused_lens_cpu(x_hat.flatten(0, 1), head).logsumexp.view(n_layers, rows)
    return x_hat, logsumexp, head


def whole(x_hat, head):
    """Both divergences from all logits in fp64, by kind."""
    logits = head.scale * (x_hat.double() @ head.weight.double().T + head.bias.double())
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    log_p = logits.log_softmax(-1)
    p, q, mean = log_p.exp(), log_p[-1].exp(), (log_p.exp() + log_p[-1].exp()) / 2
    kl = (q * (log_p[-1] - log_p).masked_fill(q == 0, 0.0)).sum(-1)
    halves = [torch.xlogy(each, (each / mean).nan_to_num(1.0)) for each in (p, q.expand_as(p))]
    return {"kl": kl, "jsd": (halves[0] + halves[1]).sum(-1) / 2}


def by_torch(kind, x_hat, logsumexp, head):
    if kind == "jsd":
        return divergences._jensen_shannon(x_hat, logsumexp, head)
    log_p = divergences._expected_capped(x_hat, logsumexp, head) - logsumexp
    return log_p[-1] - log_p


def check(x_hat, logsumexp, head):
    exact = whole(x_hat, head)
    for kind in ("kl", "jsd"):
        found, same = divergence_cpu(x_hat, logsumexp, head, kind), by_torch(kind, x_hat, logsumexp, head)
        assert found.shape == logsumexp.shape and found.dtype == torch.float32
        assert (found[-1] == 0).all()
        floor = 2 * torch.finfo(torch.float32).eps * float(logsumexp.abs().max().clamp(min=1))
        assert (found - exact[kind]).abs().max() <= 2 * (same - exact[kind]).abs().max() + floor, kind


# Layers: the last one alone; a divisor of a vector, and a prime; one more than a vector, and than a panel. Positions:
# one; so many that groups straddle panels and begin at every lane.
@pytest.mark.parametrize("n_layers", [1, 2, 13, 17, 65])
@pytest.mark.parametrize("rows, d_model, vocab", [(1, 33, 97), (2, 1, 5), (17, 16, 1), (7, 65, 601), (1, 1031, 13)])
def test_odd_sizes(isa, n_layers, rows, d_model, vocab):
    check(*problem(n_layers, rows, d_model, vocab))


@pytest.mark.parametrize("softcap, scale", [(None, 0.5), (30.0, 1.0), (2.0, 3.0)])
def test_cap_and_scale(isa, softcap, scale):
    check(*problem(softcap=softcap, scale=scale))


@pytest.mark.parametrize("n_layers, rows", [(65, 2), (3, 43)])
def test_more_rows_than_are_packed_at_a_time(isa, n_layers, rows):
    """12 MiB hold 64 rows of this width: fewer than one group, and no multiple of the other."""
    check(*problem(n_layers, rows, d_model=49152, vocab=13))


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_close_layers_keep_their_digits(isa, size):
    """The last layers differ by a thousandth; flat predictions, and such as leave all but a few tokens out."""
    x_hat, logsumexp, head = problem(n_layers=7, size=size)
    check(x_hat, logsumexp, head)
    exact, found = whole(x_hat, head)["jsd"], divergence_cpu(x_hat, logsumexp, head, "jsd")
    assert exact[-2].max() < 1e-2 and (found[-2] - exact[-2]).abs().max() < 1e-7 + 1e-3 * exact[-2].max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_strides(isa, dtype):
    x_hat, logsumexp, head = problem(dtype=dtype)
    check(x_hat, logsumexp, head)
    tall = torch.full((len(head.weight) + 1, 43), float("nan"), dtype=dtype)
    tall[1:, 3:] = head.weight
    for weight in (head.weight.T.contiguous().T, tall[1:, 3:], head.weight.float()):
        for kind in ("kl", "jsd"):
            again = divergence_cpu(
                x_hat.transpose(0, 2).contiguous().transpose(0, 2), logsumexp, LensHead(weight, bias=head.bias), kind
            )
            assert torch.equal(again, divergence_cpu(x_hat, logsumexp, head, kind))


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_neither_threads_nor_neighbours_change_a_bit(isa, threads, kind):
    x_hat, logsumexp, head = problem(n_layers=7, rows=31, softcap=20.0)
    together = divergence_cpu(x_hat, logsumexp, head, kind)
    for n in (2, 3, 7):
        threads(n)
        assert torch.equal(divergence_cpu(x_hat, logsumexp, head, kind), together)
    x_hat[:, 30] = float("nan")
    for rows in (slice(0, 1), slice(3, 20), slice(29, 30)):
        alone = divergence_cpu(x_hat[:, rows], logsumexp[:, rows], head, kind)
        assert torch.equal(alone, together[:, rows])
    again = divergence_cpu(x_hat, logsumexp, head, kind)
    assert torch.equal(again[:, :30], together[:, :30]) and again[:, 30].isnan().all()


def test_tokens_that_cannot_occur(isa):
    """In whole blocks, and all but one."""
    x_hat, _, head = problem()
    for absent in (slice(0, 400), slice(1, None, 2), slice(0, -1)):
        head.bias[absent] = float("-inf")
        logsumexp = fused_lens_cpu(x_hat.flatten(0, 1), head).logsumexp.view(x_hat.shape[:-1])
        exact = whole(x_hat, head)
        for kind in ("kl", "jsd"):
            found = divergence_cpu(x_hat, logsumexp, head, kind)
            assert (found[-1] == 0).all()
            slack = 4 * torch.finfo(torch.float32).eps * logsumexp.abs().max()  # the rounding of logits
            assert (found - exact[kind].nan_to_num(0.0)).abs().max() < slack


def test_far_tokens_keep_their_distance(isa):
    """A token that the output is sure of, and a layer holds impossible: its logit is 200 below."""
    x_hat = torch.tensor([[[-100.0]], [[100.0]]])
    head = LensHead(torch.tensor([[1.0], [-1.0]]))
    logsumexp = torch.full((2, 1), 100.0)
    assert divergence_cpu(x_hat, logsumexp, head, "kl").tolist() == [[200.0], [0.0]]
    assert abs(divergence_cpu(x_hat, logsumexp, head, "jsd")[0, 0] - math.log(2)) < 1e-7


@pytest.mark.parametrize("kind", ["kl", "jsd"])
def test_nothing_is_read_before_it_is_written(threads, over_dirty_memory, kind):
    threads(3)
    for dtype in (torch.float32, torch.bfloat16):
        operands = problem(dtype=dtype)
        first, second = over_dirty_memory(lambda operands=operands: divergence_cpu(*operands, kind))
        assert torch.equal(first, second)


@pytest.mark.parametrize("divergence, softcap", [(jsd_to_final, None), (jsd_to_final, 20.0), (kl_to_final, 20.0)])
def test_blocks_of_positions_change_nothing(monkeypatch, divergence, softcap):
    x_hat, _, head = problem(softcap=softcap)
    stats = fused_lens(x_hat, head)
    whole = divergence(x_hat, stats, head)
    monkeypatch.setattr(divergences, "_CPP_ROWS", 11)  # two positions
    assert torch.equal(divergence(x_hat, stats, head), whole)


def test_bad_arrays_show_both_values():
    x, weight, logsumexp = (torch.zeros(shape).numpy() for shape in ((6, 4), (5, 4), (6,)))
    rest = (None, 1.0, 0.0)
    with pytest.raises(ValueError, match="group: expected a divisor of 6 rows, got 4"):
        _C.divergence_from_first(x, weight, *rest, logsumexp, 4, "kl", 1)
    with pytest.raises(ValueError, match="kind: expected kl or jsd, got js"):
        _C.divergence_from_first(x, weight, *rest, logsumexp, 3, "js", 1)
    with pytest.raises(ValueError, match=r"logsumexp: expected shape \(6,\), got \(5,\)"):
        _C.divergence_from_first(x, weight, *rest, logsumexp[:5], 3, "kl", 1)
