"""What the C++ kernel of the fused lens promises beyond agreeing with fp64."""

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from operator import itemgetter

import pytest
import torch

from refinelens import _C, LayerNorm, RMSNorm, fused_lens
from refinelens.kernels.reference import LensHead, fused_lens_reference
from refinelens.op.cpu import fused_lens_and_more, fused_lens_cpu, product_only
from tiny import assert_matches_truth, skip_unless_isa_runs, truth

pytestmark = pytest.mark.usefixtures("every_core")

def problem(rows=70, d_model=64, vocab=20011, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(rows, d_model, generator=generator) * 3).to(dtype)
    unembedding = torch.randn(vocab, d_model, generator=generator).to(dtype)
    return hidden, unembedding, torch.randint(0, vocab, (rows,), generator=generator)


def run(hidden, unembedding, targets=None, norm=None, logit_scale=1.0, **options):
    return fused_lens_cpu(hidden, LensHead(unembedding, norm, scale=logit_scale, **options), targets)


def assert_same_bits(ours, theirs):
    for (_, mine), (_, other) in zip(ours.items(), theirs.items(), strict=True):
        assert torch.equal(mine, other)


def check(hidden, unembedding, targets, norm=None):
    stats = fused_lens(hidden, unembedding, norm, targets, backend="cpp")
    exact, same = (truth(hidden, unembedding, norm, targets, dtype=d) for d in (torch.float64, torch.float32))
    assert assert_matches_truth(stats, exact, same, targets) <= 1


def test_every_instruction_set_is_code_of_its_own(monkeypatch):
    """With fused multiply-adds the logits have the same bits; blocks, so sums, differ; without them logits do too."""
    results = {}
    for name in ("v4", "v3", "baseline"):
        monkeypatch.setenv("REFINELENS_ISA", name)
        skip_unless_isa_runs()
        results[name] = run(*problem(d_model=600, vocab=3001))
    assert torch.equal(results["v4"].target_logit, results["v3"].target_logit)
    assert not torch.equal(results["v4"].entropy, results["v3"].entropy)
    assert not torch.equal(results["v4"].target_logit, results["baseline"].target_logit)


def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("REFINELENS_ISA", "v9")
    with pytest.raises(ValueError, match="REFINELENS_ISA: expected one of baseline.*, got 'v9'"):
        run(*problem(2, 3, 5))


def test_threads_do_not_change_a_bit(isa, threads):
    hidden, unembedding, targets = problem()
    results = []
    for n in (1, 2, 3, 7):
        threads(n)
        results.append(run(hidden, unembedding, targets, LayerNorm(None), softcap=20.0))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_a_row_has_the_same_bits_whatever_is_beside_it(isa, softcap):
    hidden, unembedding, targets = problem(rows=131, vocab=700, d_model=300)
    operands = dict(norm=LayerNorm(torch.linspace(0.5, 1.5, 300), torch.linspace(-1, 1, 300)), softcap=softcap)
    together = run(hidden, unembedding, targets, **operands)
    # Up to 8 rows have kernels of their own.
    for rows in (slice(0, 1), slice(3, 11), slice(4, 13), slice(3, 20), slice(60, 131)):
        alone = run(hidden[rows], unembedding, targets[rows], **operands)
        assert_same_bits(alone, together.map(itemgetter(rows)))


# Rows: one; one more than the few with kernels of their own; one short of and one more than a vector, a panel. Tokens:
# one; around a register tile of 6; more than a block. d_model: one; around the prefetch step of 16; a prime of real
# size; more than is multiplied at a time.
@pytest.mark.parametrize("rows", [1, 9, 15, 17, 65])
@pytest.mark.parametrize("d_model, vocab", [(1, 97), (15, 5), (16, 6), (17, 7), (33, 1), (577, 97), (1031, 49)])
def test_odd_sizes(isa, rows, d_model, vocab):
    check(*problem(rows, d_model, vocab), RMSNorm(None))


