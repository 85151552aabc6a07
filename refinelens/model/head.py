"""The head of a causal LM that a lens uses, its blocks, and how they are found.

What a module computes is found by asking it: its output on chosen rows is compared with formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModelError
from ..kernels.reference import LayerNorm, LensHead, Norm, RMSNorm, apply_norm
from .hooks import HALF_REMEDY, first_state, hooked, probe_ids, run_whole, text_config
from .split import in_memory, is_split, stored

ROUNDINGS = 8  # of fp32, in which modules and formulas are compared
SMALL = 1e-4  # magnitude of rows on which an epsilon is measured
# Names that configurations use; what a name states is tried and need not be true.
BLOCK_COUNTS = ("num_decoder_layers", "decoder_layers", "num_hidden_layers")  # a decoder's first: an encoder's hides it
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")


def identify_norm(module: nn.Module, d_model: int) -> Norm:
    """The `LayerNorm` or `RMSNorm` that a module computes, with the module's own parameters.

    Neither class nor attribute names count. A norm without parameters is found too, and one that adds 1
    to its stored weight.

    Args:
        module: Maps ``[..., d_model]`` to the same shape.
        d_model: Width of its input.

    Raises:
        UnsupportedModelError: No formula gives the module's output.
    """
    own = [p.detach() for p in module.parameters(recurse=False) if p.shape == (d_model,)]
    ask = _Asking(module)
    x = _rows(d_model, own[0].device if own else None)
    with torch.no_grad():
        for eps in _epsilons(module, ask, x):
            shifted = x + 0.5  # a LayerNorm and an RMSNorm agree on rows of mean 0
            rows = torch.cat([shifted, shifted * eps**0.5])  # the second half so small that a wrong epsilon shows
            wanted = ask(rows)
            for norm, wide in zip(_norms(own, eps), _norms([v.float() for v in own], eps), strict=True):
                if _agree(apply_norm(rows, wide), wanted):
                    return norm
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a LayerNorm or RMSNorm (of the stored weight, or of 1 + weight), "
        "got other values"
    )


def identify_projection(module: nn.Module, d_model: int) -> Tensor:
    """The weight ``[d_embed, d_model]`` of a linear map without bias, as the module stores it or transposed.

    Raises:
        UnsupportedModelError: The module computes something else.
    """
    weights = [p.detach() for p in module.parameters(recurse=False) if p.dim() == 2 and p.is_floating_point()]
    with torch.no_grad():
        for weight in (form for w in weights for form in (w, w.T) if form.shape[1] == d_model):
            x = _rows(d_model, weight.device) + 0.5
            if _agree(x @ weight.float().T, _Asking(module)(x)):
                return weight
    raise UnsupportedModelError(f"{type(module).__name__}: expected a linear map without bias, got {module}")


class _Asking:
    """A module as a function in fp32, so that half precision hides no difference."""

    def __init__(self, module: nn.Module):
        self._name = type(module).__name__
        self._module = copy.deepcopy(module).float()

    def __call__(self, x: Tensor) -> Tensor:
        try:
            return self._module(x)
        except Exception as error:  # anything can come out of a model's own code
            message = f"expected a module that takes rows {list(x.shape)}, got {type(error).__name__}: {error}"
            raise UnsupportedModelError(f"{self._name}: {message}") from error


def _rows(width: int, device: torch.device | None) -> Tensor:
    """Four random rows of mean 0 and mean square 1, ``[4, width]``."""
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    x = x - x.mean(-1, keepdim=True)
    return (x / x.square().mean(-1, keepdim=True).sqrt()).to(device)


def _epsilons(module: nn.Module, ask: _Asking, x: Tensor) -> Iterator[float]:
    """What may be the norm's epsilon: every small number that the module holds, then what its output tells.

    A norm scales a row of mean square v by ``sqrt(v / (v + eps))`` beside what it does to a large row.
    """
    yield from sorted({v for v in vars(module).values() if isinstance(v, float) and 0 < v < 1})
    bias = ask(torch.zeros_like(x))
    large, small = ask(x / SMALL) - bias, ask(x * SMALL) - bias
    share = float((large * small).sum() / large.square().sum())
    if 0 < share < 1:
        eps = SMALL**2 * (share**-2 - 1)
        yield float(f"{eps:.4g}")  # as a person would have written it, without the rounding of the output
        yield eps


def _norms(vectors: list[Tensor], eps: float) -> Iterator[Norm]:
    """Every norm that these vectors can be the weight and bias of; all of them first, none of them last."""
    for number in range(min(len(vectors), 2), -1, -1):
        for chosen in permutations(vectors, number):
            weight, bias = (*chosen, None, None)[:2]
            yield LayerNorm(weight, bias, eps)
            yield RMSNorm(weight, eps)
            if weight is not None:
                yield RMSNorm(weight, eps, offset=1.0)
                yield LayerNorm(weight + 1.0, bias, eps)  # Nemotron's, summed in the dtype that it sums in


def _agree(got: Tensor, wanted: Tensor) -> bool:
    if got.shape != wanted.shape or not torch.isfinite(wanted).all():
        return False
    return bool((got - wanted).abs().max() <= ROUNDINGS * torch.finfo(torch.float32).eps * wanted.abs().max())


def find_head(model: PreTrainedModel) -> LensHead:
    """Find final norm, projection, unembedding, softcap and logit scale of any causal LM; tensors are its own.

    Nothing is looked up by architecture: the blocks are the module list of ``num_hidden_layers`` entries
    that runs, norm and projection are what runs between the last of them and the output embedding, what
    they compute is found by asking them, and softcap and logit scale are those numbers of the
    configuration that lead to the model's logits. The parity gate of `LogitLens` then proves
    the result.

    Raises:
        UnsupportedModelError: A part is missing or ambiguous; the model's class is named.
    """
    check_device(model)
    module = model.get_output_embeddings()
    if module is None or not isinstance(getattr(module, "weight", None), Tensor):
        raise UnsupportedModelError(f"{type(model).__name__}: expected an output embedding with a weight, got {module}")
    if hasattr(module, "base_layer") and not getattr(module, "merged", False):
        name = next(name for name, other in model.named_modules() if other is module)
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected an unembedding without an adapter, got one on {name} "
            f"({type(module).__module__}.{type(module).__name__}); merge it (merge_and_unload)"
        )
    if hasattr(module.weight, "__tensor_flatten__") or not module.weight.is_floating_point():
        kind = type(module.weight).__name__ if hasattr(module.weight, "__tensor_flatten__") else module.weight.dtype
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected an unembedding of floating numbers, got one of {kind}; leave it out of "
            "the quantisation"
        )
    states, tail, logits = _run_tail(model, find_blocks(model), module)
    _check_finite(model, states, logits)
    weight, bias = stored(module, "weight"), stored(module, "bias") if hasattr(module, "bias") else None
    last = states[-1].to(weight.device)
    norm, projection = _read_tail(model, tail)
    if norm is not None:
        norm = replace(norm, **{name: value.to(weight.device) for name, value in _tensors_of(norm)})
    projection = None if projection is None else projection.to(weight.device)
    try:
        head = LensHead(weight.detach(), norm, None if bias is None else bias.detach(), projection=projection)
    except ValueError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from None
    check_widths(model, head, last, logits)
    return _with_logit_transform(head, text_config(model), last, logits)


def check_device(model: PreTrainedModel) -> None:
    """Raise ``UnsupportedModelError`` for weights in several places, or in none, that accelerate does not move."""
    if is_split(model):
        return
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices:
        got = "weights that are nowhere (on the meta device)"
    elif len(devices) > 1:
        got = f"one over {', '.join(sorted(map(str, devices)))}"
    else:
        return
    raise UnsupportedModelError(
        f"{type(model).__name__}: expected a whole model on one device, or one loaded with device_map, got {got}"
    )


def check_widths(model: PreTrainedModel, head: LensHead, states: Tensor, logits: Tensor) -> None:
    """Raise ``UnsupportedModelError`` unless states and logits of the model fit the head."""
    wanted = (head.d_model, head.weight.dtype)
    if (states.shape[-1], states.dtype) != wanted:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a residual stream of width {wanted[0]} and {wanted[1]} like the "
            f"unembedding, got width {states.shape[-1]} and {states.dtype}"
            + ("" if states.dtype == wanted[1] else HALF_REMEDY)
        )
    if logits.shape[-1] != len(head.weight):
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected {len(head.weight)} logits like the rows of the unembedding, "
            f"got {logits.shape[-1]}"
        )


def find_blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The blocks of a causal LM: the output of one is the residual stream ``[batch, token, d_model]``.

    Raises:
        UnsupportedModelError: None, or several lists of them.
    """
    stated = [getattr(text_config(model), name, None) for name in BLOCK_COUNTS]
    counts = [count for count in dict.fromkeys(stated) if isinstance(count, int) and count > 0]
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) in counts]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    found = [blocks for _, blocks in outer]
    if len(found) > 1:
        ran = _modules_that_run(model, [block for blocks in found for block in blocks])
        found = [blocks for blocks in found if ran.issuperset(blocks)]
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected one list of {' or '.join(map(str, counts))} transformer blocks, got "
            f"{len(found)}"
        )
    return found[0]


