"""The two halves of every block: what attention and feed-forward part add, and the residual stream between them.

What a part adds is found by what it does: a block whose feed-forward part is zero-ablated puts out the stream behind
its attention, ``resid_mid``; what the whole block puts out beyond that is the feed-forward part's. So norms behind a
part, multipliers and parallel parts are in it; of parallel parts (GPT-J, GPT-NeoX) attention counts first.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..lens.attribution import contributions
from ..lens.blocks import ActivationCache, mid_state, sublayers_of
from ..lens.inputs import Tokens, targets_of, tokens_of
from ..lens.logit_lens import LogitLens
from ..lens.reading import LayerReading
from ..op.fused_lens import broadcast_ids
from ..store.layers import HALVES

if TYPE_CHECKING:
    import pandas as pd

MID = "behind-attention"  # name of the lens that reads resid_mid


@dataclass(frozen=True, eq=False, repr=False)
class SublayerReading:
    """What happens inside the blocks; fields ``[n_layers, position]`` fp32, row i of block i + 1, but for those named.

    What they are, and that ``embedding + attn + mlp + constant = logit`` over all blocks, see `lens.attribution`.
    """

    mid: LayerReading  # resid_mid through the plain lens; [n_layers + 1, position], its last row the output
    attn: Tensor  # nats, direct logit attribution of what attention adds
    mlp: Tensor
    embedding: Tensor  # [position], of the embedding output
    constant: Tensor  # [position], of biases of norm and unembedding
    logit: Tensor  # [position], of the target at the output
    attn_cosine: Tensor  # cosine of what attention adds and the stream before it
    mlp_cosine: Tensor
    block_cosine: Tensor  # of what both add together and the stream before the block
    attn_size: Tensor  # norm of what attention adds, as a share of that of the stream before it
    mlp_size: Tensor
    targets: Tensor  # int64 [position]
    tokens: Tokens

    def __repr__(self) -> str:
        n_layers, n = self.attn.shape
        return f"SublayerReading: {n_layers} blocks, {n} positions; {', '.join(f.name for f in fields(self))}"

    def to_frame(self) -> pd.DataFrame:
        """A row per block (from 1) and position, with ``resid_mid``'s best token, rank and log-probability.

        Raises:
            InputError: pandas is not installed.
        """
        frame = self.mid.map(lambda value: value[:-1]).to_frame().rename(columns={"layer": "block"})
        frame["block"] += 1
        names = [f"{half}{end}" for half in HALVES for end in ("", "_cosine", "_size")]
        for name in names:
            frame[name] = getattr(self, name).flatten().numpy()
        return frame


@torch.no_grad()
def read_sublayers(
    lens: LogitLens, text: object, targets: object = None, positions: object = None, *, top_k: int = 5
) -> SublayerReading:
    """Run a text once, and every block of it once more without its feed-forward part.

    Args:
        lens: Of the model; the stream between the parts is read by its plain form.
        text: One text, as in `LogitLens.read`.
        targets: Token ids or strings of one token each, broadcastable to ``[position]``; None for the model's own
            prediction at each.
        positions: As in `LogitLens.read`.
        top_k: How many of the likeliest tokens to list; 0 for none.

    Raises:
        InputError: Input that does not fit, more than one text, or a lens with translators, which were made for the
            stream behind whole blocks.
        UnsupportedModelError: Blocks that cannot be run by themselves, or whose parts were not found.
    """
    if lens.translators is not None:
        raise InputError(f"lens: expected the plain lens, got {lens.name}, which was made for whole blocks")
    tokens = tokens_of(text, positions, None, lens.tokenizer)
    if len(tokens.input_ids) != 1:
        raise InputError(f"text: expected one text, got {len(tokens.input_ids)}")
    sublayers = sublayers_of(lens)
    with lens.undisturbed():
        run = ActivationCache.record(lens, tokens.input_ids)
        between = [mid_state(run, index, own) for index, own in enumerate(sublayers)]
    places = tokens.positions[0].to(run.states[0].device)
    post, mid = (torch.stack(states)[:, 0, places] for states in (run.states, between))  # [.., position, d_model]
    ids = targets_of(targets, lens.tokenizer)
    if ids is None:
        chosen = lens.stats(post[-1]).argmax
    else:
        chosen = broadcast_ids("targets", torch.as_tensor(ids, device=post.device), [len(places)])
    reading = lens.read_states(torch.cat([mid, post[-1:]]), chosen, kl=True, top_k=top_k, check_last=False)
    shown = replace(reading, tokens=replace(tokens, is_batch=False), lens=MID).to("cpu")
    found = vars(contributions(lens, post, mid, chosen))
    on_cpu = {name: value.cpu() for name, value in found.items()}
    return SublayerReading(mid=shown, **on_cpu, targets=chosen.cpu(), tokens=shown.tokens)  # type: ignore[arg-type]


def by_layer(inside: SublayerReading, half: str, mid: bool) -> np.ndarray:
    """Attributions of one half as a map has them, ``[n_layers + 1, position]``; NaN where there are none.

    Beside the stream behind a block stands what the block added, and beside the embedding output (layer 0) in the place
    of attention what the embedding adds. Beside the stream within a block (``mid``) stands what that block adds.
    """
    none, own = torch.full_like(inside.embedding, torch.nan), getattr(inside, half)
    first = inside.embedding if half == HALVES[0] else none
    return torch.cat([own, none[None]] if mid else [first[None], own]).numpy()
