"""Running a Hugging Face causal LM without its unembedding, and hooks that keep the chosen positions of every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel


def text_config(model: PreTrainedModel):
    """The configuration of the language model itself, also inside a multimodal model."""
    return model.config.get_text_config()


def probe_ids(model: PreTrainedModel, n_tokens: int = 8) -> Tensor:
    """``[1, n_tokens]`` token ids spread over the vocabulary, on the model's input device."""
    n_vocab = text_config(model).vocab_size
    step = torch.arange(1, n_tokens + 1, device=model.device)
    return (step * n_vocab // (n_tokens + 1))[None]


def first_state(args: tuple, kwargs: dict) -> Tensor | None:
    """The first floating tensor that a module is called with, by position or by name: what it works on."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def run_base(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None
) -> None:
    """Run embeddings, blocks and final norm, but not the unembedding: no logits are made.

    With a cache, ``input_ids`` go on where it ends, and it then holds them too.
    """
    past = {} if cache is None else {_cache_argument(model): cache}
    with torch.no_grad():
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=cache is not None, **past)


def _cache_argument(model: PreTrainedModel) -> str:
    """What a model calls its cache: Transformers renames ``past_key_values``, model by model."""
    return "cache" if "cache" in signature(model.base_model.forward).parameters else "past_key_values"


@contextmanager
def keep_positions(blocks: nn.ModuleList, positions: Tensor) -> Iterator[list[Tensor]]:
    """Within the block, a forward pass fills the yielded list with the kept residual stream.

    Layer 0 is the input of the first block (the embedding output), layer i the output of block i; the
    list ends with ``n_layers + 1`` tensors ``[batch, n_positions, d_model]``, copies in the model's dtype.

    Args:
        blocks: The model's transformer blocks.
        positions: ``[batch, n_positions]`` int64 token positions to keep.
    """
    kept: list[Tensor] = []

    def keep(stream: Tensor) -> None:
        index = positions.to(stream.device)
        rows = torch.arange(len(index), device=stream.device)[:, None]
        kept.append(stream.detach()[rows, index])

    def before_first(_module, args, kwargs):
        keep(first_state(args, kwargs))

    def after_block(_module, _args, output):
        keep(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [block.register_forward_hook(after_block) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
