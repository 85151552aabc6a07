"""What tells two models apart: hashes of configuration, weights and tokenizer; and what is asked of any tokenizer.

A tokenizer may be fast, slow, or one that is no Transformers tokenizer but looks like it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import BatchEncoding, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError
from .split import stored

SAMPLE = 1024  # values per tensor that enter a hash of weights
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by element size
LOADED_AS = ("dtype", "torch_dtype", "transformers_version")  # what a configuration says of how it was loaded


def is_fast(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it knows which characters each token covers; not every tokenizer says."""
    return bool(getattr(tokenizer, "is_fast", False))


def added_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that were added to the vocabulary after it was made."""
    try:
        return set(tokenizer.added_tokens_decoder)
    except (AttributeError, NotImplementedError, TypeError):  # mistral-common's has a method of that name
        return set()


def text_of(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The text of one token; ``<id N>`` of a row of the unembedding that the tokenizer has no token for."""
    try:
        text = tokenizer.decode([token_id])
    except Exception:  # a slow tokenizer looks it up
        return f"<id {token_id}>"
    return text if text or token_id < len(tokenizer) else f"<id {token_id}>"


def decode(tokenizer: PreTrainedTokenizerBase, token_ids: Iterable[int]) -> str:
    """The text of several tokens, without special ones."""
    ids = list(token_ids)
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except Exception:  # one of them is beyond its vocabulary
        return "".join(text_of(tokenizer, id) for id in ids)


def encode(tokenizer: PreTrainedTokenizerBase, text: str, special: bool, literal: bool) -> BatchEncoding:
    """A text as tokens.

    Args:
        tokenizer: What makes them.
        text: The text.
        special: Put the tokenizer's special tokens around it.
        literal: Read what looks like a special token in the text as the characters that it is written with.
    """
    if literal:
        try:
            return tokenizer(text, add_special_tokens=special, split_special_tokens=True)
        except ValueError:  # mistral-common's never reads them in a text
            pass
    return tokenizer(text, add_special_tokens=special)


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text by itself, without those that a tokenizer puts around it."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens two texts share before they differ."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def config_sha256(config: PreTrainedConfig) -> str:
    """Of a configuration as JSON, without how it was loaded."""
    settings = _settings(config.to_diff_dict())
    return _sha256(json.dumps(settings, sort_keys=True, default=str))


def weights_sha256(model: PreTrainedModel) -> str:
    """Of name, shape, dtype, exact sum of bit patterns and a sample of every tensor: one pass, not all bytes."""
    digest = hashlib.sha256()
    for key, tensor in _tensors(model):
        flat = tensor.flatten()
        # Integers add up to the same sum in any order, on any device and number of threads.
        bits = flat.view(BITS[flat.element_size()]).sum(dtype=torch.int64).item() if len(flat) else 0
        digest.update(f"{key} {tuple(tensor.shape)} {tensor.dtype} {bits}".encode())
        digest.update(_sample(flat).numpy().tobytes())
    return digest.hexdigest()


def weights_sample_sha256(model: PreTrainedModel) -> str:
    """Of name, shape and a sample of every tensor rounded to bf16: the same in fp32 and bf16, on any device."""
    digest = hashlib.sha256()
    for key, tensor in _tensors(model):
        sample = _sample(tensor.flatten()).bfloat16().view(torch.int16)
        digest.update(f"{key} {tuple(tensor.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def tokenizer_sha256(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of a fast tokenizer's rules, of another one's vocabulary."""
    if is_fast(tokenizer):
        return _sha256(tokenizer.backend_tokenizer.to_str())
    return _sha256(json.dumps(sorted(tokenizer.get_vocab().items())))


def _settings(config: dict) -> dict:
    """A configuration without what depends on how it was loaded, also in those of its parts."""
    kept = {name: value for name, value in config.items() if name not in LOADED_AS}
    return {name: _settings(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model that holds numbers, by name.

    Raises:
        InputError: Weights that cannot be read; names the first.
    """
    for name, value in sorted(model.state_dict().items()):
        if not isinstance(value, Tensor):  # what a module keeps beside its tensors
            yield name, torch.frombuffer(bytearray(repr(value).encode()), dtype=torch.uint8)
            continue
        module, _, own = name.rpartition(".")
        if value.is_meta and hasattr(model.get_submodule(module), "_hf_hook"):
            value = stored(model.get_submodule(module), own)
        for place, tensor in _plain(name, value):
            if tensor.is_meta or tensor.is_quantized or tensor.layout != torch.strided or tensor.element_size() > 8:
                raise InputError(
                    f"{place}: expected weights that lie in memory as numbers, got {tensor.dtype} on {tensor.device} "
                    f"({tensor.layout})"
                )
            yield place, tensor.detach()


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that one of a class of its own, such as a quantised one, is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    names, context = tensor.__tensor_flatten__()
    for part in names:
        yield from _plain(f"{name}.{part} {type(tensor).__name__} {context}", getattr(tensor, part))


def _sample(flat: Tensor) -> Tensor:
    places = torch.linspace(0, max(len(flat) - 1, 0), min(SAMPLE, len(flat)), dtype=torch.float64).long()
    return flat[places.to(flat.device)].to("cpu", torch.float32)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
