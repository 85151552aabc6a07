"""Running a causal LM without its unembedding, with hooks that keep the chosen positions of every layer.

On a CPU, attention over a cache leaves out the keys that the mask hides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import signature
from itertools import pairwise
from threading import get_ident

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from ..errors import UnsupportedModelError

HALF_REMEDY = "; use ``dtype='float32'`` (model.float() in Python)"  # where a model mixes half precision with fp32
BLOCK = 256  # queries that share the keys they see


def text_config(model: PreTrainedModel):
    """The configuration of the language model itself, also inside a multimodal model."""
    return model.config.get_text_config()


def input_device(model: PreTrainedModel) -> torch.device:
    """Where a model computes what its token ids stand for: of one that is split its first device."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    places = [getattr(one, "execution_device", None) for one in getattr(hook, "hooks", [hook])]
    return next((torch.device(place) for place in places if place is not None), model.device)


def probe_ids(model: PreTrainedModel, n_tokens: int = 8) -> Tensor:
    """``[1, n_tokens]`` token ids spread over the vocabulary, on the model's input device."""
    n_vocab = text_config(model).vocab_size
    step = torch.arange(1, n_tokens + 1, device=input_device(model))
    return (step * n_vocab // (n_tokens + 1))[None]


def first_state(args: tuple, kwargs: dict) -> Tensor | None:
    """The first floating tensor that a module is called with, by position or by name: what it works on."""
    values = (*args, *kwargs.values())
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None)


def stream_of(output: Tensor | tuple | list) -> Tensor:
    """The residual stream in what a block returns."""
    return output[0] if isinstance(output, tuple | list) else output


def difference(states: Tensor, others: Tensor) -> float:
    """Largest difference of ``[n_layers + 1, ...]``, as a share of the layer's largest state; infinite for NaN."""
    error, scale = ((t.float().abs().flatten(1).amax(1)) for t in (states - others, others))
    share = torch.where(error == 0, 0.0, error / scale)  # of states that are all 0 nothing is a share
    return float(share.nan_to_num(torch.inf).max())


@contextmanager
def hooked(
    modules: Iterable[nn.Module], before: Callable | None = None, after: Callable | None = None
) -> Iterator[None]:
    """Within the block, forward passes of this thread call ``before`` and ``after`` every run of these modules.

    A hook belongs to a module, and so to all threads that run it: those of other threads are passed over here. A module
    that stands in the list twice has its hooks once.

    Args:
        modules: What is watched.
        before: Called with module, args and kwargs; what it returns, if anything, takes the place of args and kwargs.
        after: Called with module, args, kwargs and output; what it returns, if anything, takes the output's place.
    """
    thread, handles = get_ident(), []

    def of_this_thread(hook: Callable) -> Callable:
        def own(*call):
            return hook(*call) if get_ident() == thread else None

        own.of_refinelens = True  # type: ignore[attr-defined]
        return own

    try:
        for module in dict.fromkeys(modules):
            if before is not None:
                handles.append(module.register_forward_pre_hook(of_this_thread(before), with_kwargs=True))
            if after is not None:
                handles.append(module.register_forward_hook(of_this_thread(after), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def base_of(model: PreTrainedModel) -> nn.Module:
    """The innermost model without an unembedding: embeddings, blocks and norm, also behind an adapter's wrapper."""
    base = model
    while getattr(base, "base_model", base) is not base:
        base = base.base_model
    return base


def modules_around(model: PreTrainedModel) -> tuple[nn.Module, ...]:
    """What stands around the base model: `run_base` passes by its hooks."""
    inside = set(base_of(model).modules())
    return tuple(module for module in model.modules() if module not in inside)


def hooks_on(modules: Iterable[nn.Module]) -> frozenset[int]:
    """Hooks of other people's."""
    hooks = [hook for m in modules for hook in (*m._forward_pre_hooks.items(), *m._forward_hooks.items())]
    return frozenset(number for number, hook in hooks if not hasattr(hook, "of_refinelens"))


def run_base(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    cache: Cache | None = None,
    gradients: bool = False,
    **options: Tensor,
) -> None:
    """Run embeddings, blocks and final norm, but not the unembedding: no logits are made, and no graph but on request.

    The model runs in its own dtype, whatever autocast is in force around the call: what was proven is what is run.
    With a cache, ``input_ids`` go on where it ends, and it then holds them too.
    """
    base = base_of(model)
    name = "cache" if takes(base, "cache") else "past_key_values"  # Transformers renames it, model by model
    past = {} if cache is None else {name: cache}
    with torch.set_grad_enabled(gradients), torch.autocast(input_ids.device.type, enabled=False):
        base(input_ids=input_ids, attention_mask=attention_mask, use_cache=cache is not None, **past, **options)


def takes(module: nn.Module, argument: str) -> bool:
    """Whether a module's forward pass has an argument of this name."""
    return argument in signature(module.forward).parameters


@contextmanager
def keep_positions(
    model: PreTrainedModel, blocks: nn.ModuleList, positions: Tensor, n_tokens: int
) -> Iterator[list[Tensor]]:
    """Within the block, one forward pass fills the yielded list with the kept residual stream.

    Layer 0 is the input of the first block (the embedding output), layer i the output of block i; the
    list ends with ``n_layers + 1`` tensors ``[batch, n_positions, d_model]``, copies in the model's dtype.

    Args:
        model: What runs, for errors.
        blocks: Its transformer blocks. One module may stand there several times.
        positions: ``[batch, n_positions]`` int64 token positions to keep.
        n_tokens: Tokens that each row of the pass has.

    Raises:
        UnsupportedModelError: Blocks that did not run once each, in their order, or states of other tokens than those
            that went in.
    """
    kept: list[Tensor] = []
    ran: list[nn.Module] = []

    def keep(stream: Tensor) -> None:
        if not isinstance(stream, Tensor) or stream.shape[:-1] != (len(positions), n_tokens):
            got = list(stream.shape) if isinstance(stream, Tensor) else type(stream).__name__
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected states [{len(positions)}, {n_tokens}, d_model] of the tokens that "
                f"went in, got {got} at layer {len(kept)}"
            )
        if kept and (stream.shape[-1], stream.dtype) != (kept[0].shape[-1], kept[0].dtype):
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected a residual stream of one width and dtype, got {kept[0].shape[-1]} "
                f"in {kept[0].dtype} at layer 0 and {stream.shape[-1]} in {stream.dtype} at layer {len(kept)}"
                + ("" if stream.dtype == kept[0].dtype else HALF_REMEDY)
            )
        index = positions.to(stream.device)
        rows = torch.arange(len(index), device=stream.device)[:, None]
        kept.append(stream.detach()[rows, index])

    def before(_module, args, kwargs):
        if not kept:
            keep(first_state(args, kwargs))

    def after(module, _args, _kwargs, output):
        ran.append(module)
        keep(stream_of(output))

    with hooked(blocks, before, after):
        yield kept
    if [id(module) for module in ran] != [id(blocks[index]) for index in range(len(blocks))]:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected each of its {len(blocks)} blocks to run once, in order, got "
            f"{len(ran)} runs of {len(set(ran))} blocks, of which no lens can tell which are its layers"
        )


