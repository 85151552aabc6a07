"""`mean_unembedding_cpu` against whole softmaxes in fp64, and what the kernel promises beyond."""

import pytest
import torch

from refinelens import _C
from refinelens.errors import InputError
from refinelens.kernels.reference import LensHead
from refinelens.op.cpu import mean_unembedding_cpu

pytestmark = pytest.mark.usefixtures("every_core")

def problem(rows=70, d_model=64, vocab=2011, dtype=torch.float32, seed=0, with_bias=True, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    x_hat = torch.randn(rows, d_model, generator=generator)
    weight = (torch.randn(vocab, d_model, generator=generator) * 3 / d_model**0.5).to(dtype)
    bias = torch.randn(vocab, generator=generator) if with_bias else None
    return x_hat, LensHead(weight, bias=bias, scale=scale)


def whole(x_hat, head, dtype=torch.float64):
    """Mean weights, mean bias and logsumexp from all logits in ``dtype``."""
    weight = head.weight.to(dtype)
    bias = torch.zeros(len(weight), dtype=dtype) if head.bias is None else head.bias.to(dtype)
    z = head.scale * (x_hat.to(dtype) @ weight.T + bias)
    p = z.softmax(-1)
    return p @ weight, p @ bias.masked_fill(bias.isinf(), 0.0), z.logsumexp(-1)


def check(x_hat, head):
    """At most a few times the error of torch in fp32; that may be nothing in one row, so of all together."""
    ours = mean_unembedding_cpu(x_hat, head)
    for mine, same, exact in zip(ours, whole(x_hat, head, torch.float32), whole(x_hat, head), strict=True):
        assert mine.dtype == torch.float32 and mine.shape == exact.shape
        slack = 4 * (same - exact).abs().max() + 4e-7 * exact.abs().max()
        assert (mine - exact).abs().max() <= slack


def assert_same_bits(ours, theirs):
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


# Rows: one; few that go by columns, in pairs and a last one; more; one short of and one more than a vector, a panel.
# Columns: one; around a register tile of 6; primes; more than is multiplied at a time. Tokens: one; one more than a
# register tile, a block of 96; more than the ranges.
@pytest.mark.parametrize("rows", [1, 2, 5, 6, 15, 65])
@pytest.mark.parametrize("d_model, vocab", [(1, 97), (5, 5), (6, 7), (7, 1), (107, 97), (577, 97), (1031, 1009)])
def test_odd_sizes(isa, rows, d_model, vocab):
    check(*problem(rows, d_model, vocab, with_bias=rows != 2, scale=0.5 if rows == 15 else 1.0))


def test_more_rows_than_are_taken_at_a_time(isa):
    """16 MiB hold the sums of 64 rows of this width."""
    check(*problem(rows=129, d_model=8200, vocab=97 * 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_strides(isa, dtype):
    x_hat, head = problem(rows=20, d_model=18, vocab=301, dtype=dtype)
    check(x_hat, head)
    plain = mean_unembedding_cpu(x_hat, head)
    widened = LensHead(head.weight.float(), bias=head.bias)
    assert_same_bits(mean_unembedding_cpu(x_hat, widened), plain)
    wide = torch.full((20, 40), float("nan"))
    wide[:, 1:37:2] = x_hat
    tall = torch.full((302, 19), float("nan"), dtype=dtype)
    tall[1:, 1:] = head.weight
    for x, weight in ((x_hat.T.contiguous().T, head.weight.T.contiguous().T), (wide[:, 1:37:2], tall[1:, 1:])):
        assert not (x.is_contiguous() or weight.is_contiguous())
        assert_same_bits(mean_unembedding_cpu(x, LensHead(weight, bias=head.bias)), plain)


def test_threads_do_not_change_a_bit(isa, threads):
    x_hat, head = problem(rows=150)
    results = []
    for n in (1, 2, 3, 7, 20):  # the last are more than there are ranges
        threads(n)
        results.append(mean_unembedding_cpu(x_hat, head))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def test_a_row_has_the_same_bits_whatever_is_beside_it(isa):
    x_hat, head = problem(rows=131, d_model=150)
    together = mean_unembedding_cpu(x_hat, head)
    x_hat[130] = float("nan")
    for rows in (slice(0, 1), slice(1, 4), slice(2, 10), slice(3, 20), slice(60, 130)):
        assert_same_bits(mean_unembedding_cpu(x_hat[rows], head), [value[rows] for value in together])
    assert_same_bits([value[:130] for value in mean_unembedding_cpu(x_hat, head)], [value[:130] for value in together])
    assert all(value[130].isnan().all() for value in mean_unembedding_cpu(x_hat, head))


def test_tokens_that_cannot_occur(isa):
    """In whole blocks and ranges, at the very start, and all but one; their weights may be anything finite."""
    x_hat, head = problem(rows=17, vocab=1009)
    head.bias[:400], head.bias[500::3] = float("-inf"), float("-inf")
    check(x_hat, head)
    few = head.bias.isfinite()
    kept = mean_unembedding_cpu(x_hat, LensHead(head.weight[few], bias=head.bias[few]))
    head.weight[~few] *= 1e30
    for mine, other in zip(mean_unembedding_cpu(x_hat, head), kept, strict=True):
        assert (mine - other).abs().max() < 1e-5
    head.bias[:-1] = float("-inf")
    mean_weights, mean_bias, logsumexp = mean_unembedding_cpu(x_hat, head)
    assert torch.equal(mean_weights, head.weight[-1].expand(17, -1))
    assert (mean_bias == head.bias[-1]).all()
    assert (logsumexp - (x_hat @ head.weight[-1] + head.bias[-1])).abs().max() < 1e-5


@pytest.mark.parametrize("size", [1e-3, 1e3])
def test_flat_and_peaked_predictions(isa, size):
    """Means over the whole vocabulary, and single tokens, ever larger ones from first to last."""
    x_hat, head = problem(rows=20, vocab=3001)
    x_hat *= size
    check(x_hat, head)
    check(x_hat[:1], LensHead(torch.linspace(-1, 1, 3001)[:, None] * x_hat[:1] / x_hat[:1].norm()))


def test_nothing_is_read_before_it_is_written(threads, over_dirty_memory):
    threads(3)
    for dtype in (torch.float32, torch.bfloat16):
        x_hat, head = problem(rows=70, d_model=31, dtype=dtype)
        assert_same_bits(*over_dirty_memory(lambda x_hat=x_hat, head=head: mean_unembedding_cpu(x_hat, head)))


def test_bad_input_shows_both_values():
    x_hat, head = problem(3, 4, 5)
    with pytest.raises(InputError, match="softcap: expected None, .*got 3.0"):
        mean_unembedding_cpu(x_hat, LensHead(head.weight, softcap=3.0))
    with pytest.raises(ValueError, match="one d_model above 0 .*, got 3 and 5 by 4"):
        _C.mean_unembedding(x_hat[:, :3].numpy(), head.weight.numpy(), None, 1.0, 1)
    with pytest.raises(ValueError, match=r"bias: expected shape \(5,\), got \(4,\)"):
        _C.mean_unembedding(x_hat.numpy(), head.weight.numpy(), head.bias[:4].numpy(), 1.0, 1)


def test_no_rows():
    x_hat, head = problem(3, 4, 5)
    assert [value.shape for value in mean_unembedding_cpu(x_hat[:0], head)] == [(0, 4), (0,), (0,)]
