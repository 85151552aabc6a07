"""The Triton lens against its fp64 twin: in Triton's interpreter, or compiled where there is a GPU."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from refinelens.kernels import configs, lens_common, lens_triton, schedule
from refinelens.kernels.configs import LensConfig
from refinelens.kernels.lens_common import linear_logits
from refinelens.kernels.lens_triton import fused_lens_triton
from refinelens.kernels.lens_twin import fused_lens_twin
from refinelens.kernels.norms import LayerNorm, RMSNorm, apply_norm
from refinelens.kernels.norms_triton import normed_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = LensConfig(32, 32, 16, 32, num_warps=4, num_stages=2, splits=3)
FEW_ROWS = LensConfig(16, 32, 32, 32, num_warps=4, num_stages=2, kind="few_rows", splits=2)
SPECIALIZED = LensConfig(32, 32, 16, 64, num_warps=4, num_stages=2, kind="specialized", splits=2)
KINDS = [pytest.param(config, id=config.kind) for config in (SMALL, FEW_ROWS, SPECIALIZED)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [
    pytest.param(1, 1, 1, id="all-one"),  # every dimension far below its block, more splits than tiles
    pytest.param(2, 17, 2, id="prime-width"),  # d_model divides nothing: the unaligned loads
    pytest.param(129, 64, 33, id="one-more-row-and-token"),  # one row and one token more than whole tiles
    pytest.param(2, 65, 257, id="one-more-column"),  # one column more than the padding, an odd vocabulary
]
NORMS = {
    "none": lambda d: None,
    "layer": lambda d: LayerNorm(1 + 0.2 * randn(d, seed=7), randn(d, seed=8)),
    "layer-plain": lambda d: LayerNorm(None),
    "rms": lambda d: RMSNorm(1 + 0.2 * randn(d, seed=7)),
    "rms-offset": lambda d: RMSNorm(0.2 * randn(d, seed=7), offset=1.0),
    "rms-plain": lambda d: RMSNorm(None),
}
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device; too large for the interpreter")


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    """Whatever the launcher allocates starts as NaN or -1: an entry that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


