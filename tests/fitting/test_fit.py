"""Fitting a linear lens: the regression against direct solutions, the text, stopping and going on, bad input."""

import gzip
import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode
from transformers import OPTConfig, OPTForCausalLM

from faults import at_pass, faulty_disk, full_disk_at
from refinelens.cli import main
from refinelens.config import FitConfig
from refinelens.data.texts import load_text
from refinelens.errors import FaultError, InputError
from refinelens.fitting import fit, objectives
from refinelens.fitting.objectives import Statistics, _Correction
from refinelens.fitting.quality import measure
from refinelens.fitting.text import States, sequences
from refinelens.lens.files import load_lens
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.prefix import PROBE_TOKENS
from refinelens.lens.translators import Translators, rows_at_a_time
from refinelens.model.loading import load_model
from refinelens.store.process import LOCK, Interrupted
from tiny import WORDS, tiny_gpt2, word_tokenizer


class AtCalls(TorchFunctionMode):
    """Within it ``act(function, keywords)`` comes before every call of torch; it may raise instead."""

    def __init__(self, act):
        super().__init__()
        self._act = act

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        self._act(function, keywords or {})
        return function(*arguments, **(keywords or {}))


def random_states(tokens, n_layers=2, d_model=7, seed=0):
    """States whose last layer is a noisy affine map of every other, with means and scales far from 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 2, d_model)
    x = torch.randn(n_layers, tokens, d_model, generator=generator) * scale + 5 * scale
    maps = torch.randn(d_model, d_model, generator=torch.Generator().manual_seed(99))
    y = x.mean(0) @ maps / scale.mean() + 3 + 0.5 * torch.randn(tokens, d_model, generator=generator)
    return torch.cat([x, y[None]])


def statistics_of(states, chunk=1000):
    found = Statistics.empty(len(states) - 1, states.shape[2])
    for block in states.split(chunk, dim=1):
        found.add(block)
    return found


def direct_ridge(states, layer, strength):
    """Ridge with an intercept by numpy's least squares on augmented rows, fp64."""
    x, y = states[layer].double().numpy(), states[-1].double().numpy()
    mean_x, mean_y = x.mean(0), y.mean(0)
    xc, yc = x - mean_x, y - mean_y
    penalty = strength * (xc**2).sum() / xc.shape[1]
    rows = np.concatenate([xc, np.sqrt(penalty) * np.eye(xc.shape[1])])
    maps = np.linalg.lstsq(rows, np.concatenate([yc, np.zeros_like(rows[: xc.shape[1]])]), rcond=None)[0]
    return maps, mean_y - mean_x @ maps


def test_translators_solve_the_ridge_problem():
    states, other = random_states(500), random_states(200, seed=1)
    translators, strengths = objectives.solve(statistics_of(states), statistics_of(other))
    for layer, strength in enumerate(strengths):
        maps, intercept = direct_ridge(states, layer, strength)
        found = translators.weight[layer].double().numpy().T + np.eye(len(maps))
        np.testing.assert_allclose(found, maps, atol=2e-6 * np.abs(maps).max())
        np.testing.assert_allclose(translators.bias[layer].numpy(), intercept, rtol=1e-5, atol=1e-4)


def test_the_strength_is_the_best_on_the_held_out_tokens():
    states, other = random_states(12), random_states(300, seed=1)  # few tokens: the ridge matters
    _, strengths = objectives.solve(statistics_of(states), statistics_of(other))
    for layer, chosen in enumerate(strengths):
        errors = {}
        for strength in objectives.STRENGTHS:
            maps, intercept = direct_ridge(states, layer, strength)
            residual = other[-1].double().numpy() - other[layer].double().numpy() @ maps - intercept
            errors[strength] = (residual**2).sum()
        assert errors[chosen] <= min(errors.values()) * (1 + 1e-9)
        assert chosen > objectives.STRENGTHS[0]


