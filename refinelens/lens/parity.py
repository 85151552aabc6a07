"""The parity gate: the states that a lens reads, and the lens at the last layer, are the model's own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from ..kernels.reference import LensHead, LensStats, apply_norm
from ..model.head import check_widths
from ..model.hooks import difference, keep_positions, probe_ids, run_base, run_whole
from ..model.split import is_split
from ..op.fused_lens import fused_lens

# Largest difference between lens and model that counts as rounding, as a share of the logit range. A model
# in half precision rounds its normed states and its logits, so there the share is a multiple of epsilon.
FP32_PARITY = 1e-4
ROUNDINGS = 2


def rounding_of(dtype: torch.dtype) -> float:
    """What rounding of one number can be, as a share of the logit range: tokens so close together are tied."""
    return ROUNDINGS * torch.finfo(dtype).eps


@dataclass(frozen=True)
class ParityReport:
    """How well the lens at the last layer reproduces the model's own logits."""

    max_difference: float  # largest absolute difference of a logit
    logit_range: float  # largest minus smallest logit
    tolerance: float  # allowed share of the range
    argmax_equal: bool  # same prediction at every position, or one that rounding cannot tell apart
    op_agrees: bool  # the op's argmax, maximum and logsumexp agree with the model's logits

    @property
    def passed(self) -> bool:
        """Whether the lens may be used."""
        within = self.max_difference <= self.tolerance * self.logit_range
        return within and self.argmax_equal and self.op_agrees


def check_parity(model: PreTrainedModel, head: LensHead, blocks: nn.ModuleList, backend: str = "auto") -> ParityReport:
    """Compare the states that a lens reads, and the lens at the last layer, with the model's own forward pass.

    States come from the base model alone; those of every layer must be the ones that ``model(...)`` computes on its
    way to its logits. Of the logits both the formula (every logit) and the op (argmax, maximum, logsumexp) are
    compared; the only place beside `find_head` where logits of all tokens are held, for 8 positions.

    Raises:
        UnsupportedModelError: States of another forward pass, another width or dtype.
    """
    of_model, output = run_whole(model, blocks)
    ids, own = probe_ids(model), output.logits[0].float()
    with keep_positions(model, blocks, torch.arange(ids.shape[1])[None], ids.shape[1]) as kept:
        run_base(model, ids)
    last = kept[-1][0].to(head.weight.device)
    check_widths(model, head, last, own)
    rounding = rounding_of(head.weight.dtype)
    tolerance = FP32_PARITY if head.weight.dtype == torch.float32 else rounding
    crosses_devices = is_split(model)
    for layer, pair in enumerate(zip(kept, of_model, strict=True)):
        if (found := difference(*(states[None] for states in pair))) > tolerance:
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected its base model to compute the states that the model itself does, "
                f"got others from layer {layer} on (difference {found:.2g} of the largest, allowed {tolerance:.2g}): "
                "it changes what goes in, as prompts of virtual tokens, scaled embeddings or hooks do; undo that"
            )
        if crosses_devices and not pair[0].any(-1).all():
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected states from every device, got nothing but zeros at layer {layer}; "
                "use another ``device_map``"
            )
    lens = head.logits(last).to(own.device)
    logit_range = float(own.max() - own.min())
    allowed, tie = tolerance * logit_range, rounding * logit_range
    stats = fused_lens(last, head, backend=backend).to(own.device)
    close = [
        (stats.max_logit - own.amax(-1)).abs().max() <= allowed,
        (stats.logsumexp - own.logsumexp(-1)).abs().max() <= allowed,
    ]
    return ParityReport(
        max_difference=float((lens - own).abs().max()),
        logit_range=logit_range,
        tolerance=tolerance,
        argmax_equal=_same_argmax(own, lens.argmax(-1), tie),
        op_agrees=all(close) and _same_argmax(own, stats.argmax, tie),
    )


def _same_argmax(own: Tensor, predicted: Tensor, tie: float) -> bool:
    margin = own.amax(-1) - own.gather(1, predicted[:, None])[:, 0]
    return bool((margin <= tie).all())


def check_logits(logits: Tensor, last: LensStats, vocab_size: int, tolerance: float) -> None:
    """Hold a model's logits ``[..., vocab_size]`` against what the lens reads at the last layer, ``[...]``.

    Raises:
        InputError: Another shape, or other logits, by more than ``tolerance`` of their range.
    """
    own = logits.float().to(last.argmax.device)
    if own.shape != (*last.argmax.shape, vocab_size):
        raise InputError(
            f"logits: expected [*{list(last.argmax.shape)}, {vocab_size}] like the last layer, got {list(own.shape)}"
        )
    allowed = tolerance * (own.amax(-1) - own.amin(-1))
    worst = ((last.max_logit - own.amax(-1)).abs() - allowed).max()
    if own.numel() and (worst > 0 or ((last.logsumexp - own.logsumexp(-1)).abs() > allowed).any()):
        raise InputError(
            "logits: expected those of the last of these states, got others; pass the residual stream of every "
            "layer, or hidden_states as Transformers returns them"
        )


def returns_normed(model: PreTrainedModel, head: LensHead, blocks: nn.ModuleList) -> bool:
    """Whether the last of the ``hidden_states`` that a model returns is behind its final norm, found by one short pass.

    Raises:
        UnsupportedModelError: It is neither what the last block puts out nor that, normed.
    """
    kept, output = run_whole(model, blocks, output_hidden_states=True)
    last, found = (states.to(head.weight.device) for states in (kept[-1], output.hidden_states[-1]))
    normed = apply_norm(last, head.norm).to(found.dtype)
    allowed = max(FP32_PARITY, rounding_of(found.dtype))
    if found.shape != normed.shape or min(difference(found, last), difference(found, normed)) > allowed:
        raise UnsupportedModelError(
            f"{type(model).__name__}: expected the last of its hidden_states to be what its last block puts out, "
            "normed or not, got other states; pass those of LogitLens.hidden"
        )
    return head.norm is not None and difference(found, normed) <= difference(found, last)


def looks_normed(states: Tensor, head: LensHead, exactly: bool = False) -> bool:
    """Whether states ``[..., d_model]`` can be behind the final norm: less its bias, over its weight, of mean square 1.

    An epsilon of the norm makes it less, for small states; ``exactly`` takes no such states.
    """
    norm, rows = head.norm, states.detach().float()
    if norm is None or not states.numel():
        return False
    told = torch.ones(states.shape[-1], dtype=torch.bool, device=states.device)
    if norm.bias is not None:
        rows = rows - norm.bias.float().to(states.device)
    if norm.weight is not None:
        weight = norm.weight.float().to(states.device) + norm.offset
        # Where the bias hides what the weight lets through, or nothing goes through, a state tells nothing.
        hides = 0.0 if norm.bias is None else norm.bias.float().to(states.device).abs()
        told = weight.abs() > 100 * torch.finfo(states.dtype).eps * hides
        rows = rows / torch.where(told, weight, 1.0)
    squares = rows[..., told].square().sum(-1) / states.shape[-1]
    low, high = (0.995, 1.005) if exactly else (0.5, 1.02)
    return bool(((squares >= low * told.float().mean()) & (squares <= high)).all())