def _modules_that_run(model: PreTrainedModel, modules: list[nn.Module]) -> set[nn.Module]:
    """Those that a text runs through: a second tower, for images say, has blocks too."""
    ran: set[nn.Module] = set()
    with hooked(modules, lambda module, _args, _kwargs: ran.add(module)):
        _run(model, nn.ModuleList())
    return ran


def _run_tail(
    model: PreTrainedModel, blocks: nn.ModuleList, head: nn.Module
) -> tuple[list[Tensor], list[tuple[nn.Module, int]], Tensor]:
    """One pass over a few tokens: the residual stream, what ran after the last block before the head, logits.

    Returns:
        States of layers 0 to ``n_layers``, each ``[token, d_model]``; innermost modules that changed their input, each
        with its width; ``[token, vocab_size]`` logits.
    """
    tail: list[tuple[nn.Module, int]] = []
    reached: list[nn.Module] = []

    def after_step(module, args, kwargs, output):
        state = first_state(args, kwargs)
        if state is not None and not _same(state, output) and not reached:  # dropout, say, changes nothing
            tail.append((module, state.shape[-1]))

    inside = set(blocks.modules())
    steps = [m for m in model.modules() if m not in inside and m is not head and not any(m.children())]
    with (
        hooked(steps, after=after_step),
        hooked([blocks[-1]], after=lambda *_: tail.clear()),
        hooked([head], before=lambda *_: reached.append(head)),
    ):
        kept, logits = _run(model, blocks)
    return [states[0] for states in kept], tail, logits[0]