def test_statistics_do_not_depend_on_how_the_tokens_come():
    states = random_states(97)
    whole, pieces = statistics_of(states), statistics_of(states, chunk=5)
    for name, value in whole.tensors("x").items():
        torch.testing.assert_close(pieces.tensors("x")[name], value, rtol=1e-12, atol=1e-9)


def test_a_layer_that_never_varies_is_no_trouble():
    states = random_states(50)
    states[0] = 3.0
    translators, _ = objectives.solve(statistics_of(states), statistics_of(states))
    torch.testing.assert_close(translators.one(0, states[0]), states[-1].mean(0).expand(50, -1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("eigenvalue", [0.0, 3e-13, -3e-13], ids=["exactly-0", "above-0", "below-0"])
def test_rounding_is_no_variance_on_any_machine(eigenvalue):
    """What is left of two equal sums is 0 on one machine and rounding on another, in the cross moment too.

    The sums are put there by hand, so that no machine's own rounding decides.
    """
    states = random_states(50)
    found = statistics_of(states)
    d_model = states.shape[2]
    found.sum_x[0] = 150.0
    found.xx[0] = 450.0 + eigenvalue * torch.eye(d_model, dtype=torch.float64)
    found.xy[0] = 3 * found.sum_y + 4.5e-13
    translators, _ = objectives.solve(found, found)
    assert float((translators.weight[0] + torch.eye(d_model)).abs().max()) == 0.0
    torch.testing.assert_close(translators.bias[0], states[-1].mean(0), rtol=1e-6, atol=1e-6)
    correction = _Correction(0, translators, found, steps=1)
    assert not correction._whiten.any(), "nor is it a direction to train along"


def test_a_small_variance_beside_a_large_mean_is_still_mapped():
    """One part in a million of the mean is far above rounding."""
    states = random_states(500)
    states[0] = 1e-3 * states[-1] + 1e3
    translators, _ = objectives.solve(statistics_of(states), statistics_of(states))
    error = translators.one(0, states[0].double().float()) - states[-1]
    assert float(error.square().mean() / states[-1].var(0).mean()) < 0.01


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of strong opinions: random weights as they come make all tokens equally likely."""
    folder = tmp_path_factory.mktemp("model")
    sharp = tiny_gpt2(len(word_tokenizer()))
    with torch.no_grad():
        for name, parameter in sharp.named_parameters():
            if parameter.dim() == 2:
                parameter *= 50.0 if name.endswith(("wte.weight", "wpe.weight")) else 40.0
    sharp.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    generator = np.random.default_rng(0)
    path.write_text("\n".join(" ".join(generator.choice(WORDS, 12)) for _ in range(300)), encoding="utf-8")
    return path


def test_no_document_is_read_twice(model, tmp_path):
    """Passages that questions share would be fitted on and reported on."""
    generator = np.random.default_rng(0)
    passages = [{"title": "arven", "text": " ".join(generator.choice(WORDS, 60))} for _ in range(40)]
    path = tmp_path / "task.jsonl"
    shared = [passages[(5 * i) % 40 :][:10] for i in range(60)]
    path.write_text("".join(json.dumps({"ctxs": own}) + "\n" for own in shared))
    found = load_text(str(path))
    assert [piece.split("\n")[1] for piece in found.pieces()] == [passage["text"] for passage in passages]
    loaded = load_model(str(model), "cpu")
    states = States(options(model, path, tokens=1600), found, loaded, LogitLens(loaded.model))
    fit, report = (list(states.some(role)) for role in (states.split.fit, states.split.report))
    grams = [{tuple(ids[i : i + 12]) for ids in role for i in range(len(ids) - 11)} for role in (fit, report)]
    assert len(grams[1]) > 50 and not grams[0] & grams[1]


@pytest.mark.parametrize("count", [10, 11, 19, 31, 39, 390])
def test_a_tenth_is_the_nearest_number_of_sequences(model, tmp_path, count):
    """Of 39, which 20,000 tokens make, four: three would be a thirteenth."""
    loaded, path = load_model(str(model), "cpu"), tmp_path / "text"
    path.write_text(" ".join(["door"] * (count * loaded.max_tokens + 7)))  # and a rest
    given = options(model, path, tokens=10**6)  # more than there are: the text says how many sequences
    split = States(given, load_text(str(path)), loaded, LogitLens(loaded.model)).split
    assert [*split.fit, *split.choose, *split.report] == list(range(count)) and len(split.fit) >= 8
    assert len(split.choose) == len(split.report) and abs(len(split.report) - count / 10) <= 0.5


def options(model, text, **changes):
    return FitConfig(**{"model": str(model), "text": str(text), "tokens": 3000} | changes)


@pytest.fixture(scope="module")
def fitted(model, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lens") / "words"
    return fit.fit_lens(options(model, text), str(folder))


def test_a_fitted_lens_explains_more_than_the_plain_one(fitted):
    quality = fitted.manifest["quality"]
    n_layers = fitted.manifest["model"]["n_layers"]
    for layer in range(n_layers):
        assert quality["linear"]["variance_explained"][layer] > quality["plain"]["variance_explained"][layer]
        assert quality["linear"]["kl"][layer] < quality["plain"]["kl"][layer]
    for lens in quality.values():
        assert (lens["kl"][-1], lens["top1"][-1]) == (0.0, 1.0)
        assert lens["variance_explained"][-1] == pytest.approx(1.0)


def test_the_folder_of_a_lens(fitted):
    names = {path.name for path in fitted.path.iterdir()}
    assert names == {"lens.safetensors", "manifest.json", "quality.csv", "quality.png"}
    lens = load_lens(fitted.path)
    assert (lens.name, lens.kind, lens.manifest) == ("words", "linear", fitted.manifest)
    assert fitted.manifest["tokens"]["fit"] > 4 * fitted.manifest["tokens"]["report"]
    lines = (fitted.path / "quality.csv").read_bytes().strip().split(b"\n")
    assert not any(b"\r" in line for line in lines)
    assert len(lines) == 2 + fitted.manifest["model"]["n_layers"]


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.medium
@pytest.mark.parametrize("stop_after", [1, 7, 17])
def test_a_stopped_fit_goes_on_to_the_same_lens(model, text, fitted, tmp_path, stop_after):
    read = []

    def progress(stage, done, total):
        read.append(done)
        if len(read) == stop_after + 1:
            raise Stop

    with pytest.raises(Stop):
        fit.fit_lens(options(model, text), str(tmp_path / "words"), progress=progress, checkpoint_seconds=0.0)
    begun = []
    fit.fit_lens(options(model, text), str(tmp_path / "words"), progress=lambda *stage: begun.append(stage))
    assert begun[0][1] == stop_after  # what was read is not read again
    for name, tensor in load_file(fitted.path / "lens.safetensors").items():
        assert torch.equal(load_file(tmp_path / "words" / "lens.safetensors")[name], tensor)
    assert not (tmp_path / "words" / fit.STATISTICS).exists()


@pytest.mark.parametrize("stage, at, signum", [("reading", 3, signal.SIGINT), ("solving", 0, signal.SIGTERM)])
def test_a_signal_lets_the_sequence_finish(model, text, fitted, tmp_path, stage, at, signum):
    """Nothing is begun after it; the lens becomes the one of a fit that was never stopped."""
    told = []

    def progress(*now):
        told.append(now)
        if now[:2] == (stage, at):
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted) as stopped:
        fit.fit_lens(options(model, text), str(tmp_path / "words"), progress=progress)
    assert stopped.value.signum == signum and told[-1][:2] == (stage, at)
    assert {path.name for path in (tmp_path / "words").iterdir()} == {fit.STATISTICS}
    begun = []
    fit.fit_lens(options(model, text), str(tmp_path / "words"), progress=lambda *stage: begun.append(stage))
    assert begun[0][1] == (at or begun[0][2]), "what was read is not read again"
    for name, tensor in load_file(fitted.path / "lens.safetensors").items():
        assert torch.equal(load_file(tmp_path / "words" / "lens.safetensors")[name], tensor)


def test_a_second_signal_writes_nothing(model, text, tmp_path):
    def progress(stage, done, total):
        if done == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted) as stopped:
        fit.fit_lens(options(model, text), str(tmp_path / "lens"), progress=progress)
    assert stopped.value.signum == signal.SIGTERM and not (tmp_path / "lens").exists()


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on(model, text, tmp_path, capsys, signum, code):
    calls = []

    def stop_at_the_second(ids, states):
        if ids.shape[1] > PROBE_TOKENS:
            calls.append(ids)
            if len(calls) == 2:
                os.kill(os.getpid(), signum)

    command = ["fit", "--model", str(model), "--text", str(text), "--tokens", "3000", "--out", str(tmp_path / "lens")]
    with at_pass(stop_at_the_second):
        assert main(command) == code
    said = "refinelens: interrupted; the same command goes on from the last checkpoint, if there is one\n"
    assert capsys.readouterr().err == said
    assert len(calls) == 2 and (tmp_path / "lens" / fit.STATISTICS).exists()


def stopped(model, text, folder):
    def progress(stage, done, total):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        fit.fit_lens(options(model, text), str(folder), progress=progress, checkpoint_seconds=0.0)


@pytest.mark.medium
def test_another_fit_does_not_go_on_from_a_stopped_one(model, text, tmp_path):
    stopped(model, text, tmp_path / "lens")
    with pytest.raises(InputError, match="expected tokens 3000, as the stopped fit has it, got 4000; pass ``over"):
        fit.fit_lens(options(model, text, tokens=4000), str(tmp_path / "lens"))
    path = tmp_path / "lens" / fit.STATISTICS  # of a version that divided the text in another way
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    identity = json.loads(metadata["identity"]) | {"sequences": [13, 1, 1]}
    save_file(tensors, path, metadata | {"identity": json.dumps(identity)})
    with pytest.raises(InputError, match=r"expected sequences \[13, 1, 1\], as the stopped fit has it, got \[.*\]"):
        fit.fit_lens(options(model, text), str(tmp_path / "lens"))
    fit.fit_lens(options(model, text, tokens=4000), str(tmp_path / "lens"), overwrite=True)


def test_a_damaged_checkpoint_is_named(model, text, tmp_path):
    stopped(model, text, tmp_path / "lens")
    path = tmp_path / "lens" / fit.STATISTICS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="expected a whole statistics.safetensors"):
        fit.fit_lens(options(model, text), str(tmp_path / "lens"))


def test_texts(tmp_path, model):
    loaded = load_model(str(model))
    plain = " ".join(WORDS) + "\n"
    documents = [json.dumps({"text": plain}), json.dumps({"ctxs": [{"title": "door", "text": "the"}]})]
    (tmp_path / "a.txt").write_text(plain, encoding="utf-8")
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write(plain)
    (tmp_path / "b.jsonl").write_text("\n".join(documents), encoding="utf-8")
    ids = loaded.tokenizer(plain)["input_ids"]
    for name, wanted in (
        ("a.txt", ids),
        ("a.txt.gz", ids),
        ("b.jsonl", ids + loaded.tokenizer("door the")["input_ids"]),
    ):
        found = list(sequences(load_text(str(tmp_path / name)), loaded.tokenizer, 2, 1000))
        assert sum(found, []) == wanted[: len(found) * 2]
        assert len(found) == len(wanted) // 2
    assert len(list(sequences(load_text("builtin"), loaded.tokenizer, 100, 50))) == 50


BAD = [
    (["--tokens", "10"], "--tokens: expected at least 160, got 10"),
    (["--text", "nowhere.txt"], "--text: expected builtin, tiny or a file of text, got no file at nowhere.txt"),
    (["--text", "SHORT"], "expected at least 10 sequences of 256 tokens, got 0; give more text"),
    (["--text", "BROKEN"], "expected a JSON object with text or ctxs in every line, got another in line 2"),
    (["--text", "BINARY"], "expected readable UTF-8 text"),
    (["--text", "DAMAGED"], "expected readable UTF-8 text"),
    (["--text", "DEEP"], "expected a JSON object with text or ctxs in every line, got another in line 1"),
    (["--text", "HALF"], "expected a JSON object with text or ctxs in every line, got another in line 1"),
    (["--seed", str(2**63)], "--seed: expected 0 to 2**63 - 1"),
    (["--out", "plain"], "--out: expected a folder that --lens can name, without a comma and not plain, got 'plain'"),
    (["--out", "a,b"], "--out: expected a folder that --lens can name"),
    (["--out", ""], "--out: expected a value, got ''"),
    (["--steps", "5"], "--steps: expected --objective kl, which alone has this option, got linear"),
    (["--seed", "5"], "--seed: expected --objective kl, which alone has this option, got linear"),
    (["--out", "FOREIGN"], "expected a new folder or a lens, got other files, such as mine.txt"),
    (["--out", "LENS"], "expected a new folder, got a lens; choose another or pass --overwrite"),
    (["--model", "nowhere/at/all"], "--model: expected a folder"),
]


@pytest.mark.medium
@pytest.mark.parametrize("arguments, message", BAD, ids=lambda value: value if isinstance(value, str) else None)
def test_bad_input_is_one_line(model, text, fitted, tmp_path, capsys, arguments, message):
    (tmp_path / "SHORT").write_text("door the", encoding="utf-8")
    (tmp_path / "BROKEN.jsonl").write_text('{"text": "door"}\n{"word": 1}\n', encoding="utf-8")
    (tmp_path / "BINARY").write_bytes(b"\xff\xfe\x00" * 100)
    (tmp_path / "FOREIGN").mkdir()
    (tmp_path / "FOREIGN" / "mine.txt").write_text("kept")
    packed = bytearray(gzip.compress(" ".join(WORDS * 500).encode()))
    packed[40:60] = b"\xff" * 20
    (tmp_path / "DAMAGED.txt.gz").write_bytes(packed)
    (tmp_path / "DEEP.jsonl").write_text("[" * 200_000, encoding="utf-8")
    (tmp_path / "HALF.jsonl").write_text('{"text": "red \\ud800 blue"}', encoding="utf-8")
    places = {path.name.split(".")[0]: str(path) for path in tmp_path.iterdir()} | {"LENS": str(fitted.path)}
    given = [places.get(argument, argument) for argument in arguments]
    defaults = ["--model", str(model), "--text", str(text), "--tokens", "6000", "--out", str(tmp_path / "out")]
    assert main(["fit", *defaults, *given]) == 2
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1
    assert (tmp_path / "FOREIGN" / "mine.txt").read_text() == "kept"


@pytest.mark.medium
def test_the_command_prints_the_report(model, text, tmp_path, capsys):
    assert (
        main(["fit", "--model", str(model), "--text", str(text), "--tokens", "3000", "--out", str(tmp_path / "l")]) == 0
    )
    printed = capsys.readouterr().out
    assert (
        "ridge" in printed and "KL: KL(final || layer) in nats, final the" in printed and "lens.safetensors" in printed
    )


@pytest.mark.usefixtures("drawn")
def test_the_figure_says_what_it_is_of(fitted):
    from refinelens.report.figures import quality_figure

    figure = quality_figure(fitted.manifest)
    tokens = fitted.manifest["tokens"]["report"]
    assert figure.get_suptitle().endswith(f": {tokens} held-out tokens of the text words.txt")
    assert figure.axes[0].get_ylabel() == "KL(final || layer)\n(mean nats; axis linear below 1)"


@pytest.mark.medium
def test_training_lowers_the_kl(model, text, fitted, tmp_path):
    trained = fit.fit_lens(options(model, text, objective="kl", steps=60), str(tmp_path / "lens"))
    quality = trained.manifest["quality"]
    assert (
        list(quality) == ["plain", "linear", "kl"] and trained.manifest["kind"] == load_lens(trained.path).kind == "kl"
    )
    assert quality["linear"]["kl"] == pytest.approx(fitted.manifest["quality"]["linear"]["kl"], rel=1e-4)
    assert sum(quality["kl"]["kl"]) < 0.95 * sum(quality["linear"]["kl"])
    again = fit.fit_lens(options(model, text, objective="kl", steps=60), str(tmp_path / "again"))
    assert torch.equal(load_lens(again.path).translators.weight, load_lens(trained.path).translators.weight)


@pytest.mark.medium
def test_a_layer_that_training_makes_worse_keeps_its_linear_translator(model, text, fitted, tmp_path, monkeypatch):
    from refinelens.fitting import objectives

    monkeypatch.setattr(objectives, "RATE", 50.0)
    wild = fit.fit_lens(options(model, text, objective="kl", steps=3), str(tmp_path / "lens"))
    assert torch.equal(load_lens(wild.path).translators.weight, load_lens(fitted.path).translators.weight)


@pytest.mark.medium
def test_a_manifest_beside_other_tensors_is_refused(fitted, tmp_path, model, text):
    other = fit.fit_lens(options(model, text, tokens=4000), str(tmp_path / "other"))
    (other.path / "lens.safetensors").write_bytes((fitted.path / "lens.safetensors").read_bytes())
    with pytest.raises(InputError, match="expected the tensors that its manifest was written for, got others"):
        load_lens(other.path)


@pytest.mark.medium
@pytest.mark.parametrize("stage", ["solving", "training", "measuring"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_fit_that_stopped_late_reads_nothing_again(model, text, fitted, tmp_path, stage, overwrite):
    given = options(model, text, objective="kl", steps=2)
    if overwrite:
        fit.fit_lens(options(model, text, tokens=4000), str(tmp_path / "lens"))

    def progress(at, done, total):
        if at == stage:
            raise Stop

    with pytest.raises(Stop):
        fit.fit_lens(given, str(tmp_path / "lens"), overwrite, progress=progress)
    begun = []
    fit.fit_lens(given, str(tmp_path / "lens"), overwrite, progress=lambda *told: begun.append(told))
    assert begun[0][1] == begun[0][2] > 0
    names = {path.name for path in (tmp_path / "lens").iterdir()}
    assert names == {"lens.safetensors", "manifest.json", "quality.csv", "quality.png"}


@pytest.mark.medium
def test_a_stop_in_the_middle_of_a_sum_is_forgotten(model, text, fitted, tmp_path):
    sums = []

    def stop_halfway(function, keywords):
        if function is torch.Tensor.addmm_:
            sums.append(function)
            if len(sums) == 27:  # two of each of three layers: of the fifth sequence it is the third
                raise Stop

    with AtCalls(stop_halfway), pytest.raises(Stop):
        fit.fit_lens(options(model, text), str(tmp_path / "lens"))
    again = fit.fit_lens(options(model, text), str(tmp_path / "lens"))
    assert torch.equal(load_lens(again.path).translators.weight, load_lens(fitted.path).translators.weight)


def test_out_of_memory_is_one_line(model, text, tmp_path, capsys):
    def fail(function, keywords):
        if function is torch.zeros and keywords.get("dtype") == torch.float64:  # sums are of no other
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")

    command = ["fit", "--model", str(model), "--text", str(text), "--tokens", "3000", "--out", str(tmp_path / "l")]
    with AtCalls(fail):
        assert main(command) == 1
    printed = capsys.readouterr().err
    assert "GB of statistics beside the model, got out of memory" in printed and printed.count("\n") == 1


@pytest.mark.medium
def test_a_full_disk_is_one_line(model, text, tmp_path, capsys):
    def full(number, path):
        if path and path.endswith("lens.safetensors"):
            raise OSError(28, "No space left on device")

    command = ["fit", "--model", str(model), "--text", str(text), "--tokens", "3000", "--out", str(tmp_path / "l")]
    with faulty_disk(full):
        assert main(command) == 1
    printed = capsys.readouterr().err
    assert "no free disk left; what was written stays readable; free some; the same command goes on from the" in printed
    assert printed.count("\n") == 1
    assert [path.name for path in (tmp_path / "l").glob("*.safetensors")] == [fit.STATISTICS]


@pytest.mark.medium
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_no_write_of_a_fit_may_fail_unseen(model, text, tmp_path, every):
    """Every fifth flush, rename and removal, or every one, in turn; the same call makes the lens that it was to be."""
    whole = fit.fit_lens(options(model, text), str(tmp_path / "whole"))
    for step in range(1, 100, every):
        folder = tmp_path / str(step) / "whole"
        try:
            with full_disk_at(step):
                fit.fit_lens(options(model, text), str(folder))
            break
        except FaultError as error:
            assert "no free disk left" in str(error)
        if not (folder / "manifest.json").exists():
            fit.fit_lens(options(model, text), str(folder))
        for name in ("lens.safetensors", "quality.csv"):
            assert (folder / name).read_bytes() == (whole.path / name).read_bytes()
        assert load_lens(folder).manifest["quality"] == whole.manifest["quality"]
    assert step > 10


@pytest.mark.medium
def test_two_fits_and_one_folder(model, text, tmp_path):
    """Whoever comes second is told so, also where nothing is written yet; the lock goes with the fit."""
    refused = []

    def progress(stage, done, total):
        if not refused:
            assert {path.name for path in (tmp_path / "lens").iterdir()} == {LOCK}
            with pytest.raises(InputError, match="expected a folder that no other process writes, got one held by"):
                fit.fit_lens(options(model, text), str(tmp_path / "lens"), overwrite=True)
            refused.append(stage)

    fit.fit_lens(options(model, text), str(tmp_path / "lens"), progress=progress)
    assert refused and not (tmp_path / "lens" / LOCK).exists()


def test_a_fit_that_cannot_begin_leaves_no_folder(model, text, tmp_path):
    with pytest.raises(InputError, match="``text``: expected builtin, tiny or a file of text"):
        fit.fit_lens(options(model, tmp_path / "nowhere.txt"), str(tmp_path / "lens"))
    assert not (tmp_path / "lens").exists()


def test_a_sample_is_spread_over_its_sequences(model, text):
    asked = []

    class Spy(LogitLens):
        def hidden(self, ids, at, *rest):
            asked.append(at[0])
            return super().hidden(ids, at, *rest)

    loaded = load_model(str(model))
    read = States(options(model, text, tokens=6000), load_text(str(text)), loaded, Spy(loaded.model))
    which = range(3, len(read.split.fit))
    limit = read.split.tokens(which) // 7
    states = list(read.sample(which, limit))
    assert sum(s.shape[1] for s in states) == limit
    places = torch.cat(asked)
    assert places.min() >= 1 and places.max() < read.split.length
    assert len(places.unique()) > 0.4 * read.split.length and len(states) == len(which)
    assert sum(s.shape[1] for s in read.sample(which, 10**9)) == read.split.tokens(which)


@pytest.mark.parametrize(("objective", "room", "runs"), [("kl", 10**9, 1), ("kl", 0, 2), ("linear", 10**9, 2)])
def test_states_that_training_comes_back_to_are_kept(model, text, monkeypatch, objective, room, runs):
    asked = []

    class Spy(LogitLens):
        def hidden(self, ids, *rest):
            asked.append(tuple(ids.flatten().tolist()))
            return super().hidden(ids, *rest)

    monkeypatch.setattr("refinelens.fitting.text.KEPT_BYTES", room)
    loaded = load_model(str(model))
    read = States(options(model, text, objective=objective), load_text(str(text)), loaded, Spy(loaded.model))
    everything, asked[:] = list(read.of(range(read.split.report.stop))), []
    for _ in range(runs):
        again = list(read.of(read.split.fit))
    assert len(again) == len(read.split.fit) and all(map(torch.equal, again, everything))
    assert len(asked) == (0 if objective == "kl" and room else runs * len(read.split.fit))
    asked.clear()
    list(read.of(read.split.report))
    assert len(asked) == len(read.split.report)  # others are read once by a fit, and not kept


def test_only_as_many_states_are_kept_as_there_is_room_for(model, text, monkeypatch):
    loaded = load_model(str(model))
    source = (options(model, text, objective="kl"), load_text(str(text)), loaded, LogitLens(loaded.model))
    size = next(States(*source).of(range(1))).nbytes
    monkeypatch.setattr("refinelens.fitting.text.KEPT_BYTES", 3 * size)
    read = States(*source)
    once, again = (list(read.of(read.split.fit)) for _ in range(2))
    assert sum(a is b for a, b in zip(once, again, strict=True)) == 3 < len(once)
    assert all(map(torch.equal, once, again))


def test_quality_is_that_of_the_whole_vocabulary(model, monkeypatch):
    """Of several lenses and more tokens than are read at a time, against logits in fp64."""
    lens = LogitLens(load_model(str(model)).model)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(lens.n_layers + 1, 159, lens.d_model, generator=generator)
    monkeypatch.setattr("refinelens.lens.translators.TRANSLATED_BYTES", 0)
    assert rows_at_a_time(states[:, 10:]) < 149 / 2
    maps = torch.randn(lens.n_layers, lens.d_model, lens.d_model, generator=generator) / lens.d_model
    lenses = {"plain": None, "a": Translators(maps, maps[:, 0]), "b": Translators(-maps, maps[:, 1])}
    found = measure(lens, [states[:, :10], states[:, 10:]], lenses)
    final = states[-1].double()
    for name, translators in lenses.items():
        read = (states if translators is None else translators(states)).double()
        logits = lens.head.logits(read.float()).double()
        log_p = logits.log_softmax(-1)
        kl = (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1).mean(1)
        top1 = (logits.argmax(-1) == logits[-1].argmax(-1)).double().mean(1)
        variance = 1 - ((read - final) ** 2).sum((1, 2)) / ((final - final.mean(0)) ** 2).sum()
        assert (found[name].tokens, found[name].top1) == (states.shape[1], pytest.approx(top1.tolist()))
        assert found[name].kl == pytest.approx(kl.tolist(), rel=1e-4, abs=1e-5)
        assert found[name].variance_explained == pytest.approx(variance.tolist(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_quality_is_the_same_under_autocast(dtype):
    """Of a head with a projection, which is a product of torch's."""
    config = OPTConfig(
        vocab_size=97, hidden_size=32, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    lens = LogitLens(OPTForCausalLM(config).eval().to(dtype))
    states = torch.randn(lens.n_layers + 1, 9, lens.d_model, dtype=dtype)
    maps = torch.randn(lens.n_layers, lens.d_model, lens.d_model, dtype=dtype) / lens.d_model
    lenses = {"plain": None, "own": Translators(maps, maps[:, 0])}
    alone = measure(lens, [states], lenses)
    with torch.autocast("cpu", torch.bfloat16):
        assert measure(lens, [states], lenses) == alone


def test_states_that_do_not_vary_explain_nothing(model):
    logit_lens = LogitLens(load_model(str(model)).model)
    states = torch.randn(logit_lens.n_layers + 1, 1, logit_lens.d_model).expand(-1, 9, -1)
    with pytest.raises(InputError, match="``text``: expected held-out text whose tokens differ"):
        measure(logit_lens, [states], {"plain": None})
