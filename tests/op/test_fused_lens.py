"""The fused lens on the CPU backends, against whole logits in fp64."""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import refinelens
from refinelens import LayerNorm, RMSNorm, fused_lens
from refinelens.errors import InputError
from refinelens.kernels.reference import LensHead, LensStats, fused_lens_reference
from refinelens.op import backends
from refinelens.op.backends import choose_backend
from refinelens.op.fused_lens import values_fit
from tiny import assert_matches_truth, skip_unless_isa_runs, truth

BACKENDS = ("cpp", "reference")


@pytest.fixture(params=["cpp-v4", "cpp-v3", "cpp-baseline", "reference"])
def backend(request, monkeypatch):
    """Name of a backend; the C++ one on every instruction set of this processor."""
    name, _, isa = request.param.partition("-")
    if isa:
        monkeypatch.setenv("REFINELENS_ISA", isa)
        skip_unless_isa_runs()
    return name


def make(rows=37, d_model=24, vocab=1031, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    targets = torch.randint(0, vocab, (rows,), generator=generator)
    return randn(rows, d_model) * 3, randn(vocab, d_model), targets, randn


NORMS = {
    "none": lambda randn, d: None,
    "layer": lambda randn, d: LayerNorm(randn(d), randn(d), 1e-5),
    "layer-plain": lambda randn, d: LayerNorm(None),
    "rms": lambda randn, d: RMSNorm(randn(d), 1e-6),
    "rms-offset": lambda randn, d: RMSNorm(randn(d), 1e-6, offset=1.0),
}


@pytest.mark.parametrize("norm_name", NORMS)
@pytest.mark.parametrize("with_bias, softcap, scale", [(False, None, 1.0), (True, 12.0, 0.25), (True, None, 3.0)])
def test_agrees_with_fp64(backend, norm_name, with_bias, softcap, scale):
    hidden, unembedding, targets, randn = make()
    options = (NORMS[norm_name](randn, 24), targets, randn(len(unembedding)) if with_bias else None, softcap, scale)
    stats = fused_lens(hidden, unembedding, *options, backend=backend)
    exact, same = (truth(hidden, unembedding, *options, dtype=d) for d in (torch.float64, torch.float32))
    assert assert_matches_truth(stats, exact, same, targets) <= 1
    assert torch.equal(stats.target_logprob, (stats.target_logit - stats.logsumexp).clamp(max=0.0))


# One row and one token; a prime; one more than a vector's 16 lanes; one more than the reference's chunk of 2048 and
# many ranges of the vocabulary; one row more than the reference's chunk of 512.
@pytest.mark.parametrize(
    "rows, d_model, vocab", [(1, 1, 1), (1, 7, 2), (2, 5, 17), (3, 1, 8193), (5, 16, 2049), (513, 3, 31)]
)
def test_odd_sizes(backend, rows, d_model, vocab):
    hidden, unembedding, targets, _ = make(rows, d_model, vocab)
    stats = fused_lens(hidden, unembedding, None, targets, backend=backend)
    exact, same = (truth(hidden, unembedding, None, targets, dtype=d) for d in (torch.float64, torch.float32))
    assert_matches_truth(stats, exact, same, targets)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_lose_nothing(backend, dtype):
    """Inputs are widened, so the error is that of fp32, far below torch's own in the same dtype."""
    hidden, unembedding, targets, randn = make(64, 32, 3001, dtype)
    norm = LayerNorm(randn(32), randn(32))
    stats = fused_lens(hidden, unembedding, norm, targets, backend=backend)
    exact, fp32 = (truth(hidden, unembedding, norm, targets, dtype=d) for d in (torch.float64, torch.float32))
    assert assert_matches_truth(stats, exact, fp32, targets) <= 1
    assert stats.logsumexp.dtype == torch.float32 and stats.argmax.dtype == stats.target_rank.dtype == torch.int64


def test_ties_go_to_the_lower_id(backend):
    """Small integers are exact in fp32, so argmax and rank must be equal to the truth, ties included."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randint(-2, 3, (200, 6), generator=generator).float()
    unembedding = torch.randint(-2, 3, (700, 6), generator=generator).float()  # hundreds of duplicate rows
    targets = torch.randint(0, 700, (200,), generator=generator)
    targets[:50] = fused_lens(hidden[:50], unembedding, backend="reference").argmax
    stats = fused_lens(hidden, unembedding, None, targets, backend=backend)
    exact = truth(hidden, unembedding, None, targets)
    assert torch.equal(stats.argmax, exact["argmax"])
    assert torch.equal(stats.target_rank, exact["target_rank"])
    assert (stats.target_rank[:50] == 0).all()


def test_all_logits_equal(backend):
    targets = torch.tensor([0, 5, 999])
    stats = fused_lens(torch.zeros(3, 4), torch.randn(1000, 4), None, targets, backend=backend)
    assert stats.argmax.tolist() == [0, 0, 0]
    assert stats.target_rank.tolist() == [0, 5, 999]
    torch.testing.assert_close(stats.entropy, torch.full((3,), 1000.0).log())


def test_tokens_masked_by_a_bias_of_minus_infinity(backend):
    """More masked tokens than a tile, first: they have probability 0 and add nothing to the entropy."""
    hidden, unembedding, targets, _ = make(5, 8, 9000)
    bias = torch.zeros(9000)
    bias[:8500] = float("-inf")
    stats = fused_lens(hidden, unembedding, None, targets % 500 + 8500, bias, backend=backend)
    rest = fused_lens(hidden, unembedding[8500:], None, targets % 500, backend=backend)
    assert torch.equal(stats.argmax, rest.argmax + 8500) and torch.equal(stats.target_rank, rest.target_rank)
    torch.testing.assert_close(stats.logsumexp, rest.logsumexp)
    torch.testing.assert_close(stats.entropy, rest.entropy)


@pytest.mark.parametrize("masked", [2000, 9000])
def test_a_softcap_makes_a_bias_of_minus_infinity_finite(backend, masked):
    """The logit of such tokens is minus the cap, so that they weigh something; more of them than a tile, or all."""
    hidden, unembedding, targets, _ = make(5, 8, 9000)
    bias = torch.zeros(9000)
    bias[9000 - masked :] = float("-inf")
    options = (None, targets % 1000, bias, 2.0)
    stats = fused_lens(hidden, unembedding, *options, backend=backend)
    exact = truth(hidden, unembedding, *options)
    for name in ("max_logit", "logsumexp", "entropy"):
        torch.testing.assert_close(getattr(stats, name).double(), exact[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_of_a_class_of_ones_own(backend):
    class Own(RMSNorm):
        pass

    hidden, unembedding, _, randn = make()
    weight = randn(24)
    own, same = (fused_lens(hidden, unembedding, norm(weight), backend=backend) for norm in (Own, RMSNorm))
    assert torch.equal(own.logsumexp, same.logsumexp)


@pytest.mark.medium
def test_parameters_that_are_trained_leave_no_graph():
    hidden, unembedding, targets, _ = make(12, 8, 50)
    weight = torch.nn.Parameter(unembedding)
    stats = fused_lens(hidden.requires_grad_(), weight, RMSNorm(torch.nn.Parameter(torch.ones(8))), targets)
    assert len(stats.target_logprob.numpy()) == 12
    compiled = torch.compile(
        lambda x: fused_lens(x, weight, None, 3).entropy * 2, backend="aot_eager", fullgraph=True
    )
    assert torch.equal(compiled(hidden), fused_lens(hidden, weight, None, 3).entropy * 2)


HOW = ({"backend": "reference"}, {"backend": "cpp", "precision": "fp32"}, {"backend": "cpp", "precision": "certified"})


# One row and one token; a prime; one more than a vector; one more than a tile of 96 tokens.
@settings(max_examples=40, deadline=None)
@given(
    rows=st.sampled_from([1, 3, 17]),
    d_model=st.sampled_from([1, 7, 33]),
    vocab=st.sampled_from([1, 2, 17, 97, 211]),
    levels=st.sampled_from([1, 2, 50, None]),
    seed=st.integers(0, 2**32),
)
def test_every_backend_ranks_alike(rows, d_model, vocab, levels, seed):
    """Of whole numbers every sum is exact, and of few of them many tokens tie: argmax and ranks are those of fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        if levels is None:
            return torch.randn(shape, generator=generator)
        return torch.randint(-levels, levels + 1, shape, generator=generator).float()

    hidden, unembedding = draw(rows, d_model), draw(vocab, d_model)
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    own = truth(hidden, unembedding, None, targets)["argmax"]
    targets = torch.where(torch.rand(rows, generator=generator) < 0.5, own, targets)
    exact = truth(hidden, unembedding, None, targets)
    wide = fused_lens_reference(hidden.double(), LensHead(unembedding.double()), targets)
    for stats in (wide, *(fused_lens(hidden, unembedding, None, targets, **how) for how in HOW)):
        assert torch.equal(stats.target_rank == 0, stats.argmax == targets)
        if levels is not None or stats is wide:
            assert torch.equal(stats.argmax, exact["argmax"])
            assert torch.equal(stats.target_rank, exact["target_rank"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(10))
def test_ties_among_tokens_that_cannot_occur(backend, seed):
    """A target of logit -inf is beaten by everything else and by its equals of lower id, over several chunks."""
    generator = torch.Generator().manual_seed(seed)
    vocab = 16411  # a prime, two chunks of the reference and a rest
    hidden = torch.randint(-2, 3, (30, 3), generator=generator).float()
    unembedding = torch.randint(-2, 3, (vocab, 3), generator=generator).float()
    bias = torch.where(torch.rand(vocab, generator=generator) < 0.4, float("-inf"), 0.0)
    bias[0] = 0.0
    targets = torch.randint(0, vocab, (30,), generator=generator)
    stats = fused_lens(hidden, unembedding, None, targets, bias, backend=backend)
    exact = truth(hidden, unembedding, None, targets, bias)
    assert torch.equal(stats.argmax, exact["argmax"])
    assert torch.equal(stats.target_rank, exact["target_rank"])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_broadcasting_and_strides(backend):
    hidden, unembedding, _, _ = make(24, 24, 301)
    by_layer = hidden.reshape(4, 2, 3, 24)
    targets = torch.tensor([[5, 300, 0], [1, 2, 3]])
    stats = fused_lens(by_layer, unembedding, targets=targets, backend=backend)
    assert stats.argmax.shape == stats.target_rank.shape == (4, 2, 3)
    flat = fused_lens(hidden, unembedding, targets=targets.expand(4, 2, 3).reshape(-1), backend=backend)
    assert torch.equal(stats.target_rank.view(-1), flat.target_rank)
    strided = fused_lens(hidden.T.contiguous().T, unembedding.T.contiguous().T, targets=7, backend=backend)
    torch.testing.assert_close(strided.logsumexp, flat.logsumexp)
    expanded = fused_lens(hidden[:1].expand(5, 24), unembedding, targets=7, backend=backend)
    assert (expanded.target_rank == expanded.target_rank[0]).all()
    single = fused_lens(hidden[0], unembedding, backend=backend)
    assert single.argmax.shape == () and single.target_rank is None and single.target_logprob is None
    empty = fused_lens(hidden[:0], unembedding, targets=7, backend=backend)
    assert empty.argmax.shape == empty.target_rank.shape == (0,)


@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_a_broken_row_is_named(backend, value, word):
    hidden, unembedding, targets, _ = make(10, 8, 100)
    hidden[7, 3] = value
    norm = LayerNorm(None)
    with pytest.raises(ValueError, match=rf"hidden: expected finite values, got {word} in row 7 of 10.*1 rows"):
        fused_lens(hidden, unembedding, norm, targets, backend=backend)


def test_an_infinity_is_named_also_under_a_softcap(backend):
    """tanh makes an infinite logit finite again; the row is refused all the same."""
    hidden, unembedding, targets, _ = make(10, 8, 100)
    hidden[7, 3] = float("inf")
    with pytest.raises(ValueError, match="got infinity in row 7 of 10"):
        fused_lens(hidden, unembedding.abs(), None, targets, softcap=5.0, backend=backend)


def test_broken_weights_are_not_blamed_on_hidden():
    hidden, unembedding, targets, _ = make(10, 8, 100)
    unembedding[50, 0] = float("nan")
    with pytest.raises(ValueError, match="although the row is"):
        fused_lens(hidden, unembedding, None, targets)


def bad_calls():
    hidden, unembedding, targets, _ = make(10, 8, 100)
    weight = torch.ones(8)
    yield "d_model", (hidden, unembedding[:, :5]), {}, r"got \[10, 8\] and \[100, 5\]"
    yield "dtypes", (hidden, unembedding.bfloat16()), {}, "got torch.float32 and torch.bfloat16"
    yield "fp64", (hidden.double(), unembedding.double()), {}, "got torch.float64"
    yield "target above", (hidden, unembedding), {"targets": 100}, "expected ids from 0 to 99, got 100 at row 0"
    yield "target below", (hidden, unembedding), {"targets": targets - 200}, "expected ids from 0 to 99, got -"
    yield "target shape", (hidden, unembedding), {"targets": targets[:3]}, r"broadcasts to \[10\], got \[3\]"
    yield "target dtype", (hidden, unembedding), {"targets": targets.float()}, "integer ids, got torch.float32"
    yield "norm weight", (hidden, unembedding, LayerNorm(weight[:5])), {}, r"norm.weight: .*\[8\], got .*\[5\]"
    yield "norm type", (hidden, unembedding, torch.nn.BatchNorm1d(8)), {}, "norm: .*got torch.nn.*BatchNorm1d; make"
    yield "bias", (hidden, unembedding), {"bias": torch.ones(99)}, r"bias: .*\[100\], got .*\[99\]"
    yield "no tensor", ([[1.0]], unembedding), {}, "hidden: expected a tensor, got list"
    yield "infinite softcap", (hidden, unembedding), {"softcap": float("inf")}, "softcap: expected a positive"
    yield "softcap beyond fp32", (hidden, unembedding), {"softcap": 1e39}, "softcap: expected a positive"
    yield "scale of 0 in fp32", (hidden, unembedding), {"logit_scale": 1e-46}, "logit_scale: expected a positive"
    yield "target overflow", (hidden, unembedding), {"targets": 2**70}, "targets: expected integer ids, got"
    yield "backend of no rows", (hidden[:0], unembedding), {"backend": "gpu"}, "backend: expected one of"
    yield "softcap", (hidden, unembedding), {"softcap": 0.0}, "softcap: expected a positive"
    yield "scale", (hidden, unembedding), {"logit_scale": -1.0}, "logit_scale: expected a positive"
    yield "backend", (hidden, unembedding), {"backend": "gpu"}, "backend: expected one of auto, triton, cpp, reference"
    yield "empty vocabulary", (hidden, unembedding[:0]), {}, "at least one token"
    yield "meta", (hidden, unembedding), {"bias": torch.ones(100, device="meta")}, "bias: expected device cpu"


@pytest.mark.parametrize("args, kwargs, message", [pytest.param(*c[1:], id=c[0]) for c in bad_calls()])
def test_bad_input_shows_both_values(args, kwargs, message):
    with pytest.raises(InputError, match=message):
        fused_lens(*args, **kwargs)


@pytest.mark.medium
def test_opcheck():
    hidden, unembedding, targets, randn = make(6, 8, 50)
    op = torch.ops.refinelens.fused_lens.default
    for backend in BACKENDS:
        full = (hidden, unembedding, "layer", randn(8), randn(8), 1e-5, 0.0, targets, randn(50), 9.0, 0.5, backend)
        bare = (hidden, unembedding, "none", None, None, 0.0, 0.0, None, None, None, 1.0, backend)
        for arguments in (full, bare):
            assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@pytest.mark.medium
def test_compiles_without_graph_breaks():
    hidden, unembedding, targets, _ = make(12, 8, 50)

    def probability(x, t):
        return refinelens.fused_lens(x, unembedding, RMSNorm(None), t).target_logprob.exp().sum()

    compiled = torch.compile(probability, backend="aot_eager", fullgraph=True)
    for rows in (12, 7):  # a second size: dynamic shapes
        torch.testing.assert_close(compiled(hidden[:rows], targets[:rows]), probability(hidden[:rows], targets[:rows]))


def test_backend_choice_says_why():
    assert choose_backend("cpu")[0] == "cpp", "the C++ extension must be built where the tests run"
    assert choose_backend("meta") == ("reference", "no kernel for device 'meta': plain torch")
    with pytest.raises(InputError, match="got device 'cuda'"):
        choose_backend("cuda", "cpp")


@pytest.mark.medium
def test_triton_through_the_public_op(monkeypatch):
    """In the interpreter where there is no GPU; without either, Triton is refused in one line."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, unembedding, targets, randn = make(5, 16, 40)
    norm = LayerNorm(randn(16).to(device), randn(16).to(device))
    moved = [t.to(device) for t in (hidden, unembedding)]
    stats = fused_lens(*moved, norm, targets.to(device), backend="triton").to("cpu")
    exact, same = (
        truth(hidden, unembedding, LayerNorm(norm.weight.cpu(), norm.bias.cpu()), targets, dtype=d)
        for d in (torch.float64, torch.float32)
    )
    assert_matches_truth(stats, exact, same, targets)
    # Ids and results are checked together, or not at all.
    with pytest.raises(InputError, match="targets: expected ids from 0 to 39, got 40 at row 2"):
        fused_lens(*moved, targets=torch.tensor([0, 1, 40, 2, 3]), backend="triton")
    moved[0][3, 7] = float("nan")
    with pytest.raises(InputError, match="hidden: expected finite values, got NaN in row 3 of 5"):
        fused_lens(*moved, targets=targets.to(device), backend="triton")
    unchecked = fused_lens(*moved, targets=torch.tensor([0, 1, 40, 2, 3]), backend="triton", check_values=False)
    assert unchecked.logsumexp.isnan().tolist() == [False, False, False, True, False]
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="expected CUDA tensors for 'triton', got device 'cpu'"):
        fused_lens(hidden, unembedding, backend="triton")


def test_finite_numbers_with_an_infinite_sum_are_finite():
    """One sum tells whether a call is sound; where it overflows every number is looked at."""
    far = torch.full((2,), 3e38)
    stats = LensStats(torch.zeros(2, dtype=torch.int64), far, far, torch.zeros(2))
    hidden = torch.zeros(2, 8)
    assert not stats.logsumexp.sum().isfinite() and values_fit(stats, hidden, None, 50, False)
    for broken in (float("inf"), float("nan")):
        assert not values_fit(replace(stats, logsumexp=torch.tensor([1.0, broken])), hidden, None, 50, False)
    assert not values_fit(replace(stats, entropy=torch.tensor([float("nan"), 1.0])), hidden, None, 50, False)


@pytest.fixture
def looked_up_again():
    """What this machine has is looked up once a process; here once more, and after the test."""
    for function in (backends._no_extension, backends._no_triton):
        function.cache_clear()
    yield
    for function in (backends._no_extension, backends._no_triton):
        function.cache_clear()


@pytest.mark.parametrize("error", [None, ImportError("invalid ELF header")])
def test_without_extension_the_reference_runs(looked_up_again, monkeypatch, error):
    """Not built, or damaged."""

    def import_module(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)
    if error is None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    why = "cannot be loaded (invalid ELF header)" if error else "was not built"
    assert choose_backend("cpu") == ("reference", f"the C++ extension {why}: plain torch")
    with pytest.raises(InputError, match="expected CPU tensors and the C.. extension for 'cpp', got"):
        choose_backend("cpu", "cpp")
    if error is None:
        assert choose_backend("cuda") == ("reference", "Triton is not installed: plain torch")


def test_on_a_gpu_of_amd_the_reference_runs(looked_up_again, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    chosen, why = choose_backend("cuda")
    assert chosen == "reference" and "for NVIDIA" in why
    with pytest.raises(InputError, match="for NVIDIA, this torch is for AMD; use auto"):
        choose_backend("cuda", "triton")


def assert_equal(stats, other):
    assert [name for name, _ in stats.items()] == [name for name, _ in other.items()]
    for name, value in stats.items():
        assert torch.equal(value, getattr(other, name)), name


@pytest.mark.parametrize("eps", [None, 1e-3])
def test_modules_of_torch_are_taken_as_they_are(eps):
    """The op's norm of an ``nn`` module against the module itself, in fp64."""
    torch.manual_seed(0)
    hidden, targets = torch.randn(7, 24), torch.arange(7)
    linear = torch.nn.Linear(24, 67)
    layer = torch.nn.LayerNorm(24, *([] if eps is None else [eps]))
    for norm in (layer, torch.nn.RMSNorm(24, eps), torch.nn.LayerNorm(24, elementwise_affine=False)):
        for parameter in norm.parameters():
            torch.nn.init.normal_(parameter)
        stats = fused_lens(hidden, linear, norm, targets)
        z = linear.double()(norm.double()(hidden.double()))
        torch.testing.assert_close(stats.logsumexp.double(), z.logsumexp(-1), rtol=0, atol=1e-5)
        torch.testing.assert_close(stats.target_logit.double(), z.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-5)
        assert torch.equal(stats.argmax, z.argmax(-1))
        linear.float(), norm.float()


def test_a_head_is_its_operands():
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(2, 5, 24), torch.randn(67, 24), torch.randn(67)
    norm = RMSNorm(torch.randn(24))
    head = refinelens.LensHead(weight, norm, bias, softcap=5.0, scale=0.5)
    given = dict(norm=norm, bias=bias, softcap=5.0, logit_scale=0.5)
    stats = fused_lens(hidden, head, targets=3)
    assert_equal(stats, fused_lens(hidden, weight, targets=3, **given))
    kl, same = refinelens.kl_to_final(hidden, stats, head), refinelens.kl_to_final(hidden, stats, weight, **given)
    assert torch.equal(kl, same)
    top, same = refinelens.lens_top_k(hidden, head, 4), refinelens.lens_top_k(hidden, weight, 4, **given)
    assert torch.equal(top.ids, same.ids) and torch.equal(top.logits, same.logits)
    with pytest.raises(InputError, match="expected none beside a LensHead"):
        fused_lens(hidden, head, norm)


def test_a_head_with_a_projection():
    torch.manual_seed(0)
    hidden, weight, projection = torch.randn(5, 24), torch.randn(67, 16), torch.randn(16, 24)
    norm = LayerNorm(torch.randn(24))
    stats = fused_lens(hidden, refinelens.LensHead(weight, norm, projection=projection))
    projected = torch.nn.functional.layer_norm(hidden, (24,), norm.weight) @ projection.T
    torch.testing.assert_close(stats.logsumexp, (projected @ weight.T).logsumexp(-1))
    with pytest.raises(InputError, match=r"got \[5, 16\] and \[67, 16\]"):
        fused_lens(hidden[:, :16], refinelens.LensHead(weight, norm, projection=projection))


def test_heads_that_are_none():
    with pytest.raises(ValueError, match="bias: expected None beside an nn.Linear"):
        refinelens.LensHead(torch.nn.Linear(3, 4), bias=torch.zeros(4))
    with pytest.raises(ValueError, match=r"unembedding: expected a tensor .*, got \[3\]"):
        refinelens.LensHead(torch.zeros(3))
    with pytest.raises(ValueError, match="norm: expected one over the last dimension, got one over 2"):
        refinelens.LensHead(torch.zeros(4, 3), torch.nn.LayerNorm((2, 3)))
