"""What an analysis of layers says: summarised once, as a table with the lines under it, a figure and files."""

from __future__ import annotations

import math
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..config import NO_POSITION, ORACLE, PATCH, condition_name
from ..report.figures import COLOURS, MARKERS
from ..report.findings import counted, format_estimate, title
from ..report.tables import WIDTH, write_csv
from ..stats import FEW_QUESTIONS
from ..store.files import write_whole
from ..store.layers import CONTROL, DESTROY, FIGURE, LAYER_ROWS, RESTORE, ROWS, LayersFolder
from .examples import RunExamples
from .measures import (
    COLUMNS,
    COST,
    EVERY_POSITION,
    FEW_LAYERS,
    GAIN,
    KEPT,
    LENS,
    AblationResults,
    Agreement,
    EarlyExit,
    Essential,
    LayerStatistic,
    Patching,
    agreements,
    early_exits,
    essential_layers,
    essential_threshold,
    layer_statistics,
    measure_ablations,
    measure_lens,
    patchings,
)

SHOWN_PAIRS = 6
LENS_COLUMNS = {
    "first_correct_share": ("first", 2),
    "settle_share": ("settle", 2),
    GAIN: ("gain", 2),
    "log_rank_gain": ("ln rank", 2),
    "entropy_drop": ("entropy", 2),
    "exit_accuracy": ("exit", 2),
}
WORDS = {
    LENS: "gain, {lens} lens\n({unit})",
    "skip": "block skipped\n({unit})",
    "mean": "block replaced by its\nmean ({unit})",
    "attn": "attention zero_ablated\n({unit})",
    "mlp": "MLP zero_ablated\n({unit})",
}
PATCHES = {
    RESTORE: "failing runs, given the state of a right one",
    DESTROY: "right runs, given the state of a failing one",
}
LINEAR_TO = 1.0  # nats; beyond, the axis is logarithmic


@dataclass(frozen=True)
class LayersReport:
    """What table, figure and files of an analysis say."""

    manifest: dict  # of the analysis
    run: dict  # manifest of the run
    ablations: list[str]
    noise: float  # nats: the largest change by a control that changes nothing; 0 where nothing was intervened in
    largest_difference: float  # nats: of the clean log-probabilities here and in the run
    statistics: list[LayerStatistic]
    agreements: list[Agreement]
    essentials: list[Essential]
    exits: list[EarlyExit]
    patchings: list[Patching]

    @property
    def threshold(self) -> float:
        """Nats that the mean of an essential layer lies above for sure."""
        return essential_threshold(self.noise)

    @property
    def n_layers(self) -> int:
        """The layer of the output."""
        return self.run["model"]["n_layers"]


def read_report(folder: LayersFolder, manifest: dict, examples: RunExamples) -> LayersReport:
    """Summarise the questions that an analysis has.

    Args:
        folder: The analysis.
        manifest: Of the analysis.
        examples: Of the run.
    """
    parts = (table.select(COLUMNS) for table in folder.rows(manifest))
    rows = pa.concat_tables([LAYER_ROWS.empty_table().select(COLUMNS), *parts])
    if manifest["parts"]:
        examples = examples.of_questions([part["question_id"] for part in manifest["parts"]])
    seed, n_layers = examples.manifest["seed"], examples.n_layers
    ablations = [name for name in manifest["arguments"]["interventions"] if name != PATCH]
    scanned = {name: AblationResults.of(rows, name, n_layers) for name in (*ablations, CONTROL, RESTORE, DESTROY)}
    lens = measure_lens(examples)
    costs = [measure_ablations(scanned[name]) for name in ablations]
    patched = [measure_ablations(scanned[name]) for name in (RESTORE, DESTROY) if len(scanned[name])]
    statistics = [row for measured in (lens, *costs, *patched) for row in layer_statistics(measured, seed)]
    noise = float(np.abs(scanned[CONTROL]["logprob_change"]).max(initial=0.0))
    return LayersReport(
        manifest=manifest,
        run=examples.manifest,
        ablations=ablations,
        noise=noise,
        largest_difference=_difference([scanned[name] for name in ablations[:1]], examples),
        statistics=statistics,
        agreements=agreements(lens, costs, seed),
        essentials=essential_layers(lens, costs, essential_threshold(noise)),
        exits=early_exits(statistics),
        patchings=[row for name in (RESTORE, DESTROY) for row in patchings(scanned[name], seed)],
    )


