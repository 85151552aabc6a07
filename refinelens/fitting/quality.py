"""How well a lens reads held-out text, layer by layer, beside the plain logit lens."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..lens.logit_lens import LogitLens
from ..lens.translators import Translators, rows_at_a_time
from ..op.divergences import kl_to_final

NEGLIGIBLE = 1e-12  # variance as a share of the mean square: rounding


@dataclass(frozen=True)
class Quality:
    """Means over held-out tokens; every list ``[n_layers + 1]``, the output last."""

    tokens: int
    variance_explained: list[float]  # of the last layer's residual stream; below 0 where worse than its mean
    kl: list[float]  # nats, KL(p_final || p_layer)
    top1: list[float]  # share of tokens where the layer's argmax is the model's own prediction


def measure(
    logit_lens: LogitLens, states: Iterable[Tensor], lenses: dict[str, Translators | None]
) -> dict[str, Quality]:
    """The quality of every lens (None: the plain one) on ``states`` ``[n_layers + 1, tokens, d_model]``.

    Raises:
        InputError: The last layer's states do not vary.
    """
    sums, tokens = torch.zeros(()), 0  # see `_sums`
    total, squares = torch.zeros(()), torch.zeros(())  # of the last layer's states, [d_model] each
    for hidden in states:
        y = hidden[-1].double()
        tokens, total, squares = tokens + len(y), total + y.sum(0), squares + (y * y).sum(0)
        for block in hidden.split(rows_at_a_time(hidden), 1):
            with logit_lens.in_own_dtype():
                sums = sums + _sums(logit_lens, block, lenses.values())
    variance = float((squares - total**2 / tokens).sum())
    if not variance > NEGLIGIBLE * float(squares.sum()):
        raise InputError("``text``: expected held-out text whose tokens differ, got states that do not vary")
    return {
        name: Quality(tokens, (1.0 - error / variance).tolist(), (kl / tokens).tolist(), (agreement / tokens).tolist())
        for name, (error, kl, agreement) in zip(lenses, sums, strict=True)
    }


def _sums(logit_lens: LogitLens, hidden: Tensor, lenses: Collection[Translators | None]) -> Tensor:
    """Squared error, KL and agreement summed over some tokens: fp64 ``[lenses, 3, n_layers + 1]``."""
    hidden = hidden.to(logit_lens.head.weight.device)
    read = [hidden if lens is None else logit_lens.translated(hidden, logit_lens.adapted(lens)) for lens in lenses]
    read = torch.cat([*(layers[:-1] for layers in read), hidden[-1:]])  # at the output all read the same, once
    stats = logit_lens.stats(read)
    kl = kl_to_final(read, stats, logit_lens.head, backend=logit_lens.backend).double().sum(1)
    agreement = (stats.argmax == stats.argmax[-1]).double().sum(1)
    final = hidden[-1].double()
    error = torch.stack([((x.double() - final) ** 2).sum() for x in read])
    sums = torch.stack([error, kl, agreement]).cpu()
    below, output = sums[:, :-1].unflatten(1, (len(lenses), -1)).transpose(0, 1), sums[None, :, -1:]
    return torch.cat([below, output.expand(len(lenses), 3, 1)], 2)
