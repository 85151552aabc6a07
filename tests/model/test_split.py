"""Models in several places: what is offloaded to disk gives the numbers of the whole model, bit for bit, or a line."""

import json

import pytest
import torch
from accelerate import cpu_offload
from transformers import AutoModelForCausalLM

from refinelens import LogitLens
from refinelens.cli import main
from refinelens.config import EngineConfig, FitConfig, LayersConfig, SweepConfig
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.fitting.fit import fit_lens
from refinelens.layers.analysis import run_layers
from refinelens.model import loading, split
from refinelens.model.hooks import first_state
from refinelens.model.loading import load_model
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions, stop_after

PARTS = ("transformer.wte", "transformer.wpe", "transformer.h", "transformer.ln_f", "lm_head")
ON_DISK = {
    "everything": {"": "disk"},
    "each-part": dict.fromkeys(PARTS, "disk"),
    "blocks": dict.fromkeys(PARTS, "cpu") | {"transformer.h": "disk"},
    "last-block": dict.fromkeys((*PARTS[:2], "transformer.h.0", "transformer.h.1", *PARTS[3:]), "cpu")
    | {"transformer.h.2": "disk"},
    "head": dict.fromkeys(PARTS, "disk") | {"transformer.wpe": "cpu", "transformer.h": "cpu"},
}


@pytest.fixture
def write_map(tmp_path):
    def write(entries):
        path = tmp_path / "map.json"
        path.write_text(json.dumps(entries))
        return str(path)

    return write


@pytest.fixture(scope="module")
def whole(tiny_model):
    return load_model(str(tiny_model), "cpu")


@pytest.mark.parametrize("name", ON_DISK)
def test_offloaded_it_is_the_same_model(tiny_model, whole, write_map, name):
    loaded = load_model(str(tiny_model), device_map=write_map(ON_DISK[name]))
    assert any(parameter.is_meta for parameter in loaded.model.parameters())
    assert loaded.whole_difference == 0 and loaded.device.type == "cpu"
    for hash in ("config_sha256", "weights_sha256", "weights_sample_sha256", "tokenizer_sha256"):
        assert getattr(loaded, hash) == getattr(whole, hash)
    lens, own = LogitLens(loaded.model), LogitLens(whole.model)
    ids = torch.tensor([[3, 9, 4, 7, 12]])
    reading, wanted = lens.read(ids, 5), own.read(ids, 5)
    assert torch.equal(reading.rank, wanted.rank) and torch.equal(reading.entropy, wanted.entropy)
    assert lens.head.weight.device.type == "cpu" and torch.equal(lens.head.weight, own.head.weight)


def test_another_kind_of_checkpoint(tiny_model, whole, write_map, tmp_path):
    """Of a .bin file the weights are written to disk once more, to a folder that goes with the model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_model.iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    torch.save(whole.model.state_dict(), folder / "pytorch_model.bin")
    loaded = load_model(str(folder), device_map=write_map(ON_DISK["blocks"]))
    assert loaded.whole_difference == 0 and loaded.weights_sha256 == whole.weights_sha256


def test_a_model_that_was_split_elsewhere(tiny_model, whole):
    """By its user, in Python."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    cpu_offload(model, "cpu")
    ids = torch.tensor([[3, 9, 4, 7, 12]])
    with pytest.raises(UnsupportedModelError, match="got weights that are nowhere"):  # accelerate left no map
        LogitLens(model)
    model.hf_device_map = {"": "cpu"}
    assert torch.equal(LogitLens(model).read(ids, 5).rank, LogitLens(whole.model).read(ids, 5).rank)


