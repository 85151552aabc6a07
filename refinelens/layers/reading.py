"""What the lens reads of a clean run and of what remains of it under an intervention."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..lenses.lens_files import Lens
from ..lenses.logit_lens import LogitLens


@dataclass(frozen=True)
class Reading:
    """Target of one context at every layer, ``[1 + runs, n_layers + 1]``: the clean run, then one per struck block."""

    ranks: np.ndarray  # int64, 0-based
    logprobs: np.ndarray  # fp32, nats

    def __post_init__(self):
        if self.ranks.shape != self.logprobs.shape:
            raise ValueError(f"expected equal shapes, got {list(self.ranks.shape)} and {list(self.logprobs.shape)}")


def read_scan(logit_lens: LogitLens, lens: Lens, clean: Tensor, remains: list[Tensor], target: int) -> Reading:
    """Read every layer of a scan in one call of the op, so that clean and struck runs are read alike.

    Args:
        logit_lens: Of the model.
        lens: What the layers are read with.
        clean: ``[n_layers + 1, d_model]``.
        remains: As `scan` gives them: of block ``i`` layers ``i + 1 .. n_layers``.
        target: Token id.
    """
    n_layers = len(clean) - 1
    by_layer = [torch.stack([clean[j], *(remains[i][j - i - 1] for i in range(j))]) for j in range(n_layers + 1)]
    read = _read(logit_lens, lens, by_layer, target)
    ranks, logprobs = (np.repeat(values[None], n_layers + 1, 0) for values in (_clean(read[0]), _clean(read[1])))
    for layer in range(1, n_layers + 1):
        for values, found in zip((ranks, logprobs), read, strict=True):
            values[1 : layer + 1, layer] = found[layer][1:]
    return Reading(ranks, logprobs)


def read_output(logit_lens: LogitLens, lens: Lens, clean: Tensor, ends: Tensor, target: int) -> Reading:
    """The same at the output alone: ``[1 + runs, 1]``, of states ``[runs, d_model]`` of the last layer."""
    read = _read(logit_lens, lens, [clean[:0]] * (len(clean) - 1) + [torch.cat([clean[-1:], ends])], target)
    return Reading(*(found[-1][:, None] for found in read))


def _read(logit_lens: LogitLens, lens: Lens, by_layer: list[Tensor], target: int) -> tuple[list, list]:
    """Ranks and log-probabilities, a row of each layer's states."""
    if lens.translators is not None:
        lower = [lens.translators.one(layer, states) for layer, states in enumerate(by_layer[:-1])]
        by_layer = [*lower, by_layer[-1]]
    stats = logit_lens.stats(torch.cat(by_layer), target)
    sizes = np.cumsum([len(states) for states in by_layer])[:-1]
    return tuple(np.split(values.cpu().numpy(), sizes) for values in (stats.target_rank, stats.target_logprob))


def _clean(found: list[np.ndarray]) -> np.ndarray:
    return np.array([values[0] for values in found])
