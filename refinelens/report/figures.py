"""Every figure, of a run, of an analysis of layers, of the quality of a fit.

A figure is an object of its own, without pyplot: neither the backend of whoever calls nor the settings are touched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..placement import CLOSED_BOOK, NO_POSITION, ORACLE, condition_name
from ..stats import FEW_QUESTIONS
from ..store.files import write_whole
from ..store.layers import DESTROY, RESTORE
from ..store.results import Run
from .rows import (
    COST,
    EVERY_POSITION,
    GAIN,
    LENS,
    LayerProfile,
    LayersReport,
    LayerStatistic,
    Report,
    SummaryRow,
    counted,
    layer_curves,
    title,
)
from .summary import caution_lines

if TYPE_CHECKING:  # half a second to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct to colour-blind readers on white (Okabe and Ito 2008); markers tell the lines apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
LEVELS = {CLOSED_BOOK: {"color": "0.6", "ls": "--"}, ORACLE: {"color": "0.3", "ls": "--"}}
MARGIN = 0.02  # of an axis, so that markers at its end are whole
LEGEND_WIDTH = 1.4  # inches
CHARACTERS_PER_INCH = 17  # of 8 point text
KL_LABEL = "KL(final || layer)\n(mean nats; axis linear below 1)"
QUALITY_FIGURE = "quality.png"
PANELS = {  # of an analysis of layers, a row each
    LENS: "gain, {lens} lens\n({unit})",
    "skip": "block skipped\n({unit})",
    "mean": "block replaced by its\nmean ({unit})",
    "attn": "attention zero-ablated\n({unit})",
    "mlp": "MLP zero-ablated\n({unit})",
}
PATCHES = {
    RESTORE: "failing runs, given the state of a right one",
    DESTROY: "right runs, given the state of a failing one",
}
LINEAR_TO = 1.0  # nats; beyond, an axis is logarithmic


def draw_figures(run: Run, report: Report, profiles: list[LayerProfile]) -> None:
    """Write ``accuracy.png``, ``depth.png`` and ``layers.png`` of a run."""
    _save(run.path / "accuracy.png", accuracy_figure(report))
    _save(run.path / "depth.png", depth_figure(report))
    _save(run.path / "layers.png", profiles_figure(report, profiles))


def draw_layers(path: Path, report: LayersReport) -> None:
    """Write the figure of an analysis of layers."""
    _save(path, layers_figure(report), dpi=200)


def draw_quality(folder: Path, manifest: dict) -> None:
    """Write ``quality.png`` of a fit."""
    _save(folder / QUALITY_FIGURE, quality_figure(manifest))


def accuracy_figure(report: Report) -> Figure:
    """A panel per way to score; accuracy is the model's own: the same under every lens and threshold."""
    scores = {"accuracy": "first answer token", "accuracy_all": "every answer token"}
    if report.has_generations:
        scores["accuracy_generated"] = "generated answer"
    figure, panels = _run_figure(len(scores))
    for axes, (name, words) in zip(panels, scores.items(), strict=True):
        _plot_sizes(axes, _reading(report, report.lenses[0]), name)
        axes.set_title(words, fontsize=10)
    panels[0].set_ylim(-MARGIN, 1 + MARGIN)
    panels[0].set_ylabel("accuracy")
    _add_legend(figure, panels)
    figure.suptitle(_run_title(report), fontsize=10, parse_math=False)
    return figure


def depth_figure(report: Report) -> Figure:
    """Depth by gold position: one panel per lens at the first threshold, on one scale."""
    cautions = {reading: counts for reading, counts in report.cautions.items() if reading[1] == report.tops[0]}
    figure, panels = _run_figure(len(report.lenses), caution_lines(cautions, report.manifest))
    for axes, lens in zip(panels, report.lenses, strict=True):
        _plot_sizes(axes, _reading(report, lens), "mean_depth")
        if len(report.lenses) > 1:
            axes.set_title(lens, fontsize=10, parse_math=False)
    top = max(1.0, 1.04 * panels[0].get_ylim()[1])
    panels[0].set_ylim(-MARGIN * top, top)
    panels[0].set_ylabel("mean refinement depth (layers)")
    _add_legend(figure, panels)
    others = f" (first of {', '.join(map(str, report.tops))})" if len(report.tops) > 1 else ""
    figure.suptitle(f"{_run_title(report)}, rank <= {report.tops[0]}{others}", fontsize=10, parse_math=False)
    return figure


