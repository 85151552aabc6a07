"""What a run leaves behind and shows: tables and figures in its folder, the table on a terminal."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import fields
from pathlib import Path

from rich.console import Console

from ..conditions import CLOSED_BOOK
from ..errors import FaultError, InputError
from ..options import check_top
from ..runs.durable import write_cells
from ..runs.lock import RunLock
from ..runs.results import DERIVED, Run
from ..runs.trajectory_table import trajectory_tables
from .bootstrap import Estimate
from .figures import draw_figures
from .inverted_u import InvertedU
from .layer_profile import layer_profiles
from .paired import PairedDifference
from .report import Report, read_report
from .summary import SummaryRow
from .table import print_table


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
    lines = [[cell for field in fields(kind) for cell in _cells(getattr(row, field.name))] for row in rows]
    write_cells(path, [columns, *lines])


def _cells(value) -> list:
    if isinstance(value, Estimate):
        return [_number(x) for x in (value.value, value.low, value.high)]
    if isinstance(value, tuple):
        return [" ".join(map(str, value))]
    return [_number(value) if isinstance(value, float) else value]


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.6g}"
