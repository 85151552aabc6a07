"""What attention and feed-forward part of every block add to the residual stream: to the target's logit, and how.

The direct logit attribution of a part is what it adds to the target's logit through the final norm, whose scale is
taken as it is at the output (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"): the parts of a
sum, ``embedding + attn + mlp + constant = logit`` over all blocks, which is checked. Logits are before a softcap.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UnsupportedModelError
from ..kernels.reference import LayerNorm, LensHead, apply_norm
from .logit_lens import LogitLens


@dataclass(frozen=True)
class Contributions:
    """Of every block, fp32 ``[n_layers, position]``, row i of block i + 1, but for those named.

    A cosine is that of what is added and the stream it is added to, a size the norm of the one as a share of the
    other's: attention and the block as a whole are held against the stream before the block, the feed-forward part
    against ``resid_mid``.
    """

    attn: Tensor  # nats, direct logit attribution of what attention adds
    mlp: Tensor
    embedding: Tensor  # [position], of the embedding output
    constant: Tensor  # [position], of biases of norm and unembedding
    logit: Tensor  # [position], of the target at the output
    attn_cosine: Tensor
    mlp_cosine: Tensor
    block_cosine: Tensor  # of attention and feed-forward part together
    attn_size: Tensor
    mlp_size: Tensor


@torch.no_grad()
def contributions(lens: LogitLens, post: Tensor, mid: Tensor, targets: Tensor) -> Contributions:
    """What the parts of every block contribute, block by block, so that no copy of all states is held.

    Args:
        lens: Of the model.
        post: ``[n_layers + 1, position, d_model]``, the residual stream of every layer.
        mid: ``[n_layers, position, d_model]``, ``resid_mid`` of every block.
        targets: ``[position]`` int64.

    Raises:
        UnsupportedModelError: The parts do not sum up to the target's logit, see `check_sum`.
    """
    direction, constant = logit_direction(post[-1], targets, lens.head)
    rows: dict[str, list[Tensor]] = {}
    for states in zip(post[:-1], mid, post[1:], strict=True):
        before, between, after = (state.double() for state in states)  # else half precision rounds what was added
        for name, what, stream in (
            ("attn", between - before, before),
            ("mlp", after - between, between),
            ("block", after - before, before),
        ):
            rows.setdefault(name, []).append((what * direction).sum(-1))
            cosine = torch.nn.functional.cosine_similarity(what, stream, -1)
            rows.setdefault(f"{name}_cosine", []).append(cosine)
            rows.setdefault(f"{name}_size", []).append(what.norm(dim=-1) / stream.norm(dim=-1))
    found = {name: torch.stack(values) for name, values in rows.items()}
    embedding = (post[0].double() * direction).sum(-1)
    found |= {"embedding": embedding, "constant": constant}
    found["logit"] = embedding + found["attn"].sum(0) + found["mlp"].sum(0) + constant
    check_sum(lens, post[-1], targets, found["logit"])
    return Contributions(**{name: found[name].float() for name in Contributions.__dataclass_fields__})


def sublayer_measures(lens: LogitLens, post: Tensor, mid: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The columns of ``measures='sublayers'`` by name, ``[n_layers + 1, position]`` on the CPU, row i of block i.

    Row 0 is NaN, but for what the embedding adds to the target's logit, which stands in ``attn_logit``; so is a size
    where the stream before is zero. All are fp32 but the 0-based rank, which is fp64.

    Args:
        lens: Of the model.
        post: As of `contributions`.
        mid: As of `contributions`; it is read by the plain lens.
        targets: ``[position]`` int64.

    Raises:
        UnsupportedModelError: As `contributions`.
    """
    found, read = contributions(lens, post, mid, targets), lens.stats(mid, targets)
    none = torch.full_like(found.embedding, torch.nan)[None]
    columns = {f"{half}_logit": getattr(found, half) for half in ("attn", "mlp")}
    columns |= {name: getattr(found, name) for name in ("attn_cosine", "mlp_cosine", "block_cosine")}
    columns |= {name: getattr(found, name) for name in ("attn_size", "mlp_size")}
    columns |= {"mid_logprob": read.target_logprob, "mid_rank": read.target_rank.double()}
    first = {"attn_logit": found.embedding[None]}
    whole = {name: torch.cat([first.get(name, none).to(value), value]) for name, value in columns.items()}
    return {name: value.masked_fill(~value.isfinite(), torch.nan).cpu() for name, value in whole.items()}


def logit_direction(final: Tensor, targets: Tensor, head: LensHead) -> tuple[Tensor, Tensor]:
    """What a summand of a final state is multiplied by to give what it adds to the target's logit.

    Args:
        final: ``[position, d_model]``, the residual stream at the output, which gives the norm its scale.
        targets: ``[position]`` int64.
        head: Of the lens.

    Returns:
        fp64 ``[position, d_model]``, and ``[position]``, what biases of norm and unembedding add.
    """
    x, norm = final.double(), head.norm
    weight = head.weight[targets].double()  # [position, d_embed]
    if head.projection is not None:
        weight = weight @ head.projection.double()
    constant = weight.new_zeros(len(weight)) if head.bias is None else head.bias[targets].double()
    if norm is not None:
        if norm.bias is not None:
            constant = constant + (weight * norm.bias.double()).sum(-1)
        if norm.weight is not None:
            weight = weight * (norm.weight.double() + norm.offset)
        if isinstance(norm, LayerNorm):  # that takes the mean off every summand is the same as taking it off here
            x, weight = x - x.mean(-1, keepdim=True), weight - weight.mean(-1, keepdim=True)
        weight = weight * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
    return head.scale * weight, head.scale * constant


def check_sum(lens: LogitLens, final: Tensor, targets: Tensor, total: Tensor) -> None:
    """Hold the sum of all attributions against the target's logit, computed whole.

    Raises:
        UnsupportedModelError: They differ by more than the parity gate allows.
    """
    head = lens.head
    x = apply_norm(final, head.norm, torch.float64)
    x = x if head.projection is None else x @ head.projection.double().T
    logit = (x * head.weight[targets].double()).sum(-1) + (0.0 if head.bias is None else head.bias[targets].double())
    largest, allowed = float((head.scale * logit - total).abs().max()), lens.parity.tolerance * lens.parity.logit_range
    if not largest <= allowed:
        raise UnsupportedModelError(
            f"{type(lens.model).__name__}: expected what its parts add to sum up to the logit, got a difference of "
            f"{largest:.2g}, allowed {allowed:.2g}"
        )
