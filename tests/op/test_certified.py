"""The certified lens against exact integer arithmetic and the fp64 reference; every screen that this processor runs."""

import gc
import os
import signal

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from refinelens import _C, LayerNorm, RMSNorm, fused_lens
from refinelens.errors import InputError
from refinelens.kernels.reference import LensHead, apply_norm, fused_lens_reference
from refinelens.op import cpu
from refinelens.op.backends import CERTIFIED_FROM, CERTIFIED_ROWS, CERTIFIED_WIDTH, choose_precision
from refinelens.op.cpu import fused_lens_certified, fused_lens_screened, screen_index
from tiny import truth

pytestmark = pytest.mark.usefixtures("every_core")


def _runs(isa):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINELENS_ISA", isa)
        try:
            return _C.screen_kernels(8)[0]
        except ValueError:
            return None


SCREENS = {name: isa for isa in ("baseline", "v3", "v4", "amx") if (name := _runs(isa))}


@pytest.fixture(params=SCREENS.values())
def screen(request, monkeypatch):
    monkeypatch.setenv("REFINELENS_ISA", request.param)
    return request.param


def make(rows=37, d_model=24, vocab=1031, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return randn(rows, d_model) * 3, randn(vocab, d_model), torch.randint(0, vocab, (rows,), generator=generator), randn


def _as_integers(numbers):
    """The floats as integers, and the power of two that they are multiples of 1 / it."""
    ratios = [number.as_integer_ratio() for number in numbers]
    scale = max(denominator for _, denominator in ratios)
    return [numerator * (scale // denominator) for numerator, denominator in ratios], scale


def exact_argmax_and_rank(hidden, unembedding, norm, targets, bias=None):
    """By integers: floats are multiples of one power of two, and so are sums and products."""
    n_vocab, d_model = unembedding.shape
    x_hat, x_scale = _as_integers(apply_norm(hidden, norm, torch.float64).flatten().tolist())
    weights, w_scale = _as_integers(unembedding.double().flatten().tolist())
    offsets, b_scale = _as_integers([0.0] * n_vocab if bias is None else bias.double().tolist())
    argmax, rank = [], []
    for row, target in enumerate(targets.tolist()):
        x = x_hat[row * d_model : (row + 1) * d_model]
        z = [
            sum(map(int.__mul__, x, weights[token * d_model : (token + 1) * d_model])) * b_scale
            + offsets[token] * x_scale * w_scale
            for token in range(n_vocab)
        ]
        argmax.append(z.index(max(z)))
        rank.append(sum(v > z[target] or (v == z[target] and i < target) for i, v in enumerate(z)))
    return torch.tensor(argmax), torch.tensor(rank)


def assert_certified(out, hidden, unembedding, norm, targets, bias=None, softcap=None, scale=1.0):
    """Against the fp64 reference, which itself is exact to (d_model + 4) 2^-53 of the product of norms."""
    head = LensHead(unembedding, norm, bias, softcap, scale)
    exact = fused_lens_reference(hidden, head, targets, dtype=torch.float64)
    size = apply_norm(hidden, norm, torch.float64).norm(dim=-1) * unembedding.double().norm(dim=-1).max()
    size += 0.0 if bias is None else bias.double().nan_to_num(neginf=0.0).abs().max()
    slack = 1e-12 + (hidden.shape[-1] + 4) * 2**-51 * scale * size
    assert ((out.logsumexp - exact.logsumexp).abs() <= out.logsumexp_bound + slack).all()
    for value, true in ((out.max_logit, exact.max_logit), (out.target_logit, exact.target_logit)):
        assert ((value - true).abs() <= 2**-23 * true.abs() + slack).all(), "logits are fp64, rounded once"
    assert torch.equal(out.target_rank == 0, out.argmax == targets)
    return exact


NORMS = {
    "none": lambda randn, d: None,
    "layer": lambda randn, d: LayerNorm(randn(d), randn(d), 1e-5),
    "rms-offset": lambda randn, d: RMSNorm(randn(d), 1e-6, offset=1.0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm_name", NORMS)
@pytest.mark.parametrize("with_bias, softcap, scale", [(False, None, 1.0), (True, 12.0, 0.25), (True, None, 3.0)])
def test_equal_to_fp64(screen, dtype, norm_name, with_bias, softcap, scale):
    hidden, unembedding, targets, randn = make(dtype=dtype)
    bias = randn(len(unembedding)) if with_bias else None
    norm = NORMS[norm_name](randn, 24)
    out = fused_lens_certified(hidden, LensHead(unembedding, norm, bias, softcap, scale), targets)
    exact = assert_certified(out, hidden, unembedding, norm, targets, bias, softcap, scale)
    assert torch.equal(out.argmax, exact.argmax) and torch.equal(out.target_rank, exact.target_rank)
    assert not out.fell_back.any()
    assert (out.entropy - exact.entropy).abs().max() < 0.02


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4, 1e6, 1e30])
def test_a_cap_of_any_size_is_screened(screen, softcap):
    hidden, unembedding, targets, _ = make()
    out = fused_lens_certified(hidden, LensHead(unembedding, softcap=softcap), targets)
    exact = assert_certified(out, hidden, unembedding, None, targets, softcap=softcap)
    assert torch.equal(out.argmax, exact.argmax) and torch.equal(out.target_rank, exact.target_rank)
    assert not out.fell_back.any() and out.logsumexp_bound.max() < 0.02


# One of everything; one more than a step of K, than a tile of 96 tokens, than a panel of 32 rows; one more than a
# range of 32 tiles; an odd number that is none of these.
@pytest.mark.parametrize(
    "rows, d_model, vocab", [(1, 1, 1), (1, 65, 2), (33, 3, 97), (2, 129, 96 * 32 + 1), (17, 31, 6007)]
)
def test_odd_sizes(screen, rows, d_model, vocab):
    hidden, unembedding, targets, _ = make(rows, d_model, vocab)
    out = fused_lens_certified(hidden, LensHead(unembedding), targets)
    exact = assert_certified(out, hidden, unembedding, None, targets)
    assert torch.equal(out.argmax, exact.argmax) and torch.equal(out.target_rank, exact.target_rank)


def test_more_rows_than_a_block():
    rows = cpu.ROW_BLOCK
    hidden, unembedding, targets, _ = make(rows + 37, d_model=7, vocab=97)
    whole = fused_lens_certified(hidden[:rows], LensHead(unembedding), targets[:rows])
    blocks = fused_lens_certified(hidden, LensHead(unembedding), targets)
    for (_, one), (_, other) in zip(whole.items(), blocks.items(), strict=True):
        assert torch.equal(one, other[:rows])
    assert_certified(blocks, hidden, unembedding, None, targets)


# Every corner of the arithmetic: subnormals, neighbours, and the largest values whose logits fp32 still holds.
CORNERS = [0.0, -0.0, 1.0, 1.0 + 2**-23, -1.0, 3.0, 1e-45, 1e-38, -1e-30, 1e-12, 65504.0, 1e15, -1e15, 1e18, 2**-149]


@st.composite
def problems(draw):
    rows, d_model, vocab = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 110))
    values = draw(st.sampled_from(["corners", "integers", "floats"]))
    numbers = {
        "corners": st.sampled_from(CORNERS),
        "integers": st.integers(-2, 2).map(float),
        "floats": st.floats(-100, 100, width=32),
    }[values]

    def matrix(n, m):
        # A few drawn rows, repeated: ties are the rule.
        pool = draw(st.lists(st.lists(numbers, min_size=m, max_size=m), min_size=1, max_size=5))
        picks = draw(st.lists(st.integers(0, len(pool) - 1), min_size=n, max_size=n))
        return torch.tensor([pool[i] for i in picks], dtype=torch.float32)

    hidden, unembedding = matrix(rows, d_model), matrix(vocab, d_model)
    targets = torch.tensor(draw(st.lists(st.integers(0, vocab - 1), min_size=rows, max_size=rows)))
    bias = matrix(1, vocab)[0] if draw(st.booleans()) else None
    norm = draw(st.sampled_from([None, LayerNorm(None), RMSNorm(None)]))
    return hidden, unembedding, norm, targets, bias, draw(st.sampled_from([None, 0.5, 30.0]))


@pytest.mark.medium
@settings(max_examples=150, deadline=None)
@given(problem=problems(), scale=st.sampled_from([1.0, 0.3, 7.0]), isa=st.sampled_from(list(SCREENS.values())))
def test_no_input_breaks_exactness_or_the_bound(problem, scale, isa):
    hidden, unembedding, norm, targets, bias, softcap = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINELENS_ISA", isa)
        out = fused_lens_certified(hidden, LensHead(unembedding, norm, bias, softcap, scale), targets)
    argmax, rank = exact_argmax_and_rank(hidden, unembedding, norm, targets, bias)
    assert torch.equal(out.argmax, argmax) and torch.equal(out.target_rank, rank)
    assert_certified(out, hidden, unembedding, norm, targets, bias, softcap, scale)


@pytest.mark.medium
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    d_model=st.sampled_from([1, 2, 63, 64, 700]),
    spread=st.sampled_from([0.0, 1.0, 6.0]),
    giant=st.sampled_from([1.0, 1e3, 1e7]),
    offset=st.sampled_from([0.0, 100.0]),
    softcap=st.sampled_from([None, 2.0, 30.0, 1e4]),
    isa=st.sampled_from(list(SCREENS.values())),
)
def test_the_bound_holds_for_heavy_tails(seed, d_model, spread, giant, offset, softcap, isa):
    """Components over many orders of magnitude, one giant, weights far from 0: what quantisation likes least."""
    hidden, unembedding, targets, randn = make(8, d_model, 500, seed=seed)
    hidden, unembedding = hidden * (randn(8, d_model) * spread).exp(), unembedding * (randn(500, 1) * spread / 2).exp()
    hidden[:, 0] *= giant
    unembedding += offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINELENS_ISA", isa)
        out = fused_lens_certified(hidden, LensHead(unembedding, softcap=softcap), targets)
    exact = assert_certified(out, hidden, unembedding, None, targets, None, softcap)
    assert torch.equal(out.argmax, exact.argmax)
    certain = torch.tensor([_is_certain(h, unembedding, t) for h, t in zip(hidden, targets, strict=True)])
    assert torch.equal(out.target_rank[certain], exact.target_rank[certain])


