"""Tiny random models of every family that docs/models.md lists, with the options that its configurations have."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import transformers as tf

from tiny import shake, word_tokenizer

VOCAB = 101  # a prime
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCAB, **TOKENS}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, **HEADS}
GROUPED = {**SIZES, "num_key_value_heads": 2}
OPT = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, **HEADS}
FALCON = {"hidden_size": 32, "num_hidden_layers": 3, **HEADS}
GEMMA = {**GROUPED, "head_dim": 8, "sliding_window": 4}
GPTJ = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4, "vocab_size": VOCAB, **TOKENS}
MPT = {"d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 64, "vocab_size": VOCAB, **TOKENS}
GPT_OSS = {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}

LAYER = "LayerNorm"
NO_BIAS = "LayerNorm without bias"
RMS = "RMSNorm"
NONE = "none"


@dataclass(frozen=True)
class Case:
    """A configuration and what must be found in a model made from it."""

    family: str  # as in docs/models.md
    config: Callable[[], tf.PreTrainedConfig]
    norm: str  # as in docs/models.md
    projection: bool = False
    bias: bool = False  # of the unembedding
    softcap: float | None = None
    logit_scale: float = 1.0
    tied: bool = True  # unembedding and input embedding


def gpt_neo(**options):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64, "vocab_size": VOCAB}
    return tf.GPTNeoConfig(**sizes, **TOKENS, window_size=4, attention_types=[[["global", "local"], 1]], **options)


def gemma3_with_images():
    """Its vision tower has as many blocks as the language model."""
    sizes = {"image_size": 8, "patch_size": 4}
    text = {**GEMMA, "tie_word_embeddings": True}
    return tf.Gemma3Config(text_config=text, vision_config={**TOWER, **sizes}, mm_tokens_per_image=4, **TOKENS)


CASES = {
    "gpt2": Case(
        "GPT-2",
        lambda: tf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=VOCAB, **TOKENS),
        LAYER,
    ),
    "gpt_neo": Case("GPT-Neo", gpt_neo, LAYER),
    "gpt_neo-untied": Case("GPT-Neo", lambda: gpt_neo(tie_word_embeddings=False), LAYER, tied=False),
    "gptj": Case("GPT-J", lambda: tf.GPTJConfig(**GPTJ), LAYER, bias=True, tied=False),
    "gptj-tied": Case("GPT-J", lambda: tf.GPTJConfig(**GPTJ, tie_word_embeddings=True), LAYER, bias=True),
    "gpt_neox": Case("GPT-NeoX", lambda: tf.GPTNeoXConfig(**SIZES), LAYER, tied=False),
    "gpt_neox-sequential": Case(
        "GPT-NeoX", lambda: tf.GPTNeoXConfig(**SIZES, use_parallel_residual=False), LAYER, tied=False
    ),
    "opt": Case("OPT", lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=32), LAYER),
    "opt-projection": Case("OPT", lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=16), LAYER, projection=True),
    "opt-350m": Case(
        "OPT",
        lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
        NONE,
        projection=True,
    ),
    "opt-no-norm": Case("OPT", lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False), NONE),
    "opt-no-weight": Case(
        "OPT",
        lambda: tf.OPTConfig(**OPT, word_embed_proj_dim=32, layer_norm_elementwise_affine=False),
        "LayerNorm without weight",
    ),
    "bloom": Case(
        "BLOOM", lambda: tf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=VOCAB, **TOKENS), LAYER
    ),
    "bloom-post": Case(
        "BLOOM",
        lambda: tf.BloomConfig(
            hidden_size=32,
            n_layer=3,
            n_head=4,
            vocab_size=VOCAB,
            apply_residual_connection_post_layernorm=True,
            **TOKENS,
        ),
        LAYER,
    ),
    "falcon": Case("Falcon", lambda: tf.FalconConfig(**FALCON), LAYER),
    "falcon-new": Case(
        "Falcon", lambda: tf.FalconConfig(**FALCON, num_kv_heads=2, new_decoder_architecture=True), LAYER
    ),
    "falcon-alibi": Case(
        "Falcon",
        lambda: tf.FalconConfig(**FALCON, alibi=True, parallel_attn=False, multi_query=False, bias=True),
        LAYER,
    ),
    "phi": Case("Phi", lambda: tf.PhiConfig(**GROUPED), LAYER, bias=True, tied=False),
    "phi-qk": Case("Phi", lambda: tf.PhiConfig(**GROUPED, qk_layernorm=True), LAYER, bias=True, tied=False),
    "phi3": Case("Phi-3", lambda: tf.Phi3Config(**GROUPED), RMS, tied=False),
    "phi3-tied": Case("Phi-3", lambda: tf.Phi3Config(**GROUPED, sliding_window=4, tie_word_embeddings=True), RMS),
    "stablelm": Case("StableLM", lambda: tf.StableLmConfig(**GROUPED), LAYER, tied=False),
    "stablelm-parallel": Case(
        "StableLM",
        lambda: tf.StableLmConfig(**GROUPED, use_parallel_residual=True, qk_layernorm=True, use_qkv_bias=True),
        LAYER,
        tied=False,
    ),
    "mpt": Case("MPT", lambda: tf.MptConfig(**MPT), NO_BIAS),
    # The configuration states a scale, as a number or a word, and the model does not use it.
    "mpt-scale": Case("MPT", lambda: tf.MptConfig(**MPT, logit_scale=0.25), NO_BIAS),
    "mpt-scale-word": Case("MPT", lambda: tf.MptConfig(**MPT, logit_scale="inv_sqrt_d_model"), NO_BIAS),
    "llama": Case("Llama", lambda: tf.LlamaConfig(**GROUPED), RMS, tied=False),
    "llama-tied": Case(
        "Llama", lambda: tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True, tie_word_embeddings=True), RMS
    ),
    "mistral": Case("Mistral", lambda: tf.MistralConfig(**GROUPED, sliding_window=4), RMS, tied=False),
    "mixtral": Case("Mixtral", lambda: tf.MixtralConfig(**GROUPED, num_local_experts=4), RMS, tied=False),
    "mixtral-3-experts": Case("Mixtral", lambda: tf.MixtralConfig(**GROUPED, num_local_experts=3), RMS, tied=False),
    "qwen2": Case("Qwen2", lambda: tf.Qwen2Config(**GROUPED), RMS, tied=False),
    "qwen3": Case("Qwen3", lambda: tf.Qwen3Config(**GROUPED, head_dim=8), RMS, tied=False),
    "gemma2": Case("Gemma-2", lambda: tf.Gemma2Config(**GEMMA), "RMSNorm of 1 + weight", softcap=30.0),
    "gemma2-no-cap": Case(
        "Gemma-2", lambda: tf.Gemma2Config(**GEMMA, final_logit_softcapping=None), "RMSNorm of 1 + weight"
    ),
    "gemma3": Case("Gemma-3", lambda: tf.Gemma3TextConfig(**GEMMA), "RMSNorm of 1 + weight"),
    "gemma3-cap": Case(
        "Gemma-3",
        lambda: tf.Gemma3TextConfig(**GEMMA, final_logit_softcapping=2.0),
        "RMSNorm of 1 + weight",
        softcap=2.0,
    ),
    "gemma3-images": Case("Gemma-3", gemma3_with_images, "RMSNorm of 1 + weight"),
    "cohere": Case("Cohere", lambda: tf.CohereConfig(**GROUPED), NO_BIAS, logit_scale=0.0625),
    "granite": Case(
        "Granite", lambda: tf.GraniteConfig(**GROUPED, logits_scaling=8.0), RMS, logit_scale=0.125, tied=False
    ),
    "granite-tied": Case(
        "Granite",
        lambda: tf.GraniteConfig(**GROUPED, logits_scaling=8.0, tie_word_embeddings=True),
        RMS,
        logit_scale=0.125,
    ),
    "granite-unscaled": Case("Granite", lambda: tf.GraniteConfig(**GROUPED), RMS, tied=False),
    "olmo": Case("OLMo", lambda: tf.OlmoConfig(**GROUPED), "LayerNorm without weight", tied=False),
    "olmo-clip": Case(
        "OLMo",
        lambda: tf.OlmoConfig(**GROUPED, clip_qkv=0.5, tie_word_embeddings=True),
        "LayerNorm without weight",
    ),
    "olmo2": Case("OLMo-2", lambda: tf.Olmo2Config(**GROUPED), RMS, tied=False),
    "nemotron": Case("Nemotron", lambda: tf.NemotronConfig(**GROUPED), LAYER, tied=False),
    "starcoder2": Case("StarCoder2", lambda: tf.Starcoder2Config(**GROUPED), LAYER),
    "starcoder2-no-bias": Case(
        "StarCoder2", lambda: tf.Starcoder2Config(**GROUPED, use_bias=False, sliding_window=4), LAYER
    ),
    "gpt_oss": Case("gpt-oss", lambda: tf.GptOssConfig(**GPT_OSS, rope_parameters=ROPE), RMS, tied=False),
    "gpt_oss-no-bias": Case(
        "gpt-oss", lambda: tf.GptOssConfig(**GPT_OSS, rope_parameters=ROPE, attention_bias=False), RMS, tied=False
    ),
}


FAMILIES = list({case.family: name for name, case in reversed(CASES.items())}.values())  # the first case of each
# And of options those by which blocks run otherwise; by the rest the head differs, or what is in a block.
BY_BLOCK = {*FAMILIES, "opt-projection", "opt-350m", "opt-no-norm", "bloom-post", "falcon-new", "gpt_neox-sequential"}


def others_slow(names, fast):
    """Parameters of a test: all ``names``, of which those that are not ``fast`` are slow."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]


def build(name):
    """The random model of a case."""
    torch.manual_seed(0)
    return make_random(tf.AutoModelForCausalLM.from_config(CASES[name].config(), dtype=torch.float32))


def make_random(model):
    """The model with weights of which every block changes the residual stream and every vector matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 4  # the standard deviation of 0.02 of large models leaves a small one nearly linear
    return shake(model).eval()


def save(name, folder):
    """Save a case's model with a tokenizer of fewer words than it has rows; returns the folder as text."""
    word_tokenizer().save_pretrained(folder)
    build(name).save_pretrained(folder)
    return str(folder)