def randn(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def randint(low, high, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE)


def operands(n_rows, d_model, n_vocab, dtype):
    """Hidden states that no norm would leave alone, unembedding, targets."""
    hidden = (3 * randn(n_rows, d_model, seed=1) + 0.5).to(dtype)
    targets = randint(0, n_vocab, (n_rows,), seed=3)
    return hidden, randn(n_vocab, d_model, seed=2, dtype=dtype), targets


def check(hidden, unembedding, norm=None, targets=None, bias=None, softcap=None, logit_scale=1.0, config=SMALL):
    """Compare with fp64 within the error of torch's own computation; return the output and the count of
    rows whose argmax or rank that error leaves open."""
    options = (norm, targets, bias, softcap, logit_scale)
    out = fused_lens_triton(hidden, unembedding, *options, config=config)
    truth = fused_lens_twin(hidden, unembedding, *options, dtype=torch.float64)
    z = linear_logits(apply_norm(hidden, norm, torch.float64), unembedding, bias, logit_scale)
    # Without a norm nothing is rounded to the operands' dtype, and fp32 accuracy is due.
    own_dtype = torch.float32 if norm is None else hidden.dtype
    own_z = linear_logits(apply_norm(hidden, norm).to(own_dtype), unembedding, bias, logit_scale)
    slack = 4 if own_dtype == torch.float32 else 1  # orders of summation differ; logits are not rounded
    error = slack * (own_z.double() - z).abs().max() + 8 * 2**-23 * z.abs().max().clamp(min=1)
    if softcap is not None:
        error += 8 * 2**-23 * softcap  # the cap is a difference of numbers of its own size
    spread = max(1.0, torch.tensor(float(z.shape[1])).log().item())  # of log-probabilities, in the entropy
    for name in ("max_logit", "logsumexp", "entropy", "target_logit"):
        got, expected = getattr(out, name), getattr(truth, name)
        if expected is None:
            assert got is None
            continue
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert (got - expected).abs().max() <= error * (spread if name == "entropy" else 1), name
    return out, check_order(out, truth, z, targets, 2 * error)


def check_order(out, truth, z, targets, error):
    n_rows = len(z)
    assert out.argmax.dtype == torch.int64
    behind = z.max(1).values - z.gather(1, out.argmax[:, None])[:, 0]
    open_rows = out.argmax != truth.argmax
    assert (behind[open_rows] <= error).all()
    if targets is None:
        assert out.target_rank is None
        return int(open_rows.sum())
    assert out.target_rank.dtype == torch.int64
    assert torch.equal(out.target_rank == 0, out.argmax == targets)
    close = ((z - z.gather(1, targets[:, None])).abs() <= error).sum(1) - 1  # but for the target itself
    assert ((out.target_rank - truth.target_rank).abs() <= close).all()
    open_rows |= out.target_rank != truth.target_rank
    assert open_rows.shape == (n_rows,)
    return int(open_rows.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows, d_model, n_vocab", SIZES)
def test_plain_sizes_to_fp32_accuracy(n_rows, d_model, n_vocab, dtype):
    hidden, unembedding, targets = operands(n_rows, d_model, n_vocab, dtype)
    _, left_open = check(hidden, unembedding, targets=targets)
    assert left_open <= 0.02 * n_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", [name for name in NORMS if name != "none"])
def test_norms(norm, dtype):
    hidden, unembedding, targets = operands(5, 17, 33, dtype)
    check(hidden, unembedding, NORMS[norm](17), targets)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_prepass_rounds_once_and_pads_with_zeros(norm, dtype):
    hidden = operands(5, 17, 1, dtype)[0]
    x_hat = normed_rows(hidden, NORMS[norm](17), row_multiple=8)
    assert x_hat.shape == (8, 64) and x_hat.dtype == dtype
    assert not x_hat[5:].any() and not x_hat[:, 17:].any()
    exact = apply_norm(hidden, NORMS[norm](17), torch.float64)
    half_step = torch.finfo(dtype).eps / 2
    fp32_error = (apply_norm(hidden, NORMS[norm](17)) - exact).abs().max() + 2**-22 * exact.abs().max()
    assert ((x_hat[:5, :17] - exact).abs() <= half_step * exact.abs() + 2 * fp32_error).all()


@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        dict(bias=True),
        dict(softcap=5.0),
        dict(logit_scale=0.0625),
        dict(bias=True, softcap=5.0, logit_scale=0.3),
    ],
    ids=["bias", "softcap", "scale", "all"],
)
def test_options(options, with_targets):
    hidden, unembedding, targets = operands(5, 17, 67, torch.float32)
    if "bias" in options:
        options = {**options, "bias": 3 * randn(67, seed=4)}
    _, left_open = check(hidden, unembedding, NORMS["layer"](17), targets if with_targets else None, **options)
    assert left_open == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [64, 65], ids=["aligned", "unaligned"])
def test_pinned_configuration(d_model, dtype):
    hidden, unembedding, targets = operands(3, d_model, 257, dtype)
    assert configs.is_aligned(unembedding) == (d_model == 64)
    check(hidden, unembedding, targets=targets, bias=randn(257, seed=4), config=None)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_rank_all_tokens_as_a_permutation(dtype, splits):
    # Small integers: sums are exact in fp32, so equal logits are equal bits on every backend.
    n_vocab, n_contexts = 70, 2
    unembedding = randint(-2, 3, (n_vocab, 16), seed=5).to(dtype)
    unembedding[40:60] = unembedding[5:25]
    hidden = randint(-2, 3, (n_contexts, 16), seed=6).to(dtype).repeat_interleave(n_vocab, 0)
    targets = torch.arange(n_vocab, device=DEVICE).repeat(n_contexts)
    config = replace(SMALL, splits=splits)
    out = fused_lens_triton(hidden, unembedding, targets=targets, config=config)
    truth = fused_lens_twin(hidden, unembedding, targets=targets, dtype=torch.float64)
    for name in ("argmax", "target_rank", "max_logit", "target_logit"):
        assert torch.equal(getattr(out, name).double(), getattr(truth, name).double()), name
    ranks = out.target_rank.view(n_contexts, n_vocab)
    assert torch.equal(ranks.sort(1).values, torch.arange(n_vocab, device=DEVICE).expand(n_contexts, -1))
    assert torch.equal(out.target_rank == 0, out.argmax == targets)


