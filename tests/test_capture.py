"""Discovery, hooks and the parity gate, on tiny random models built from their configurations."""

import pytest
import torch
import transformers as tf

from refinelens import LayerNorm, LogitLens, RMSNorm
from refinelens.capture import find_parts, identify_norm, keep_positions, run_base
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.logit_lens import check_parity
from tiny import shake, tiny_gpt2

VOCAB = 211  # a prime
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 0, "vocab_size": VOCAB}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **HEADS}
GROUPED = {**SIZES, "num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}

FAMILIES = {
    "gpt2": (
        lambda: tf.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=3, n_head=4, **TOKENS),
        LayerNorm,
        (0.0, None, 1.0),
    ),
    "gpt_neox": (lambda: tf.GPTNeoXConfig(**SIZES, **TOKENS), LayerNorm, (0.0, None, 1.0)),
    "llama": (lambda: tf.LlamaConfig(**GROUPED), RMSNorm, (0.0, None, 1.0)),
    "mistral": (lambda: tf.MistralConfig(**GROUPED), RMSNorm, (0.0, None, 1.0)),
    "qwen2": (lambda: tf.Qwen2Config(**GROUPED), RMSNorm, (0.0, None, 1.0)),
    "qwen3": (lambda: tf.Qwen3Config(**GROUPED, head_dim=8), RMSNorm, (0.0, None, 1.0)),
    "gemma2": (lambda: tf.Gemma2Config(**GROUPED, head_dim=8), RMSNorm, (1.0, 30.0, 1.0)),
    "cohere": (lambda: tf.CohereConfig(**GROUPED, **TOKENS), LayerNorm, (0.0, None, 0.0625)),
    # Not among the first families: the same discovery and the same gate, nothing written for it.
    "granite": (lambda: tf.GraniteConfig(**GROUPED, logits_scaling=8.0), RMSNorm, (0.0, None, 0.125)),
}


def build(family):
    torch.manual_seed(0)
    return shake(tf.AutoModelForCausalLM.from_config(FAMILIES[family][0]())).eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity_of_every_family(family, dtype):
    model = build(family).to(dtype)
    lens = LogitLens.from_model(model)
    _, norm, expected = FAMILIES[family]
    assert isinstance(lens.parts.norm, norm)
    assert (lens.parts.norm.offset, lens.parts.softcap, lens.parts.logit_scale) == expected
    assert lens.parity.passed and lens.n_layers == 3
    if dtype == torch.float32:
        assert lens.parity.max_difference <= 1e-4 * lens.parity.logit_range


@pytest.mark.parametrize("family", FAMILIES)
def test_trajectory_is_the_lens_of_every_layer(family):
    model = build(family)
    lens = LogitLens.from_model(model)
    ids = torch.randint(0, VOCAB, (2, 11), generator=torch.Generator().manual_seed(3))
    positions, targets = torch.tensor([[2, 10], [0, 9]]), torch.tensor([[5, 6], [7, 8]])
    stats = lens.trajectory(ids, positions, targets)
    assert stats.argmax.shape == (4, 2, 2)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    rows = torch.arange(2)[:, None]
    own = out.logits[rows, positions]
    assert torch.equal(stats.argmax[-1], own.argmax(-1))
    log_p = own.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    torch.testing.assert_close(stats.target_logprob[-1], log_p, rtol=1e-4, atol=1e-4)
    # Transformers returns the residual stream before every block, and the last state already normed.
    for layer in range(3):
        kept = lens.stats(out.hidden_states[layer][rows, positions], targets)
        assert torch.equal(kept.target_rank, stats.target_rank[layer])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_trajectory_on_a_gpu(family, dtype):
    """The Triton backend passes the gate and, in fp32, predicts what the CPU does."""
    model = build(family)
    ids, positions = torch.arange(11)[None], torch.tensor([4, 10])
    on_cpu = LogitLens.from_model(model).trajectory(ids, positions, torch.tensor([5, 6]))
    lens = LogitLens.from_model(model.to("cuda", dtype), backend="triton")
    stats = lens.trajectory(ids, positions, torch.tensor([5, 6])).to("cpu")
    if dtype == torch.float32:
        assert torch.equal(stats.argmax, on_cpu.argmax)
        torch.testing.assert_close(stats.target_logprob, on_cpu.target_logprob, rtol=1e-3, atol=1e-3)


