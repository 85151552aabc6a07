"""``refinelens doctor``: what it says of this machine and of a model, and what it refuses."""

import importlib.util
import re
from importlib.metadata import PackageNotFoundError

import pytest
import transformers
from torch.nn.modules.module import register_module_forward_hook

from families import save
from refinelens import doctor
from refinelens.cli import main
from tiny import word_tokenizer


def lines_of(out):
    return {line[:16].strip(): line[17:] for line in out.splitlines()}


def assert_one_line(error, message):
    assert error.startswith("refinelens: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert message in error


def test_doctor_where_another_package_brings_triton(monkeypatch, capsys):
    """As builds of torch do, pytorch-triton for instance."""

    find_spec = importlib.util.find_spec

    def version(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("refinelens.machine.version", version)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find_spec("json" if name == "triton" else name))
    assert main(["doctor"]) == 0
    assert ", installed by a package of another name; " in lines_of(capsys.readouterr().out)["Triton"]


@pytest.mark.parametrize("version, among", [("3.9.4", "among"), ("3.10.0", "not among"), ("4.0.0+git1", "not among")])
def test_doctor_says_whether_the_gate_was_passed_with_this_triton(version, among, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr("refinelens.doctor.package_version", lambda name: version)
    expected = f"{version}; {among} the versions that the compile gate was passed with: 3.6, 3.7, 3.8, 3.9"
    assert doctor._triton() == expected


def test_doctor_on_a_model(tmp_path, capsys):
    """Every line, for an OPT with a projection."""
    folder = save("opt-projection", tmp_path / "opt")
    assert main(["doctor", "--model", folder, "--device", "cpu"]) == 0
    found = lines_of(capsys.readouterr().out)
    assert found["model"] == f"{folder}: OPTForCausalLM on cpu"
    expected = {
        "blocks": "3 in model.decoder.layers, d_model 32",
        "final norm": "LayerNorm",
        "norm eps": "1e-05",
        "norm offset": "0",
        "norm weight": "yes",
        "norm bias": "yes",
        "projection": "16 x 32 float32, d_embed x d_model",
        "unembedding": "101 x 16 float32, tied to the embedding",
        "unembedding bias": "none",
        "softcap": "none",
        "logit scale": "1",
        "max tokens": "64",
    }
    assert {name: found[name] for name in expected} == expected
    assert re.fullmatch(
        r"passed: largest difference \S+, allowed \S+; argmax equal; op agrees; logits range over \S+", found["parity"]
    )


@pytest.mark.parametrize(
    "name, dtype, expected",
    [
        ("gemma3-cap", "bfloat16", {"norm offset": "1", "softcap": "2", "unembedding": "101 x 32 bfloat16, tied to"}),
        ("nemotron", "float32", {"norm offset": "1", "norm bias": "yes", "unembedding": "101 x 32 float32, its own"}),
        ("olmo", "float32", {"final norm": "LayerNorm without weight", "norm eps": "1e-05", "norm weight": "none"}),
        ("granite", "float32", {"logit scale": "0.125", "norm bias": "none"}),
        ("gptj", "float32", {"unembedding bias": "yes", "blocks": "3 in transformer.h"}),
        ("opt-350m", "float32", {"final norm": "none", "projection": "16 x 32"}),
    ],
)
def test_doctor_on_other_parts(tmp_path, capsys, name, dtype, expected):
    folder = save(name, tmp_path / name)
    assert main(["doctor", "--model", folder, "--device", "cpu", "--dtype", dtype]) == 0
    found = lines_of(capsys.readouterr().out)
    for line, start in expected.items():
        assert found[line].startswith(start), (line, found[line])


def test_doctor_refuses_a_model(tmp_path, capsys):
    """More than a norm and a projection before the head; a lens that is not the model, after all that was found."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    bert = transformers.BertLMHeadModel(transformers.BertConfig(**sizes, vocab_size=101, is_decoder=True))
    bert.save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    assert main(["doctor", "--model", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert_one_line(captured.err, "BertLMHeadModel: expected a norm, a projection or both between the last block")
    assert captured.err.endswith("got Linear, GELUActivation, LayerNorm\n")
    assert "BertLMHeadModel on" in captured.out and "parity" not in captured.out
    folder = save("gptj", tmp_path / "gptj")

    def bend(module, inputs, output):  # as no head does
        if isinstance(module, transformers.GPTJForCausalLM):
            output.logits += 0.1 * output.logits.sin()

    hook = register_module_forward_hook(bend)
    try:
        assert main(["doctor", "--model", folder]) == 2
    finally:
        hook.remove()
    captured = capsys.readouterr()
    assert_one_line(captured.err, "GPTJForCausalLM: expected the lens at the last layer to equal the model's logits")
    assert "max tokens" in captured.out and "parity" not in captured.out


@pytest.mark.parametrize("name, message", [("./missing", "got no folder at ./missing"), ("", "--model: expected a v")])
def test_doctor_on_no_model(name, message, capsys):
    assert main(["doctor", "--model", name]) == 2
    assert_one_line(capsys.readouterr().err, message)
