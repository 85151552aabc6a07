"""How well a lens reads held-out text, layer by layer, beside the plain logit lens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ..lens.logit_lens import LogitLens
from ..lens.translators import Translators

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
    sums: dict[str, Tensor | float] = dict.fromkeys(lenses, 0.0)  # see `_sums`
    tokens, total, squares = 0, torch.zeros(()), torch.zeros(())  # of the last layer's states, [d_model] each
    for hidden in states:
        y = hidden[-1].double()
        tokens, total, squares = tokens + len(y), total + y.sum(0), squares + (y * y).sum(0)
        for name, translators in lenses.items():
            sums[name] = sums[name] + _sums(logit_lens, hidden, translators)
    variance = float((squares - total**2 / tokens).sum())
    if not variance > NEGLIGIBLE * float(squares.sum()):
        raise InputError("``text``: expected held-out text whose tokens differ, got states that do not vary")
    return {
        name: Quality(tokens, (1.0 - error / variance).tolist(), (kl / tokens).tolist(), (agreement / tokens).tolist())
        for name, (error, kl, agreement) in sums.items()
    }


def _sums(logit_lens: LogitLens, hidden: Tensor, translators: Translators | None) -> Tensor:
    """Squared error, KL and agreement of one lens, summed over some tokens: fp64 ``[3, n_layers + 1]``."""
    reading = logit_lens.read_states(hidden[:, None], None, translators, check_last=False)
    final = hidden[-1].double()
    lower = range(0 if translators is None else translators.n_layers)
    read = (translators.one(layer, x) if layer in lower else x for layer, x in enumerate(hidden))
    error = torch.stack([((x.double() - final) ** 2).sum() for x in read])
    agreement = (reading.stats.argmax == reading.stats.argmax[-1]).double().sum((1, 2))
    return torch.stack([error, reading.kl.double().sum((1, 2)), agreement]).cpu()
