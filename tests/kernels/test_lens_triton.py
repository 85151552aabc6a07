"""The Triton lens against its fp64 reference: in Triton's interpreter, or compiled where there is a GPU."""

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import BF16, DEVICE, DTYPES, FEW_ROWS, NORMS, SMALL, TMA, check, operands, poison_buffers, randn
from refinelens.kernels.config import LensConfig, is_aligned
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.norm_kernel import normed_rows
from refinelens.kernels.reference import LensHead, apply_norm

SLOW = pytest.mark.slow  # minutes in the interpreter
SIZES = [
    pytest.param(1, 1, 1, id="all-one"),  # every dimension far below its block, more splits than tiles
    pytest.param(2, 17, 2, id="prime-width"),  # d_model divides nothing: the unaligned loads
    pytest.param(129, 64, 33, id="one-more-row-and-token"),  # one row and one token more than whole tiles
    pytest.param(2, 65, 257, id="one-more-column"),  # one column more than the padding, an odd vocabulary
]


@pytest.fixture(autouse=True)
def poisoned_buffers(monkeypatch):
    poison_buffers(monkeypatch)


@pytest.mark.medium
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows, d_model, n_vocab", SIZES)
def test_plain_sizes_to_fp32_accuracy(n_rows, d_model, n_vocab, dtype):
    hidden, unembedding, targets = operands(n_rows, d_model, n_vocab, dtype)
    _, left_open = check(hidden, unembedding, targets=targets)
    assert left_open <= 0.02 * n_rows


KINDS = [
    *(pytest.param(config, dtype, id=f"{config.kind}-{dtype}") for config in (SMALL, FEW_ROWS) for dtype in DTYPES),
    *(pytest.param(TMA, dtype, id=f"tma-{dtype}") for dtype in (torch.float16, BF16)),
]
OPTIONS = {
    "plain": dict(),
    "softcap": dict(softcap=5.0, logit_scale=0.3),
    "bias": dict(bias=True),
    "bias-softcap": dict(bias=True, softcap=5.0),
}


# What is multiplied in each dtype, the tests of sizes and of the pinned configurations have.
OF_EVERY_DTYPE = [pytest.param(*kind.values, id=kind.id, marks=[] if BF16 in kind.values else SLOW) for kind in KINDS]


@pytest.mark.medium
@pytest.mark.parametrize("config, dtype", OF_EVERY_DTYPE)
def test_kinds(config, dtype):
    """Several tiles and an odd rest, with all options."""
    check_kind(config, dtype, 70, OPTIONS)


# How a vocabulary is cut is the same in every dtype.
@pytest.mark.parametrize("n_vocab, names", [(31, ["plain"]), (32, ["plain"]), (33, ["plain", "bias-softcap"])])
@pytest.mark.parametrize("config, dtype", OF_EVERY_DTYPE)
@pytest.mark.medium
def test_kinds_at_the_border_of_a_tile(config, dtype, n_vocab, names):
    """No whole tile, exactly one, one and one token more."""
    check_kind(config, dtype, n_vocab, names)


def check_kind(config, dtype, n_vocab, names):
    hidden, unembedding, ids = operands(17, 80, n_vocab, dtype)  # a row more than a block of 16
    for name in names:
        options = OPTIONS[name]
        if "bias" in options:
            options = options | dict(bias=randn(n_vocab, seed=4))
        for targets in (ids, None):
            _, left_open = check(hidden, unembedding, None, targets, **options, config=config)
            assert left_open <= 1, name


# What a norm does in each dtype the test of the pre-pass has.
@pytest.mark.parametrize("dtype", [BF16, *(pytest.param(dtype, marks=SLOW) for dtype in DTYPES if dtype != BF16)])
@pytest.mark.parametrize("norm", [name for name in NORMS if name != "none"])
@pytest.mark.medium
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


# By the number of rows the tiles of every dtype differ, but not how they are cut.
@pytest.mark.medium
@pytest.mark.parametrize("d_model", [64, 65], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "n_rows, dtype",
    [
        pytest.param(n_rows, dtype, marks=[] if n_rows == 17 or dtype == BF16 else SLOW)
        for n_rows in (3, 17, 65)
        for dtype in DTYPES
    ],
)
def test_pinned_configuration(n_rows, d_model, dtype):
    hidden, unembedding, targets = operands(n_rows, d_model, 257, dtype)
    assert is_aligned(unembedding) == (d_model == 64)
    check(hidden, unembedding, targets=targets, bias=randn(257, seed=4), config=None)


# The five tile sizes by row count, all but the first by TMA where there are no targets (or a device has the same bits).
@pytest.mark.parametrize("n_rows", [3, 17, 65, 129, 200])
@pytest.mark.medium
def test_pinned_configuration_of_plain_logits(n_rows):
    hidden, unembedding, targets = operands(n_rows, 64, 300, BF16)
    for given in (targets, None):
        check(hidden, unembedding, targets=given, config=None)


def test_no_rows():
    hidden, unembedding, targets = operands(0, 17, 67, torch.float32)
    stats = fused_lens_triton(hidden, LensHead(unembedding), targets)
    assert [value.shape for _, value in stats.items()] == [(0,)] * 6


def test_unknown_dtype_is_refused():
    double = torch.zeros(2, 16, dtype=torch.float64, device=DEVICE)
    with pytest.raises(ValueError, match="bfloat16, float16 or float32 operands, got torch.float64"):
        fused_lens_triton(double, LensHead(double))
    with pytest.raises(ValueError, match="block_k: expected a divisor of 64, got 128"):
        LensConfig(32, 32, 32, 128, num_warps=4, num_stages=2)
