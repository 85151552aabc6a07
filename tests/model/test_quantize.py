"""Models quantised as they are loaded: read in the dtype they compute in, swept, resumed, told from their original."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from refinelens import LogitLens
from refinelens.cli import main
from refinelens.config import QUANTIZE, SweepConfig
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.model import quantize
from refinelens.model.loading import load_model
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions, stop_after
from tiny import save_tiny_model


def needs(word):
    return pytest.importorskip(quantize.PACKAGES[word], reason=f"quantises to {word}")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A small Llama with the tiny model's tokenizer; all its widths are multiples of 64, as 4-bit blocks need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(folder / "words"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes))
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder / "llama"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("word", QUANTIZE)
def test_the_lens_is_proven_on_what_is_run(llama, word, dtype):
    needs(word)
    loaded = load_model(str(llama), "cpu", dtype, quantize=word)
    lens, own = LogitLens(loaded.model), LogitLens(load_model(str(llama), "cpu", dtype).model)
    assert lens.head.weight.dtype == getattr(torch, dtype) and torch.equal(lens.head.weight, own.head.weight)
    ids = torch.tensor([[3, 9, 4, 7, 12]])
    states, original = (one.hidden(ids, torch.arange(5)).float() for one in (lens, own))
    assert torch.equal(states[0], original[0])  # the embedding
    share = (states[1:] - original[1:]).norm() / original[1:].norm()
    assert 1e-4 < share < 0.3  # quantised, and the same model


@pytest.mark.medium
def test_a_sweep_goes_on_with_the_same_weights_alone(llama, question_file, tmp_path, capsys):
    needs("int8")
    options = SweepConfig(str(llama), str(question_file), (2, 3), device="cpu", quantize="int8")
    own = run_sweep(options, tmp_path / "own")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(options, tmp_path / "run", progress=stop_after(2))
    assert predictions(resume_sweep(tmp_path / "run")) == predictions(own)
    assert own.manifest["model"]["quantization"] == "torchao" and own.manifest["arguments"]["quantize"] == "int8"
    plain = run_sweep(SweepConfig(str(llama), str(question_file), (2, 3), device="cpu"), tmp_path / "plain")
    assert plain.manifest["model"]["weights_sha256"] != own.manifest["model"]["weights_sha256"]
    assert main(["show", str(own.path)]) == 0
    assert "The model is quantised (torchao)" in capsys.readouterr().out


def test_a_checkpoint_that_is_quantised_loads_as_it_is(llama, tmp_path):
    needs("nf4")
    loaded = load_model(str(llama), "cpu", quantize="nf4")
    loaded.model.save_pretrained(tmp_path / "nf4")
    loaded.tokenizer.save_pretrained(tmp_path / "nf4")
    again = load_model(str(tmp_path / "nf4"), "cpu")
    ids = torch.tensor([[3, 9, 4, 7, 12]])
    one, other = (LogitLens(model.model).hidden(ids, torch.arange(5)) for model in (loaded, again))
    assert torch.equal(one, other)
    with pytest.raises(InputError, match="``quantize``: expected none beside a checkpoint that is quantised by"):
        load_model(str(tmp_path / "nf4"), "cpu", quantize="int8")


def compressed(folder, checkpoint):
    """A checkpoint as vLLM's compressor writes it: four bits in groups of 32, the unembedding left as it is."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        apply_quantization_config,
    )

    weights = QuantizationArgs(num_bits=4, strategy="group", group_size=32)
    groups = {"blocks": QuantizationScheme(targets=["Linear"], weights=weights)}
    config = QuantizationConfig(config_groups=groups, ignore=["lm_head"], format="pack-quantized")
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    apply_quantization_config(model, config)
    for layer in model.modules():
        if hasattr(layer, "weight_scale"):
            layer.weight_scale.data.copy_(layer.weight.data.unflatten(1, (-1, 32)).abs().amax(-1) / 7.5)
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(folder)


def by_gptqmodel(folder, checkpoint, **more):
    """A checkpoint of the package gptqmodel, which Transformers takes for GPTQ and AWQ."""
    from gptqmodel import GPTQModel, QuantizeConfig

    vocabulary = list(AutoTokenizer.from_pretrained(checkpoint).get_vocab())
    model = GPTQModel.load(str(checkpoint), QuantizeConfig(bits=4, group_size=32, **more), device="cpu")
    model.quantize([" ".join(vocabulary[start:] + vocabulary[:start])[:1000] for start in range(64)], batch_size=1)
    model.save(str(folder))


@pytest.mark.parametrize(
    "package, method, write",
    [
        pytest.param("compressed_tensors", "compressed-tensors", compressed, marks=pytest.mark.medium),
        pytest.param("gptqmodel", "gptq", by_gptqmodel, marks=pytest.mark.slow),
        pytest.param("gptqmodel", "awq", partial(by_gptqmodel, method="awq", format="gemm"), marks=pytest.mark.slow),
    ],
)
def test_checkpoints_of_other_packages(llama, question_file, tmp_path, monkeypatch, package, method, write):
    """Read, told from the original, and swept, again with the same bits."""
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)  # gptqmodel leaves logs
    write(tmp_path / "other", llama)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "other")
    lens, own = (LogitLens(load_model(str(path), "cpu", "float32").model) for path in (tmp_path / "other", llama))
    assert lens.parity.argmax_equal
    torch.testing.assert_close(lens.head.weight, own.head.weight, rtol=2**-8, atol=1e-6)  # gptqmodel writes bfloat16
    ids = torch.tensor([[3, 9, 4, 7, 12]])
    states, original = (one.hidden(ids, torch.arange(5)) for one in (lens, own))
    share = (states[1:] - original[1:]).norm() / original[1:].norm()
    assert 1e-3 < share < 0.3  # quantised, and the same model
    options = SweepConfig(str(tmp_path / "other"), str(question_file), (2,), device="cpu", dtype="float32")
    runs = [run_sweep(options, tmp_path / name) for name in ("run", "again")]
    assert runs[0].manifest["model"]["quantization"] == method and predictions(runs[0]) == predictions(runs[1])


def test_an_unembedding_that_is_quantised_is_refused(llama):
    needs("int8")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = AutoModelForCausalLM.from_pretrained(llama).eval()
    quantize_(model, Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="an unembedding of floating numbers, got one of Int8Tensor"):
        LogitLens(model)


@pytest.mark.parametrize("word", QUANTIZE)
def test_without_the_package(llama, monkeypatch, word):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = f"``quantize='{word}'``: expected the package {quantize.PACKAGES[word]}, which is not installed"
    with pytest.raises(InputError, match=message):
        quantize.quantization(word, torch.float32, None)


def test_a_word_that_there_is_not():
    with pytest.raises(InputError, match="``quantize``: expected int8, llm-int8, nf4, fp4, got 'int3'"):
        SweepConfig("tiny", quantize="int3")


def test_layers_that_nothing_quantises(tiny_model):
    """GPT-2's are no linear ones to torchao."""
    needs("int8")
    with pytest.raises(InputError, match="``quantize='int8'``: expected linear layers, got none in GPT2LMHead"):
        load_model(str(tiny_model), "cpu", quantize="int8")
