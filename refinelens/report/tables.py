"""Every table, of a run, of an analysis of layers, of the quality of a fit: printed with lines under it, and as CSV."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..config import PATCH, check_top
from ..errors import FaultError, InputError
from ..placement import CLOSED_BOOK, NO_POSITION, ORACLE, condition_name
from ..stats import FEW_QUESTIONS, Estimate, PairedTest
from ..store.files import write_cells
from ..store.layers import DESTROY, RESTORE
from ..store.process import RunLock
from ..store.results import Run
from ..store.trajectory import trajectory_tables
from .checks import parity_lines
from .effective_depth import effective_depth_lines
from .figures import draw_figures
from .frequency import frequency_lines
from .further_rows import EITHER
from .probe import probe_lines
from .rows import (
    ATTRIBUTED,
    COST,
    EVERY_POSITION,
    FEW_LAYERS,
    GAIN,
    KEPT,
    LENS,
    EarlyExit,
    Essential,
    InvertedU,
    LayersReport,
    PairedDifference,
    Patching,
    Report,
    SummaryRow,
    counted,
    essential_threshold,
    format_estimate,
    title,
)
from .scope import scope_lines
from .summary import caution_lines, layer_profiles, read_report

WIDTH = 120
LENS_WIDTH = 14  # longer names are folded, so that the table stays within WIDTH
COLUMNS = {  # of the summary of a run: field of its rows, digits of an estimate, whether its interval is shown
    "lens": ("lens",),
    "top": ("top",),
    "docs": ("documents",),
    "gold": ("gold_position",),
    "n": ("n",),
    "accuracy": ("accuracy", 2, True),
    "all": ("accuracy_all", 2),
    "gen.": ("accuracy_generated", 2),
    "settled": ("settled",),
    "depth": ("mean_depth", 1, True),
    "median": ("median_depth", 1),
    "first": ("mean_first_correct", 1),
    "settle": ("mean_settle", 1),
    "at out.": ("share_at_output", 2),
    "unseen": ("share_unseen", 2),
}
SHOWN_PAIRS = 6  # of gold positions, in the line about patches
LENS_COLUMNS = {  # statistics of the lens by layer
    "first_correct_share": "first",
    "settle_share": "settle",
    GAIN: "gain",
    "log_rank_gain": "ln rank",
    "entropy_drop": "entropy",
    "exit_accuracy": "exit",
}


def new_table(headings: list[str], vertical: str = "top") -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in headings:
        folded = {"overflow": "fold", "max_width": LENS_WIDTH} if heading == "lens" else None
        table.add_column(heading, **folded or {"justify": "right", "no_wrap": True, "vertical": vertical})
    return table


def print_lines(console: Console, lines: list[str], style: str | None = None) -> None:
    """Lines as they stand, however long."""
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


def print_table(console: Console, report: Report, in_words: Callable[[str], str] = str) -> None:
    """Print the summary of a run and, under it, what a reader needs to trust it.

    Args:
        console: Where to.
        report: What of.
        in_words: Puts the parameters that a line names, see `refinelens.errors`, as its reader knows them.
    """
    console.width = max(console.width, WIDTH)  # a pipe reports 80
    print_lines(console, [f"{title(report.manifest)}: refinement by gold position\n"])
    shown = {"lens": len(report.lenses) > 1, "top": len(report.tops) > 1, "gen.": report.has_generations}
    columns = {heading: column for heading, column in COLUMNS.items() if shown.get(heading, True)}
    table = new_table([*columns])
    for row, after in zip(report.rows, [*report.rows[1:], None], strict=True):
        section = (row.lens, row.top, row.documents)
        end = after is None or section != (after.lens, after.top, after.documents)
        table.add_row(*(_cell(row, *column) for column in columns.values()), end_section=end)
    console.print(table)
    lines = [*notes(report), *effective_depth_lines(report), *paired_lines(report), *cue_lines(report)]
    lines += [*inverted_u_lines(report), *caution_lines(report.cautions, report.manifest)]
    print_lines(console, [in_words(line) for line in lines], "dim")


def _cell(row: SummaryRow, field: str, digits: int = 0, interval: bool = False) -> str:
    value = getattr(row, field)
    if isinstance(value, Estimate):
        return format_estimate(value, digits, interval)
    return "-" if (field, value) == ("gold_position", NO_POSITION) else escape(str(value))


def notes(report: Report) -> list[str]:
    """The lines under the table: what the numbers are, and the checks behind them."""
    manifest = report.manifest
    model, counts, arguments = manifest["model"], manifest["counts"], manifest["arguments"]
    n_layers = model["n_layers"]
    reasons = ", ".join(f"{len(ids)} at {reason}" for reason, ids in counts["left_out"].items())
    lenses = ", ".join(_lens_words(entry) for entry in manifest["lenses"])
    tops = ", ".join(map(str, arguments["top"]))
    generated = "; gen.: what the model writes contains an answer (best_subspan_em)" if arguments["generate"] else ""
    oracle = ", 1 oracle, the gold one alone" if any(row.documents == ORACLE for row in report.rows) else ""
    lines = [
        f"docs: documents, 0 is closed-book{oracle}. gold: 0-based position of the gold document. accuracy: the first "
        "answer token is the model's own prediction; all: so is every one after the true ones before it"
        f"{generated}. settled: examples whose target is correct at the output; all that "
        "stands to the right is over them alone, the others are censored; a depth of fewer than "
        f"{FEW_QUESTIONS} questions has no interval. first, settle: mean layers, 0 (embedding) to "
        f"{n_layers} (output); depth = settle - first. at out.: share whose settle is layer {n_layers}; unseen: not "
        "correct at any layer before it. Brackets: 95 % intervals over questions, all of them in summary.csv.",
        *parity_lines(manifest),
        f"Left out: {reasons or 'no question'} (of {counts['questions']}). Target: {arguments['target']}, "
        f"rank <= {tops}, answer tokens: {arguments['answer_tokens']}, seed {manifest['seed']}. Lens: {lenses}, "
        f"backend {model['backend']}, {model['dtype']} on {model['device']}.",
        *scope_lines(manifest),
    ]
    if model["unused_weights"]:
        first, count = model["unused_weights"][0], len(model["unused_weights"])
        have = f"{counted(count, 'tensor')} of the checkpoint {'has' if count == 1 else 'have'}"
        lines.append(f"Caution: {have} no place in this model, such as {first}.")
    if manifest["seconds"]:
        lines.append(
            f"{counted(counts['done'], 'question')}, {counted(counts['contexts'], 'context')}, "
            f"{counted(counts['lens_rows'], 'row')} of the lens in {manifest['seconds']:.0f} s."
        )
    if arguments["positions"] == "all":
        rate = f", {counts['positions_read'] / manifest['seconds']:.0f} a second" if manifest["seconds"] else ""
        read = counted(counts["positions_read"], "token")
        lines.append(f"{read} read{rate}; tables and figures are about the answers.")
    if "tokens_saved" in counts and "states" not in manifest:
        lines.append(_prefix_words(manifest["prefix_reuse"], counts["tokens_computed"], counts["tokens_saved"]))
    if arguments["generate"]:
        written = counted(counts["tokens_generated"], "token")
        lines.append(f"{written} generated, at most {arguments['generate']} a context.")
    lines += [*frequency_lines(report), *probe_lines(report)]
    if manifest["status"] != "finished":
        status = "unfinished" if manifest["status"] == "running" else manifest["status"]
        lines.append(
            f"This run is {status}: {counts['done']} of {counted(counts['questions'], 'question')}; ``sweep(resume)`` "
            "goes on with it."
        )
    return lines


def paired_lines(report: Report) -> list[str]:
    """A line per context size on the accuracy of the first answer token, which no lens or threshold changes."""
    reading = (report.lenses[0], report.tops[0])
    chosen = [d for d in report.differences if (d.lens, d.top) == reading]
    lines = [paired_line(list(group)) for _, group in groupby(chosen, key=lambda d: d.documents)]
    return [*lines, "Paired over questions; all pairs, also of depth, in paired.csv."] if lines else []


def paired_line(differences: list[PairedDifference]) -> str:
    """The accuracies of one context size compared: gold in the middle and last against first, and each other."""
    documents = differences[0].documents
    wanted = {0, (documents - 1) // 2, documents - 1}
    pairs = [d for d in differences if {d.gold_position, d.less_position} <= wanted]
    words = [
        f"{d.gold_position} - {d.less_position}: {format_estimate(d.accuracy, 2, interval=True, sign=True)}"
        for d in pairs
    ]
    return f"Accuracy, gold at one position less at another, {condition_name(documents)}: {'; '.join(words)}."


def cue_lines(report: Report) -> list[str]:
    """Which of two answers wins, by lens and context size at the first threshold, and what their order changes."""
    if not report.cues:
        return []
    lines, top = [], report.tops[0]
    for row in (row for row in report.cues if row.top == top and row.order == EITHER):
        where = f"lens {row.lens}, {condition_name(row.documents)}"
        lines.append(
            f"Two answers, {where}: the gold answer is ahead of the decoys' in "
            f"{format_estimate(row.gold_ahead, 2, interval=True)} of {row.examples} contexts, which is decided from "
            f"layer {format_estimate(row.mean_decided, 1, interval=True)} on; the lead changes on the way in "
            f"{format_estimate(row.share_switched, 2)}."
        )
        for d in report.cue_differences:
            if (d.lens, d.top, d.documents) == (row.lens, top, row.documents):
                lines.append(
                    f"Decoy first less gold first, {where}: gold ahead "
                    f"{format_estimate(d.gold_ahead, 2, interval=True, sign=True)}, decided "
                    f"{format_estimate(d.mean_decided, 1, interval=True, sign=True)} layers later."
                )
    where = "by order and distance in cues.csv, by layer in cues_layers.csv, the orders compared in cues_paired.csv"
    return [*lines, f"Two answers {where}."]


def inverted_u_lines(report: Report) -> list[str]:
    """A line per test of the inverted U, and what it counts."""
    if not report.tests:
        return []
    return [
        *map(inverted_u_line, report.tests),
        "Inverted U: mean depth with gold in the middle third less that with gold first and last, paired over the "
        "questions that have both; p is the larger of two one-sided tests, of a middle deeper than each end, and small "
        "for an inverted U alone. Holm over the context sizes; all numbers in inverted_u.csv.",
    ]


def inverted_u_line(test: InvertedU) -> str:
    """One test."""
    said = test.reason or f"p = {_p(test.p)} (Holm {_p(test.p_holm)}; {test.method}){_shallower(test)}"
    sides = f"middle - first {_side(test.first)}, middle - last {_side(test.last)}"
    return f"Inverted U, {test.lens}, rank <= {test.top}, {test.documents} documents: {sides}; {said}."


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


def _side(test: PairedTest) -> str:
    words = [format_estimate(test.difference, 2, interval=True, sign=True)]
    words += [] if math.isnan(test.difference.value) else ["layers"]
    words += [] if math.isnan(test.d_z) else [f"d_z {test.d_z:z.2f}"]
    return " ".join([*words, f"(differs in {test.differ} of {counted(test.questions, 'question')})"])


def _shallower(test: InvertedU) -> str:
    ends = [end for end in ("first", "last") if getattr(test, end).difference.value < 0]
    where = "both ends" if len(ends) == 2 else f"the {ends[0]} position" if ends else ""
    return f"; the middle is shallower than {where}" if where else ""


def _lens_words(entry: dict) -> str:
    if entry["kind"] == "plain":
        return "plain logit lens"
    words = f"{entry['kind']} lens" if entry["name"] == entry["kind"] else f"{entry['name']} ({entry['kind']} lens)"
    return f"{words}; {entry['note']};" if entry["note"] else words


def _prefix_words(reuse: dict, computed: int, saved: int) -> str:
    times = f" ({(computed + saved) / computed:.2f} times)" if saved else ""
    why = "" if reuse["used"] else f"; {'from then on ' if saved else ''}contexts ran whole: {reuse['why']}"
    return f"{counted(computed, 'token')} computed, {saved} saved by shared prefixes{times}{why}."


def print_layers(console: Console, report: LayersReport) -> None:
    """Print a table per context size and, under it, what the interventions say of the lens."""
    console.width = max(console.width, WIDTH)  # a pipe reports 80
    for documents in sorted({row.documents for row in report.statistics}, key=lambda n: (n <= ORACLE, n)):
        part = report.of_size(documents)
        questions = max(row.questions for row in part.statistics if row.gold_position is EVERY_POSITION)
        size, lens = condition_name(documents), report.manifest["lens"]
        print_lines(console, [f"{title(report.run)}: {size}, {counted(questions, 'question')}, {lens} lens\n"])
        console.print(_layers_table(part))
        print_lines(console, [*_lines(part), ""])
    print_lines(console, _layers_notes(report), "dim")


def _layers_table(report: LayersReport) -> Table:
    values = {
        (row.of, row.statistic, row.layer): row.value
        for row in report.statistics
        if row.gold_position is EVERY_POSITION
    }
    starred = {(row.intervention, layer) for row in report.essentials for layer in (*row.both, *row.intervention_only)}
    table = new_table(["layer", *LENS_COLUMNS.values(), *report.ablations])
    for layer in range(report.n_layers + 1):
        cells = [format_estimate(values[LENS, name, layer], 2, interval=name == GAIN) for name in LENS_COLUMNS]
        for name in report.ablations:
            value = values.get((name, COST, layer))
            star = "*" if (name, layer) in starred else " "
            cells.append("-" if value is None else f"{format_estimate(value, 2)}{star}")
        table.add_row(str(layer), *cells)
    return table


def _lines(report: LayersReport) -> list[str]:
    lines = [_agreement_line(report, name, GAIN) for name in report.ablations if report.agreements]
    attributed = {row.intervention for row in report.agreements if row.lens_statistic == ATTRIBUTED}
    lines += [_agreement_line(report, name, ATTRIBUTED) for name in report.ablations if name in attributed]
    if report.ablations and not report.agreements:
        over = counted(report.n_layers, "layer")
        lines.append(f"Agreement: none over {over}; fewer than {FEW_LAYERS} agree by chance too often.")
    if report.ablations and not report.essentials:
        lines.append(f"Essential: no verdict on fewer than {FEW_QUESTIONS} questions.")
    lines += [_essential_line(row) for row in report.essentials]
    lines.append(_exit_line(report.exits, report.manifest["lens"]))
    if PATCH in report.manifest["arguments"]["interventions"] and not report.patchings:
        lines.append("Patching: no question is answered at one gold position and not at another.")
    patches = ([row for row in report.patchings if row.intervention == name] for name in (RESTORE, DESTROY))
    return [*lines, *(_patch_line(*rows) for rows in patches if rows)]


def _agreement_line(report: LayersReport, name: str, statistic: str) -> str:
    wanted = (EVERY_POSITION, name, statistic)
    rows = [row for row in report.agreements if (row.gold_position, row.intervention, row.lens_statistic) == wanted]
    words = ", ".join(f"{row.coefficient.title()} {format_estimate(row.value, 2, interval=True)}" for row in rows)
    intervals = "" if math.isnan(rows[0].value.low) else "; intervals over questions"
    what = {GAIN: f"gain and {name}", ATTRIBUTED: f"direct logit attribution and cost of {name}"}[statistic]
    return f"Agreement of {what} over {report.n_layers} layers: {words}{intervals}."


def _essential_line(row: Essential) -> str:
    sets = (("both", row.both), ("the lens only", row.lens_only), (f"{row.intervention} only", row.intervention_only))
    words = "; ".join(f"by {name} {_ranges(layers)}" for name, layers in sets)
    return f"Essential, lens and {row.intervention}: {words}."


def _ranges(layers: tuple[int, ...]) -> str:
    """``1-3,7``, or none."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda item: item[1] - item[0])]
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