def profiles_figure(report: Report, profiles: list[LayerProfile]) -> Figure:
    """Rank of the target and KL(final || layer) over the layers, one line per lens."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure, (ranks, kl) = _run_figure(2, share=False)
    for index, profile in enumerate(profiles):
        lower, median, upper = profile.rank_quartiles + 1
        style, layers = _style(index, 3), range(len(median))
        ranks.plot(layers, median, **style)
        ranks.fill_between(layers, lower, upper, color=style["color"], alpha=0.15, lw=0)
        kl.plot(layers, profile.mean_kl, label=f"lens: {profile.lens}", **style)
    ranks.set_yscale("log")
    ranks.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ranks.set_ylabel("rank of the target (1 is best)")
    kl.set_ylabel(KL_LABEL)
    _scale_kl(kl)
    for axes, shaded in ((ranks, "; line: median, shaded: quartiles"), (kl, "")):
        axes.set_xlabel(f"layer{shaded}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for text in kl.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    examples = max((profile.examples for profile in profiles), default=0)
    token = {"first": "first answer token", "all": "answer token"}[report.manifest["arguments"]["answer_tokens"]]
    figure.suptitle(f"{_run_title(report)}, {counted(examples, token)}", fontsize=10, parse_math=False)
    return figure


def quality_figure(manifest: dict) -> Figure:
    """KL(final || layer) and top-1 agreement of a fit over the layers, one line per lens."""
    figure, (panels,) = _new_figure(8.0, 3.6, 1, 2)
    labels = {"kl": KL_LABEL, "top1": "same argmax as the model (share)"}
    for axes, (measure, label) in zip(panels, labels.items(), strict=True):
        for lens, quality in manifest["quality"].items():
            axes.plot(quality[measure], marker=".", label=lens)
        axes.set(xlabel="layer (0: embedding; last: output)", ylabel=label)
    _scale_kl(panels[0])
    panels[0].legend(frameon=False)
    panels[1].set_ylim(0, 1.02)
    model, text = (Path(manifest[what]["name"]).name for what in ("model", "text"))
    tokens = counted(manifest["tokens"]["report"], "held-out token")
    figure.suptitle(f"{model}: {tokens} of the text {text}", fontsize=10, parse_math=False)
    return figure


def _run_figure(panels: int, under: Sequence[str] = (), share: bool = True) -> tuple[Figure, Sequence[Axes]]:
    """A figure with panels side by side and, if wanted, lines of text under them."""
    width = 6.4 if panels == 1 else 4.4 * panels
    text = "\n".join(textwrap.fill(line, int(width * CHARACTERS_PER_INCH)) for line in under)
    height = 4.0 + 0.16 * (text.count("\n") + bool(text))
    figure, (axes,) = _new_figure(width, height, 1, panels, sharey=share)
    if text:
        figure.supxlabel(text, fontsize=8, x=0.01, ha="left", parse_math=False)
    return figure, axes


def _new_figure(width: float, height: float, rows: int, columns: int, grid: str = "both", **shared):
    """A figure of so many inches and its panels ``[rows, columns]``; ``grid`` and ``shared`` name axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, **shared)
    for axes in panels.flat:
        axes.grid(axis=grid, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _scale_kl(axes: Axes) -> None:
    """0 at the output, and perhaps a hundred at the embedding."""
    axes.set_yscale("symlog", linthresh=LINEAR_TO)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(bottom=0)


def _plot_sizes(axes: Axes, rows: list[SummaryRow], name: str) -> None:
    """One line per context size by gold position, intervals as bars; closed-book and oracle as shaded levels."""
    from matplotlib.ticker import MaxNLocator

    for row in rows:
        estimate = getattr(row, name)
        if row.documents <= ORACLE and not math.isnan(estimate.value):
            axes.axhline(estimate.value, label=condition_name(row.documents), **LEVELS[row.documents])
            axes.axhspan(estimate.low, estimate.high, color=LEVELS[row.documents]["color"], alpha=0.08, lw=0)
    rows = [row for row in rows if row.documents > ORACLE]
    for index, size in enumerate(sorted({row.documents for row in rows})):
        line = [row for row in rows if row.documents == size and not math.isnan(getattr(row, name).value)]
        if not line:
            continue
        estimates, x = [getattr(row, name) for row in line], [row.gold_position for row in line]
        style = _style(index, max(4, 8 - 2 * index))  # of equal points the lower one stays visible
        axes.plot(x, [e.value for e in estimates], label=condition_name(size), **style)
        if name == "mean_depth":
            few = [i for i, row in enumerate(line) if row.settled_questions < FEW_QUESTIONS]
            axes.plot([x[i] for i in few], [estimates[i].value for i in few], **style | {"ls": "", "mfc": "white"})
        # Not joined: where a position has no interval, nothing is to be seen between its neighbours.
        low, high = [e.low for e in estimates], [e.high for e in estimates]
        axes.vlines(x, low, high, color=style["color"], alpha=0.25, lw=style["markersize"], zorder=1)
    asked = [row.gold_position for row in rows] or [0]
    axes.set_xlim(min(asked) - 0.3, max(asked) + 0.3)
    if not axes.lines:
        axes.text(0.5, 0.5, "no example settles", ha="center", transform=axes.transAxes)
    hollow = f"\nhollow: examples of fewer than {FEW_QUESTIONS} questions settle" if name == "mean_depth" else ""
    axes.set_xlabel(f"gold position (0-based); bars: 95 % intervals{hollow}", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """One for all panels, whose lines mean the same, beside them, where it hides none."""
    labelled = _handles(panels)
    if labelled:
        figure.set_figwidth(figure.get_figwidth() + LEGEND_WIDTH)
        figure.legend(labelled.values(), labelled.keys(), loc="outside right center", frameon=False)


def _handles(panels: Sequence[Axes]) -> dict:
    """What a legend of all panels shows, by label."""
    return {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}


def _style(index: int, size: float) -> dict:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": size}


def _reading(report: Report, lens: str) -> list[SummaryRow]:
    return [row for row in report.rows if (row.lens, row.top) == (lens, report.tops[0])]


def _run_title(report: Report) -> str:
    return f"{title(report.manifest)}, {counted(max((row.n for row in report.rows), default=0), 'question')}"


def layers_figure(report: LayersReport) -> Figure:
    """A row of panels per intervention under one of the lens, a column per context size."""
    rows = [(LENS, GAIN), *((name, COST) for name in report.ablations)]
    has_patches = any(row.of in PATCHES for row in report.statistics)
    sizes = sorted({row.documents for row in report.statistics})
    styles = _styles({row.gold_position for row in report.statistics} - {EVERY_POSITION})
    n = len(rows) + has_patches
    width, height = max(6.8, 5.0 * len(sizes)), 0.9 + 1.45 * n
    figure, panels = _new_figure(width, height, n, len(sizes), grid="x", sharex=True, sharey="row")
    for axes in panels.flat:
        axes.tick_params(labelsize=7)
    for of_row, (name, statistic) in zip(panels, rows, strict=False):
        for axes, documents in zip(of_row, sizes, strict=True):
            _plot_positions(axes, _curves(report, name, documents, statistic), styles)
        unit = "nats; log beyond 1" if _scale(of_row) else "nats"
        words = PANELS[name].format(lens=report.manifest["lens"], unit=unit)
        of_row[0].set_ylabel(words, fontsize=8, parse_math=False)
    for axes, documents in zip(panels[-1], sizes, strict=True) if has_patches else ():
        _plot_patches(axes, {name: _curves(report, name, documents, "accuracy") for name in PATCHES})
    _finish(figure, panels, sizes, report)
    return figure


def _curves(report: LayersReport, of: str, documents: int, statistic: str) -> dict[int | None, list[LayerStatistic]]:
    """One statistic over layers ``1 .. n_layers`` by gold position; layer 0 has no block."""
    wanted = (of, documents, statistic)
    rows = [r for r in report.statistics if (r.of, r.documents, r.statistic) == wanted and r.layer > 0]
    return {position: curve for (_, _, position, _), curve in layer_curves(rows).items()}


def _plot_patches(axes: Axes, curves: dict[str, dict[int | None, list[LayerStatistic]]]) -> None:
    """Share of answers that are correct once a state is patched over, all pairs of gold positions together."""
    for (name, of_patch), line in zip(curves.items(), ("-", "--"), strict=True):
        whole = of_patch.get(EVERY_POSITION, [])
        layers, values = [row.layer for row in whole], [row.value for row in whole]
        if whole:
            axes.plot(layers, [value.value for value in values], color="k", ls=line, lw=1, label=PATCHES[name])
            axes.fill_between(layers, [v.low for v in values], [v.high for v in values], color="k", alpha=0.08, lw=0)
    axes.set_ylim(-0.05, 1.05)
    axes.set_ylabel("share correct\nonce patched", fontsize=8)
    if axes.lines:
        axes.legend(fontsize=7, frameon=False, loc="center left")
    else:
        axes.text(0.5, 0.5, "no question both answered and failed", fontsize=7, ha="center", transform=axes.transAxes)


def _plot_positions(axes: Axes, curves: dict[int | None, list[LayerStatistic]], styles: dict[int, dict]) -> None:
    """A line per gold position, behind them a bar per layer: the interval of all of them together."""
    axes.use_sticky_edges = False  # a narrow bar would end the axis, in the middle of the markers on it
    whole = curves.pop(EVERY_POSITION, [])
    layers = [row.layer for row in whole]
    low, high = (np.array([getattr(row.value, end) for row in whole]) for end in ("low", "high"))
    axes.bar(layers, high - low, bottom=low, width=0.8, color="0.85", lw=0, label="all positions, 95 % interval")
    for position, curve in sorted(curves.items()):
        label = "closed-book" if position == NO_POSITION else f"gold position {position}"
        axes.plot(layers, [row.value.value for row in curve], lw=1, ms=2.5, label=label, **styles[position])
    axes.axhline(0.0, color="0.4", lw=0.6)


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
    handles = _handles(panels[0])
    options = {"fontsize": 7, "frameon": False, "ncols": min(len(handles), 4), "loc": "outside lower center"}
    figure.legend(handles.values(), handles.keys(), **options)
    at = {"all": "at every token", "answer": "at the token before the answer"}[report.manifest["arguments"]["at"]]
    questions = max((row.questions for row in report.statistics), default=0)
    struck = f"; below, its mean loss by an intervention {at}" if report.ablations else ""
    subject = f"{title(report.run)}, {counted(questions, 'question')}"
    words = f"{subject}: mean gain of target log-probability by layer{struck}"
    figure.suptitle("\n".join(textwrap.wrap(words, 100)), fontsize=8, parse_math=False)


def _save(path: Path, figure: Figure, dpi: int = 150) -> None:
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))