def _is_certain(row, unembedding, target):
    """Whether no logit is so near to the target's that fp64 may order them wrongly."""
    z = unembedding.double() @ row.double()
    gap = (z - z[target]).abs()
    gap[target] = torch.inf
    return bool(gap.min() > 1e-12 * row.double().norm() * unembedding.double().norm(dim=1).max())


def adversarial():
    hidden, unembedding, targets, randn = make(20, 16, 3000)
    yield "duplicates", hidden, unembedding[torch.arange(3000) % 7], None, targets
    integers = torch.randint(-2, 3, (3000, 16), generator=torch.Generator().manual_seed(1)).float()
    yield "ties", integers[:20], integers, None, targets
    yield "near-constant rows", torch.ones(20, 16) + 1e-6 * hidden, unembedding, LayerNorm(None), targets
    yield "weights far from 0, logits near together", hidden.abs() * 10, 50 + unembedding / 1000, None, targets
    yield "huge norms", hidden * 1e25, unembedding, None, targets
    yield "zero rows", hidden * 0, unembedding, None, targets
    yield "zero rows and the largest weights", hidden * 0, unembedding[:100].sign() * 3e38, None, targets % 100
    yield "subnormal rows", hidden * 1e-40, unembedding, None, targets
    yield "subnormal weights", hidden, unembedding * 1e-40, None, targets
    yield "equal logits", hidden, torch.ones(3000, 16), None, targets
    near = 1 + 2**-23 * torch.arange(3000)[:, None] % 5 * torch.ones(3000, 16)
    yield "logits that differ in the last place", hidden, near, None, targets
    giant = hidden.clone()
    giant[:, 3] = 1e6
    yield "giant component", giant, unembedding, RMSNorm(None), targets


