"""What the lenses read of contexts that were run: all layers of many contexts in one call each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..lenses.lens_files import Lens
from ..lenses.logit_lens import LayerReading, LogitLens
from ..prompts.context import Context, Span
from .generate import Generation


@dataclass(frozen=True)
class ContextStates:
    """A context that was run: its residual stream where it is to be read, and the text it goes on with, if any."""

    context: Context
    span: Span
    hidden: Tensor  # [n_layers + 1, n_positions, d_model]
    generation: Generation | None

    @property
    def n_rows(self) -> int:
        """Rows that a lens reads: layers times positions."""
        return self.hidden.shape[0] * self.hidden.shape[1]


@dataclass(frozen=True)
class ContextReading:
    """What was read of one context, on the CPU."""

    context: Context
    span: Span
    target_ids: Tensor  # [n_positions] int64
    readings: dict[str, LayerReading]  # by lens, fields [n_layers + 1, n_positions]
    generation: Generation | None


def read_contexts(
    ran: Sequence[ContextStates], logit_lens: LogitLens, lenses: Sequence[Lens], target: str
) -> list[ContextReading]:
    """Read every layer of several contexts through every lens.

    The unembedding is fetched once for all of them: with a context at a time, that would be most of the work.

    Args:
        ran: Contexts, at least one.
        logit_lens: Of their model.
        lenses: What to read them through.
        target: ``answer``, the token that follows, or ``prediction``, the model's own.

    Raises:
        InputError: States that are not finite, of any of them.
    """
    hidden = torch.cat([one.hidden for one in ran], 1)[:, None]  # [n_layers + 1, 1, positions of all, d_model]
    if target == "prediction":
        targets = logit_lens.stats(hidden[-1]).argmax
    else:
        targets = torch.tensor([[id for one in ran for id in one.span.next_ids]], device=hidden.device)
    readings = {lens.name: logit_lens.read(hidden, targets, lens.translators).to("cpu") for lens in lenses}
    targets, found, start = targets[0].cpu(), [], 0
    for one in ran:
        end = start + len(one.span.next_ids)
        own = {name: reading.of(start, end) for name, reading in readings.items()}
        found.append(ContextReading(one.context, one.span, targets[start:end], own, one.generation))
        start = end
    return found
