"""Every family of docs/models.md: what is found in it, and that the parity gate refuses what is not the model."""

from dataclasses import replace

import pytest
import torch
import transformers as tf
from torch import nn
from torch.nn import functional as F

from families import CASES, FAMILIES, SIZES, VOCAB, build, save
from refinelens import LayerNorm, LogitLens, RMSNorm
from refinelens.bench.problem import make_problem
from refinelens.config import SweepConfig
from refinelens.doctor import describe_norm
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.lens.parity import check_parity
from refinelens.model.head import find_blocks, find_head
from refinelens.model.loading import LoadedModel, load_model
from refinelens.sweeping.sweep import run_sweep
from refinelens.view_config import BenchConfig
from tiny import tiny_gpt2


@pytest.mark.parametrize("name", CASES)
def test_trajectory_is_the_model(name):
    """What is found, and with it every layer of two contexts of different lengths, one padded on the right."""
    model, case = build(name), CASES[name]
    lens = LogitLens(model)
    assert_found(lens, case, model)
    generator = torch.Generator().manual_seed(3)
    ids, mask = torch.randint(3, VOCAB, (2, 11), generator=generator), torch.ones(2, 11, dtype=torch.int64)
    ids[1, 7:], mask[1, 7:] = 0, 0
    positions, targets = torch.tensor([[2, 10], [0, 6]]), torch.tensor([[5, 6], [7, 8]])
    stats = lens.read(ids, targets, positions, attention_mask=mask).stats
    n_layers = lens.n_layers
    assert stats.argmax.shape == (n_layers + 1, 2, 2)
    with torch.no_grad():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    rows = torch.arange(2)[:, None]
    own = out.logits[rows, positions]
    assert torch.equal(stats.argmax[-1], own.argmax(-1))
    log_p = own.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(stats.target_logprob[-1], log_p, rtol=1e-4, atol=1e-4)
    # Transformers returns the residual stream before every block, and the last state already normed.
    kept = lens.hidden(ids, positions, mask)
    for layer in range(n_layers):
        torch.testing.assert_close(kept[layer], out.hidden_states[layer][rows, positions], rtol=1e-5, atol=1e-5)
        assert torch.equal(lens.stats(kept[layer], targets).target_rank, stats.target_rank[layer])
        assert not torch.equal(kept[layer], kept[layer + 1])


def assert_found(lens, case, model):
    head = lens.head
    assert describe_norm(head.norm) == case.norm
    assert (head.projection is not None, head.bias is not None) == (case.projection, case.bias)
    assert (head.softcap, head.scale) == (case.softcap, case.logit_scale)
    assert (head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()) == case.tied
    assert lens.d_model == 32 and lens.n_layers == model.config.get_text_config().num_hidden_layers


@pytest.mark.medium
@pytest.mark.parametrize(
    "dtype, name",
    [
        *((torch.bfloat16, name) for name in CASES),
        *((torch.float16, name) for name in FAMILIES),
        *(pytest.param(torch.float16, name, marks=pytest.mark.slow) for name in CASES if name not in FAMILIES),
    ],
)
def test_parity_in_half_precision(name, dtype):
    lens = LogitLens(build(name).to(dtype))
    assert lens.parity.passed and describe_norm(lens.head.norm) == CASES[name].norm


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_trajectory_on_a_gpu(name, dtype):
    """The Triton backend passes the gate and, in fp32, predicts what the CPU does."""
    model = build(name)
    ids, positions = torch.arange(11)[None], torch.tensor([4, 10])
    on_cpu = LogitLens(model).read(ids, torch.tensor([5, 6]), positions).stats
    lens = LogitLens(model.to("cuda", dtype), backend="triton")
    stats = lens.read(ids, torch.tensor([5, 6]), positions).stats.to("cpu")
    if dtype == torch.float32:
        assert torch.equal(stats.argmax, on_cpu.argmax)
        torch.testing.assert_close(stats.target_logprob, on_cpu.target_logprob, rtol=1e-3, atol=1e-3)