@pytest.mark.parametrize("hidden, unembedding, norm, targets", [pytest.param(*c[1:], id=c[0]) for c in adversarial()])
def test_adversarial_rows(screen, hidden, unembedding, norm, targets):
    out = fused_lens_certified(hidden, LensHead(unembedding, norm), targets)
    argmax, rank = exact_argmax_and_rank(hidden[:6], unembedding, norm, targets[:6])
    assert torch.equal(out.argmax[:6], argmax) and torch.equal(out.target_rank[:6], rank)
    assert_certified(out, hidden, unembedding, norm, targets)


def test_rows_that_no_screen_decides_fall_back_alone(screen):
    hidden, unembedding, targets, _ = make(20, 16, 3000)
    hidden[3], hidden[11] = 0.0, 1e-42
    out = fused_lens_certified(hidden, LensHead(unembedding), targets)
    assert out.fell_back.nonzero()[:, 0].tolist() == [3, 11]
    assert_certified(out, hidden, unembedding, None, targets)


def test_all_screens_of_one_width_agree(monkeypatch):
    """The integers are the same, so what is left to fp64 is, and what is decided; sums differ by rounding."""
    hidden, unembedding, targets, randn = make(70, 100, 5000)
    outs = {}
    for isa in SCREENS.values():
        monkeypatch.setenv("REFINELENS_ISA", isa)
        digits = _C.screen_kernels(100)[1]
        head = LensHead(unembedding, LayerNorm(None))
        outs.setdefault(digits, []).append(fused_lens_certified(hidden, head, targets))
    for same in outs.values():
        for other in same[1:]:
            assert torch.equal(same[0].argmax, other.argmax) and torch.equal(same[0].target_rank, other.target_rank)
            torch.testing.assert_close(same[0].logsumexp, other.logsumexp, rtol=0, atol=5e-6)
            torch.testing.assert_close(same[0].logsumexp_bound, other.logsumexp_bound, rtol=0.01, atol=1e-6)


