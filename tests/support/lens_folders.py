"""Folders of lenses as they lie on disk, made for tiny models, and the models."""

import json

import torch
import transformers as tf

from refinelens.lens.files import save_lens
from refinelens.lens.logit_lens import LogitLens, model_entry
from refinelens.lens.translators import Translators
from refinelens.model.loading import load_model
from tiny import shake, word_tokenizer

VOCAB = 211  # a prime
D_MODEL = 32
N_LAYERS = 3


def tiny(family, n_layers=N_LAYERS, d_model=D_MODEL, seed=0):
    """A random GPT-NeoX or Gemma-2 (softcap) with an unembedding of its own and large logits."""
    sizes = {"vocab_size": VOCAB, "hidden_size": d_model, "intermediate_size": 48, "num_hidden_layers": n_layers}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0}
    configs = {
        "gpt_neox": lambda: tf.GPTNeoXConfig(**sizes, bos_token_id=1, eos_token_id=2),
        "gemma2": lambda: tf.Gemma2Config(**sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False),
    }
    torch.manual_seed(seed)
    model = shake(tf.AutoModelForCausalLM.from_config(configs[family]())).eval()
    model.get_output_embeddings().weight.data *= 50.0
    return model


def save_model(folder, model):
    """A model with a tokenizer, as ``--model`` takes it."""
    word_tokenizer().save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


def random_translators(n_layers=N_LAYERS, d_model=D_MODEL, seed=5, dtype=torch.float32):
    """Maps that change every number of a state."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_layers, d_model, d_model, generator=generator) * 0.5 / d_model**0.5
    return Translators(weight.to(dtype), torch.randn(n_layers, d_model, generator=generator).to(dtype))


def save_linear(folder, model_folder, translators=None):
    """A lens in the format of `refinelens fit`, made for the model in a folder."""
    loaded = load_model(str(model_folder), "cpu")
    entry = model_entry(loaded, LogitLens(loaded.model))
    translators = translators or random_translators(entry["n_layers"], entry["d_model"])
    save_lens(folder, translators, {"format_version": 1, "kind": "linear", "model": entry})
    return folder


def save_tuned(folder, translators=None, **config):
    """A lens in the format of tuned-lens 0.2.0, by hand."""
    translators = translators or random_translators()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"d_model": translators.d_model, "num_hidden_layers": translators.n_layers}
    entries = {"base_model_name_or_path": "some/model", "base_model_revision": None, **sizes, "bias": True}
    entries |= {"unembed_hash": None, "lens_type": "linear_tuned_lens"}
    (folder / "config.json").write_text(json.dumps(entries | config))
    torch.save(state_dict(translators), folder / "params.pt")
    return folder


def state_dict(translators):
    """The parameters of a tuned lens."""
    return {
        f"{layer}.{name}": getattr(translators, name)[layer].clone()
        for layer in range(translators.n_layers)
        for name in ("weight", "bias")
    }