def other_norm(head):
    norm = head.norm
    kind = RMSNorm(norm.weight, norm.eps) if isinstance(norm, LayerNorm) else LayerNorm(norm.weight, None, norm.eps)
    return replace(head, norm=kind)


WRONG = {
    "kind of norm": (FAMILIES, other_norm),
    "no norm": (FAMILIES, lambda p: replace(p, norm=None)),
    "norm bias": (["gpt2", "phi", "nemotron"], lambda p: replace(p, norm=LayerNorm(p.norm.weight, None, p.norm.eps))),
    "norm weight": (["llama", "gemma3"], lambda p: replace(p, norm=RMSNorm(None, p.norm.eps))),
    "a weight": (["olmo"], lambda p: replace(p, norm=LayerNorm(torch.linspace(0.5, 1.5, 32)))),
    "offset": (["gemma2", "gemma3"], lambda p: replace(p, norm=RMSNorm(p.norm.weight, p.norm.eps, 0.0))),
    "stored weight": (
        ["nemotron"],
        lambda p: replace(p, norm=LayerNorm(p.norm.weight - 1, p.norm.bias, p.norm.eps)),
    ),
    "a norm": (["opt-350m", "opt-no-norm"], lambda p: replace(p, norm=LayerNorm(torch.ones(32)))),
    "projection": (["opt-projection", "opt-350m"], lambda p: replace(p, projection=p.projection.flip(1))),
    "unembedding bias": (["gptj", "phi"], lambda p: replace(p, bias=None)),
    "softcap": (["gemma2", "gemma3-cap"], lambda p: replace(p, softcap=None)),
    "scale": (["cohere", "granite"], lambda p: replace(p, scale=1.0)),
    "stated scale": (["mpt-scale"], lambda p: replace(p, scale=0.25)),
    "unembedding": (["llama"], lambda p: replace(p, weight=p.weight.flip(0))),
}


@pytest.mark.parametrize("name, wrong", [(name, wrong) for wrong, (names, _) in WRONG.items() for name in names])
def test_gate_refuses_what_is_not_the_model(name, wrong):
    model = build(name)
    head = WRONG[wrong][1](find_head(model))
    assert not check_parity(model, head, find_blocks(model)).passed


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "gptj"])
def test_a_model_that_the_gate_refuses_has_no_lens(name):
    """It does something to its logits that no head does."""
    model = build(name)

    def bend(module, inputs, output):
        output.logits += 0.1 * output.logits.sin()

    model.register_forward_hook(bend)
    with pytest.raises(UnsupportedModelError, match=rf"{type(model).__name__}: expected .* maximum difference of \d"):
        LogitLens(model)


def test_gate_refuses_a_norm_changed_after_it_was_found():
    model = build("starcoder2")
    head, blocks = find_head(model), find_blocks(model)
    assert check_parity(model, head, blocks).passed
    model.model.norm.weight = nn.Parameter(torch.ones(32))
    assert not check_parity(model, head, blocks).passed


def test_a_projection_left_out_is_named():
    model = build("opt-350m")
    head = replace(find_head(model), projection=None)
    with pytest.raises(UnsupportedModelError, match="OPTForCausalLM: .* of width 16 .* got width 32"):
        check_parity(model, head, find_blocks(model))
    with pytest.raises(ValueError, match=r"projection: expected shape \[16, d_model\], got \[32, 16\]"):
        replace(head, projection=torch.zeros(32, 16))


def test_gate_refuses_a_norm_that_is_no_module():
    """Discovery sees no norm between the last block and the head; the gate sees that there is one."""
    model = tiny_gpt2(50)
    model.transformer.ln_f = nn.Identity()
    model.lm_head.register_forward_pre_hook(lambda _, args: (F.layer_norm(args[0], (32,)),))
    assert find_head(model).norm is None
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel: expected the lens at the last layer"):
        LogitLens(model)