@pytest.mark.medium
def test_a_sweep_its_layers_and_a_fit(tiny_model, question_file, write_map, tmp_path):
    options = {"task": str(question_file), "documents": (2, 3), "measures": "sublayers,top5", "generate": 2}
    own = run_sweep(SweepConfig(str(tiny_model), device="cpu", **options), tmp_path / "own")
    split = SweepConfig(str(tiny_model), device_map=write_map(ON_DISK["blocks"]), **options)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(split, tmp_path / "split", progress=stop_after(2))
    run = resume_sweep(tmp_path / "split")
    assert predictions(run) == predictions(own)
    assert run.manifest["model"]["places"]["transformer.h"] == "disk" and own.manifest["model"]["places"] is None
    for one in (own, run):
        run_layers(one.path, LayersConfig(("skip", "attn", "patch"), examples=2))
    names = ("layers/layers.csv", "layers/interventions.parquet", "layers/patching.parquet")
    for name in (name for name in names if (own.path / name).exists()):
        assert (run.path / name).read_bytes() == (own.path / name).read_bytes(), name
    assert (own.path / names[0]).exists()
    text = tmp_path / "text.txt"
    text.write_text("the door of arven is red . the roof of brosk is blue stone . " * 200)
    fits = [FitConfig(str(tiny_model), str(text), 2000, **where) for where in ({}, {"device_map": split.device_map})]
    paths = [fit_lens(fit, str(tmp_path / f"lens{index}"), False).path for index, fit in enumerate(fits)]
    assert len({(path / "lens.safetensors").read_bytes() for path in paths}) == 1


@pytest.mark.medium
def test_what_is_said_of_it(tiny_model, question_file, write_map, tmp_path, capsys):
    arguments = ["--model", str(tiny_model), "--device-map", write_map(ON_DISK["blocks"])]
    sweep = ["sweep", *arguments, "--task", str(question_file), "--documents", "2", "--out", str(tmp_path / "run")]
    assert main(sweep) == 0
    words = "The model was split over cpu, disk; in one piece it has the same states, to 0 of the largest of a layer."
    assert words in " ".join(capsys.readouterr().out.split())
    assert words in (tmp_path / "run" / "report.html").read_text()
    assert main(["doctor", *arguments]) == 0
    assert "transformer.h: disk, transformer.ln_f: cpu, lm_head: cpu; whole model within 0" in capsys.readouterr().out


def broken(model, layer):
    """Zeros go into a block and all that follow, as behind a device border that loses its states."""
    block = model.transformer.h[layer]

    def lose(_module, args, kwargs):
        state = first_state(args, kwargs)
        zeros = torch.zeros_like(state)
        return tuple(zeros if one is state else one for one in args), {
            name: zeros if one is state else one for name, one in kwargs.items()
        }

    block.register_forward_pre_hook(lose, with_kwargs=True)


@pytest.mark.parametrize("layer", [0, 1])
def test_states_that_are_lost_between_devices(tiny_model, whole, write_map, layer):
    """The first layer that differs is named; layer i is what block i - 1, counted from 0, puts out."""
    loaded = load_model(str(tiny_model), device_map=write_map(ON_DISK["blocks"]))
    broken(loaded.model, layer)
    blocks, own = loaded.model.transformer.h, whole.model.transformer.h
    with pytest.raises(UnsupportedModelError, match=f"got others from layer {layer + 1 if layer else 0} on"):
        split.compare_with_whole(loaded.model, blocks, whole.model, own)


def test_one_token_that_hides_all_others(tiny_model, whole, write_map):
    """Its state is a thousand times as large; each token is held against itself."""
    loaded = load_model(str(tiny_model), device_map=write_map(ON_DISK["blocks"]))

    def first_alone(module, args, output):
        stream = output[0] if isinstance(output, tuple) else output
        stream[:, 0] *= 1000

    def lose_the_rest(module, args, output):
        first_alone(module, args, output)
        (output[0] if isinstance(output, tuple) else output)[:, 1:] *= 0.5

    whole_model = load_model(str(tiny_model), "cpu").model
    whole_model.transformer.h[1].register_forward_hook(first_alone)
    loaded.model.transformer.h[1].register_forward_hook(lose_the_rest)
    with pytest.raises(UnsupportedModelError, match="got others from layer 2 on"):
        split.compare_with_whole(loaded.model, loaded.model.transformer.h, whole_model, whole_model.transformer.h)


def test_nothing_but_zeros_where_the_whole_model_does_not_fit(tiny_model, write_map, monkeypatch):
    monkeypatch.setattr(loading, "memory_left", lambda limits: 0)
    loaded = load_model(str(tiny_model), device_map=write_map(ON_DISK["blocks"]))
    assert loaded.whole_difference is None
    with torch.no_grad():
        loaded.model.transformer.wte.weight.zero_()
        loaded.model.transformer.wpe.weight.zero_()
    with pytest.raises(UnsupportedModelError, match="got nothing but zeros at layer 0; use another ``device_map``"):
        LogitLens(loaded.model)