def _patch_line(whole: Patching, *pairs: Patching) -> str:
    words = {
        RESTORE: "Patching from where the model succeeds to where it fails restores the answer",
        DESTROY: "Patching from where it fails to where it succeeds destroys it",
    }
    shown = ", ".join(f"{p.source_position} to {p.gold_position}: {p.from_layer.value:.1f}" for p in pairs)
    shown = f"by gold positions {shown}" if len(pairs) <= SHOWN_PAIRS else "by pairs of gold positions in patching.csv"
    return (
        f"{words[whole.intervention]} from layer {format_estimate(whole.from_layer, 1, interval=True)} on (mean of "
        f"{counted(whole.examples, 'pair')} of contexts, {counted(whole.questions, 'question')}); {shown}."
    )


def _layers_notes(report: LayersReport) -> list[str]:
    lines = [
        "first, settle: share of examples whose layer it is. gain: mean nats of target log-probability over the layer "
        "before; ln rank, entropy: mean fall of ln(rank) and of nats of entropy. exit: accuracy of stopping there. "
        "Brackets: 95 % bootstrap intervals over questions; all numbers in layers.csv.",
    ]
    if not report.ablations:
        return lines
    tokens = {"all": "at every token", "answer": "at the token before the answer"}[report.manifest["arguments"]["at"]]
    threshold = f"{essential_threshold(report.noise):.2g}"
    return [
        *lines,
        f"{', '.join(report.ablations)}: mean nats of target log-probability lost by striking the block of that layer "
        f"{tokens}; * essential: a mean above {threshold} nats, by 95 % bounds that hold for all layers at "
        f"once; {threshold} is the larger of a hundredth of the probability and the noise of "
        f"{report.noise:.1e}, the most that a control without effect changed. Clean runs and the sweep differ by "
        f"{report.largest_difference:.1e} nats at most.",
        f"{counted(len(report.manifest['parts']), 'question')} in {report.manifest['seconds']:.0f} s.",
    ]


