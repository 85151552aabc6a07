"""A heat map as a figure, for a paper."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .heatmap import HeatMap, visible

if TYPE_CHECKING:  # half a second to import
    from matplotlib.figure import Figure

INKS = {  # of tokens
    "gold": "#9a6200",
    "decoy": "#a0303c",
    "document": "#0057b8",
    "answer": "#0057b8",
    "generated": "#6a3d9a",
}
SHOWN_TEXT = 9  # characters of a token
MEASURES = {
    "probability": "probability of the best token",
    "rank": "rank of the target (1 is best)",
    "entropy": "entropy (nats)",
    "kl": "KL(final || layer) (nats)",
}


def draw_heatmap(map: HeatMap, measure: str = "probability", tokens: int = 24) -> Figure:
    """The last tokens of a map, a panel a lens: best tokens by name, coloured by a measure, output on top.

    Args:
        map: What is drawn.
        measure: One of `MEASURES` that the map has.
        tokens: How many columns at most, the last ones.

    Raises:
        InputError: Another measure, or one that was not read.
    """
    first = map.lenses[0]
    has = {name for name in MEASURES if name == "probability" or getattr(first, name) is not None}
    if measure not in has:
        raise InputError(f"measure: expected one of {', '.join(m for m in MEASURES if m in has)}, got {measure!r}")
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    map = map.last(tokens)
    layers, n = map.layers, len(map.tokens)
    height, width = 0.24 * len(layers) + 1.3, 0.78 * n + 1.8
    figure = Figure(figsize=(width, height * len(map.lenses)), layout="constrained")
    panels = figure.subplots(len(map.lenses), 1, squeeze=False)[:, 0]
    for panel, lens in zip(panels, map.lenses, strict=True):
        values = {"probability": np.exp(lens.max_logprob), "entropy": lens.entropy, "kl": lens.kl, "rank": lens.rank}
        shown = np.asarray(values[measure], float)[layers]
        options: dict[str, Any] = {"cmap": "cividis_r" if measure != "probability" else "cividis"}
        if measure == "probability":
            options |= {"vmin": 0.0, "vmax": 1.0}
        if measure == "rank":
            shown, options = shown + 1, options | {"norm": LogNorm(1, max(2, map.vocab_size))}
        image = panel.imshow(shown, origin="lower", aspect="auto", **options)
        found = lens.trajectory
        for row, layer in enumerate(layers):
            for place in range(n):
                red, green, blue, _ = image.cmap(image.norm(shown[row, place]))
                ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
                weight = "bold" if layer == found.settle[place] else "normal"
                text = _short(map.texts[int(lens.argmax[layer, place])])
                style = {"ha": "center", "va": "center", "size": 7, "color": ink, "weight": weight, "parse_math": False}
                panel.text(place, row, text, **style)
        panel.axhline(len(layers) - 1.5, color="white", lw=2.5)
        names = [_short(map.texts[id]) for id in map.tokens]
        panel.set_xticks(range(n), names, rotation=45, ha="right", size=8, parse_math=False)
        inks = {place: INKS[s.kind] for s in map.segments if s.kind in INKS for place in range(s.start, s.end)}
        for place, label in enumerate(panel.get_xticklabels()):
            label.set_color(inks.get(place, "black"))
        panel.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        panel.set(ylabel="layer")
        title = panel.set_title(f"{map.title} ({lens.name} lens)" if len(map.lenses) > 1 else map.title, size=9)
        title.set_parse_math(False)
        figure.colorbar(image, ax=panel, label=MEASURES[measure], fraction=0.03, pad=0.01)
    return figure


def _short(text: str) -> str:
    shown = visible(text)
    return shown if len(shown) <= SHOWN_TEXT else shown[: SHOWN_TEXT - 1] + "…"
