"""``layers.png``: what each layer gains under the lens, above what the answer loses without it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from ..conditions import NO_POSITION, condition_name
from ..durable import write_whole
from ..figures import COLOURS, MARKERS
from ..table import title
from .agreement import COST, GAIN
from .report import LayersReport
from .statistics import LENS, LayerStatistic

WORDS = {
    LENS: "gain under\nthe {lens} lens",
    "skip": "block skipped",
    "mean": "block replaced\nby its mean",
    "attn": "attention\nsilenced",
    "mlp": "MLP\nsilenced",
}
LINEAR_TO = 1.0  # nats; beyond, the axis is logarithmic


def draw_layers(path: Path, report: LayersReport) -> None:
    """Draw a row of panels per intervention under one of the lens, a column per context size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [(LENS, GAIN), *((name, COST) for name in report.ablations)]
    sizes = sorted({row.documents for row in report.statistics})
    figure, panels = plt.subplots(
        *(len(rows), len(sizes)),
        figsize=(max(6.8, 5.0 * len(sizes)), 0.9 + 1.45 * len(rows)),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for of_row, (name, statistic) in zip(panels, rows, strict=True):
        for axes, documents in zip(of_row, sizes, strict=True):
            chosen = [r for r in report.statistics if (r.of, r.documents, r.statistic) == (name, documents, statistic)]
            _draw(axes, [row for row in chosen if row.layer > 0])
        _scale(of_row)
        of_row[0].set_ylabel(WORDS[name].format(lens=report.manifest["lens"]), fontsize=8, parse_math=False)
    _finish(figure, panels, sizes, report)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=200, format="png"))
    plt.close(figure)


def _draw(axes, rows: list[LayerStatistic]) -> None:
    """A line per gold position, behind them a bar per layer: the interval of all of them together."""
    positions = sorted({row.gold_position for row in rows if row.gold_position is not None})
    whole = [row for row in rows if row.gold_position is None]
    layers = [row.layer for row in whole]
    low, high = (np.array([getattr(row.value, end) for row in whole]) for end in ("low", "high"))
    axes.bar(layers, high - low, bottom=low, width=0.8, color="0.85", lw=0, label="all positions, 95 % interval")
    for index, position in enumerate(positions):
        values = [row.value.value for row in rows if row.gold_position == position]
        label = "closed-book" if position == NO_POSITION else f"gold position {position}"
        axes.plot(layers, values, lw=1, ms=2.5, label=label, **_style(index, len(positions)))
    axes.axhline(0.0, color="0.4", lw=0.6)
    axes.tick_params(labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _scale(of_row) -> None:
    """Linear near 0 and logarithmic beyond, where one layer costs a hundred times as much as another."""
    from matplotlib.ticker import SymmetricalLogLocator

    largest = max(abs(limit) for limit in of_row[0].get_ylim())
    for axes in of_row if largest > 4 * LINEAR_TO else ():
        axes.set_yscale("symlog", linthresh=LINEAR_TO)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR_TO, subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()


def _style(index: int, count: int) -> dict:
    """Colours of their own for a few lines, a scale for many."""
    if count <= len(COLOURS):
        return {"color": COLOURS[index], "marker": MARKERS[index]}
    import matplotlib

    return {"color": matplotlib.colormaps["viridis"](index / (count - 1)), "marker": MARKERS[index % len(MARKERS)]}


def _finish(figure, panels, sizes: list[int], report: LayersReport) -> None:
    from matplotlib.ticker import MultipleLocator

    step = next(step for step in (1, 2, 5, 10, 20, 50) if report.n_layers / step <= 32)
    for axes in panels[-1]:
        axes.xaxis.set_major_locator(MultipleLocator(step))
        axes.set_xlim(0.5, report.n_layers + 0.5)
        axes.set_xlabel("layer", fontsize=8)
    for axes, documents in zip(panels[0], sizes, strict=True):
        axes.set_title(condition_name(documents), fontsize=8)
    handles, labels = panels[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, ncols=min(len(labels), 6), loc="outside lower center")
    figure.supylabel("nats of target log-probability", fontsize=8)
    at = {"all": "at every token", "answer": "at the token before the answer"}[report.manifest["arguments"]["at"]]
    questions = max((row.questions for row in report.statistics), default=0)
    struck = f"; below, mean cost of an intervention {at}" if report.ablations else ""
    words = f"{title(report.run)}, {questions} questions: above, mean gain of each layer{struck}"
    figure.suptitle("\n".join(textwrap.wrap(words, 100)), fontsize=8, parse_math=False)