def write_outputs(run: Run, report: Report) -> None:
    """Write trajectories, tables and figures of a run."""
    run.write_trajectories(trajectory_tables(run, report.tops))
    write_tables(run.path, report)
    closed_book = all(row.documents == CLOSED_BOOK for row in report.rows)
    profiles = layer_profiles(run, report.lenses, report.manifest["arguments"]["answer_tokens"], closed_book)
    draw_figures(run, report, profiles)


def show_run(
    run: Run, console: Console, tops: tuple[int, ...] | None = None, in_words: Callable[[str], str] = str
) -> None:
    """Print the table of a run from its predictions, see `print_table`.

    Files that are missing are written if they can be and no sweep is at it. With other thresholds the run stays as
    it is.

    Raises:
        InputError: A damaged run, or thresholds that no rank can be held against.
    """
    if tops is not None:
        check_top(tops, run.vocab_size)
    report = read_report(run, tops)
    if tops is None and not all((run.path / name).exists() for name in run.derived):
        with suppress(OSError, InputError, FaultError), RunLock(run.path):
            write_outputs(run, report)
    print_table(console, report, in_words)


def write_tables(folder: Path, report: Report | LayersReport) -> None:
    """Write the CSV files of a report: a line per row, a column per field of its class.

    An estimate has three columns, with its interval, a paired test those of its fields.
    """
    for file, (kind, rows) in report.tables.items():
        write_cells(folder / file, [_columns(kind), *(_csv_cells(row) for row in rows)])


def _columns(kind: type, prefix: str = "") -> list[str]:
    columns = []
    for field in fields(kind):
        name = f"{prefix}{field.name}"
        if field.type == "PairedTest":
            columns += _columns(PairedTest, f"{name}_")
        else:
            columns += [f"{name}{end}" for end in (("", "_low", "_high") if field.type == "Estimate" else ("",))]
    return columns


def _csv_cells(value) -> list:
    if is_dataclass(value):
        return [cell for field in fields(value) for cell in _csv_cells(getattr(value, field.name))]
    if isinstance(value, tuple):
        return [" ".join(map(str, value))]
    if isinstance(value, float):
        return ["" if math.isnan(value) else f"{value:.6g}"]
    return [value]
