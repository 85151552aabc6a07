"""Models as they lie on disks: adapters, code of their own, quantised weights, tokenizers that need a package."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime, timedelta

import pytest
import torch
import transformers
from torch.utils._python_dispatch import return_and_correct_aliasing

from lens_folders import random_translators, save_tuned, tiny
from refinelens import LogitLens, load_lens
from refinelens.cli import main
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.lens.files import save_lens
from refinelens.lens.logit_lens import model_entry
from refinelens.lens.translators import unembed_hash
from refinelens.model import identity
from refinelens.model.loading import load_model
from refinelens.store import process
from refinelens.store.results import open_run
from tiny import save_tiny_lens, save_tiny_model, tiny_gpt2

IDS = torch.tensor([[3, 9, 4, 7, 12]])


@pytest.fixture
def without(monkeypatch):
    """Makes a package look as if it were not installed."""
    find = importlib.util.find_spec

    def hide(package):
        hidden = lambda name, *rest: None if name == package else find(name, *rest)  # noqa: E731
        monkeypatch.setattr(importlib.util, "find_spec", hidden)

    return hide


# ---------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def base_and_adapter(tmp_path_factory):
    """A folder with a model and an adapter beside it, as training scripts leave them."""
    peft = pytest.importorskip("peft")
    folder = save_tiny_model(tmp_path_factory.mktemp("adapter") / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    where = {"task_type": "CAUSAL_LM", "target_modules": ["c_attn"], "fan_in_fan_out": True}
    config = peft.LoraConfig(**where, init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(model, config).save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(folder)}))
    return folder


def test_an_adapter_is_loaded_with_its_base(base_and_adapter, tmp_path):
    base = shutil.copytree(base_and_adapter, tmp_path / "base", ignore=shutil.ignore_patterns("adapter*"))
    loaded, bare = load_model(str(base_and_adapter), "cpu"), load_model(str(base), "cpu")
    positions = torch.arange(5)
    found, plain = (LogitLens(each.model).read(IDS, positions=positions).stats for each in (loaded, bare))
    with torch.no_grad():
        own = loaded.model(IDS).logits[0]
    torch.testing.assert_close(found.max_logit[-1, 0], own.amax(-1))
    assert not torch.allclose(found.max_logit[-1], plain.max_logit[-1])
    assert loaded.weights_sha256 != bare.weights_sha256


def test_an_adapter_by_itself_and_merged(base_and_adapter, tmp_path):
    """A folder of the adapter alone has its base's tokenizer; merged, the model is the same to rounding."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for path in base_and_adapter.glob("adapter*"):
        shutil.copy(path, alone)
    loaded, beside = load_model(str(alone), "cpu"), load_model(str(base_and_adapter), "cpu")
    assert loaded.tokenizer_sha256 == beside.tokenizer_sha256
    own = LogitLens(loaded.model).read(IDS, 5)
    assert torch.equal(own.stats.max_logit, LogitLens(beside.model).read(IDS, 5).stats.max_logit)
    import peft

    base = tmp_path / "base"
    shutil.copytree(base_and_adapter, base, ignore=shutil.ignore_patterns("adapter*"))
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    merged = peft.PeftModel.from_pretrained(model, alone).merge_and_unload()
    found = LogitLens(merged.eval()).read(IDS, 5)
    torch.testing.assert_close(found.stats.max_logit, own.stats.max_logit)
    assert torch.equal(found.stats.argmax, own.stats.argmax) and torch.equal(found.rank, own.rank)


def test_checkpoints_of_several_files(tmp_path):
    whole = load_model(str(save_tiny_model(tmp_path / "whole")), "cpu")
    whole.model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    whole.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    assert load_model(str(tmp_path / "shards"), "cpu").weights_sha256 == whole.weights_sha256