def _difference(scanned: list[AblationResults], examples: RunExamples) -> float:
    """Largest difference of a clean log-probability at the output to what the run has."""
    stored = examples.by_key(examples.layers["target_logprob"][:, -1].astype(float))
    found = [0.0]
    for one in scanned:
        clean = (one["target_logprob"] - one["logprob_change"])[:, 0]
        keys = zip(one.question_id.tolist(), one.documents.tolist(), one.gold_position.tolist(), strict=True)
        found += [abs(value - stored[key]) for key, value in zip(keys, clean, strict=True)]
    return float(max(found))


def print_layers(console: Console, report: LayersReport) -> None:
    """Print a table per context size and, under it, what the interventions say of the lens."""
    console.width = max(console.width, WIDTH)  # a pipe reports 80
    for documents in sorted({row.documents for row in report.statistics}, key=lambda n: (n <= ORACLE, n)):
        rows = [row for row in report.statistics if row.documents == documents and row.gold_position is None]
        questions = max(row.questions for row in rows)
        size, lens = condition_name(documents), report.manifest["lens"]
        words = f"{title(report.run)}: {size}, {counted(questions, 'question')}, {lens} lens"
        console.print(f"{words}\n", highlight=False, markup=False)
        console.print(_table(report, rows, [row for row in report.essentials if row.documents == documents]))
        for line in _lines(report, documents):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        console.print()
    for line in _notes(report):
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def _table(report: LayersReport, rows: list[LayerStatistic], essentials: list[Essential]) -> Table:
    starred = {row.intervention: {*row.both, *row.intervention_only} for row in essentials}
    values = {(row.of, row.statistic, row.layer): row.value for row in rows}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    headings = ["layer", *(heading for heading, _ in LENS_COLUMNS.values()), *report.ablations]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in range(report.n_layers + 1):
        cells = []
        for statistic, (_, digits) in LENS_COLUMNS.items():
            value = values[LENS, statistic, layer]
            cells.append(format_estimate(value, digits, interval=statistic == GAIN))
        for name in report.ablations:
            value = values.get((name, COST, layer))
            star = "*" if layer in starred.get(name, ()) else " "
            cells.append("-" if value is None else f"{format_estimate(value, 2)}{star}")
        table.add_row(str(layer), *cells)
    return table


def _lines(report: LayersReport, documents: int) -> list[str]:
    lines = [_agreement_line(report, documents, name) for name in report.ablations if report.agreements]
    if report.ablations and not report.agreements:
        over = counted(report.n_layers, "layer")
        lines.append(f"Agreement: none over {over}; fewer than {FEW_LAYERS} agree by chance too often.")
    essentials = [row for row in report.essentials if row.documents == documents]
    if report.ablations and not essentials:
        lines.append(f"Essential: no verdict on fewer than {FEW_QUESTIONS} questions.")
    lines += [_essential_line(row) for row in essentials]
    exits = [row for row in report.exits if row.documents == documents]
    lines.append(_exit_line(exits, report.manifest["lens"]))
    patches = [row for row in report.patchings if row.documents == documents]
    if PATCH in report.manifest["arguments"]["interventions"] and not patches:
        lines.append("Patching: no question is answered at one gold position and not at another.")
    lines += [_patch_line([row for row in patches if row.intervention == name], name) for name in (RESTORE, DESTROY)]
    return [line for line in lines if line]


def _agreement_line(report: LayersReport, documents: int, name: str) -> str:
    chosen = {
        row.coefficient: row.value
        for row in report.agreements
        if (row.documents, row.gold_position, row.intervention, row.lens_statistic) == (documents, None, name, GAIN)
    }
    words = ", ".join(
        f"{coefficient} {format_estimate(chosen[coefficient.lower()], 2, interval=True)}"
        for coefficient in ("Spearman", "Kendall")
    )
    intervals = "" if math.isnan(chosen["spearman"].low) else "; intervals over questions"
    return f"Agreement of gain and {name} over {report.n_layers} layers: {words}{intervals}."


