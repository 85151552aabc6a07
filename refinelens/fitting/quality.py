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
    tallies = {name: _Tally(lens) for name, lens in lenses.items()}
    for hidden in states:
        for tally in tallies.values():
            tally.add(logit_lens, hidden)
    return {name: tally.quality() for name, tally in tallies.items()}


class _Tally:
    """Sums of one lens over the tokens seen so far."""

    def __init__(self, translators: Translators | None):
        self._translators = translators
        self._tokens = 0
        self._sums: Tensor | None = None  # [3, n_layers + 1]: squared error, KL, agreement
        self._y: Tensor | float = 0.0  # [d_model] sum of the last layer's states
        self._yy: Tensor | float = 0.0  # and of their squares

    def add(self, logit_lens: LogitLens, hidden: Tensor) -> None:
        reading = logit_lens.read_states(hidden[:, None], None, self._translators, check_last=False)
        y = hidden[-1].double()
        error = torch.stack([self._squared_error(layer, x, y) for layer, x in enumerate(hidden)])
        agreement = (reading.stats.argmax == reading.stats.argmax[-1]).double().sum((1, 2))
        sums = torch.stack([error, reading.kl.double().sum((1, 2)), agreement]).cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._tokens += len(y)
        self._y, self._yy = self._y + y.sum(0), self._yy + (y * y).sum(0)

    def _squared_error(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        if self._translators is not None and layer < self._translators.n_layers:
            x = self._translators.one(layer, x)
        return ((x.double() - y) ** 2).sum()

    def quality(self) -> Quality:
        error, kl, agreement = self._sums
        n = self._tokens
        variance = float((self._yy - self._y**2 / n).sum())
        if not variance > NEGLIGIBLE * float(self._yy.sum()):
            raise InputError("``text``: expected held-out text whose tokens differ, got states that do not vary")
        return Quality(n, (1.0 - error / variance).tolist(), (kl / n).tolist(), (agreement / n).tolist())