def test_a_subfolder_and_a_revision(tmp_path, monkeypatch):
    """Of a folder, and on the hub, here its cache."""
    folders = [save_tiny_model(tmp_path / name / "inside", n_layer=layers) for name, layers in (("a", 2), ("b", 3))]
    own = [load_model(str(folder), "cpu") for folder in folders]
    assert load_model(str(tmp_path / "a"), "cpu", subfolder="inside").weights_sha256 == own[0].weights_sha256
    hub = tmp_path / "hub" / "models--someone--model"
    (hub / "refs").mkdir(parents=True)
    for commit, name, folder in (("0" * 40, "main", folders[0]), ("1" * 40, "step3000", folders[1])):
        (hub / "refs" / name).write_text(commit)
        shutil.copytree(folder, hub / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    for revision, wanted in zip((None, "step3000", "1" * 40), (own[0], own[1], own[1]), strict=True):
        assert load_model("someone/model", "cpu", revision=revision).weights_sha256 == wanted.weights_sha256
    with pytest.raises(InputError, match="``model`` someone/model: expected .* got OSError"):
        load_model("someone/model", "cpu", revision="none")
    with pytest.raises(InputError, match="``revision``: expected a name on the hub as ``model`` beside it"):
        load_model(str(folders[0]), "cpu", revision="main")


def test_an_adapter_is_not_left_out_without_a_word(base_and_adapter, without, capsys):
    without("peft")
    assert main(["doctor", "--model", str(base_and_adapter), "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"refinelens: --model {base_and_adapter}: expected the package peft for its adapter")
    assert line.endswith("pip install peft, or merge the adapter into the model\n") and line.count("\n") == 1


# ---------------------------------------------------------------- code of a model's own

CODE = """
from transformers import GPT2Config, GPT2LMHeadModel
class OwnConfig(GPT2Config):
    model_type = "own-of-refinelens"
class OwnModel(GPT2LMHeadModel):
    config_class = OwnConfig
"""


def test_code_that_a_model_brings_is_never_run_unasked(tmp_path, capsys, monkeypatch):
    """Nor is anybody asked: the question would stand behind a progress bar."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    folder = save_tiny_model(tmp_path / "model")
    (folder / "own_model.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnModel"}
    config |= {"model_type": "own-of-refinelens", "auto_map": names, "architectures": ["OwnModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    command = ["doctor", "--model", str(folder), "--device", "cpu"]
    assert main(command) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"refinelens: --model {folder}: expected a model that Transformers knows, got one ")
    assert "read that code, and pass --trust-remote-code to run it" in line and line.count("\n") == 1
    assert main([*command, "--trust-remote-code"]) == 0
    assert "OwnModel on cpu" in capsys.readouterr().out


@pytest.mark.medium
def test_trusting_code_stands_in_the_manifest(tiny_model, question_file, tmp_path):
    sweep = ["sweep", "--model", str(tiny_model), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
    for number, given in enumerate(([], ["--trust-remote-code"])):
        assert main([*sweep, *given, "--out", str(tmp_path / str(number))]) == 0
        assert open_run(tmp_path / str(number)).manifest["arguments"]["trust_remote_code"] is bool(given)


def test_a_tokenizer_that_needs_sentencepiece_says_so(tmp_path, without, monkeypatch, capsys):
    def cannot(*_, **__):
        raise ValueError("You need to have sentencepiece or tiktoken installed to convert a slow tokenizer.")

    folder = save_tiny_model(tmp_path / "model")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", cannot)
    without("sentencepiece")
    assert main(["doctor", "--model", str(folder), "--device", "cpu"]) == 2
    line = capsys.readouterr().err
    assert "expected the package sentencepiece for its tokenizer.model, which is not installed; pip install" in line
    assert "tiktoken" not in line


# ---------------------------------------------------------------- what a model states


@pytest.mark.parametrize("end, shown", [("</s>", "'</s>'"), ([[1]], r"\[1\]"), (["2"], "'2'")])
def test_ends_that_are_no_ids(tmp_path, question_file, end, shown):
    folder = save_tiny_model(tmp_path / "model")
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": end}))
    loaded = load_model(str(folder), "cpu")  # they matter where a text is generated
    with pytest.raises(InputError, match=rf"expected eos_token_id of its generation .* got {shown}; mend generation"):
        print(loaded.end_ids)
    sweep = ["sweep", "--model", str(folder), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
    assert main([*sweep, "--generate", "2", "--out", str(tmp_path / "run")]) == 2


class Quantised(torch.Tensor):
    """A tensor of a class of its own, made of plain ones, as those of torchao: most operations do not know it."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def __tensor_flatten__(self):
        return ["numbers", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return return_and_correct_aliasing(func, args, kwargs or {}, Quantised(args[0].numbers, args[0].scale))
        raise NotImplementedError(f"Quantised does not know {func}")


def quantised_model(change=0):
    model = tiny_gpt2(50)
    weight = model.transformer.h[1].mlp.c_fc.weight.detach()
    numbers = (weight / weight.abs().max() * 127).to(torch.int8)
    numbers[3, 3] += change
    scale = weight.abs().max() / 127
    model.transformer.h[1].mlp.c_fc.weight = torch.nn.Parameter(Quantised(numbers, scale), requires_grad=False)
    return model


def test_quantised_weights_are_hashed_by_what_they_hold():
    one, same, other = quantised_model(), quantised_model(), quantised_model(change=1)
    assert identity.weights_sha256(one) == identity.weights_sha256(same) != identity.weights_sha256(other)
    assert identity.weights_sample_sha256(one) == identity.weights_sample_sha256(same)
    assert identity.weights_sha256(one) != identity.weights_sha256(tiny_gpt2(50))


def test_a_quantised_unembedding_is_refused_by_name():
    model = tiny_gpt2(50)
    weight = model.lm_head.weight.detach()
    model.lm_head.weight = torch.nn.Parameter(Quantised(weight.to(torch.int8), weight.max()), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match="expected an unembedding of floating numbers, .* Quantised"):
        LogitLens(model)


def test_weights_that_cannot_be_read_are_named():
    model = tiny_gpt2(50)
    model.transformer.h[0].to("meta")
    with pytest.raises(InputError, match=r"h.0.attn.c_attn.bias: expected weights that lie in memory .* meta"):
        identity.weights_sha256(model)


# ---------------------------------------------------------------- a lens knows its model


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """Two models of one shape, and a lens of the first."""
    folder = tmp_path_factory.mktemp("two")
    mine, other = (save_tiny_model(folder / name, seed=seed) for name, seed in (("mine", 0), ("other", 1)))
    return mine, other, save_tiny_lens(folder / "lens", mine, scale=0.1)


def test_a_lens_of_another_model_is_refused_in_python_too(two_models):
    mine, other, folder = two_models
    translators = load_lens(folder).translators
    positions = torch.arange(5)
    own = LogitLens(load_model(str(mine), "cpu").model)
    read = own.with_lens(translators).read(IDS, positions=positions).stats
    assert not torch.equal(read.logsumexp, own.read(IDS, positions=positions).stats.logsumexp)
    wrong = LogitLens(load_model(str(other), "cpu").model)
    with pytest.raises(InputError, match="a lens made for .*other, got one for .*mine, another revision of it"):
        wrong.with_lens(translators).read(IDS, positions=positions)
    with pytest.raises(InputError, match="expected a lens made for"):
        wrong.read_states(wrong.hidden(IDS, positions), translators=translators.to("cpu", torch.float64))


def test_a_lens_follows_the_dtype_of_its_model(two_models):
    """One that was fitted in fp32 reads the model in bf16, on the command line and in Python alike."""
    mine, _, folder = two_models
    loaded, translators = load_model(str(mine), "cpu", "bfloat16"), load_lens(folder).translators
    lens, positions = LogitLens(loaded.model), torch.arange(5)
    found = lens.with_lens(translators).read(IDS, positions=positions).stats
    wanted = lens.with_lens(translators.to("cpu", torch.bfloat16)).read(IDS, positions=positions).stats
    assert torch.equal(found.logsumexp, wanted.logsumexp) and translators.weight.dtype == torch.float32


def test_a_published_lens_of_another_unembedding_is_refused(tmp_path):
    """What a tuned lens says of its model is less: its unembedding."""
    model = tiny("gpt_neox")
    unembedding = model.get_output_embeddings().weight
    save_tuned(tmp_path / "tuned", unembed_hash=unembed_hash(unembedding, torch.float32))
    translators = load_lens(tmp_path / "tuned").translators
    lens, ids = LogitLens(model), torch.tensor([[3, 9, 4]])
    lens.with_lens(translators).read(ids, positions=torch.arange(3))
    with torch.no_grad():
        unembedding[0] += 1.0
    with pytest.raises(InputError, match="another model or revision .unembed_hash"):
        LogitLens(model).with_lens(translators).read(ids, positions=torch.arange(3))


def test_maps_of_ones_own_have_no_model(tmp_path):
    lens = LogitLens(tiny("gpt_neox"))
    assert random_translators().made_for is None
    lens.with_lens(random_translators()).read(torch.tensor([[3, 9, 4]]), positions=torch.arange(3))


# ---------------------------------------------------------------- the command line around it


@pytest.fixture
def sweep(tiny_model, question_file):
    command = ["sweep", "--model", str(tiny_model), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
    return [*command, "--examples", "2"]


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_every_command_is_the_same_under_another_default_dtype(
    sweep, tiny_model, tmp_path, request, dtype, monkeypatch
):
    """Whole numbers divided, empty tensors, constants: torch makes what has no dtype in the default one."""
    text = tmp_path / "text"
    text.write_text(
        "\n".join(f"the door of {a} is {b} ." for a in ("arven", "brosk", "calmi") for b in ("red", "green")) * 40
    )

    def run(folder):
        made = tmp_path / folder
        made.mkdir()
        monkeypatch.chdir(made)
        fit = ["fit", "--model", str(tiny_model), "--device", "cpu", "--text", str(text), "--tokens", "400"]
        assert main([*fit, "--objective", "kl", "--steps", "2", "--out", "lens"]) == 0
        assert main([*sweep, "--lens", "plain,lens", "--generate", "2", "--out", "run"]) == 0
        assert main(["layers", "run"]) == 0
        files = [*made.rglob("*.parquet"), *made.rglob("*.safetensors"), *made.rglob("*.csv")]
        return {path.relative_to(made): path.read_bytes() for path in sorted(files)}

    wanted = run("float32")
    torch.set_default_dtype(dtype)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    found = run("other")
    assert found.keys() == wanted.keys() and len(found) > 8
    assert [str(name) for name in wanted if found[name] != wanted[name]] == []


@pytest.mark.medium
def test_default_sweeps_of_one_second(sweep, tmp_path, monkeypatch, capsys):
    """Other sweeps took the names of this minute and the next."""
    monkeypatch.chdir(tmp_path)
    assert main(sweep) == 0
    (first,) = (path.name for path in (tmp_path / "runs").iterdir())
    assert re.fullmatch(r".+-questions-\d{8}-\d{6}", first)
    now, taken = datetime.now(), {first}
    for second in range(120):
        name = f"{first[:-16]}-{now + timedelta(seconds=second):%Y%m%d-%H%M%S}"
        taken |= {name, f"{name}-2"}
    for name in taken:
        (tmp_path / "runs" / name).mkdir(exist_ok=True)
    assert main(sweep) == 0
    names = {path.name for path in (tmp_path / "runs").iterdir()}
    (own,) = names - taken
    assert own.endswith("-3") and own[:-2] in taken
    assert main([*sweep, "--model", str(tmp_path / "none")]) == 2
    assert {path.name for path in (tmp_path / "runs").iterdir()} == names, "nothing is left of a sweep that failed"


@pytest.mark.medium
def test_a_run_of_relative_paths_goes_on_from_another_folder(tiny_model, question_file, tmp_path, monkeypatch):
    """Model, task, template and lens are found from where they were named."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    shutil.copytree(tiny_model, here / "model"), shutil.copy(question_file, here / "task.jsonl")
    save_tiny_lens(here / "lens", here / "model", scale=0.1)
    (here / "template").write_text("{documents}\n{question}")
    monkeypatch.chdir(here)
    given = ["--model", "model", "--task", "task.jsonl", "--template", "template", "--lens", "plain,lens"]
    assert main(["sweep", *given, "--documents", "2", "--device", "cpu", "--out", "run"]) == 0
    whole = [part.to_pylist() for part in open_run("run").parts()]
    (here / "run" / "predictions" / "part-00000.parquet").unlink()
    monkeypatch.chdir(there)
    assert main(["sweep", "--resume", "../here/run"]) == 0
    assert [part.to_pylist() for part in open_run("../here/run").parts()] == whole
    monkeypatch.chdir(here)
    (here / "run" / "predictions" / "part-00000.parquet").unlink()
    moved = shutil.copytree(here, tmp_path / "moved")
    shutil.rmtree(here / "model")
    monkeypatch.chdir(moved)
    assert main(["sweep", "--resume", "run"]) == 0, "a folder that was moved as a whole is its own"


@pytest.mark.medium
def test_a_terminal_without_unicode(tiny_model, question_file, tmp_path):
    """Text that it lacks is escaped, in what is printed and in errors."""
    out, table = tmp_path / "größe", tmp_path / "größe.csv"
    command = ["sweep", "--model", str(tiny_model), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
    assert main([*command, "--examples", "2", "--out", str(out)]) == 0
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    export = [sys.executable, "-m", "refinelens.cli", "export", str(out), "--out", str(table)]
    done, again = (subprocess.run(export, capture_output=True, env=environment) for _ in range(2))
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"gr\\xf6\\xdfe.csv: " in done.stdout and table.exists()
    assert again.returncode == 2 and again.stderr.startswith(b"refinelens: --out ") and again.stderr.count(b"\n") == 1


def test_a_system_without_file_locks_is_named(sweep, tmp_path, monkeypatch, capsys):
    """Windows has no fcntl: one line, before anything is loaded."""
    monkeypatch.setattr(process, "fcntl", None)
    assert main([*sweep, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("refinelens: expected Linux or macOS, whose file locks keep runs whole, got another system")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_numbers_beyond_any_context(sweep, tmp_path, capsys):
    for given, words in (
        (["--documents", "9" * 20], "--documents: expected sizes up to 100000, got 99999999999999999999"),
        (["--documents", "2," + "9" * 20], "--documents: expected sizes up to 100000, got 2,99999999999999999999"),
        (["--task", "kv", "--examples", "9" * 20], "--examples: expected 1 to 1000000 questions of --task kv, got 999"),
    ):
        assert main([*sweep, *given, "--out", str(tmp_path / "run")]) == 2
        line = capsys.readouterr().err
        assert line.startswith(f"refinelens: {words}") and line.count("\n") == 1


def test_an_entry_of_a_lens_is_that_of_its_model(two_models, tmp_path):
    mine, _, _ = two_models
    loaded = load_model(str(mine), "cpu")
    lens = LogitLens(loaded.model)
    entry = model_entry(loaded, lens)
    assert entry["name"] == str(mine) and entry["config_sha256"] == loaded.config_sha256
    assert entry["weights_sample_sha256"] == loaded.weights_sample_sha256
    translators = random_translators(lens.n_layers, lens.d_model)
    manifest = save_lens(tmp_path / "lens", translators, {"format_version": 1, "kind": "linear", "model": entry})
    assert load_lens(tmp_path / "lens").translators.made_for == manifest["model"] == entry
