"""The tables of a run: printed, with the lines under them, and in its folder beside the figures."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import fields
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..config import CLOSED_BOOK, NO_POSITION, ORACLE, check_top
from ..errors import FaultError, InputError
from ..stats import FEW_QUESTIONS, Estimate
from ..store.files import write_cells
from ..store.process import RunLock
from ..store.results import DERIVED, Run
from ..store.trajectory import trajectory_tables
from .figures import draw_figures
from .findings import InvertedU, PairedDifference, Report, counted, format_estimate, paired_line, read_report, title
from .summary import SummaryRow, caution_lines, layer_profiles

WIDTH = 120
LENS_WIDTH = 14  # longer names are folded, so that the table stays within WIDTH
GENERATED = "gen."  # a column of runs that have generated texts
HEADINGS = (
    *("docs", "gold", "n", "accuracy", "all", GENERATED),
    *("settled", "depth", "median", "first", "settle", "at out.", "unseen"),
)


def print_table(console: Console, report: Report) -> None:
    """Print the summary and, under it, what a reader needs to trust it."""
    console.width = max(console.width, WIDTH)  # a pipe reports 80
    console.print(f"{title(report.manifest)}: refinement by gold position\n", highlight=False, markup=False)
    with_lens, with_top = len(report.lenses) > 1, len(report.tops) > 1
    headings = [heading for heading in HEADINGS if heading != GENERATED or report.has_generations]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    if with_lens:
        table.add_column("lens", overflow="fold", max_width=LENS_WIDTH)
    for heading in (*(["top"] if with_top else []), *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for row, after in zip(report.rows, [*report.rows[1:], None], strict=True):
        section = (row.lens, row.top, row.documents)
        leading = [*([row.lens] if with_lens else []), *([str(row.top)] if with_top else [])]
        end = after is None or section != (after.lens, after.top, after.documents)
        cells = _cells(row)
        table.add_row(*map(_escape, leading), *(cells[heading] for heading in headings), end_section=end)
    console.print(table)
    lines = [*notes(report), *paired_lines(report), *inverted_u_lines(report)]
    lines += caution_lines(report.cautions, report.manifest)
    for line in lines:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def notes(report: Report) -> list[str]:
    """The lines under the table: what the numbers are, and the checks behind them."""
    manifest = report.manifest
    model, counts, arguments = manifest["model"], manifest["counts"], manifest["arguments"]
    parity, n_layers = model["parity"], model["n_layers"]
    reasons = ", ".join(f"{len(ids)} at {reason}" for reason, ids in counts["left_out"].items())
    lenses = ", ".join(_lens_words(entry) for entry in manifest["lenses"])
    tops = ", ".join(map(str, arguments["top"]))
    oracle = ", 1 oracle, the gold one alone" if any(row.documents == ORACLE for row in report.rows) else ""
    lines = [
        f"docs: documents, 0 is closed-book{oracle}. gold: 0-based position of the gold document. accuracy: the first "
        "answer token is the model's own prediction; all: so is every one after the true ones before it"
        f"{_generated_words(arguments['generate'])}. settled: examples whose target is correct at the output; all that "
        "stands to the right is over them alone, the others are censored; a depth of fewer than "
        f"{FEW_QUESTIONS} questions has no interval. first, settle: mean layers, 0 (embedding) to "
        f"{n_layers} (output); depth = settle - first. at out.: share whose settle is layer {n_layers}; unseen: not "
        "correct at any layer before it. Brackets: 95 % intervals over questions, all of them in summary.csv.",
        f"Parity: the lens at layer {n_layers} equals the model's own logits: largest difference "
        f"{parity['max_difference']:.2g}, allowed {parity['tolerance'] * parity['logit_range']:.2g}, same predictions.",
        f"Left out: {reasons or 'no question'} (of {counts['questions']}). Target: {arguments['target']}, "
        f"rank <= {tops}, answer tokens: {arguments['answer_tokens']}, seed {manifest['seed']}. Lens: {lenses}, "
        f"backend {model['backend']}, {model['dtype']} on {model['device']}.",
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
    if "tokens_saved" in counts:
        lines.append(_prefix_words(manifest["prefix_reuse"], counts["tokens_computed"], counts["tokens_saved"]))
    if arguments["generate"]:
        generated = counted(counts["tokens_generated"], "token")
        lines.append(f"{generated} generated, at most {arguments['generate']} a context.")
    if manifest["status"] != "finished":
        status = "unfinished" if manifest["status"] == "running" else manifest["status"]
        lines.append(
            f"This run is {status}: {counts['done']} of {counted(counts['questions'], 'question')}; refinelens sweep "
            "--resume goes on with it."
        )
    return lines


def paired_lines(report: Report) -> list[str]:
    """A line per context size on the accuracy of the first answer token, which no lens or threshold changes."""
    reading = (report.lenses[0], report.tops[0])
    chosen = [d for d in report.differences if (d.lens, d.top) == reading]
    lines = [paired_line(list(group)) for _, group in groupby(chosen, key=lambda d: d.documents)]
    return [*lines, "Paired over questions; all pairs, also of depth, in paired.csv."] if lines else []


def inverted_u_lines(report: Report) -> list[str]:
    """A line per test of the inverted U, and what it counts."""
    if not report.tests:
        return []
    return [
        *(test.line() for test in report.tests),
        "Inverted U: mean depth with gold in the middle third less that with gold first and last, paired over the "
        "questions that have both; p is the larger of two one-sided tests, of a middle deeper than each end, and small "
        "for an inverted U alone. Holm over the context sizes; all numbers in inverted_u.csv.",
    ]


def _cells(row: SummaryRow) -> dict[str, str]:
    texts = [
        str(row.documents),
        "-" if row.gold_position == NO_POSITION else str(row.gold_position),
        str(row.n),
        format_estimate(row.accuracy, 2, interval=True),
        format_estimate(row.accuracy_all, 2),
        format_estimate(row.accuracy_generated, 2),
        str(row.settled),
        format_estimate(row.mean_depth, 1, interval=True),
        format_estimate(row.median_depth, 1),
        format_estimate(row.mean_first_correct, 1),
        format_estimate(row.mean_settle, 1),
        format_estimate(row.share_at_output, 2),
        format_estimate(row.share_unseen, 2),
    ]
    return dict(zip(HEADINGS, texts, strict=True))


def _lens_words(entry: dict) -> str:
    if entry["kind"] == "plain":
        return "plain logit lens"
    words = f"{entry['kind']} lens" if entry["name"] == entry["kind"] else f"{entry['name']} ({entry['kind']} lens)"
    return f"{words}; {entry['note']};" if entry["note"] else words


def _generated_words(limit: int) -> str:
    return "; gen.: what the model writes contains an answer (best_subspan_em)" if limit else ""


def _prefix_words(reuse: dict, computed: int, saved: int) -> str:
    times = f" ({(computed + saved) / computed:.2f} times)" if saved else ""
    why = "" if reuse["used"] else f"; {'from then on ' if saved else ''}contexts ran whole: {reuse['why']}"
    return f"{counted(computed, 'token')} computed, {saved} saved by shared prefixes{times}{why}."


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def write_outputs(run: Run, report: Report) -> None:
    """Write trajectories, tables and figures."""
    run.write_trajectories(trajectory_tables(run, report.tops))
    write_csv(run.path / "summary.csv", SummaryRow, report.rows)
    write_csv(run.path / "paired.csv", PairedDifference, report.differences)
    write_csv(run.path / "inverted_u.csv", InvertedU, report.tests)
    closed_book = all(row.documents == CLOSED_BOOK for row in report.rows)
    profiles = layer_profiles(run, report.lenses, report.manifest["arguments"]["answer_tokens"], closed_book)
    draw_figures(run, report, profiles)


def show_run(run: Run, console: Console, tops: tuple[int, ...] | None = None) -> None:
    """Print the table of a run from its predictions.

    Files that are missing are written if they can be and no sweep is at it. With other thresholds the run stays as
    it is.

    Raises:
        InputError: A damaged run, or thresholds that no rank can be held against.
    """
    if tops is not None:
        check_top(tops, run.vocab_size)
    report = read_report(run, tops)
    if tops is None and not all((run.path / name).exists() for name in DERIVED):
        with suppress(OSError, InputError, FaultError), RunLock(run.path):
            write_outputs(run, report)
    print_table(console, report)


def write_csv(path: Path, kind: type, rows: list) -> None:
    """One line per row, one column per field; an estimate has three, with its interval."""
    columns = []
    for field in fields(kind):
        names = ("", "_low", "_high") if field.type == "Estimate" else ("",)
        columns += [f"{field.name}{suffix}" for suffix in names]
    lines = [[cell for field in fields(kind) for cell in _csv_cells(getattr(row, field.name))] for row in rows]
    write_cells(path, [columns, *lines])


def _csv_cells(value) -> list:
    if isinstance(value, Estimate):
        return [_number(x) for x in (value.value, value.low, value.high)]
    if isinstance(value, tuple):
        return [" ".join(map(str, value))]
    return [_number(value) if isinstance(value, float) else value]


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.6g}"
