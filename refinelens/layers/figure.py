"""``layers.png``: what each layer gains under the lens, above what the answer loses without it."""

from __future__ import annotations

import textwrap
from pathlib import Path

import numpy as np

from ..conditions import NO_POSITION, condition_name
from ..report.figures import COLOURS, MARKERS
from ..report.table import title
from ..report.words import counted
from ..runs.durable import write_whole
from ..runs.layers_schema import DESTROY, RESTORE
from .report import LayersReport
from .statistics import COST, EVERY_POSITION, GAIN, LENS, LayerStatistic

WORDS = {
    LENS: "gain, {lens} lens\n({unit})",
    "skip": "block skipped\n({unit})",
    "mean": "block replaced by its\nmean ({unit})",
    "attn": "attention silenced\n({unit})",
    "mlp": "MLP silenced\n({unit})",
}
PATCHES = {
    RESTORE: "failing runs, given the state of a right one",
    DESTROY: "right runs, given the state of a failing one",
}
LINEAR_TO = 1.0  # nats; beyond, the axis is logarithmic


def draw_layers(path: Path, report: LayersReport) -> None:
    """Draw a row of panels per intervention under one of the lens, a column per context size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rows = [(LENS, GAIN), *((name, COST) for name in report.ablations)]
    patches = [(name, "accuracy") for name in (RESTORE, DESTROY) if any(row.of == name for row in report.statistics)]
    sizes = sorted({row.documents for row in report.statistics})
    styles = _styles({row.gold_position for row in report.statistics} - {EVERY_POSITION})
    figure, panels = plt.subplots(
        *(len(rows) + bool(patches), len(sizes)),
        figsize=(max(6.8, 5.0 * len(sizes)), 0.9 + 1.45 * (len(rows) + bool(patches))),
        layout="constrained",
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for of_row, (name, statistic) in zip(panels, rows, strict=False):
        for axes, documents in zip(of_row, sizes, strict=True):
            _draw(axes, _chosen(report, name, documents, statistic), styles)
        unit = "nats; log beyond 1" if _scale(of_row) else "nats"
        words = WORDS[name].format(lens=report.manifest["lens"], unit=unit)
        of_row[0].set_ylabel(words, fontsize=8, parse_math=False)
    for axes, documents in zip(panels[-1], sizes, strict=True) if patches else ():
        _draw_patches(axes, [_chosen(report, name, documents, statistic) for name, statistic in patches])
    _finish(figure, panels, sizes, report)
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=200, format="png"))
    plt.close(figure)


def _chosen(report: LayersReport, of: str, documents: int, statistic: str) -> list[LayerStatistic]:
    """One statistic of layers ``1 .. n_layers``; layer 0 has no block."""
    wanted = (of, documents, statistic)
    return [r for r in report.statistics if (r.of, r.documents, r.statistic) == wanted and r.layer > 0]


def _draw_patches(axes, found: list[list[LayerStatistic]]) -> None:
    """Share of answers that are correct once a state is carried over, all pairs of gold positions together."""
    styles = ({"color": "k", "ls": "-"}, {"color": "k", "ls": "--"})
    for rows, style in zip(found, styles, strict=False):
        whole = [row for row in rows if row.gold_position is None]
        layers, values = [row.layer for row in whole], [row.value for row in whole]
        if whole:
            axes.plot(layers, [value.value for value in values], lw=1, label=PATCHES[whole[0].of], **style)
            axes.fill_between(layers, [v.low for v in values], [v.high for v in values], color="k", alpha=0.08, lw=0)
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("share correct\nonce patched", fontsize=8)
    if axes.lines:
        axes.legend(fontsize=7, frameon=False, loc="center left")
    else:
        axes.text(0.5, 0.5, "no question both answered and failed", fontsize=7, ha="center", transform=axes.transAxes)
    _tidy(axes)


def _tidy(axes) -> None:
    axes.tick_params(labelsize=7)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _draw(axes, rows: list[LayerStatistic], styles: dict[int, dict]) -> None:
    """A line per gold position, behind them a bar per layer: the interval of all of them together."""
    axes.use_sticky_edges = False  # a narrow bar would end the axis, in the middle of the markers on it
    positions = sorted({row.gold_position for row in rows if row.gold_position is not None})
    whole = [row for row in rows if row.gold_position is None]
    layers = [row.layer for row in whole]
    low, high = (np.array([getattr(row.value, end) for row in whole]) for end in ("low", "high"))
    axes.bar(layers, high - low, bottom=low, width=0.8, color="0.85", lw=0, label="all positions, 95 % interval")
    for position in positions:
        values = [row.value.value for row in rows if row.gold_position == position]
        label = "closed-book" if position == NO_POSITION else f"gold position {position}"
        axes.plot(layers, values, lw=1, ms=2.5, label=label, **styles[position])
    axes.axhline(0.0, color="0.4", lw=0.6)
    _tidy(axes)


def _scale(of_row) -> bool:
    """Linear near 0 and logarithmic beyond, where one layer costs a hundred times as much as another: whether so."""
    from matplotlib.ticker import SymmetricalLogLocator

    is_wide = max(abs(limit) for limit in of_row[0].get_ylim()) > 4 * LINEAR_TO
    for axes in of_row if is_wide else ():
        axes.set_yscale("symlog", linthresh=LINEAR_TO)
        axes.yaxis.set_major_locator(SymmetricalLogLocator(base=10, linthresh=LINEAR_TO, subs=(1, 3)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.autoscale_view()  # margins of the new scale
    return is_wide


def _styles(positions: set[int]) -> dict[int, dict]:
    """Of every gold position, the same in all panels: colours of their own for a few lines, a scale for many."""
    import matplotlib

    few, scale = len(positions) <= len(COLOURS), matplotlib.colormaps["viridis"].resampled(max(2, len(positions)))
    return {
        position: {"color": COLOURS[index] if few else scale(index), "marker": MARKERS[index % len(MARKERS)]}
        for index, position in enumerate(sorted(positions))
    }


def _finish(figure, panels, sizes: list[int], report: LayersReport) -> None:
    from matplotlib.ticker import MultipleLocator

    step = next(step for step in (1, 2, 5, 10, 20, 50) if report.n_layers / step <= 32)
    for axes in panels[-1]:
        axes.xaxis.set_major_locator(MultipleLocator(step))
        axes.set_xlim(0.5, report.n_layers + 0.5)
        axes.set_xlabel("layer", fontsize=8)
    for axes, documents in zip(panels[0], sizes, strict=True):
        axes.set_title(condition_name(documents), fontsize=8)
    handles = {}
    for axes in panels[0]:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    options = {"fontsize": 7, "frameon": False, "ncols": min(len(handles), 4), "loc": "outside lower center"}
    figure.legend(handles.values(), handles.keys(), **options)
    at = {"all": "at every token", "answer": "at the token before the answer"}[report.manifest["arguments"]["at"]]
    questions = max((row.questions for row in report.statistics), default=0)
    struck = f"; below, its mean loss by an intervention {at}" if report.ablations else ""
    subject = f"{title(report.run)}, {counted(questions, 'question')}"
    words = f"{subject}: mean gain of target log-probability by layer{struck}"
    figure.suptitle("\n".join(textwrap.wrap(words, 100)), fontsize=8, parse_math=False)
