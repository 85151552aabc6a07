"""Models quantised as they are loaded: read in the dtype they compute in, swept, resumed, told from their original."""

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
    """A small Llama with the tiny model's tokenizer; its widths are multiples of 64, as 4-bit blocks need."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(folder / "words"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
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