def run_whole(model: PreTrainedModel, blocks: nn.ModuleList, **options: bool) -> tuple[list[Tensor], ModelOutput]:
    """One pass of a model over `probe_ids`, its unembedding included, in its own dtype.

    Returns:
        The residual stream of layers 0 to ``n_layers``, each ``[1, token, d_model]``, and what the model returns.
    """
    ids = probe_ids(model)
    places = torch.arange(ids.shape[1])[None]
    with (
        torch.no_grad(),
        torch.autocast(ids.device.type, enabled=False),
        keep_positions(model, blocks, places, ids.shape[1]) as kept,
    ):
        output = model(input_ids=ids, use_cache=False, **options)
    return kept, output


class SkipHiddenKeys(TorchFunctionMode):
    """While the block runs, masked attention of this thread leaves out keys that none of a block of queries sees.

    Torch skips the keys behind a query where it is told ``is_causal``, which it cannot be once a cache comes first:
    then it computes the whole rectangle of queries and keys, and turns the boolean mask into numbers in every layer.
    What a query may see is read off the mask, so that windows and padding are what they are. The result is the same
    softmax over the same keys, to rounding. Anything but boolean masks in fp32 on a CPU goes its ordinary way.
    """

    def __init__(self):
        super().__init__()
        self._mask: Tensor | None = None  # that was cut last: all layers of one kind share it
        self._blocks: list[tuple[slice, slice, Tensor]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """Called by torch in place of each of its functions."""
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not _is_plain(args, kwargs):
            return func(*args, **kwargs)
        (query, key, value), mask = args, kwargs.pop("attn_mask")
        if self._mask is not mask:
            self._mask, self._blocks = mask, list(_blocks_of(mask))
        blocks = [
            func(query[..., queries, :], key[..., keys, :], value[..., keys, :], attn_mask=bias, **kwargs)
            for queries, keys, bias in self._blocks
        ]
        return torch.cat(blocks, -2)


def _blocks_of(mask: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """A mask ``[batch, heads or 1, query, key]``, cut at multiples of `BLOCK` in the context.

    Yields neighbouring queries, all keys that any of them sees, and their mask as fp32: 0 where a query sees a key,
    else -inf.
    """
    n_queries, n_keys = mask.shape[-2:]
    past = n_keys - n_queries
    cuts = [0, *range(BLOCK - past % BLOCK, n_queries, BLOCK), n_queries]
    for start, end in pairwise(cuts):
        rows = mask[..., start:end, :]
        seen = rows.flatten(0, -2).any(0).nonzero()
        keys = slice(int(seen[0]), int(seen[-1]) + 1) if rows.any(-1).all() else slice(n_keys)
        bias = torch.zeros(rows[..., keys].shape, dtype=torch.float32).masked_fill_(~rows[..., keys], -torch.inf)
        yield slice(start, end), keys, bias


def _is_plain(args: tuple, kwargs: dict) -> bool:
    """Three operands in fp32 on a CPU, a boolean mask, and nothing random."""
    mask = kwargs.get("attn_mask")
    return (
        len(args) == 3
        and isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.dim() == 4
        and all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in args)
        and mask.shape[-2:] == (args[0].shape[-2], args[1].shape[-2])
        and not kwargs.get("dropout_p")
        and not kwargs.get("is_causal")
    )