def test_all_logits_equal():
    targets = torch.tensor([0, 1, 31, 32, 66], device=DEVICE)  # first, own tile, tile border, last
    hidden = torch.zeros(5, 17, device=DEVICE)
    out = fused_lens_triton(hidden, randn(67, 17, seed=2), targets=targets, config=SMALL)
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
    out = fused_lens_triton(hidden, unembedding, targets=targets, bias=bias, config=config)
    kept = fused_lens_twin(hidden, unembedding[32:69], bias=bias[32:69], dtype=torch.float64)
    assert torch.equal(out.argmax, kept.argmax + 32)
    torch.testing.assert_close(out.logsumexp.double(), kept.logsumexp, rtol=2**-22, atol=0)
    step = 300 * 2**-23  # of a logit in fp32
    torch.testing.assert_close(out.entropy.double(), kept.entropy, rtol=0, atol=2 * step)
    assert out.target_rank[1:].tolist() == [37, 69]  # the 37 tokens that can occur, then ids in order


def test_target_never_beats_itself(monkeypatch):
    # Another order of summation may put the target's own product below its column of the main product.
    n_vocab = 70
    hidden = torch.ones(n_vocab, 16, device=DEVICE)
    unembedding = randint(0, n_vocab, (n_vocab, 1), seed=5) * torch.eye(16, device=DEVICE)[0]
    targets = torch.arange(n_vocab, device=DEVICE)
    launch = lens_triton.launch_targets

    def lower(rows, options):
        launch(rows, options)
        rows.target_z.sub_(0.5)

    monkeypatch.setattr(lens_triton, "launch_targets", lower)
    monkeypatch.setattr(lens_triton, "has_same_bits", lambda options: False)
    out = fused_lens_triton(hidden, unembedding, targets=targets, config=SMALL)
    z = unembedding[:, 0]
    above = (z[None] > z[:, None] - 0.5).sum(1) - 1  # all that reach the lowered logit but the target itself
    is_top = out.argmax == targets
    assert is_top.sum() == 1
    assert torch.equal(out.target_rank[~is_top], above[~is_top].clamp(min=1))


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_nan_stays_in_its_row():
    hidden, unembedding, targets = operands(35, 17, 67, torch.float32)
    clean = fused_lens_triton(hidden, unembedding, NORMS["rms"](17), targets, config=SMALL)
    hidden[3, 5] = float("nan")
    out = fused_lens_triton(hidden, unembedding, NORMS["rms"](17), targets, config=SMALL)
    assert out.logsumexp.isnan().nonzero().tolist() == [[3]]
    assert 0 <= out.argmax[3] < 67
    others = torch.arange(35, device=DEVICE) != 3
    for got, expected in zip(out, clean, strict=True):
        assert torch.equal(got[others], expected[others])


def test_nan_in_the_unembedding_reaches_every_row():
    hidden, unembedding, targets = operands(3, 17, 67, torch.float32)
    unembedding[66, 0] = float("nan")
    out = fused_lens_triton(hidden, unembedding, targets=targets, config=SMALL)
    assert out.logsumexp.isnan().all()


def test_strides_do_not_matter():
    _, unembedding, targets = operands(5, 17, 67, torch.float32)
    hidden = randint(-4, 5, (5, 17), seed=1).float()  # exact squares: their order is the compiler's choice
    weight, bias = NORMS["layer"](17).weight, randn(67, seed=4)
    expected = fused_lens_triton(hidden, unembedding, RMSNorm(weight), targets, bias, config=SMALL)

    def every_second(tensor):
        return torch.stack([tensor, torch.full_like(tensor, 99)], -1).flatten(-2)[..., ::2]

    got = fused_lens_triton(
        hidden.T.contiguous().T,
        every_second(unembedding),
        RMSNorm(every_second(weight)),
        every_second(targets),
        every_second(bias),
        config=SMALL,
    )
    transposed = fused_lens_triton(
        hidden.repeat(2, 1)[:5],
        unembedding.T.contiguous().T,
        RMSNorm(weight),
        targets,
        bias,
        config=SMALL,
    )
    for name, value in expected._asdict().items():
        assert torch.equal(getattr(got, name), value), name
        assert torch.equal(getattr(transposed, name), value), name


