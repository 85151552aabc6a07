"""Lenses on disk: what is written is read again, and what does not fit is one line before a model is loaded."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from lens_folders import N_LAYERS, random_translators, save_linear, save_model, save_tuned, tiny
from refinelens.config import SweepConfig
from refinelens.errors import InputError
from refinelens.lens.files import load_lens, load_lenses
from refinelens.lens.logit_lens import LogitLens, fit_to_model
from refinelens.lens.translators import Translators
from refinelens.model.loading import load_model
from refinelens.sweeping.inputs import SweepInputs


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "neox", tiny("gpt_neox"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model_folder):
    return save_linear(tmp_path_factory.mktemp("lenses") / "whole", model_folder)


@pytest.fixture
def folder(tmp_path, whole):
    return shutil.copytree(whole, tmp_path / "broken")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_lens_is_read_as_it_was_written(model_folder, tmp_path, dtype):
    translators = random_translators(dtype=dtype)
    lens = load_lens(save_linear(tmp_path / "some lens", model_folder, translators))
    assert (lens.name, lens.kind) == ("some lens", "linear")
    assert torch.equal(lens.translators.weight, translators.weight) and lens.translators.weight.dtype == dtype
    assert torch.equal(lens.translators.bias, translators.bias)
    assert lens.manifest["model"]["n_layers"] == N_LAYERS and len(lens.sha256) == 64
    entry = {"name": "some lens", "kind": "linear", "sha256": lens.sha256, "note": None}
    assert lens.entry() == entry


def test_a_plain_lens_has_nothing_to_fit():
    (plain,) = load_lenses(("plain",))
    assert plain.translators is None and plain.kind == "plain" and fit_to_model(plain, None, None) is plain


def test_a_lens_is_named_after_its_folder_however_it_is_written(whole, monkeypatch):
    monkeypatch.chdir(whole)
    for path in (f"{whole}/", ".", "../whole", whole):
        assert load_lens(path).name == "whole"


@pytest.mark.medium
def test_every_lens_reads_the_same_forward_pass(model_folder, whole, tmp_path, question_file):
    """Up to the rows of one question: each lens its own, the output the same through all."""
    tuned = save_tuned(tmp_path / "tuned")
    options = SweepConfig(str(model_folder), str(question_file), (2,), device="cpu", lens=("plain", whole, tuned))
    inputs = SweepInputs.load(options)
    rows = inputs.predictor().ask(inputs.questions, [0])[0].rows.to_pylist()
    assert {row["lens"] for row in rows} == {"plain", "whole", "tuned"}
    assert len({tuple(row["entropy"]) for row in rows if row["gold_position"] == 0}) == 2, "whole and tuned are equal"
    assert len({row["entropy"][-1] for row in rows if row["gold_position"] == 0}) == 1


def keep_two_layers(folder):
    translators = random_translators(N_LAYERS - 1)
    save_file({"weight": translators.weight, "bias": translators.bias}, folder / "lens.safetensors")


def rewrite(**changes):
    def damage(folder):
        tensors = load_file(folder / "lens.safetensors")
        save_file({k: v for k, v in (tensors | changes).items() if v is not None}, folder / "lens.safetensors")

    return damage


def put(name, layer, value):
    def damage(folder):
        tensors = load_file(folder / "lens.safetensors")
        tensors[name][layer].view(-1)[-1] = value
        save_file(tensors, folder / "lens.safetensors")

    return damage


def cut(folder):
    whole = (folder / "lens.safetensors").read_bytes()
    (folder / "lens.safetensors").write_bytes(whole[:-7])


def manifest(text=None, remove=(), model=None, **changes):
    def damage(folder):
        entries = json.loads((folder / "manifest.json").read_text()) | changes
        entries["model"] = entries["model"] | model if model else entries["model"]
        for key in remove:
            (entries["model"] if key in entries["model"] else entries).pop(key)
        (folder / "manifest.json").write_text(json.dumps(entries) if text is None else text)

    return damage


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


def fill_the_manifest(folder):
    with (folder / "manifest.json").open("wb") as file:
        file.truncate(2**24 + 1)


def fifo(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")


DAMAGE = {
    "missing layer": (keep_two_layers, r"expected the tensors weight \[3, 32, 32\], bias \[3, 32\] .* got weight \[2"),
    "wrong shape": (rewrite(weight=torch.zeros(3, 32, 31)), r"got weight \[3, 32, 31\], bias \[3, 32\]"),
    "wrong bias": (rewrite(bias=torch.zeros(96)), r"got weight \[3, 32, 32\], bias \[96\]"),
    "no bias": (rewrite(bias=None), r"got weight \[3, 32, 32\]$"),
    "one tensor more": (rewrite(other=torch.zeros(2)), r"got weight .*, other \[2\], bias"),
    "NaN": (put("weight", 1, torch.nan), "expected finite numbers, got NaN or infinity in the weight of layer 1"),
    "infinity": (put("bias", 2, -torch.inf), "got NaN or infinity in the bias of layer 2"),
    "integers": (rewrite(weight=torch.zeros(3, 32, 32, dtype=torch.int32)), "one floating dtype, got torch.int32"),
    "truncated": (cut, "expected a whole lens.safetensors, got: "),
    "no tensors": (lambda folder: (folder / "lens.safetensors").unlink(), "expected lens.safetensors beside the man"),
    "no JSON": (manifest("{"), "expected a JSON object in manifest.json, got: Expecting"),
    "deep JSON": (manifest("[" * 100_000), "expected a JSON object in manifest.json, got: "),
    "no object": (manifest("[1, 2]"), r"expected a JSON object in manifest.json, got \[1, 2\]"),
    "no text": (lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"), "expected a JSON object in manifest"),
    "another version": (manifest(format_version=2), "expected format version 1, got 2"),
    "no version": (manifest(remove=["format_version"]), "expected format_version in manifest.json, got none"),
    "no kind": (manifest(remove=["kind"]), "expected kind in manifest.json, got none"),
    "kind of none": (manifest(kind="plain"), "expected the kind of a fitted lens in manifest.json, got plain"),
    "no model": (manifest(remove=["model"]), "expected model in manifest.json, got none"),
    "no hash": (
        manifest(remove=["weights_sample_sha256"]),
        "expected weights_sample_sha256 in model of manifest.json, got none",
    ),
    "odd width": (manifest(model={"d_model": True}), "expected d_model in .* to be a positive whole number, got True"),
    "no layers": (manifest(model={"n_layers": 0}), "expected n_layers in .* to be a positive whole number, got 0"),
    "huge layers": (manifest(model={"n_layers": 10**30}), r"expected the tensors weight \[1000000000000"),
    "huge manifest": (fill_the_manifest, "expected at most 16777216 bytes in manifest.json, got 16777217"),
    "a pipe": (fifo, "expected the file manifest.json, got none"),
    "an empty folder": (empty, "expected plain or the folder of a lens .* got neither there"),
    "no folder": (shutil.rmtree, "expected plain or the folder of a lens .* got no folder there"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_broken_lens_is_one_line_before_the_model_is_loaded(case, folder, refused_sweep, model_folder, no_model):
    damage, message = DAMAGE[case]
    damage(folder)
    line = refused_sweep(folder, model_folder)
    with pytest.raises(InputError, match=message):
        load_lens(folder)
    assert f"--lens {folder}: " in line


def test_a_file_in_place_of_a_folder(folder, refused_sweep, model_folder, no_model):
    assert line_says(refused_sweep(folder / "lens.safetensors", model_folder), "got a file there")
    assert line_says(refused_sweep(folder / "lens.safetensors" / "deeper", model_folder), "got no folder there")


def test_a_folder_called_plain_is_refused(folder, refused_sweep, model_folder, no_model, monkeypatch):
    """In a table it could not be told from the plain logit lens."""
    folder.rename(folder.with_name("plain"))
    monkeypatch.chdir(folder.parent)
    assert line_says(refused_sweep("./plain", model_folder), "expected another name than plain")


@pytest.mark.parametrize("names", ["plain,", ",", "plain,plain"])
def test_names_of_no_lens(names, refused_sweep, model_folder, no_model):
    assert line_says(refused_sweep(names, model_folder), f"expected plain or folders, each once, got {names!r}")


def test_two_lenses_of_one_name(folder, refused_sweep, model_folder, no_model):
    assert line_says(refused_sweep(f"{folder},{folder}/", model_folder), "of different names, got 2 called broken")


def line_says(line, text):
    assert text in line, line
    return True


def another_weight(model):
    model.base_model.layers[1].mlp.dense_4h_to_h.weight.data.view(-1)[0] += 1.0
    return model


@pytest.mark.parametrize(
    "made, message",
    [
        (lambda: another_weight(tiny("gpt_neox")), "another revision of it (weights_sample_sha256 "),
        (lambda: tiny("gpt_neox", n_layers=2), "another model (n_layers 3 there, 2 here)"),
        (lambda: tiny("gemma2"), "another model (class GPTNeoXForCausalLM there, Gemma2ForCausalLM here)"),
        (lambda: tiny("gpt_neox", d_model=16), "another model (d_model 32 there, 16 here)"),
    ],
    ids=["revision", "layers", "class", "width"],
)
def test_a_lens_of_another_model_is_refused(made, message, whole, refused_sweep, model_folder, tmp_path):
    other = save_model(tmp_path / "other", made())
    line = refused_sweep(whole, other)
    assert line_says(line, f"--lens whole: expected a lens made for {other}, got one for {model_folder}, {message}")


def test_the_same_model_in_another_folder_and_dtype_is_accepted(whole, model_folder, tmp_path):
    loaded = load_model(str(shutil.copytree(model_folder, tmp_path / "copy")), "cpu", "bfloat16")
    fitted = fit_to_model(load_lens(whole), loaded, LogitLens(loaded.model))
    assert fitted.translators.weight.dtype == torch.bfloat16 and fitted.note is None


def test_another_dtype_is_named_as_a_reason(whole, model_folder):
    loaded = load_model(str(model_folder), "cpu", "float16")
    with pytest.raises(InputError, match="another revision of it or one in another dtype "):
        fit_to_model(load_lens(whole), loaded, LogitLens(loaded.model))


def test_numbers_too_large_for_the_dtype_are_refused(tmp_path):
    translators = random_translators()
    large = Translators(translators.weight, translators.bias * 1e6)
    model_folder = save_model(tmp_path / "model", tiny("gpt_neox").half().float())
    lens = load_lens(save_linear(tmp_path / "large", model_folder, large))
    loaded = load_model(str(model_folder), "cpu", "float16")
    with pytest.raises(InputError, match="``lens`` large: .* bias of layer 0 once in float16; use ``dtype='float32'``"):
        fit_to_model(lens, loaded, LogitLens(loaded.model))
