"""Tuned lenses: agreement with the package tuned-lens, its hash, and files that are refused."""

import copy
import hashlib
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch

from lens_folders import D_MODEL, N_LAYERS, VOCAB, random_translators, save_model, save_tuned, state_dict, tiny
from refinelens.errors import InputError
from refinelens.lens.files import load_lens
from refinelens.lens.logit_lens import LogitLens, fit_to_model
from refinelens.lens.translators import compare_unembedding, unembed_hash
from refinelens.model.loading import load_model
from tiny import assert_matches_truth, truth

REASON = "the package tuned-lens is not installed; pip install 'refinelens[test]'"


@pytest.fixture(scope="module")
def model():
    return tiny("gpt_neox")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, model):
    return save_model(tmp_path_factory.mktemp("models") / "neox", model)


def fitted(folder, model_folder, dtype="float32"):
    """A lens fitted to a model, as a sweep does it."""
    loaded = load_model(str(model_folder), "cpu", dtype)
    logit_lens = LogitLens(loaded.model)
    return fit_to_model(load_lens(folder), loaded, logit_lens), logit_lens


def package_lens(model, seed=7):
    """The package's own lens with random maps."""
    lens = pytest.importorskip("tuned_lens.nn.lenses", reason=REASON).TunedLens.from_model(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lens.layer_translators.parameters():
            parameter += torch.randn_like(parameter) * (0.5 / D_MODEL**0.5 if parameter.dim() == 2 else 1.0)
    return lens.eval()


def test_a_lens_saved_by_the_package_reads_as_the_package_reads_it(model, model_folder, tmp_path):
    """`TunedLens.save` of tuned-lens 0.2 to a folder, and `TunedLens.forward` of every layer beside ours.

    Hidden states are those that Transformers returns, which are the residual stream below the output.
    """
    package = package_lens(model)
    package.save(tmp_path / "tuned")
    lens, logit_lens = fitted(tmp_path / "tuned", model_folder)
    assert (lens.kind, lens.note) == ("tuned", None)
    ids = torch.randint(1, VOCAB, (1, 13), generator=torch.Generator().manual_seed(3))
    targets = torch.randint(VOCAB, (1, 13), generator=torch.Generator().manual_seed(4))
    reading = logit_lens.read_states(logit_lens.hidden(ids, torch.arange(13)), targets, lens.translators)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
        exact_lens, identity = copy.deepcopy(package).double(), torch.eye(VOCAB)
        for layer in range(N_LAYERS):
            own = package(out.hidden_states[layer], layer)[0]
            exact = exact_lens(out.hidden_states[layer].double(), layer)[0]
            values = vars(reading.stats).items()
            stats = type(reading.stats)(**{name: None if v is None else v[layer, 0] for name, v in values})
            wanted = [truth(z, identity, None, targets[0], dtype=z.dtype) for z in (exact, own)]
            assert_matches_truth(stats, *wanted, targets[0])
            assert torch.equal(stats.argmax, own.argmax(-1))
            assert torch.equal(stats.target_rank, wanted[1]["target_rank"])
            assert not torch.equal(stats.argmax, package.unembed(out.hidden_states[layer])[0].argmax(-1)), "no maps"
            log_p = own.log_softmax(-1).gather(-1, targets.T)[:, 0]
            torch.testing.assert_close(stats.target_logprob, log_p, rtol=1e-5, atol=1e-4)
    assert torch.equal(reading.stats.argmax[-1], out.logits.argmax(-1)), "no lens at the output"


def test_our_hash_is_the_packages_formula():
    """Of matrices that numpy prints in part and whole, of few rows or columns, and of exponents it writes out."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(VOCAB, D_MODEL), (20, 50), (7, 143), (3, 500), (6, 200), (7, 144), (8, 200), (400, 5), (31, 32)]
    for shape in shapes:
        for scale in (1e-6, 0.02, 1.0, 3e4):
            matrix = torch.randn(shape, generator=generator) * scale
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                text = np.array_str(matrix.to(dtype).float().numpy(), precision=1)
                with np.printoptions(precision=3, suppress=True, threshold=7, edgeitems=1, linewidth=200):
                    ours = unembed_hash(matrix, dtype)  # whatever this process has set
                assert ours == hashlib.sha256(text.encode()).hexdigest(), (shape, scale, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_our_hash_is_the_packages_own(model, dtype):
    package = package_lens(copy.deepcopy(model).to(dtype))
    assert unembed_hash(model.lm_head.weight, dtype) == package.config.unembed_hash


@pytest.mark.parametrize("bias", [True, False])
def test_a_lens_made_by_hand_is_the_formula(bias, model_folder, tmp_path):
    """Without the package: the format as its source writes it, read by ``h + h @ W.T + b`` in fp64."""
    maps = random_translators()
    folder = save_tuned(tmp_path / "tuned", maps, bias=bias)
    if not bias:
        torch.save({k: v for k, v in state_dict(maps).items() if k.endswith("weight")}, folder / "params.pt")
    lens, logit_lens = fitted(folder, model_folder)
    assert lens.manifest["model"]["name"] == "some/model" and not lens.manifest["model"]["revision"]
    assert torch.equal(lens.translators.weight, maps.weight)
    assert torch.equal(lens.translators.bias, maps.bias * bias)
    x = torch.randn(N_LAYERS + 1, 5, D_MODEL, generator=torch.Generator().manual_seed(2))
    wanted = x.double()
    for layer in range(N_LAYERS):
        wanted[layer] += torch.einsum("oi,ni->no", maps.weight[layer].double(), x[layer].double())
        wanted[layer] += bias * maps.bias[layer]
    torch.testing.assert_close(lens.translators(x).double(), wanted, rtol=1e-5, atol=1e-5)


def test_half_precision_on_disk_is_read(model_folder, tmp_path):
    maps = random_translators(dtype=torch.float16)
    lens, _ = fitted(save_tuned(tmp_path / "tuned", maps), model_folder)
    assert torch.equal(lens.translators.weight, maps.weight.float())


def put(key, value):
    def damage(folder):
        state = state_dict(random_translators())
        if value is None:
            del state[key]
        else:
            state[key] = value
        torch.save(state, folder / "params.pt")

    return damage


def save(make):
    return lambda folder: torch.save(make(), folder / "params.pt")


def config(text=None, remove=None, **changes):
    def damage(folder):
        entries = json.loads((folder / "config.json").read_text()) | changes
        entries.pop(remove, None)
        (folder / "config.json").write_text(json.dumps(entries) if text is None else text)

    return damage


def put_nan(folder):
    state = state_dict(random_translators())
    state["1.weight"][3, 4] = torch.nan
    torch.save(state, folder / "params.pt")


def cut(folder):
    (folder / "params.pt").write_bytes((folder / "params.pt").read_bytes()[:-100])


def claim_more_than_there_is(folder):
    wide = {"d_model": 10**6, "num_hidden_layers": 1, "bias": False}
    config(**wide)(folder)
    torch.save({"0.weight": torch.zeros(1).expand(10**6, 10**6)}, folder / "params.pt")


def grow(folder):
    with (folder / "params.pt").open("ab") as file:
        file.truncate(2**20)


DAMAGE = {
    "missing layer": (put("2.weight", None), "expected a weight of each of 3 layers in params.pt, got none of layer 2"),
    "missing bias": (put("0.bias", None), "expected a bias of each of 3 layers in params.pt, got none of layer 0"),
    "wrong shape": (put("1.weight", torch.zeros(32, 31)), r"1.weight of shape \[32, 32\] in params.pt, got \[32, 31"),
    "wrong bias": (put("1.bias", torch.zeros(32, 1)), r"expected 1.bias of shape \[32\] in params.pt, got \[32, 1\]"),
    "one layer more": (
        put("3.bias", torch.zeros(32)),
        "the weight and bias of 3 layers in params.pt, got '3.bias' too",
    ),
    "NaN": (put_nan, "expected finite numbers, got NaN or infinity in the weight of layer 1"),
    "infinity": (put("0.bias", torch.full((32,), torch.inf)), "got NaN or infinity in the bias of layer 0"),
    "integers": (put("0.bias", torch.zeros(32, dtype=torch.int64)), "0.bias in params.pt to be a floating ten"),
    "sparse": (put("0.weight", torch.eye(32).to_sparse()), "expected 0.weight in params.pt to be a floating tensor"),
    "no numbers": (
        put("0.weight", torch.zeros(32, 32, device="meta")),
        "expected 0.weight in params.pt to be a floating",
    ),
    "no tensor": (put("0.weight", [1.0]), "expected 0.weight in params.pt to be a floating tensor"),
    "a list": (save(lambda: [torch.zeros(3)]), "expected a state dict in params.pt, got list"),
    "a tensor": (save(lambda: torch.zeros(3)), "expected a state dict in params.pt, got Tensor"),
    "a module": (save(lambda: torch.nn.Linear(2, 2)), r"tensors alone in params.pt, got pickled code \(torch.nn.mod"),
    "nothing": (save(dict), "expected a weight of each of 3 layers in params.pt, got none of layer 0"),
    "truncated": (cut, "expected a whole params.pt, got "),
    "an empty file": (lambda f: (f / "params.pt").write_bytes(b""), "expected a whole params.pt, got EOFError"),
    "text": (lambda f: (f / "params.pt").write_text("hello world"), "expected (a whole|tensors alone in) params.pt"),
    "no params": (lambda f: (f / "params.pt").unlink(), "expected the file params.pt, got none"),
    "a folder of params": (lambda f: ((f / "params.pt").unlink(), (f / "params.pt").mkdir()), "the file params.pt, "),
    "a large file": (grow, "expected at most 287488 bytes in params.pt for the layers of config.json, got 10485"),
    "a large claim": (
        claim_more_than_there_is,
        "tensors with numbers of their own in params.pt, got 4000000000000 byt",
    ),
    "many layers": (
        config(num_hidden_layers=10**12),
        "expected a weight of each of 1000000000000 layers .* of layer 3",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "expected the file config.json, got none"),
    "no JSON": (config("{'a': 1}"), "expected a JSON object in config.json, got: Expecting property name"),
    "no object": (config("3"), "expected a JSON object in config.json, got 3"),
    "no width": (config(remove="d_model"), "expected d_model in config.json, got none"),
    "odd width": (config(d_model=32.0), "expected d_model in config.json to be a positive whole number, got 32"),
    "no layers": (config(num_hidden_layers=0), "expected num_hidden_layers in config.json to be a positive whole num"),
    "odd name": (
        config(base_model_name_or_path=["a"]),
        r"base_model_name_or_path in config.json to be a text, got \['a",
    ),
    "odd bias": (config(bias="yes"), "expected bias in config.json to be true or false, got 'yes'"),
    "odd hash": (config(unembed_hash=12), "expected unembed_hash in config.json to be a text, got 12"),
    "another type": (config(lens_type="mlp"), "expected the lens_type linear_tuned_lens in config.json, got 'mlp'"),
    "no bias said": (config(bias=False), "expected the weight of 3 layers in params.pt, got '0.bias' too"),
}


@pytest.fixture
def folder(tmp_path):
    return save_tuned(tmp_path / "tuned")


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_lens_is_one_line_before_the_model_is_loaded(case, folder, refused_sweep, model_folder, no_model):
    damage, message = DAMAGE[case]
    damage(folder)
    line = refused_sweep(folder, model_folder)
    with pytest.raises(InputError, match=message):
        load_lens(folder)
    assert "weights_only" not in line, "nobody is told how to load it all the same"


class Touch:
    """Pickled code: whoever unpickles it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("how", ["in a state dict", "alone", "in another protocol", "by an old torch"])
def test_pickled_code_is_refused_and_not_run(how, folder, refused_sweep, model_folder, no_model, tmp_path):
    made = tmp_path / "made-by-pickle"
    state = state_dict(random_translators()) | {"0.bias": Touch(made)}
    if how in ("in a state dict", "by an old torch"):
        torch.save(state, folder / "params.pt", _use_new_zipfile_serialization=how == "in a state dict")
    else:
        (folder / "params.pt").write_bytes(pickle.dumps(Touch(made), protocol=2 if how == "alone" else 5))
    line = refused_sweep(folder, model_folder)
    assert "expected tensors alone in params.pt, got pickled code" in line and "weights_only" not in line
    assert not made.exists()
    pickle.loads(pickle.dumps(Touch(made)))
    assert made.exists(), "the pickle is one that does something"


def test_maps_of_several_dtypes_are_widened(folder):
    put("0.bias", torch.zeros(32).half())(folder)
    translators = load_lens(folder).translators
    assert translators.bias.dtype == translators.weight.dtype == torch.float32


def test_a_lens_of_another_model_is_refused(folder, refused_sweep, model_folder, tmp_path):
    config(base_model_revision="step3000")(folder)
    other = save_model(tmp_path / "other", tiny("gpt_neox", n_layers=2))
    message = f"made for {other}, got one for some/model at step3000, another model (n_layers 3 there, 2 here)"
    assert message in refused_sweep(folder, other)
    other = save_model(tmp_path / "thin", tiny("gpt_neox", d_model=16))
    assert "another model (d_model 32 there, 16 here)" in refused_sweep(folder, other)


def test_a_lens_of_another_unembedding_is_refused(model, model_folder, folder, refused_sweep, tmp_path):
    own = unembed_hash(model.lm_head.weight, torch.float32)
    config(unembed_hash=own)(folder)
    assert fitted(folder, model_folder)[0].note is None
    changed = copy.deepcopy(model)
    changed.lm_head.weight.data[0, 0] += 1.0
    line = refused_sweep(folder, save_model(tmp_path / "changed", changed))
    assert f"got one for some/model, another model or revision (unembed_hash {own[:12]} there, " in line


def test_the_same_model_under_another_name_is_accepted(model, model_folder, folder, tmp_path):
    config(unembed_hash=unembed_hash(model.lm_head.weight, torch.float32))(folder)
    lens, _ = fitted(folder, shutil.copytree(model_folder, tmp_path / "copy"))
    assert lens.entry() == {"name": "tuned", "kind": "tuned", "sha256": lens.sha256, "note": None}


def test_a_lens_without_hash_says_what_was_not_compared(folder, model_folder):
    lens, _ = fitted(folder, model_folder)
    assert lens.note == "its config.json holds no unembed_hash; only d_model and num_hidden_layers were compared"
    assert lens.entry()["note"] == lens.note


def test_a_hash_made_in_another_dtype_is_compared_as_far_as_rounding_allows(model, model_folder, folder):
    """A hash of roundings is found again from fp32; one of fp32 not from roundings, which is said and no refusal."""
    edge = model.lm_head.weight.detach().clone()
    edge[0, 0] = 0.95 - 1e-4  # of one digit: 0.9, in bf16 1.0
    hashes = {dtype: unembed_hash(edge, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert hashes[torch.bfloat16] != hashes[torch.float32]
    for wanted in hashes.values():
        assert compare_unembedding({"unembed_hash": wanted}, edge) is None
    note = compare_unembedding({"unembed_hash": hashes[torch.float32]}, edge.bfloat16())
    assert note == "its unembed_hash is not that of the model in bfloat16, which rounding may cause; float32 would tell"
    config(unembed_hash="0" * 64)(folder)
    assert "in bfloat16, which rounding may cause" in fitted(folder, model_folder, "bfloat16")[0].note
    with pytest.raises(InputError, match="another model or revision .unembed_hash 000000000000 there"):
        fitted(folder, model_folder)
