"""The Jacobian lens: the estimate against the published estimator and against known products, fits, merges, files."""

import json
import shutil

import pytest
import torch
from torch import nn

from lens_folders import D_MODEL, N_LAYERS, save_linear, save_model, tiny
from refinelens.cli import main
from refinelens.config import FitConfig
from refinelens.errors import InputError
from refinelens.fitting.fit import JACOBIANS, fit_lens
from refinelens.fitting.jacobian import (
    COTANGENTS,
    SKIPPED,
    JacobianEstimator,
    as_translators,
    relative_errors,
)
from refinelens.fitting.merge import merge_lenses
from refinelens.lens.files import load_lens
from refinelens.lens.logit_lens import LogitLens, fit_to_model
from refinelens.model.loading import load_model
from tiny import WORDS

FAMILIES = ("gpt_neox", "gemma2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """With blocks that do something: as they come, weights are too small for that."""
    folder, found = tmp_path_factory.mktemp("models"), {}
    for family in FAMILIES:
        model = tiny(family)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".layers." in name and parameter.dim() == 2:
                    parameter *= 8.0
        found[family] = save_model(folder / family, model)
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    places = torch.randint(len(WORDS), (6000,), generator=torch.Generator().manual_seed(0))
    path.write_text(" ".join(WORDS[place] for place in places.tolist()))
    return path


def published(lens, ids, layers):
    """The estimator as its authors describe it: the prompt in a batch, a one-hot cotangent for each of its rows at all
    valid positions, gradients averaged over those."""
    model, blocks = lens.model, lens.blocks
    kept, d_model = {}, lens.d_model

    def keep(layer):
        return lambda _module, _args, output: kept.update({layer: output[0] if type(output) is tuple else output})

    hooks = [block.register_forward_hook(keep(layer)) for layer, block in enumerate(blocks, 1)]
    embedded = model.get_input_embeddings()(torch.tensor([ids] * d_model))
    try:
        model(inputs_embeds=embedded, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    valid = torch.arange(SKIPPED, len(ids) - 1)
    output = kept[lens.n_layers]
    cotangent = torch.zeros_like(output)
    cotangent[torch.arange(d_model)[:, None], valid, torch.arange(d_model)[:, None]] = 1.0
    gradients = torch.autograd.grad(output, [kept[layer] for layer in layers], cotangent)
    return torch.stack([gradient[:, valid].mean(1) for gradient in gradients])


@pytest.mark.parametrize("branches", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_estimate_is_that_of_the_published_estimator(models, family, branches):
    """To fp32 rounding; what is behind the left-out positions runs from their keys and values, or with them."""
    lens = LogitLens(load_model(str(models[family]), "cpu").model)
    ids = torch.randint(1, 60, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    layers = range(1, N_LAYERS)  # of the published one, which has no matrix of the embedding output
    wanted = published(lens, ids, layers)
    estimate = JacobianEstimator(lens, 1)
    assert estimate._branches
    estimate._branches = branches
    found = estimate(ids)
    assert estimate._batched and found.shape == wanted.shape
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert float((wanted - torch.eye(D_MODEL)).abs().max()) > 0.1
    assert all(parameter.requires_grad for parameter in lens.model.parameters()), "as they were"
    whole = JacobianEstimator(lens, 0)(ids)
    torch.testing.assert_close(whole[1:], found, rtol=1e-4, atol=1e-5)


def test_of_linear_blocks_it_is_their_product(models):
    """Blocks that map every token by a matrix: no estimate is needed, the Jacobian is the product of those above."""
    model = load_model(str(models["gpt_neox"]), "cpu").model
    lens = LogitLens(model)

    class Linear(nn.Module):
        def __init__(self, seed):
            super().__init__()
            generator = torch.Generator().manual_seed(seed)
            self.weight = nn.Parameter(torch.eye(D_MODEL) + 0.1 * torch.randn(D_MODEL, D_MODEL, generator=generator))

        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states @ self.weight.T

    blocks = nn.ModuleList(Linear(seed) for seed in range(N_LAYERS)).eval()
    model.gpt_neox.layers = blocks
    lens.blocks = blocks
    found = JacobianEstimator(lens, 0)(list(range(1, 30)))
    wanted = torch.eye(D_MODEL)
    for layer in reversed(range(N_LAYERS)):
        wanted = wanted @ blocks[layer].weight
        torch.testing.assert_close(found[layer], wanted.detach(), rtol=1e-5, atol=1e-5)


def test_a_model_without_batched_gradients_gives_the_same(models, monkeypatch):
    lens = LogitLens(load_model(str(models["gpt_neox"]), "cpu").model)
    ids = list(range(1, 25))
    wanted = JacobianEstimator(lens, 2)(ids)
    gradients = torch.autograd.grad

    def alone(*args, is_grads_batched=False, **keywords):
        if is_grads_batched:
            raise RuntimeError("no batching rule")
        return gradients(*args, **keywords)

    monkeypatch.setattr(torch.autograd, "grad", alone)
    estimate = JacobianEstimator(lens, 2)
    torch.testing.assert_close(estimate(ids), wanted, rtol=1e-5, atol=1e-6)
    assert not estimate._batched


def test_no_memory_for_many_rows_means_fewer(models, monkeypatch):
    lens = LogitLens(load_model(str(models["gpt_neox"]), "cpu").model)
    ids = list(range(1, 25))
    wanted, gradients, rows = JacobianEstimator(lens, 2)(ids), torch.autograd.grad, []

    def small(outputs, inputs, cotangents, **keywords):
        rows.append(len(cotangents))
        if len(cotangents) > COTANGENTS // 4:
            raise torch.OutOfMemoryError("out of memory")
        return gradients(outputs, inputs, cotangents, **keywords)

    monkeypatch.setattr(torch.autograd, "grad", small)
    estimate = JacobianEstimator(lens, 2)
    torch.testing.assert_close(estimate(ids), wanted, rtol=1e-5, atol=1e-6)
    assert estimate._batched and max(rows) == COTANGENTS and rows[-1] <= COTANGENTS // 4


@pytest.mark.parametrize("counts", [(4, 4), (1, 7), (2, 3, 9)])
def test_errors_are_those_of_the_mean(counts):
    """Against the spread of means over many fits of noisy prompts, root mean squares; parts of equal size or not."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(1, 20, 20, generator=generator)
    told, actual = [], []
    for _ in range(400):
        means = [truth + 0.3 / n**0.5 * torch.randn(1, 20, 20, generator=generator) for n in counts]
        mean = sum(n * own for n, own in zip(counts, means, strict=True)) / sum(counts)
        told.append(relative_errors(means, counts)[0] ** 2)
        actual.append(float((mean - truth).norm() / truth.norm()) ** 2)
    assert abs((sum(told) / sum(actual)) ** 0.5 - 1) < 0.05
    assert relative_errors([truth], [3]) is None and relative_errors([truth, truth], [3, 0]) is None


def options(model, text, **changes):
    given = {"model": str(model), "text": str(text), "tokens": 4000, "device": "cpu", "objective": "jacobian"}
    return FitConfig(**given | {"prompts": 4, "from_layer": 1} | changes)


@pytest.fixture(scope="module")
def fitted(models, text, tmp_path_factory):
    return fit_lens(options(models["gemma2"], text), str(tmp_path_factory.mktemp("lens") / "jacobian"))


def test_a_fit_is_the_mean_over_its_prompts(models, text, fitted):
    from refinelens.data.texts import load_text
    from refinelens.fitting.text import States

    loaded = load_model(str(models["gemma2"]), "cpu")
    lens = LogitLens(loaded.model)
    states = States(options(models["gemma2"], text), load_text(str(text)), loaded, lens)
    estimate = JacobianEstimator(lens, 1)
    length = min(128, states.split.length)
    mean = torch.stack([estimate(ids[:length]) for ids in states.some(range(4))]).double().mean(0).float()
    assert torch.equal(fitted.lens.translators.weight, as_translators(mean, N_LAYERS).weight)
    assert not fitted.lens.translators.weight[0].any() and not fitted.lens.translators.bias.any()
    manifest = fitted.manifest
    assert manifest["kind"] == "jacobian" and set(manifest["quality"]) == {"plain", "linear", "jacobian"}
    wanted = {"prompts": 4, "prompts_from": 0, "prompt_tokens": length, "positions_skipped": 16, "from_layer": 1}
    assert manifest["jacobian"].items() >= wanted.items() and len(manifest["jacobian"]["errors"]) == N_LAYERS - 1
    assert manifest["quality"]["jacobian"]["kl"][0] == manifest["quality"]["plain"]["kl"][0]
    with (fitted.path / "quality.csv").open() as lines:
        assert next(lines).strip().endswith("jacobian_error")
    assert {path.name for path in fitted.path.iterdir()} == {
        *("lens.safetensors", "manifest.json", "quality.csv", "quality.png")
    }


@pytest.mark.medium
def test_a_stopped_fit_goes_on_to_the_same_lens(models, text, fitted, tmp_path):
    def stop(stage, done, total):
        if (stage, done) == ("differentiating", 3):
            raise KeyboardInterrupt

    out = tmp_path / "jacobian"
    with pytest.raises(KeyboardInterrupt):
        fit_lens(options(models["gemma2"], text), str(out), progress=stop)
    assert (out / JACOBIANS).exists()
    with pytest.raises(InputError, match="from_layer"):
        fit_lens(options(models["gemma2"], text, from_layer=2), str(out))
    with pytest.raises(InputError, match="expected at least the 3 that the stopped fit"):
        fit_lens(options(models["gemma2"], text, prompts=2), str(out))
    begun = {}
    fit_lens(options(models["gemma2"], text), str(out), progress=lambda stage, *at: begun.setdefault(stage, at))
    assert begun["differentiating"] == (3, 4)
    assert torch.equal(load_lens(out).translators.weight, fitted.lens.translators.weight)
    assert not (out / JACOBIANS).exists()


@pytest.mark.medium
def test_disjoint_fits_merge_to_the_fit_of_all(models, text, fitted, tmp_path, capsys):
    model, halves = models["gemma2"], [str(tmp_path / "a"), str(tmp_path / "b")]
    for place, (first, count) in zip(halves, [(0, 1), (1, 3)], strict=True):
        fit_lens(options(model, text, prompts_from=first, prompts=count), place)
    out = tmp_path / "both"
    assert main(["merge-lenses", *halves, "--out", str(out)]) == 0
    assert "jacobian lens of" in capsys.readouterr().out
    merged = load_lens(out)
    torch.testing.assert_close(merged.translators.weight, fitted.lens.translators.weight, rtol=1e-6, atol=1e-6)
    assert merged.manifest["jacobian"]["prompts"] == 4 and len(merged.manifest["merged"]) == 2
    jacobians = [load_lens(place).translators.weight[1:] + torch.eye(D_MODEL) for place in halves]
    wanted = relative_errors(jacobians, [1, 3])
    assert merged.manifest["jacobian"]["errors"] == pytest.approx(wanted, rel=1e-4)
    with pytest.raises(InputError, match="got 3 in common, from number 1"):
        merge_lenses([str(out), halves[1]], str(tmp_path / "twice"))
    assert not (tmp_path / "twice").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["LENS", "--out", "x"], "lenses: expected two or more, got 1"),
        (["LENS", "LENS", "--out", "x"], "expected prompts that"),
        (["LENS", "LINEAR", "--out", "x"], "expected one fitted with --objective jacobian, got a linear lens"),
        (["LENS", "FILE", "--out", "x"], "as published, which does not say what its prompts were"),
        (["LENS", "none", "--out", "x"], "got no folder there"),
        (["LENS", "OTHER", "--out", "x"], "expected sequence_tokens"),
        (["LENS", "BARE", "--out", "x"], "expected one fitted with --objective jacobian"),
        (["LENS", "OWN", "--out", "p,q"], "--out: expected a folder that --lens can name"),
        (["LENS", "OWN", "--out", "STOPPED"], "got one with jacobians.safetensors"),
    ],
)
def test_what_cannot_be_merged_is_one_line(models, fitted, tmp_path, capsys, arguments, said, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_linear(tmp_path / "linear", models["gemma2"])
    places = {"LENS": str(fitted.path), "LINEAR": "linear", "FILE": str(save_published(tmp_path / "lens.pt"))}
    for name in ("OTHER", "BARE", "OWN"):
        places[name] = str(shutil.copytree(fitted.path, tmp_path / name.lower()))
        manifest = json.loads((fitted.path / "manifest.json").read_text())
        manifest["jacobian"] |= {"sequence_tokens": 99} if name == "OTHER" else {"prompts_from": 20}
        manifest = {key: value for key, value in manifest.items() if (name, key) != ("BARE", "jacobian")}
        (tmp_path / name.lower() / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "stopped").mkdir()
    (tmp_path / "stopped" / JACOBIANS).write_bytes(b"hours of work")
    places["STOPPED"] = "stopped"
    assert main(["merge-lenses", *(places.get(one, one) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "x").exists()
    assert (tmp_path / "stopped" / JACOBIANS).read_bytes() == b"hours of work"


def test_a_merge_that_cannot_be_written_keeps_what_is_there(models, fitted, text, tmp_path, monkeypatch, capsys):
    from safetensors import SafetensorError

    here, other = str(shutil.copytree(fitted.path, tmp_path / "here")), str(tmp_path / "other")
    fit_lens(options(models["gemma2"], text, prompts_from=4, prompts=1), other)

    def full(*_):
        raise SafetensorError("I/O error: File too large (os error 27)")

    monkeypatch.setattr("refinelens.lens.files.save_file", full)
    assert main(["merge-lenses", here, other, "--out", here, "--overwrite"]) == 1
    error = capsys.readouterr().err
    assert "free some disk" in error and error.count("\n") == 1
    assert torch.equal(load_lens(here).translators.weight, fitted.lens.translators.weight)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"from_layer": 3}, "expected a layer below the output, 0 to 2, got 3"),
        ({"prompts": 400}, "expected at most"),
        ({"prompts_from": 50, "prompts": 50}, "from number 50 on"),
        ({"tokens": 170}, "expected prompts of at least 18 tokens"),
    ],
)
def test_what_cannot_be_fitted_is_said_first(models, text, tmp_path, changes, said):
    with pytest.raises(InputError, match=said):
        fit_lens(options(models["gemma2"], text, **changes), str(tmp_path / "lens"))
    assert not (tmp_path / "lens" / "manifest.json").exists()


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--prompts", "0"], "--prompts: expected at least 1"),
        (["--from-layer", "-1"], "--from-layer: expected 0 or more"),
        (["--objective", "kl", "--prompts", "3"], "--prompts: expected --objective jacobian"),
        (["--objective", "jacobian", "--steps", "3"], "--steps: expected --objective kl"),
    ],
)
def test_options_that_do_not_fit_are_one_line(tmp_path, capsys, arguments, said):
    assert main(["fit", "--model", "tiny", "--out", str(tmp_path / "lens"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def save_published(path, layers=(0, 1), d_model=D_MODEL, **changes):
    """A Jacobian lens as its authors save it; their layer 0 is the output of the first block."""
    generator = torch.Generator().manual_seed(3)
    jacobians = {layer: torch.randn(d_model, d_model, generator=generator).half() for layer in layers}
    saved = {"J": jacobians, "n_prompts": 100, "source_layers": list(layers), "d_model": d_model} | changes
    torch.save({name: value for name, value in saved.items() if value is not None}, path)
    return path


@pytest.mark.parametrize("how", ["file", "folder", "only file"])
def test_a_published_lens_is_read_as_its_formula(models, tmp_path, how):
    """``unembed(norm(J h))``, one layer further up than there; what has no matrix is plain, which is said."""
    folder = tmp_path / "words"
    folder.mkdir()
    path = save_published(folder / ("lens.pt" if how == "folder" else "mine.pt"), layers=(1,))
    if how == "folder":
        (folder / "checkpoint.pt").write_bytes(b"")
    lens = load_lens(path if how == "file" else folder)
    assert (lens.name, lens.kind) == ("mine" if how == "file" else "words", "jacobian")
    loaded = load_model(str(models["gpt_neox"]), "cpu")
    logit_lens = LogitLens(loaded.model)
    own = fit_to_model(lens, loaded, logit_lens)
    assert own.note == (
        "its file names no model; only d_model and layers were compared; it has no map of layer 0 to 1, read there by "
        "the plain logit lens"
    )
    hidden = logit_lens.hidden(torch.arange(1, 9)[None], torch.arange(8))[:, 0]
    moved = hidden.clone()
    moved[2] = hidden[2] @ torch.load(path)["J"][1].float().T
    with pytest.warns(UserWarning, match="no map of layer 0 to 1"), pytest.warns(UserWarning, match="names no model"):
        reading = logit_lens.with_lens(lens).read_states(hidden, 5)
    wanted = logit_lens.read_states(moved, 5)
    assert torch.equal(reading.argmax, wanted.argmax) and torch.equal(reading.rank, wanted.rank)
    torch.testing.assert_close(reading.logprob, wanted.logprob, rtol=1e-4, atol=1e-4)
    assert not torch.equal(reading.argmax[2], logit_lens.read_states(hidden, 5).argmax[2])


BROKEN = {
    "a checkpoint": ({"jacobian_sum": {}}, "got a checkpoint of its fit"),
    "no J": ({"J": None}, "J"),
    "a list": ({"J": [1]}, "expected J"),
    "another width": (
        {"J": {0: torch.ones(8, 8)}, "source_layers": [0]},
        r"expected J\[0\] as a floating tensor \[32, 32\] in lens.pt, got \[8, 8\]",
    ),
    "whole numbers": ({"J": {0: torch.ones(D_MODEL, D_MODEL).long()}, "source_layers": [0]}, r"expected J\[0\]"),
    "other layers": ({"source_layers": [0, 2]}, "expected a matrix in J for each of source_layers"),
    "names for layers": ({"J": {"a": torch.ones(2, 2)}}, "expected a matrix in J for each of source_layers"),
    "a layer beyond any": (
        {"J": {10**7: torch.ones(D_MODEL, D_MODEL)}, "source_layers": [10**7]},
        "expected layers below 1000 in lens.pt, got 10000000",
    ),
    "a layer below 0": ({"J": {-1: torch.ones(D_MODEL, D_MODEL)}, "source_layers": [-1]}, "expected a matrix in J"),
    "NaN": (
        {"J": {0: torch.full((D_MODEL, D_MODEL), torch.nan)}, "source_layers": [0]},
        "expected finite numbers, got NaN or infinity in the weight of layer 1",
    ),
    "code": ({"J": {0: nn.Linear}}, "expected tensors alone in lens.pt, got pickled code"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_one_line_before_the_model_is_loaded(case, refused_sweep, models, no_model, tmp_path):
    changes, said = BROKEN[case]
    path = save_published(tmp_path / "lens.pt", **changes)
    refused_sweep(path, models["gpt_neox"])
    with pytest.raises(InputError, match=said):
        load_lens(path)


def test_a_file_of_another_model_is_refused_as_far_as_it_tells(refused_sweep, models, tmp_path):
    wide = save_published(tmp_path / "wide.pt", d_model=48)
    assert "another model (d_model 48 there, 32 here)" in refused_sweep(wide, models["gpt_neox"])
    deep = save_published(tmp_path / "deep.pt", layers=(0, 1, 2))  # 2 is the output, which every lens leaves as it is
    said = "another model (layers up to 3 there, here below 3, which is the output)"
    assert said in refused_sweep(deep, models["gpt_neox"])


def cached(folder, kind, repository, files):
    """The hub's cache as it is after a download."""
    place = folder / f"{kind}s--{repository.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "blobs").mkdir()
    for number, (name, source) in enumerate(files.items()):
        path, blob = place / "snapshots" / ("0" * 40) / name, place / "blobs" / str(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, blob)
        path.symlink_to(blob)  # a name of its own, content by its hash


def test_lenses_of_the_hub_by_name(tmp_path, monkeypatch):
    from lens_folders import save_tuned

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cached(tmp_path / "hub", "model", "someone/lenses", {"qwen/lens.pt": save_published(tmp_path / "lens.pt")})
    tuned = save_tuned(tmp_path / "tuned")
    files = {f"lens/some/model/{name}": tuned / name for name in ("config.json", "params.pt")}
    cached(tmp_path / "hub", "space", "someone/tuned-lens", files)
    lens = load_lens("hub:someone/lenses/qwen/lens.pt")
    assert (lens.name, lens.kind, lens.translators.n_layers) == ("qwen", "jacobian", N_LAYERS)
    lens = load_lens("hub:spaces/someone/tuned-lens/lens/some/model")
    assert (lens.name, lens.kind) == ("model", "tuned")


@pytest.mark.parametrize(
    "name, said",
    [
        ("hub:someone/lenses/gone/lens.pt", "hf download someone/lenses gone/lens.pt --repo-type model"),
        ("hub:spaces/someone/tuned/lens/gone", "hf download someone/tuned lens/gone/config.json --repo-type space"),
        ("hub:someone/lenses", "expected hub:OWNER/NAME/PATH or hub:spaces/OWNER/NAME/PATH, got hub:someone/lenses"),
    ],
)
def test_what_the_hub_does_not_give_is_one_line(name, said, capsys, tmp_path):
    arguments = ["sweep", "--model", "tiny", "--lens", name, "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_fit_under_another_major_version_is_used_with_a_warning(models, fitted, tmp_path):
    other = shutil.copytree(fitted.path, tmp_path / "older")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["packages"]["transformers"] = "1.2.3"
    (other / "manifest.json").write_text(json.dumps(manifest))
    loaded = load_model(str(models["gemma2"]), "cpu")
    logit_lens = LogitLens(loaded.model)
    note = fit_to_model(load_lens(other), loaded, logit_lens).note
    assert "fitted under transformers 1.2.3 (here " in note and "fitted under" not in (
        fit_to_model(fitted.lens, loaded, logit_lens).note
    )
    with pytest.warns(UserWarning, match="no map of layer 0"), pytest.warns(UserWarning, match="transformers 1.2.3"):
        logit_lens.with_lens(load_lens(other))