def test_threads_do_not_change_a_bit(screen):
    hidden, unembedding, targets, _ = make(70, 40, 20000)
    x_hat, weights = hidden.double().numpy(), unembedding.numpy()
    runs = []
    for n_threads in (1, 5):
        index = _C.ScreenIndex(weights, n_threads)
        runs.append(index.lens(x_hat, weights, targets.numpy(), None, 1.0, 30.0, True, n_threads))
    for one, other in zip(*runs, strict=True):
        assert one.tobytes() == other.tobytes()


def test_tokens_masked_by_a_bias_of_minus_infinity(screen):
    hidden, unembedding, targets, _ = make(5, 8, 9000)
    bias = torch.zeros(9000)
    bias[:8500] = float("-inf")
    stats = fused_lens(hidden, unembedding, None, targets % 500 + 8500, bias, precision="certified")
    rest = fused_lens(hidden, unembedding[8500:], None, targets % 500, precision="certified")
    assert torch.equal(stats.argmax, rest.argmax + 8500) and torch.equal(stats.target_rank, rest.target_rank)
    torch.testing.assert_close(stats.logsumexp, rest.logsumexp, rtol=0, atol=0.01)
    torch.testing.assert_close(stats.entropy, rest.entropy, rtol=0, atol=0.01)
    masked = fused_lens(hidden, unembedding, None, 3, bias, precision="certified")
    assert (masked.target_rank == 503).all(), "500 tokens are larger, 3 masked ones have a lower id"


def test_the_index_is_kept_and_follows_the_weights():
    hidden, unembedding, targets, _ = make(5, 8, 300)
    parameter = torch.nn.Parameter(unembedding.clone())
    fused_lens(hidden, parameter, None, targets, precision="certified")
    index = screen_index(parameter)
    assert screen_index(parameter) is index, "also found by the operator's argument"
    with torch.no_grad():
        parameter[7] = 100 * hidden[0]
    assert fused_lens(hidden, parameter, None, targets, precision="certified").argmax[0] == 7
    assert screen_index(parameter) is not index
    parameter.data = unembedding.clone()
    assert fused_lens(hidden, parameter, precision="certified").argmax[0] == (unembedding @ hidden[0]).argmax()
    key = id(parameter)
    del parameter
    gc.collect()
    assert key not in cpu._indexes


