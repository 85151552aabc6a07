"""What is measured of every layer's prediction beside its statistics, where it is asked for.

``jsd``: Jensen-Shannon divergence from the output (arXiv 2602.13517 measures settling by it). ``top5``: share of the
five likeliest tokens that are among the output's five likeliest (arXiv 2505.13898). Each is a product of its own over
the vocabulary, a block of positions at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import JSD, TOP5
from ..op.divergences import jsd_to_final
from ..op.vocabulary import lens_top_k
from ..store.trajectory import settle_by_divergence
from .logit_lens import LogitLens
from .reading import LayerReading
from .translators import Translators, rows_at_a_time

LISTED = 5  # tokens that overlap
OF_DISTRIBUTIONS = (JSD, TOP5)  # what needs a layer's whole prediction


def measures_of(
    lens: LogitLens, hidden: Tensor, reading: LayerReading, translators: Translators | None, names: Sequence[str]
) -> dict[str, Tensor]:
    """Measures by name, fp32 ``[n_layers + 1, ...]`` on the CPU.

    Args:
        lens: Of the model.
        hidden: ``[n_layers + 1, ..., d_model]``, the residual stream.
        reading: What was read of it through ``translators``.
        translators: On the model's device and in its dtype; None for the plain lens.
        names: Of `config.MEASURES`; those that are not `OF_DISTRIBUTIONS` are left out.
    """
    names = [name for name in names if name in OF_DISTRIBUTIONS]
    if not names:
        return {}
    states = hidden.reshape(len(hidden), -1, hidden.shape[-1]).to(lens.head.weight.device)
    step = rows_at_a_time(states)
    stats = reading.stats.map(lambda value: value.reshape(len(hidden), -1).to(states.device))
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    for start in range(0, states.shape[1], step):
        block = states[:, start : start + step]
        block = block if translators is None else translators(block)
        if JSD in found:
            own = stats.map(lambda value, start=start: value[:, start : start + step])
            found[JSD].append(jsd_to_final(block, own, lens.head, backend=lens.backend).cpu())
        if TOP5 in found:
            found[TOP5].append(overlap_with_last(lens_top_k(block, lens.head, LISTED, backend=lens.backend).ids).cpu())
    return {name: torch.cat(parts, 1).view(hidden.shape[:-1]) for name, parts in found.items()}


def settling_layers(lens: LogitLens, hidden: Tensor, translators: Translators | None) -> np.ndarray:
    """The layer at which each position settles by its divergence from the output, int64 ``[N]``.

    Args:
        lens: Of the model.
        hidden: ``[n_layers + 1, N, d_model]``, the residual stream.
        translators: As of `measures_of`.
    """
    reading = lens.read_states(hidden, None, translators, kl=False, top_k=0, check_last=False)
    return settle_by_divergence(measures_of(lens, hidden, reading, translators, [JSD])[JSD].T.numpy())


def overlap_with_last(ids: Tensor) -> Tensor:
    """Of lists ``[n_layers + 1, N, k]`` the share of tokens that the last one has too, fp32 ``[n_layers + 1, N]``."""
    return (ids[..., None] == ids[-1, :, None, :]).any(-1).float().mean(-1)