def test_memory(tiny_model, whole):
    """What does not fit goes to disk; where the whole model does not fit it is not loaded."""
    size = split.n_bytes(whole.model)
    loaded = load_model(str(tiny_model), device_map="auto", max_memory=f"cpu={size // 2048}KiB")
    assert "disk" in {*split.places(loaded.model).values()} and loaded.whole_difference is None
    assert split.places(load_model(str(tiny_model), device_map="auto").model) is None
    assert split.check_split("auto", " cpu=1.5 GB") == ("auto", {"cpu": 1_500_000_000})
    assert split.memory_left({"cpu": 1000}) == 1000 < split.memory_left({0: 1000}) == split.memory_left(None)


@pytest.mark.parametrize(
    "entries, words",
    [
        ({"model.layers": "cpu"}, r"expected modules of GPT2LMHeadModel \(transformer, lm_head\), got model.layers"),
        ({"transformer": "cpu"}, "expected a device for every module, got none for lm_head.weight"),
        ({"transformer": "cpu", "lm_head": "cpu"}, None),
        ({"transformer.h": "cpu"}, "expected a device for every module, got none for transformer.wte.weight"),
        (dict.fromkeys(PARTS, "cpu") | {"lm_head": "disk"}, "expected one device for lm_head.weight and transfor"),
        ({"": "gpu"}, "expected cpu, disk or a GPU that is there for all, got 'gpu'"),
        ({"transformer": 99}, "expected cpu, disk or a GPU that is there for transformer, got 99"),
        ([1], r"expected auto or a JSON file of devices by module, such as .*, got \[1\]"),
        ({}, "expected auto or .*, got {}"),
    ],
)
def test_a_map_that_does_not_fit(tiny_model, write_map, entries, words):
    path = write_map(entries)
    if words is None:
        assert load_model(str(tiny_model), device_map=path)
        return
    with pytest.raises(InputError, match=f"``device_map`` {path}: {words}"):
        load_model(str(tiny_model), device_map=path)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"device_map": "missing.json"}, "missing.json: expected auto or a JSON file .*, got: No such file"),
        ({"max_memory": "cpu=1GiB"}, "``max_memory``: expected ``device_map``, which it limits, beside it, got none"),
        ({"device_map": "auto", "max_memory": "1GiB"}, "expected DEVICE=SIZE such as 0=20GiB,cpu=60GiB, got '1GiB'"),
        ({"device_map": "auto", "max_memory": "gpu=1GiB"}, "expected DEVICE=SIZE .*, got 'gpu=1GiB'"),
        ({"device_map": "auto", "max_memory": "99=1GiB"}, "expected cpu or a GPU that is there, got '99=1GiB'"),
        ({"device_map": "auto", "max_memory": "cpu=1GB,cpu=1KB"}, "expected each device once, got cpu twice"),
        ({"device_map": "auto", "max_memory": "cpu=lots"}, "expected DEVICE=SIZE .*, got 'cpu=lots'"),
    ],
)
def test_options_that_do_not_fit(tiny_model, given, words):
    with pytest.raises(InputError, match=words):
        load_model(str(tiny_model), **given)


def test_beside_what_it_cannot_stand(tiny_model, question_file, write_map, tmp_path):
    path = write_map(ON_DISK["blocks"])
    with pytest.raises(InputError, match="``device``: expected auto beside ``device_map``, .* got cpu"):
        SweepConfig(str(tiny_model), device="cpu", device_map=path)
    options = SweepConfig(str(tiny_model), str(question_file), (2,), device_map=path)
    with pytest.raises(InputError, match="``workers``: expected 1 beside ``device_map``, got 2"):
        run_sweep(options, tmp_path / "run", engine=EngineConfig(2))
    with pytest.raises(InputError, match="``objective='jacobian'``: expected a model whose weights stay in memory"):
        fit_lens(FitConfig(str(tiny_model), objective="jacobian", device_map=path), str(tmp_path / "lens"), False)
    with pytest.raises(InputError, match="``device_map``: expected a model of Transformers beside it, got"):
        load_model("smollm2", device_map="auto")
    assert not (tmp_path / "run").exists()
