"""What a module computes is found by asking it: norms of every form, an epsilon nobody states, linear maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from refinelens import LayerNorm, RMSNorm
from refinelens.errors import UnsupportedModelError
from refinelens.kernels.reference import apply_norm
from refinelens.model.head import identify_norm, identify_projection

WIDTH = 33  # no multiple of anything


class Asked(nn.Module):
    """A module with given parameters, under odd names, that computes a given function of its input and them."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x):
        return self.function(x, *self.parameters())


def vector(seed):
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def rms(x, weight, eps):
    return F.rms_norm(x, (WIDTH,), weight, eps)


FORMS = {
    "layer": (lambda x, b, w: F.layer_norm(x, (WIDTH,), w, b, 1e-5), 2, LayerNorm, 0.0),  # stored bias first
    "layer without bias": (lambda x, w: F.layer_norm(x, (WIDTH,), w, None, 1e-3), 1, LayerNorm, 0.0),
    "layer without weight": (lambda x: F.layer_norm(x, (WIDTH,), eps=1e-6), 0, LayerNorm, 0.0),
    "layer of 1 + weight": (lambda x, w, b: F.layer_norm(x, (WIDTH,), w + 1, b, 1e-5), 2, LayerNorm, 0.0),
    "rms": (lambda x, w: rms(x, w, 1e-6), 1, RMSNorm, 0.0),
    "rms without weight": (lambda x: rms(x, None, 1e-5), 0, RMSNorm, 0.0),
    "rms of 1 + weight": (lambda x, w: rms(x, w + 1, 1e-6), 1, RMSNorm, 1.0),
    "rms with an epsilon of fp32": (lambda x, w: rms(x, w, torch.finfo(torch.float32).eps), 1, RMSNorm, 0.0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_any_form(form, dtype):
    """Neither the class nor an attribute says what it is or what its epsilon is."""
    function, n_vectors, kind, offset = FORMS[form]
    module = Asked(function, **{f"v{i}": vector(i) for i in range(n_vectors)}).to(dtype)
    norm = identify_norm(module, WIDTH)
    assert isinstance(norm, kind) and norm.offset == offset
    assert (norm.weight is None) == (n_vectors == 0)
    x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(9))
    x[3:] *= 1e-3
    exact = module.double()(x.double())
    # 1 + weight is summed in the dtype that the module sums in.
    close = 1e-5 if dtype == torch.float32 or "layer of 1" not in form else 1e-2
    torch.testing.assert_close(apply_norm(x, norm, torch.float64), exact, rtol=close, atol=close)


def test_parameters_are_the_modules_own():
    module = nn.LayerNorm(WIDTH)
    norm = identify_norm(module, WIDTH)
    assert norm.weight.data_ptr() == module.weight.data_ptr() and norm.bias.data_ptr() == module.bias.data_ptr()


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 3e-3, 0.1])
def test_stated_epsilon_is_exact(eps):
    assert identify_norm(nn.LayerNorm(WIDTH, eps=eps), WIDTH).eps == eps


def test_used_epsilon_is_found_where_another_is_stated():
    module = nn.LayerNorm(WIDTH, eps=1e-3)
    module.forward = lambda x: F.layer_norm(x, (WIDTH,), module.weight, module.bias, 1e-5)
    assert identify_norm(module, WIDTH).eps == 1e-5


ODD = {
    "largest magnitude": lambda x, w: x / x.abs().amax(-1, keepdim=True) * w,
    "rms with bias": lambda x, w, b: rms(x, w, 1e-5) + b,
    "half the width": lambda x, w: torch.cat([rms(x, w, 1e-5)[..., :16], x[..., 16:]], -1),
    "twice": lambda x, w: rms(x, w, 1e-5) * 2,
    "not finite": lambda x, w: x * float("nan"),
    "another shape": lambda x, w: x[..., :7],
}


@pytest.mark.parametrize("odd", ODD)
def test_norm_of_another_formula_is_refused(odd):
    parameters = {"weight": vector(0)} | ({"bias": vector(1)} if "bias" in odd else {})
    with pytest.raises(UnsupportedModelError, match="Asked: expected a LayerNorm or RMSNorm"):
        identify_norm(Asked(ODD[odd], **parameters), WIDTH)


@pytest.mark.parametrize("d_embed", [1, 16, WIDTH])
@pytest.mark.parametrize("stored", ["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_projection(d_embed, stored, dtype):
    weight = torch.randn(d_embed, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)
    kept = weight if stored == "rows" else weight.T.contiguous()
    module = Asked(lambda x, w: x @ (w.T if stored == "rows" else w), weight=kept)
    found = identify_projection(module, WIDTH)
    assert torch.equal(found, weight) and found.data_ptr() == module.weight.data_ptr()


@pytest.mark.parametrize(
    "module", [nn.Linear(WIDTH, 5), Asked(lambda x, w: (x @ w.T).tanh(), weight=torch.ones(5, WIDTH))]
)
def test_what_is_no_projection_is_refused(module):
    with pytest.raises(UnsupportedModelError, match=f"{type(module).__name__}: expected a linear map without bias"):
        identify_projection(module, WIDTH)


def test_a_module_that_cannot_be_asked_is_refused():
    with pytest.raises(UnsupportedModelError, match="Embedding: expected a module that takes rows .* RuntimeError"):
        identify_projection(nn.Embedding(4, WIDTH), WIDTH)