def test_padding_on_the_right_changes_nothing():
    lens = LogitLens.from_model(build("llama"))
    ids = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(4))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 5])
    alone = lens.trajectory(ids, torch.tensor([8]), torch.tensor(3))
    batch = lens.trajectory(padded, torch.tensor([8]), torch.tensor(3), attention_mask=mask)
    torch.testing.assert_close(alone.target_logprob, batch.target_logprob, rtol=1e-5, atol=1e-5)


def test_hooks_are_removed_also_after_an_exception():
    model = build("gpt2")
    parts = find_parts(model)
    with pytest.raises(RuntimeError), keep_positions(parts.blocks, torch.tensor([[0]])) as kept:
        run_base(model, torch.tensor([[1, 2]]))
        raise RuntimeError
    assert len(kept) == 4
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_only_chosen_positions_are_kept():
    lens = LogitLens.from_model(build("gpt2"))
    hidden = lens.hidden(torch.ones(1, 60, dtype=torch.int64), torch.tensor([59]))
    assert hidden.shape == (4, 1, 1, 32)
    assert hidden.untyped_storage().nbytes() == 4 * 32 * 4


@pytest.mark.parametrize("change", ["softcap", "scale", "norm"])
def test_gate_refuses_a_lens_that_is_not_the_model(change, monkeypatch):
    model = build("gemma2")
    if change == "softcap":
        model.config.final_logit_softcapping = 1.0
        parts = find_parts(model)
        model.config.final_logit_softcapping = 30.0
    elif change == "scale":
        model.config.logit_scale = 2.0
        parts = find_parts(model)
    else:
        monkeypatch.setattr(
            "refinelens.capture.identify_norm", lambda module: RMSNorm(module.weight.detach(), module.eps, 0.0)
        )
        parts = find_parts(model)
    assert not check_parity(model, parts).passed
    monkeypatch.setattr("refinelens.logit_lens.find_parts", lambda model: parts)
    with pytest.raises(UnsupportedModelError, match=r"Gemma2ForCausalLM: expected .* maximum difference of \d"):
        LogitLens.from_model(model)


def test_a_model_without_final_norm_is_named():
    model = tiny_gpt2(50)
    model.transformer.ln_f = torch.nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel: expected one final norm .* GPT2Model, got 0"):
        LogitLens.from_model(model)


def test_a_projection_behind_the_final_norm_is_refused():
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "word_embed_proj_dim": 16, **HEADS}
    model = tf.AutoModelForCausalLM.from_config(tf.OPTConfig(**sizes))
    with pytest.raises(UnsupportedModelError, match="OPTForCausalLM: .* of width 16 .* got width 32"):
        LogitLens.from_model(model)


class OddNorm(torch.nn.Module):
    """Neither formula: divides by the largest magnitude."""

    def __init__(self):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(32)), 1e-5

    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True) * self.weight


def test_a_norm_of_another_formula_is_refused():
    model = tiny_gpt2(50)
    model.transformer.ln_f = OddNorm()
    with pytest.raises(UnsupportedModelError, match="OddNorm: expected a LayerNorm or RMSNorm"):
        find_parts(model)


def test_identified_epsilon_matters():
    """A module whose forward uses another epsilon than its attribute says is not taken for a norm."""
    module = torch.nn.LayerNorm(32, eps=1e-3)
    assert isinstance(identify_norm(module), LayerNorm)
    module.forward = lambda x: torch.nn.functional.layer_norm(x, (32,), module.weight, module.bias, 1e-1)
    with pytest.raises(UnsupportedModelError):
        identify_norm(module)


@pytest.mark.parametrize(
    "ids, positions, message",
    [
        (torch.tensor([1, 2]), torch.tensor([0]), r"input_ids: .* got torch.int64 \[2\]"),
        (torch.tensor([[1, VOCAB]]), torch.tensor([0]), f"expected ids from 0 to {VOCAB - 1}, got 1 to {VOCAB}"),
        (torch.tensor([[1, 2]]), torch.tensor([2]), "positions: expected 0 to 1, got 2 to 2"),
        (torch.tensor([[1, 2]]), torch.tensor([[0], [1]]), r"positions: .* got \[2, 1\]"),
    ],
)
def test_bad_trajectory_input(ids, positions, message):
    lens = LogitLens.from_model(build("gpt2"))
    with pytest.raises(InputError, match=message):
        lens.trajectory(ids, positions)