def _essential_line(row: Essential) -> str:
    sets = (("both", row.both), ("the lens only", row.lens_only), (f"{row.intervention} only", row.intervention_only))
    words = "; ".join(f"by {name} {_ranges(layers)}" for name, layers in sets)
    return f"Essential, lens and {row.intervention}: {words}."


def _ranges(layers: tuple[int, ...]) -> str:
    """``1-3,7``, or none."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs) or "none"


def _exit_line(exits: list[EarlyExit], lens: str) -> str:
    whole, *others = exits
    if whole.layer is None:
        return f"Early exit, {lens} lens: the output is never right."
    shown = [(row.gold_position, "-" if row.layer is None else row.layer) for row in others]
    by_position = ", ".join(f"{position}: {layer}" for position, layer in shown if position != NO_POSITION)
    return (
        f"Early exit, {lens} lens: layer {whole.layer} is the first with {KEPT:.0%} of the output's accuracy of "
        f"{format_estimate(whole.accuracy, 2)} (there {format_estimate(whole.accuracy_there, 2)}, and "
        f"{format_estimate(whole.agreement_there, 2)} of the predictions are the model's own)"
        f"{f'; by gold position {by_position}' if by_position else ''}."
    )


def _patch_line(rows: list[Patching], name: str) -> str:
    if not rows:
        return ""
    whole, *pairs = rows
    words = {
        RESTORE: "Patching from where the model succeeds to where it fails restores the answer",
        DESTROY: "Patching from where it fails to where it succeeds destroys it",
    }
    shown = ", ".join(f"{p.source_position} to {p.gold_position}: {p.from_layer.value:.1f}" for p in pairs)
    shown = f"by gold positions {shown}" if len(pairs) <= SHOWN_PAIRS else "by pairs of gold positions in patching.csv"
    return (
        f"{words[name]} from layer {format_estimate(whole.from_layer, 1, interval=True)} on (mean of "
        f"{counted(whole.examples, 'pair')} of contexts, {counted(whole.questions, 'question')}); {shown}."
    )


def _notes(report: LayersReport) -> list[str]:
    lines = [
        "first, settle: share of examples whose layer it is. gain: mean nats of target log-probability over the layer "
        "before; ln rank, entropy: mean fall of ln(rank) and of nats of entropy. exit: accuracy of stopping there. "
        "Brackets: 95 % bootstrap intervals over questions; all numbers in layers.csv.",
    ]
    if not report.ablations:
        return lines
    tokens = {"all": "at every token", "answer": "at the token before the answer"}[report.manifest["arguments"]["at"]]
    return [
        *lines,
        f"{', '.join(report.ablations)}: mean nats of target log-probability lost by striking the block of that layer "
        f"{tokens}; * essential: a mean above {report.threshold:.2g} nats, by 95 % bounds that hold for all layers at "
        f"once; {report.threshold:.2g} is the larger of a hundredth of the probability and the noise of "
        f"{report.noise:.1e}, the most that a control without effect changed. Clean runs and the sweep differ by "
        f"{report.largest_difference:.1e} nats at most.",
        f"{counted(len(report.manifest['parts']), 'question')} in {report.manifest['seconds']:.0f} s.",
    ]


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
    """Share of answers that are correct once a state is patched over, all pairs of gold positions together."""
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


def write_outputs(folder: LayersFolder, report: LayersReport) -> None:
    """Write ``layers.parquet``, the tables and ``layers.png``."""

    def write(path: Path) -> None:
        with pq.ParquetWriter(path, LAYER_ROWS, compression="zstd") as writer:
            for rows in folder.rows(report.manifest):
                writer.write_table(rows)

    write_whole(folder.path / ROWS, write)
    write_csv(folder.path / "layers.csv", LayerStatistic, report.statistics)
    write_csv(folder.path / "agreement.csv", Agreement, report.agreements)
    write_csv(folder.path / "essential.csv", Essential, report.essentials)
    write_csv(folder.path / "early_exit.csv", EarlyExit, report.exits)
    write_csv(folder.path / "patching.csv", Patching, report.patchings)
    draw_layers(folder.path / FIGURE, report)
