"""The figures of a run: accuracy and depth by gold position, and what each lens sees by layer."""

from __future__ import annotations

import math
import textwrap

from ..config import CLOSED_BOOK, ORACLE, condition_name
from ..stats import FEW_QUESTIONS
from ..store.files import write_whole
from ..store.results import Run
from .findings import Report, counted, title
from .summary import LayerProfile, SummaryRow, caution_lines

# Distinct to colour-blind readers on white (Okabe and Ito 2008); markers tell the lines apart without colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
LEVELS = {CLOSED_BOOK: {"color": "0.6", "ls": "--"}, ORACLE: {"color": "0.3", "ls": "--"}}
MARGIN = 0.02  # of an axis, so that markers at its end are whole
LEGEND_WIDTH = 1.4  # inches
CHARACTERS_PER_INCH = 17  # of 8 point text


def draw_figures(run: Run, report: Report, profiles: list[LayerProfile]) -> None:
    """Write ``accuracy.png``, ``depth.png`` and ``layers.png``."""
    import matplotlib

    matplotlib.use("agg")
    _draw_accuracy(run, report)
    _draw_depth(run, report)
    _draw_layers(run, report, profiles)


def _draw_accuracy(run: Run, report: Report) -> None:
    """A panel per way to score; accuracy is the model's own: the same under every lens and threshold."""
    scores = {"accuracy": "first answer token", "accuracy_all": "every answer token"}
    if report.has_generations:
        scores["accuracy_generated"] = "generated answer"
    figure, panels = _figure(len(scores))
    for axes, (name, words) in zip(panels, scores.items(), strict=True):
        _plot_sizes(axes, _reading(report, report.lenses[0]), name)
        axes.set_title(words, fontsize=10)
    panels[0].set_ylim(-MARGIN, 1 + MARGIN)
    panels[0].set_ylabel("accuracy")
    _add_legend(figure, panels)
    figure.suptitle(_title(report), fontsize=10, parse_math=False)
    _save(run, figure, "accuracy.png")


def _draw_depth(run: Run, report: Report) -> None:
    """One panel per lens at the first threshold, on one scale."""
    cautions = [c for c in report.cautions if c.top == report.tops[0]]
    figure, panels = _figure(len(report.lenses), caution_lines(cautions, report.manifest))
    for axes, lens in zip(panels, report.lenses, strict=True):
        _plot_sizes(axes, _reading(report, lens), "mean_depth")
        if len(report.lenses) > 1:
            axes.set_title(lens, fontsize=10, parse_math=False)
    top = max(1.0, 1.04 * panels[0].get_ylim()[1])
    panels[0].set_ylim(-MARGIN * top, top)
    panels[0].set_ylabel("mean refinement depth (layers)")
    _add_legend(figure, panels)
    others = f" (first of {', '.join(map(str, report.tops))})" if len(report.tops) > 1 else ""
    figure.suptitle(f"{_title(report)}, rank <= {report.tops[0]}{others}", fontsize=10, parse_math=False)
    _save(run, figure, "depth.png")


def _draw_layers(run: Run, report: Report, profiles: list[LayerProfile]) -> None:
    """Rank of the target and KL(final || layer) over the layers, one line per lens."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    figure, (ranks, kl) = _figure(2, share=False)
    for index, profile in enumerate(profiles):
        lower, median, upper = profile.rank_quartiles + 1
        style, layers = _style(index, 3), range(len(median))
        ranks.plot(layers, median, **style)
        ranks.fill_between(layers, lower, upper, color=style["color"], alpha=0.15, lw=0)
        kl.plot(layers, profile.mean_kl, label=f"lens: {profile.lens}", **style)
    ranks.set_yscale("log")
    ranks.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ranks.set_ylabel("rank of the target (1 is best)")
    kl.set_ylabel("KL(final || layer)\n(mean nats; axis linear below 1)")
    kl.set_yscale("symlog", linthresh=1.0)  # 0 at the output, and perhaps a hundred at the embedding
    kl.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    kl.set_ylim(bottom=0)
    for axes, shaded in ((ranks, "; line: median, shaded: quartiles"), (kl, "")):
        axes.set_xlabel(f"layer{shaded}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    for text in kl.legend(frameon=False).get_texts():
        text.set_parse_math(False)
    examples = max((profile.examples for profile in profiles), default=0)
    token = {"first": "first answer token", "all": "answer token"}[report.manifest["arguments"]["answer_tokens"]]
    figure.suptitle(f"{_title(report)}, {counted(examples, token)}", fontsize=10, parse_math=False)
    _save(run, figure, "layers.png")


def _figure(panels: int, under: list[str] = (), share: bool = True):
    """A figure with panels side by side and, if wanted, lines of text under them."""
    from matplotlib import pyplot as plt

    width = 6.4 if panels == 1 else 4.4 * panels
    text = "\n".join(textwrap.fill(line, int(width * CHARACTERS_PER_INCH)) for line in under)
    height = 4.0 + 0.16 * (text.count("\n") + bool(text))
    figure, axes = plt.subplots(1, panels, figsize=(width, height), layout="constrained", sharey=share, squeeze=False)
    if text:
        figure.supxlabel(text, fontsize=8, x=0.01, ha="left", parse_math=False)
    for panel in axes[0]:
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(axes[0])


def _plot_sizes(axes, rows: list[SummaryRow], name: str) -> None:
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


def _add_legend(figure, panels: list) -> None:
    """One for all panels, whose lines mean the same, beside them, where it hides none."""
    labelled = {}
    for axes in panels:
        labelled |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    if labelled:
        figure.set_figwidth(figure.get_figwidth() + LEGEND_WIDTH)
        figure.legend(labelled.values(), labelled.keys(), loc="outside right center", frameon=False)


def _style(index: int, size: float) -> dict:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": size}


def _reading(report: Report, lens: str) -> list[SummaryRow]:
    return [row for row in report.rows if (row.lens, row.top) == (lens, report.tops[0])]


def _title(report: Report) -> str:
    return f"{title(report.manifest)}, {counted(max((row.n for row in report.rows), default=0), 'question')}"


def _save(run: Run, figure, file: str) -> None:
    from matplotlib import pyplot as plt

    write_whole(run.path / file, lambda path: figure.savefig(path, dpi=150, format="png"))
    plt.close(figure)
