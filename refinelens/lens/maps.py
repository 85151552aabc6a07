"""From readings to the heat map that people look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..errors import InputError
from ..pages.heatmap import NEXT, PREDICTION, HeatMap, LensMap, Segment

if TYPE_CHECKING:
    from .reading import LayerReading


def heat_map(
    readings: Sequence[LayerReading],
    *,
    title: str = "",
    target_is: str = "",
    every: int = 1,
    segments: Sequence[Segment] = (),
    facts: dict[str, str] | None = None,
) -> HeatMap:
    """The map of one text, read through one or several lenses; of a batch that of its first text.

    Args:
        readings: Of the same tokens with the same targets, a lens each.
        title: Of the page; by default the text's last tokens.
        target_is: What the target is, in words.
        every: One layer of so many is shown, counted from the output.
        segments: What belongs together, such as documents.
        facts: That stand under the map.

    Raises:
        InputError: A reading of one layer, or of states that have more than one axis of positions.
    """
    first = readings[0]
    if first.layer is not None or first.argmax.dim() not in (2, 3):
        raise InputError(
            f"reading: expected all layers of one text or several, got shape {list(first.shape)}; read a text again"
        )
    lenses = [_lens_map(reading) for reading in readings]
    n = lenses[0].argmax.shape[1]
    tokens, start = list(range(n)), 0
    texts: dict[int, str] = {}
    targets = None if first.targets is None else first.targets.cpu().expand(first.shape[1:])
    if targets is not None:
        targets = (targets[0] if targets.dim() == 2 else targets).tolist()
    ids = {int(id) for lens in lenses for id in np.unique(lens.argmax)} | set(targets or ())
    ids |= {int(id) for lens in lenses if lens.top_ids is not None for id in np.unique(lens.top_ids)}
    if first.tokens is not None:
        places = first.tokens.positions[0]
        tokens = first.tokens.input_ids[0, places].tolist()
        start = int(places[0]) if n else 0
        ids |= set(tokens)
        texts = {id: first.text(id) for id in ids}
    else:  # states of one's own: a column has no token, but for its number
        texts = {id: first.text(id) for id in ids}
        tokens = [-1 - place for place in range(n)]
        texts |= {-1 - place: str(place) for place in range(n)}
    words = title or "".join(texts[token] for token in tokens[-12:]).strip()
    return HeatMap(
        words, tokens, texts, lenses, first.vocab_size, start, targets, target_is, every, list(segments), facts or {}
    )


def _lens_map(reading: LayerReading) -> LensMap:
    """Numbers of the first text, on the CPU."""

    def numbers(value: Tensor | None) -> np.ndarray | None:
        if value is None:
            return None
        return (value[:, 0] if reading.argmax.dim() == 3 else value).cpu().numpy()

    names = ("argmax", "max_logprob", "entropy", "kl", "rank", "logprob", "top_ids")
    values = {name: numbers(getattr(reading, name)) for name in names}
    return LensMap(reading.lens, **values, top_logprobs=numbers(reading.top_logprobs))  # type: ignore[arg-type]


def words_of_target(target: str, text: Callable[[int], str], target_id: int | None) -> str:
    """What a target is, for a reader: the model's own prediction, the text's next token, or a token by name."""
    if target == PREDICTION:
        return "the model's own prediction"
    if target == NEXT:
        return "the token that follows"
    return repr(text(target_id)) if target_id is not None else target
