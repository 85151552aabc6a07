"""The printed table of an analysis and the lines under it."""

from __future__ import annotations

import math

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..conditions import NO_POSITION, ORACLE, condition_name
from ..report.bootstrap import FEW_QUESTIONS
from ..report.table import WIDTH, title
from ..report.words import counted, format_estimate
from ..runs.layers_schema import DESTROY, RESTORE
from .agreement import FEW_LAYERS
from .early_exit import KEPT, EarlyExit
from .essential import Essential
from .options import PATCH
from .patching import Patching
from .report import LayersReport
from .statistics import COST, GAIN, LENS, LayerStatistic

SHOWN_PAIRS = 6
LENS_COLUMNS = {
    "first_correct_share": ("first", 2),
    "settle_share": ("settle", 2),
    GAIN: ("gain", 2),
    "log_rank_gain": ("ln rank", 2),
    "entropy_drop": ("entropy", 2),
    "exit_accuracy": ("exit", 2),
}


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
