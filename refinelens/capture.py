"""What a lens needs of a Hugging Face causal LM, and hooks that keep the chosen positions of every layer."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .kernels.norms import LayerNorm, Norm, RMSNorm, apply_norm


@dataclass(frozen=True)
class LensParts:
    """The parts of a causal LM that a logit lens uses; tensors are the model's own, not copies."""

    blocks: nn.ModuleList  # n_layers blocks; a block's output is the residual stream [batch, token, d_model]
    norm: Norm  # what the model's final norm computes
    unembedding: Tensor  # [vocab_size, d_model]
    bias: Tensor | None  # [vocab_size]
    softcap: float | None
    logit_scale: float

    def __post_init__(self):
        if self.unembedding.dim() != 2:
            raise UnsupportedModelError(
                f"unembedding: expected shape [vocab_size, d_model], got {list(self.unembedding.shape)}"
            )


def find_parts(model: PreTrainedModel) -> LensParts:
    """Find blocks, final norm, unembedding, softcap and logit scale of any causal LM.

    Nothing is looked up by architecture: the blocks are the module list of ``num_hidden_layers`` entries,
    the final norm is the norm that runs after the last of them, and what the norm computes is found by
    asking it. The parity gate of `LogitLens.from_model` then proves the result.

    Raises:
        UnsupportedModelError: A part is missing or ambiguous; the model's class is named.
    """
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise UnsupportedModelError(f"{type(model).__name__}: expected an output embedding with a weight, got {head}")
    blocks, owner = _find_blocks(model)
    softcap, logit_scale = _find_logit_transform(model)
    return LensParts(
        blocks=blocks,
        norm=identify_norm(_find_final_norm(model, blocks, owner)),
        unembedding=head.weight.detach(),
        bias=None if getattr(head, "bias", None) is None else head.bias.detach(),
        softcap=softcap,
        logit_scale=logit_scale,
    )


def text_config(model: PreTrainedModel):
    """The configuration of the language model itself, also inside a multimodal model."""
    return model.config.get_text_config()


def _find_blocks(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module]:
    n_layers = text_config(model).num_hidden_layers
    found = [
        (child, owner)
        for owner in model.modules()
        for child in owner.children()
        if isinstance(child, nn.ModuleList) and len(child) == n_layers
    ]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {n_layers} transformer blocks, got {len(found)}"
        )
    return found[0]


def _find_final_norm(model: PreTrainedModel, blocks: nn.ModuleList, owner: nn.Module) -> nn.Module:
    candidates = [(n, m) for n, m in owner.named_children() if "norm" in type(m).__name__.lower()]
    called = []
    handles = [m.register_forward_pre_hook(lambda m, *_: called.append(m)) for _, m in candidates]
    handles.append(blocks[-1].register_forward_hook(lambda *_: called.clear()))
    try:
        run_base(model, probe_ids(model))
    finally:
        for handle in handles:
            handle.remove()
    if len(called) != 1:
        names = ", ".join(f"{n} ({type(m).__name__})" for n, m in owner.named_children())
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one final norm after the last block of {type(owner).__name__}, "
            f"got {len(called)}; its parts are {names}"
        )
    return called[0]


def _find_logit_transform(model: PreTrainedModel) -> tuple[float | None, float]:
    """(softcap, logit scale) under the names that configurations use for them."""
    config = text_config(model)
    scale = getattr(config, "logit_scale", None) or 1.0
    divisor = getattr(config, "logits_scaling", None) or 1.0
    return getattr(config, "final_logit_softcapping", None), float(scale) / float(divisor)


def identify_norm(module: nn.Module) -> Norm:
    """The `LayerNorm` or `RMSNorm` that a module computes, by comparing its output on random rows.

    Raises:
        UnsupportedModelError: Neither formula gives the module's output.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = next((getattr(module, n) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(module, n)), None)
    name = type(module).__name__
    if not isinstance(weight, Tensor) or weight.dim() != 1 or eps is None:
        raise UnsupportedModelError(f"{name}: expected a norm with a weight vector and an epsilon, got {module}")
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, len(weight), generator=generator) + 0.5
    x[2:] *= eps**0.5  # rows so small that a wrong epsilon shows
    x = x.to(weight.device)
    with torch.no_grad():
        wanted = copy.deepcopy(module).float()(x)  # in fp32, so that half precision hides no difference
    tolerance = 8 * torch.finfo(torch.float32).eps * wanted.abs().max()
    for norm in (LayerNorm(weight, bias, eps), RMSNorm(weight, eps, 0.0), RMSNorm(weight, eps, 1.0)):
        if torch.isfinite(wanted).all() and (apply_norm(x, norm) - wanted).abs().max() <= tolerance:
            return norm
    raise UnsupportedModelError(f"{name}: expected a LayerNorm or RMSNorm (offset 0 or 1), got other values")


def probe_ids(model: PreTrainedModel, n_tokens: int = 8) -> Tensor:
    """``[1, n_tokens]`` token ids spread over the vocabulary, on the model's input device."""
    n_vocab = text_config(model).vocab_size
    step = torch.arange(1, n_tokens + 1, device=model.device)
    return (step * n_vocab // (n_tokens + 1))[None]


def run_base(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Run embeddings, blocks and final norm, but not the unembedding: no logits are made."""
    with torch.no_grad():
        model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


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
        keep(args[0] if args else kwargs["hidden_states"])

    def after_block(_module, _args, output):
        keep(output[0] if isinstance(output, tuple) else output)

    handles = [blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)]
    handles += [block.register_forward_hook(after_block) for block in blocks]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()