def test_more_rows_than_are_packed_at_a_time(isa):
    """12 MiB hold 64 rows of this d_model."""
    check(*problem(rows=129, d_model=49152, vocab=13), LayerNorm(None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_strides(isa, dtype):
    hidden, unembedding, targets = problem(rows=20, d_model=18, vocab=301, dtype=dtype)
    plain = run(hidden, unembedding, targets)
    wide = torch.full((20, 40), float("nan"), dtype=dtype)
    wide[:, 1:37:2] = hidden
    tall = torch.full((302, 19), float("nan"), dtype=dtype)
    tall[1:, 1:] = unembedding
    for h, w in ((hidden.T.contiguous().T, unembedding.T.contiguous().T), (wide[:, 1:37:2], tall[1:, 1:])):
        assert not (h.is_contiguous() or w.is_contiguous())
        assert_same_bits(run(h, w, targets), plain)
    repeated = run(hidden[:1].expand(5, 18), unembedding[:1].expand(9, 18), torch.full((5,), 8))
    assert repeated.argmax.tolist() == [0] * 5 and repeated.target_rank.tolist() == [8] * 5


def test_offsets_beyond_32_bits(isa, tmp_path):
    """Three rows 2^30 elements and some apart, so that the last starts beyond 2^31; the file between them is a hole."""
    stride = (1 << 30) + 64
    space = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 64)
    far = space.as_strided((3, 16), (stride, 1))
    near, others, targets = problem(rows=3, d_model=16, vocab=40)
    far.copy_(near)
    assert_same_bits(run(far, others, targets), run(near, others, targets))
    assert_same_bits(run(others, far, torch.full((40,), 2)), run(others, near, torch.full((40,), 2)))


def test_the_target_is_its_own_column(isa):
    """Every token twice: the second copy ties with the first, which beats it, and nothing beats itself by rounding."""
    hidden, unembedding, targets = problem(rows=300, d_model=100, vocab=3001)
    twice = unembedding.repeat(2, 1)
    first, second = (run(hidden, twice, targets + offset) for offset in (0, 3001))
    assert torch.equal(first.target_logit, second.target_logit)
    assert torch.equal(second.target_rank, first.target_rank + 1)
    top = run(hidden, twice, first.argmax)
    assert (top.target_rank == 0).all() and torch.equal(top.target_logit, top.max_logit)
    assert torch.equal(first.target_rank == 0, first.argmax == targets)


def test_a_whole_block_of_broken_tokens_is_seen(isa):
    """No maximum comes out of 96 tokens that are NaN, yet they must reach the logsumexp."""
    hidden, unembedding, _ = problem(rows=4, d_model=8, vocab=200)
    unembedding[:96] = float("nan")
    assert run(hidden, unembedding).logsumexp.isnan().all()
    hidden[1, 3] = float("inf")
    assert run(hidden, unembedding[96:].abs()).logsumexp.isfinite().tolist() == [True, False, True, True]


def test_nothing_is_read_before_it_is_written(threads, over_dirty_memory):
    threads(3)
    for dtype in (torch.float32, torch.bfloat16):
        operands = problem(rows=70, d_model=30, vocab=4099, dtype=dtype)
        assert_same_bits(*over_dirty_memory(lambda operands=operands: run(*operands)))
    hidden, unembedding, targets = problem(rows=70, d_model=30, vocab=4099)
    ids = torch.stack([targets, targets.flip(0), targets], 1)
    several = over_dirty_memory(lambda: fused_lens_and_more(hidden, LensHead(unembedding), ids, 4)[1:])
    assert all(torch.equal(mine, other) for mine, other in zip(*several, strict=True))


def test_calls_from_several_python_threads(threads):
    threads(2)
    problems = [problem(rows=40 + i, vocab=6000, seed=i) for i in range(4)]
    alone = [run(*p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for ours, theirs in zip(pool.map(lambda i: run(*problems[i % 4]), range(12)), alone * 3, strict=True):
            assert_same_bits(ours, theirs)


def test_a_forked_process_can_go_on(threads):
    threads(2)
    hidden, unembedding, _ = problem(rows=40, vocab=6000)
    expected = run(hidden, unembedding).logsumexp.numpy()

    def child(hidden, unembedding):
        out = _C.fused_lens(hidden, unembedding, "none", None, None, 0.0, None, None, 1.0, 0.0, 2)
        os._exit(0 if (out[2] == expected).all() else 1)

    process = multiprocessing.get_context("fork").Process(target=child, args=(hidden.numpy(), unembedding.numpy()))
    process.start()
    process.join(60)
    assert process.exitcode == 0


def test_half_floats_widen_exactly(isa):
    """Every finite fp16 number, subnormal ones included, as the only weight of a token."""
    every = torch.arange(1 << 16).to(torch.uint16).view(torch.float16)
    finite = every[every.isfinite()][:, None]
    stats = run(torch.ones(1, 1, dtype=torch.float16), finite, torch.tensor([0]))
    assert stats.max_logit.item() == 65504.0
    for token in (0, 1, 1023, 1024, 40000):
        logit = run(torch.ones(1, 1, dtype=torch.float16), finite, torch.tensor([token])).target_logit
        assert logit.item() == finite[token].float().item()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_staged_tokens_give_the_bits_of_widened_ones(isa, dtype):
    hidden, unembedding, targets = problem(rows=67, d_model=48, vocab=500, dtype=dtype)
    assert_same_bits(run(hidden, unembedding, targets), run(hidden.float(), unembedding.float(), targets))


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4, 1e6, 1e30])
@pytest.mark.parametrize("scale", [1.0, 1 / 64])
def test_a_cap_of_any_size_leaves_the_logits_their_digits(isa, softcap, scale):
    """Products of small integers are exact, so that all error is the cap's."""
    generator = torch.Generator().manual_seed(0)
    hidden, unembedding = (torch.randint(-16, 17, (n, 32), generator=generator) / 8 for n in (70, 2003))
    targets = torch.randint(0, 2003, (70,), generator=generator)
    ours = run(hidden, unembedding, targets, softcap=softcap, logit_scale=scale)
    exact = truth(hidden, unembedding, None, targets, softcap=softcap, logit_scale=scale)
    size = (softcap * torch.tanh(exact["z"] / softcap)).abs().amax(1)
    for value, name in ((ours.max_logit, "max_logit"), (ours.target_logit, "target_logit")):
        assert ((value - exact[name]).abs() <= 3e-7 * size).all(), name
    sums = torch.maximum(size, exact["logsumexp"])
    assert ((ours.logsumexp - exact["logsumexp"]).abs() <= 3e-7 * sums).all()


def test_equal_z_have_equal_logits_under_a_cap(isa):
    """Rows of three equal logits: that of the largest z, the target's and those in the sums are capped apart."""
    z = 30 * torch.cat([torch.logspace(-8, 1, 400), torch.linspace(0.9, 1.1, 101)])
    z = torch.cat([z, -z])
    for softcap in (30.0, 1e6):
        stats = run(z[:, None], torch.ones(3, 1), torch.ones(len(z)).long(), softcap=softcap)
        assert torch.equal(stats.max_logit, stats.target_logit)
        assert (stats.entropy - torch.tensor(3.0).log()).abs().max() < 3e-7


def test_near_constant_rows_are_normed_as_in_fp64(isa):
    hidden, unembedding, _ = problem(rows=9, d_model=96, vocab=50)
    hidden = 1000.0 + hidden * 1e-2
    ours = run(hidden, unembedding, norm=LayerNorm(None))
    exact = fused_lens_reference(hidden, LensHead(unembedding, LayerNorm(None)), dtype=torch.float64)
    torch.testing.assert_close(ours.logsumexp.double(), exact.logsumexp, rtol=2e-6, atol=0)


def test_bad_arrays_show_both_values():
    hidden, unembedding, _ = (t.numpy() for t in problem(3, 4, 5))
    rest = ("none", None, None, 0.0)
    with pytest.raises(ValueError, match="one d_model above 0 .*, got 4 and 5 by 3"):
        _C.product_only(hidden, unembedding[:, :3], 1)
    with pytest.raises(ValueError, match="x_hat: expected float32, float16 or uint16 .*, got float64"):
        _C.product_only(hidden.astype("float64"), unembedding, 1)
    with pytest.raises(ValueError, match="targets: expected ids below 5, got 5"):
        _C.fused_lens(hidden, unembedding, *rest, torch.tensor([[0, 3], [1, 5], [1, 4]]).numpy(), None, 1.0, 0.0, 1)
    for shape in ((3,), (2, 3)):
        with pytest.raises(ValueError, match=r"targets: expected shape \(3, n\), got \(" + str(shape[0])):
            _C.fused_lens(hidden, unembedding, *rest, torch.zeros(shape).long().numpy(), None, 1.0, 0.0, 1)
    with pytest.raises(ValueError, match=r"bias: expected shape \(5,\), got \(4,\)"):
        _C.fused_lens(hidden, unembedding, *rest, None, torch.zeros(4).numpy(), 1.0, 0.0, 1)


def test_what_benchmarks_measure_runs(isa):
    assert product_only(*problem(rows=5, vocab=300)[:2]) is None
    assert 1e8 < _C.fma_peak(2.0) < 1e13