@pytest.mark.parametrize(
    "final, message",
    [
        (nn.Sequential(nn.LayerNorm(32), nn.Tanh()), "got LayerNorm, Tanh"),
        (nn.Sequential(nn.Linear(32, 32, bias=False), nn.LayerNorm(32)), "got Linear, LayerNorm"),
        (nn.Tanh(), "Tanh: expected a LayerNorm or RMSNorm"),
        (nn.Linear(32, 32), "Linear: expected a linear map without bias"),
    ],
)
def test_what_else_stands_before_the_head_is_named(final, message):
    model = tiny_gpt2(50)
    model.transformer.ln_f = final
    with pytest.raises(UnsupportedModelError, match=f"GPT2LMHeadModel: .*{message}"):
        find_head(model)


def test_dropout_before_the_head_is_nothing():
    model = tiny_gpt2(50)
    model.transformer.ln_f = nn.Sequential(
        model.transformer.ln_f, nn.Dropout(0.5), nn.Linear(32, 32, bias=False)
    ).eval()
    lens = LogitLens(model)
    assert isinstance(lens.head.norm, LayerNorm) and lens.head.projection.shape == (32, 32)


def test_other_lists_of_as_many_modules_are_no_blocks():
    """Inside a block, or never run on a text."""
    model = tiny_gpt2(50)
    model.transformer.h[0].experts = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    model.vision = nn.ModuleList([nn.Linear(1, 1) for _ in range(3)])
    assert LogitLens(model).blocks is model.transformer.h


def test_ambiguous_blocks_are_named():
    """XLM has one list each of attentions, feed-forward parts and norms."""
    config = tf.XLMConfig(emb_dim=32, n_layers=2, n_heads=2, n_words=50, causal=True)
    with pytest.raises(UnsupportedModelError, match="XLMWithLMHeadModel: expected one list of 2 .* blocks, got 4"):
        find_head(tf.XLMWithLMHeadModel(config).eval())


def test_a_model_that_cannot_run_is_named():
    model = tiny_gpt2(50)
    model.forward = lambda **inputs: {}["pixel_values"]
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel: expected logits .* KeyError: 'pixel_values'"):
        find_head(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_broken_weights_are_refused_not_raised():
    for broken in ("model.norm", "lm_head"):
        model = build("llama")
        model.get_submodule(broken).weight.data[0] = float("nan")
        with pytest.raises(UnsupportedModelError, match="^LlamaForCausalLM: .*, got NaN in the logits; check"):
            LogitLens(model)


def test_longest_context():
    """MPT states it under a name of its own, BLOOM has no limit."""
    names = ("gptj", "mpt", "bloom", "llama")
    limits = {n: LoadedModel("m", build(n), None, "", "", "", "", ()).max_tokens for n in names}
    assert limits == {"gptj": 64, "mpt": 64, "bloom": None, "llama": SIZES["max_position_embeddings"]}


def test_sweep_and_bench_on_a_projection(tmp_path, question_file):
    """The sweep runs without a final norm; the benchmark says that its competitors know no projection."""
    folder, template = save("opt-350m", tmp_path / "model"), tmp_path / "template.txt"
    template.write_text("{documents}\n{question}\n")
    options = SweepConfig(folder, str(question_file), documents=(2,), template=str(template), device="cpu")
    manifest = run_sweep(options, tmp_path / "run").manifest
    assert manifest["counts"]["done"] == 6 and manifest["counts"]["left_out"] == {}
    found = {key: manifest["model"][key] for key in ("d_model", "norm", "projection", "vocab_size")}
    assert found == {"d_model": 32, "norm": None, "projection": [16, 32], "vocab_size": VOCAB}
    with pytest.raises(InputError, match="expected an unembedding without bias, projection"):
        make_problem(BenchConfig(model=folder, device="cpu"))


def test_a_configuration_is_the_same_in_every_dtype(tmp_path):
    """Also where the parts of a model, here its vision tower, have configurations of their own."""
    folder = save("gemma3-images", tmp_path)
    wide, half = (load_model(folder, "cpu", dtype) for dtype in ("float32", "bfloat16"))
    assert wide.config_sha256 == half.config_sha256
    assert wide.weights_sha256 != half.weights_sha256