def test_one_target_for_all_rows_without_a_copy():
    hidden, unembedding, _ = operands(5, 17, 67, torch.float32)
    targets = torch.tensor([41], device=DEVICE).expand(5)
    assert check(hidden, unembedding, targets=targets)[1] == 0


def test_chunks_of_rows_give_the_same_bits(monkeypatch):
    hidden, unembedding, targets = operands(70, 17, 67, torch.float32)
    whole = fused_lens_triton(hidden, unembedding, targets=targets, config=SMALL)
    monkeypatch.setattr(schedule, "X_HAT_BYTES", 1)  # one row block at a time
    chunked = fused_lens_triton(hidden, unembedding, targets=targets, config=SMALL)
    for got, expected in zip(chunked, whole, strict=True):
        assert torch.equal(got, expected)


def test_target_outside_the_vocabulary_is_not_read():
    hidden, unembedding, targets = operands(3, 17, 67, torch.float32)
    expected = fused_lens_triton(hidden, unembedding, targets=targets, config=SMALL)
    targets[1] = 2**40
    out = fused_lens_triton(hidden, unembedding, targets=targets, config=SMALL)
    assert out.target_rank[[0, 2]].tolist() == expected.target_rank[[0, 2]].tolist()


def test_no_rows():
    hidden, unembedding, targets = operands(0, 17, 67, torch.float32)
    assert [value.shape for value in fused_lens_triton(hidden, unembedding, None, targets)] == [(0,)] * 6


def test_unknown_dtype_is_refused():
    double = torch.zeros(2, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="bfloat16, float16 or float32 operands, got torch.float64"):
        fused_lens_triton(double, double)
    with pytest.raises(ValueError, match="block_k: expected a divisor of 64, got 128"):
        LensConfig(32, 32, 32, 128, num_warps=4, num_stages=2)


@pytest.mark.parametrize("d_model, itemsize", [(1, 2), (576, 2), (768, 4), (4096, 2), (16384, 4)])
@pytest.mark.parametrize("n_rows", [1, 129, 13 * 16384, 10**7])
def test_buffers_stay_small(n_rows, d_model, itemsize):
    width = -(-d_model // 64) * 64
    blocks = schedule.chunk_blocks(n_rows, width * itemsize, block_m=128)
    splits = schedule.choose_splits(blocks, tiles=501, processors=132)
    assert 1 <= splits <= 501
    rows = 128 * blocks
    assert rows * width * itemsize + rows * splits * 20 <= 64 * 10**6


def test_splits_fill_the_processors():
    assert schedule.choose_splits(row_blocks=1, tiles=197, processors=132) == 99  # two tiles a program
    assert schedule.choose_splits(row_blocks=104, tiles=197, processors=132) == 5  # 520 programs, 4 waves
    assert schedule.choose_splits(row_blocks=128, tiles=197, processors=132) == 1


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [576, 768])
def test_model_sized(d_model, dtype):
    n_rows, n_vocab = 1024 + 3, 50257  # GPT-2's vocabulary, rows that end inside a block
    hidden, unembedding, targets = operands(n_rows, d_model, n_vocab, dtype)
    unembedding *= d_model**-0.5
    out, left_open = check(hidden, unembedding, None, targets, config=None)
    print(f"{dtype} d_model {d_model}: {left_open} of {n_rows} rows left open, top logit {out.max_logit.max():.2f}")
    assert left_open <= 0.1 * n_rows


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [576, 768])
def test_target_logit_is_that_of_the_main_product(d_model, dtype, monkeypatch):
    hidden, unembedding, _ = operands(1024 + 3, d_model, 50257, dtype)
    top = fused_lens_triton(hidden, unembedding).argmax
    # Without settling ties the target's own product stays visible beside the largest logit.
    monkeypatch.setattr(lens_common, "settle_ties", lambda argmax, best, targets, logit, rank: (logit, rank))
    out = fused_lens_triton(hidden, unembedding, targets=top)
    mismatches = int((out.target_logit != out.max_logit).sum())
    print(f"{dtype} d_model {d_model}: {mismatches} of 1027 target logits differ from the main product")
    torch.testing.assert_close(out.target_logit, out.max_logit, rtol=2e-6, atol=1e-4)
