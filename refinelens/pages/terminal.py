"""A heat map in a terminal: layers upwards, the output on top, as many tokens side by side as fit."""

from __future__ import annotations

import math
from itertools import groupby

from rich.console import Console
from rich.text import Text

from .heatmap import HeatMap, LensMap, visible

CELL = 10  # characters of a token
SHADES = ("grey15", "grey27", "dark_blue", "blue3", "dodger_blue2", "deep_sky_blue1")  # of a share from 0 to 1
SHOWN = {"probability": "probability of the best token", "rank": "rank of the target"}


def print_heatmap(console: Console, map: HeatMap, measure: str = "probability") -> None:
    """Print the map of every lens: the best token of each cell, coloured by a measure.

    Args:
        console: Where to; of its width as many columns are used as fit, further ones stand in tables below.
        map: What is printed.
        measure: That cells are coloured by, ``probability`` or ``rank``.
    """
    n_columns = max(1, (console.width - 7) // (CELL + 1))
    for lens in map.lenses:
        _say(console, visible(map.title))
        _say(console, f"{lens.name} lens; colour: {SHOWN[measure]}\n", "dim")
        for start in range(0, len(map.tokens), n_columns):
            places = list(range(start, min(start + n_columns, len(map.tokens))))
            for line in _table(map, lens, places, measure):
                console.print(line, soft_wrap=True, highlight=False)
            console.print()
        for line in _notes(map, lens):
            _say(console, line, "dim")
    for name, fact in map.facts.items():
        if name.startswith("lens "):  # what could not be checked of it, where it has no map
            _say(console, f"{name}: {fact}", "dim")


def _table(map: HeatMap, lens: LensMap, places: list[int], measure: str) -> list[Text]:
    found, lines = lens.trajectory, []
    if map.targets is not None:
        lines.append(_line("target", [_cell(map.texts[map.targets[place]]) for place in places], "dim"))
    for layer in reversed(map.layers):
        name = "output" if layer == map.n_layers else f"{layer:>6}"
        line = Text(f"{name} ", style="bold" if layer == map.n_layers else "dim")
        for place in places:
            share = _share(map, lens, layer, place, measure)
            mark = "*" if layer == found.settle[place] else "+" if layer == found.first_correct[place] else " "
            ink = "black" if share > 0.7 else "white"
            line.append(_cell(map.texts[int(lens.argmax[layer, place])], CELL - 1), f"{ink} on {_shade(share)}")
            line.append(mark, f"bold {ink} on {_shade(share)}")
            line.append(" ")
        lines.append(line)
        if layer == map.n_layers:
            lines.append(_line("", ["─" * CELL for _ in places], "dim"))
    lines.append(_line("token", [_cell(map.texts[map.tokens[place]]) for place in places], "bold"))
    if map.segments:
        names = {place: segment.label for segment in map.segments for place in range(segment.start, segment.end)}
        owners = groupby(names.get(place, "") for place in places)
        widths = [(name, len(list(own)) * (CELL + 1) - 1) for name, own in owners]
        if any(name for name, _ in widths):
            lines.append(_line("in", [_cell(name, width) if name else " " * width for name, width in widths], "dim"))
    return lines


def _line(name: str, cells: list[str], style: str) -> Text:
    return Text(f"{name:>6} " + " ".join(cells), style=style)


def _cell(text: str, width: int = CELL) -> str:
    shown = visible(text)
    shown = shown if Text(shown).cell_len <= width else shown[: width - 1] + "…"
    while Text(shown).cell_len > width:  # of characters that are two columns wide
        shown = shown[:-2] + "…"
    return shown + " " * (width - Text(shown).cell_len)


def _share(map: HeatMap, lens: LensMap, layer: int, place: int, measure: str) -> float:
    """How strongly a cell is coloured, 0 to 1."""
    if measure == "probability":
        return math.exp(min(0.0, float(lens.max_logprob[layer, place])))
    return 1 - math.log(int(lens.rank[layer, place]) + 1) / math.log(max(2, map.vocab_size))


def _shade(share: float) -> str:
    return SHADES[min(len(SHADES) - 1, int(share * len(SHADES)))]


def _notes(map: HeatMap, lens: LensMap) -> list[str]:
    aim = f"the target ({map.target_is})" if map.targets is not None else "the output's own token"
    lines = [f"+ first layer whose best token is {aim}; * layer from which it stays so"]
    if lens.note:
        lines.append(lens.note)
    if lens.rank is not None:
        last = len(map.tokens) - 1
        steps = [layer for layer in map.layers if layer != map.n_layers]
        shown = steps[:: max(1, len(steps) // 6)] + [map.n_layers]
        ranks = ", ".join(f"{layer}: {int(lens.rank[layer, last]) + 1}" for layer in shown)
        lines.append(f"rank of {map.texts[map.targets[last]]!r} behind the last token, by layer: {ranks}")
    return lines


def _say(console: Console, line: str, style: str | None = None) -> None:
    console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