def _check_finite(model: PreTrainedModel, states: list[Tensor], logits: Tensor) -> None:
    for layer, values in enumerate([*states, logits]):
        if not values.isfinite().all():
            where = f"at layer {layer}" if layer < len(states) else "in the logits"
            wider = "" if values.dtype == torch.float32 else " or try ``dtype='float32'``"
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected finite states and logits, got "
                f"{'NaN' if values.isnan().any() else 'infinity'} {where}; check the weights{wider}"
            )


def _run(model: PreTrainedModel, blocks: nn.ModuleList) -> tuple[list[Tensor], Tensor]:
    """States of `probe_ids` at these blocks, and their logits."""
    try:
        kept, output = run_whole(model, blocks)
        return kept, output.logits
    except UnsupportedModelError:
        raise
    except Exception as error:  # anything can come out of a model's own code
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected logits for a text of {probe_ids(model).shape[1]} tokens, got "
            f"{type(error).__name__}: {error}"
        ) from error


def _same(state: Tensor, output: object) -> bool:
    if not isinstance(output, Tensor) or state.shape != output.shape:
        return False
    return torch.equal(state, output.to(state.device))


def _read_tail(model: PreTrainedModel, tail: list[tuple[nn.Module, int]]) -> tuple[Norm, Tensor | None]:
    """Final norm and projection, either of which a model may lack."""
    kinds = [_is_matrix(module) for module, _ in tail]
    if kinds not in ([], [False], [True], [False, True]):
        names = ", ".join(type(module).__name__ for module, _ in tail)
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected a norm, a projection or both between the last block and the output "
            f"embedding, got {names}"
        )
    try:
        parts = [(in_memory(module), width) for module, width in tail]
        norm = identify_norm(*parts[0]) if False in kinds else None
        projection = identify_projection(*parts[-1]) if True in kinds else None
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{type(model).__name__}: {error}") from None
    return norm, projection


def _tensors_of(norm: Norm) -> Iterator[tuple[str, Tensor]]:
    return ((name, value) for name, value in vars(norm).items() if isinstance(value, Tensor))


def _is_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() == 2 for parameter in module.parameters())


def _with_logit_transform(head: LensHead, config, states: Tensor, logits: Tensor) -> LensHead:
    """The head with those of the configuration's numbers that lead to the model's own logits.

    A number can be stated and not used, as MPT's ``logit_scale``. What is stated comes first among those
    that rounding cannot tell apart; where nothing fits, the parity gate says so.
    """
    softcaps = [*_numbers(config, SOFTCAPS), None]
    scales = [*_numbers(config, FACTORS), *(1.0 / d for d in _numbers(config, DIVISORS)), 1.0]
    candidates = [replace(head, softcap=c, scale=s) for c, s in product(softcaps, scales)]
    differences = [float((p.logits(states).to(logits.device) - logits).abs().max()) for p in candidates]
    close = (p for p, d in zip(candidates, differences, strict=True) if d <= 2 * min(differences))
    return next(close, candidates[0])


def _numbers(config, names: tuple[str, ...]) -> list[float]:
    values = (getattr(config, name, None) for name in names)
    return [float(v) for v in values if isinstance(v, int | float) and v > 0]