def step_of_a_fused_optimizer(parameter):
    parameter.grad = torch.ones_like(parameter)
    torch.optim.AdamW([parameter], lr=0.5, fused=True).step()


def swap_rows(parameter):
    parameter.data[[3, 200]] = parameter.data[[200, 3]]


def fewer_tokens(parameter):
    parameter.data = parameter.data[:200]


CHANGES = {
    "fused optimizer": step_of_a_fused_optimizer,
    "sign": lambda parameter: parameter.data.neg_(),
    "one weight": lambda parameter: parameter.data[299, 7:].mul_(1.01),
    "order of rows": swap_rows,
    "fewer tokens": fewer_tokens,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_that_torch_does_not_record_are_seen(change, dtype):
    hidden, unembedding, _, _ = make(64, 8, 300)
    hidden, parameter = hidden.to(dtype), torch.nn.Parameter(unembedding.to(dtype))
    index = screen_index(parameter)
    change(parameter)
    stats = fused_lens(hidden, parameter, precision="certified")
    assert screen_index(parameter) is not index
    assert torch.equal(stats.argmax, truth(hidden, parameter, None, stats.argmax)["argmax"])


def test_the_index_of_a_tensor_of_inference_mode_is_kept():
    with torch.inference_mode():
        unembedding = torch.randn(300, 8)
        assert screen_index(unembedding) is screen_index(unembedding)


def test_a_process_forked_while_an_index_is_made():
    hidden, unembedding, targets, _ = make(3, 8, 300)
    with cpu._lock:
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # a deadlock must not outlive the test
            torch.set_num_threads(1)
            stats = fused_lens(hidden, unembedding, None, targets, precision="certified")
            os._exit(int(not torch.isfinite(stats.logsumexp).all()))
    assert os.waitpid(child, 0)[1] == 0


def test_a_width_of_one(screen):
    """A column of a wider tensor: as torch says, contiguous whatever its stride."""
    unembedding = torch.randn(1, 50).T
    stats = fused_lens(torch.ones(1, 1), unembedding, precision="certified")
    assert int(stats.argmax) == int(unembedding.argmax())


def test_an_index_of_two_or_three_bytes_a_weight(screen):
    index = screen_index(torch.randn(9600, 640))
    assert index.nbytes / (9600 * 640) == pytest.approx({1: 2, 3: 3}[_C.screen_kernels(640)[1]], rel=0.01)


@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_broken_row_is_named(screen, value, word):
    hidden, unembedding, targets, _ = make(10, 8, 100)
    hidden[7, 3] = value
    with pytest.raises(ValueError, match=rf"hidden: expected finite values, got {word} in row 7 of 10.*1 rows"):
        fused_lens(hidden, unembedding, LayerNorm(None), targets, precision="certified")


def test_broken_weights_are_not_blamed_on_hidden():
    hidden, unembedding, targets, _ = make(10, 8, 100)
    unembedding[50, 0] = float("nan")
    with pytest.raises(ValueError, match="although the row is"):
        fused_lens(hidden, unembedding, None, targets, precision="certified")


def test_through_the_public_op():
    hidden, unembedding, targets, _ = make(24, 24, 301)
    stats = fused_lens(hidden.view(4, 6, 24), unembedding, None, targets.view(4, 6), precision="certified")
    assert stats.logsumexp_bound.shape == stats.fell_back.shape == (4, 6) and stats.fell_back.dtype == torch.bool
    strided = fused_lens(hidden.T.contiguous().T, unembedding.T.contiguous().T, None, targets, precision="certified")
    assert torch.equal(strided.target_rank, stats.target_rank.view(-1))
    assert fused_lens(hidden, unembedding).logsumexp_bound is None
    empty = fused_lens(hidden[:0], unembedding, precision="certified")
    assert empty.logsumexp_bound.shape == empty.fell_back.shape == (0,)


@pytest.mark.medium
def test_opcheck():
    hidden, unembedding, targets, randn = make(6, 8, 50)
    op = torch.ops.refinelens.fused_lens.default
    full = (hidden, unembedding, "layer", randn(8), randn(8), 1e-5, 0.0, targets, randn(50), 9.0, 0.5, "cpp")
    bare = (hidden, unembedding, "none", None, None, 0.0, 0.0, None, None, None, 1.0, "auto")
    for arguments in (full, bare):
        assert set(torch.library.opcheck(op, (*arguments, "certified")).values()) == {"SUCCESS"}


def test_more_tokens_than_are_counted_are_refused():
    with pytest.raises(ValueError, match=r"expected 1 to 2\^31 - 1 tokens.*got \(2147483648, 1\)"):
        _C.ScreenIndex(numpy.broadcast_to(numpy.float32(0), (2**31, 1)), 1)


def test_where_it_cannot_run_it_is_refused(monkeypatch):
    hidden, unembedding, _, _ = make(3, 8, 20)
    with pytest.raises(InputError, match="got backend 'reference' on 'cpu'"):
        fused_lens(hidden, unembedding, backend="reference", precision="certified")
    with pytest.raises(InputError, match="precision: expected one of auto, fp32, certified, got 'fp64'"):
        fused_lens(hidden, unembedding, precision="fp64")
    with pytest.raises(InputError, match="got backend 'triton' on 'cuda'"):
        choose_precision("triton", "cuda", "certified")


def test_auto_runs_what_it_says(screen):
    rows, d_model = CERTIFIED_ROWS, CERTIFIED_WIDTH
    hidden, unembedding, targets, _ = make(rows, d_model, 97)
    auto, few = (fused_lens(hidden[:n], unembedding, None, targets[:n]) for n in (rows, rows - 1))
    chosen = choose_precision("cpp", "cpu", rows=rows, d_model=d_model)[0]
    wanted, fp32 = (
        fused_lens(hidden[:n], unembedding, None, targets[:n], precision=p)
        for n, p in ((rows, chosen), (rows - 1, "fp32"))
    )
    assert torch.equal(auto.logsumexp, wanted.logsumexp) and torch.equal(few.logsumexp, fp32.logsumexp)
    assert auto.logsumexp_bound is None and auto.fell_back is None


def test_what_auto_means(screen):
    kernels, digits = _C.screen_kernels(64)
    assert (CERTIFIED_FROM[kernels] is None) == (digits == 1)  # of 16 bits, whose logsumexp is less exact than fp32
    expected = "certified" if digits == 3 else "fp32"
    rows, width = CERTIFIED_ROWS, CERTIFIED_WIDTH
    assert choose_precision("cpp", "cpu", rows=rows, d_model=width)[0] == expected
    assert choose_precision("cpp", "cpu", rows=rows - 1, d_model=width)[0] == "fp32"
    assert choose_precision("cpp", "cpu", rows=rows, d_model=width - 1)[0] == "fp32"
    assert choose_precision("reference", "cpu")[0] == "fp32"


def test_rows_that_would_take_long_are_left_to_fp32_unless_asked_for():
    """All logits of row 3 are equal, which no bound tells apart; the other rows are certified either way."""
    hidden, unembedding = torch.randn(9, 16), torch.randn(4000, 16)
    hidden[3] = 0.0
    targets = torch.randint(0, 4000, (9,))
    screened = fused_lens_screened(hidden, LensHead(unembedding), targets)
    fp32 = fused_lens(hidden, unembedding, None, targets, precision="fp32")
    cpu = fused_lens(hidden, unembedding, None, targets, precision="certified")
    assert cpu.fell_back.tolist() == [row == 3 for row in range(9)]
    for name, _ in screened.items():
        expected = getattr(cpu, name).clone()
        expected[3] = getattr(fp32, name)[3]
        assert torch.equal(getattr(screened, name), expected), name
    assert int(screened.target_rank[3]) == int(targets[3])
