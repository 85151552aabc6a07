"""What a run says: summarised once, then written, drawn or printed. Reads results only; no torch, no model."""

from __future__ import annotations

import csv
import math
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from .bootstrap import Estimate
from .caution import Caution, find_cautions
from .durable import write_whole
from .errors import InputError
from .figures import draw_figures
from .inverted_u import InvertedU, inverted_u_tests
from .layer_profile import layer_profiles
from .lock import RunLock
from .options import check_top
from .results import DERIVED, Run
from .summary import SummaryRow, summarise
from .table import print_table
from .trajectory_table import choose_tokens, read_trajectories, trajectory_tables


@dataclass(frozen=True)
class Report:
    """What the tables and figures of a run say of its chosen answer tokens."""

    manifest: dict
    rows: list[SummaryRow]
    tests: list[InvertedU]
    cautions: list[Caution]

    @property
    def lenses(self) -> tuple[str, ...]:
        """Names of the lenses, in the order given."""
        return lens_names(self.manifest)

    @property
    def tops(self) -> tuple[int, ...]:
        """Thresholds, in the order given."""
        return tuple(self.manifest["arguments"]["top"])


def lens_names(manifest: dict) -> tuple[str, ...]:
    """Names of a run's lenses, in the order given."""
    return tuple(entry["name"] for entry in manifest["lenses"])


def read_report(run: Run, tops: tuple[int, ...] | None = None) -> Report:
    """Summarise the predictions that a run has.

    Args:
        run: The run.
        tops: Thresholds in place of the run's own.

    Raises:
        InputError: A part that is not as it was written, or none yet.
    """
    manifest = run.manifest
    if tops is not None:
        manifest["arguments"]["top"] = list(tops)
    lenses, tops = lens_names(manifest), tuple(manifest["arguments"]["top"])
    n_layers, seed = manifest["model"]["n_layers"], manifest["seed"]
    table = read_trajectories(run, tops)
    if not len(table):
        raise InputError(
            f"{run.path}: expected a run with rows, got none yet; refinelens sweep --resume {run.path} goes on with it"
        )
    table = choose_tokens(table, manifest["arguments"]["answer_tokens"])
    cautions = find_cautions(table, lenses, tops, n_layers)
    blind = {(caution.lens, caution.top) for caution in cautions}
    tests = inverted_u_tests(table, lenses, tops, blind, seed)
    return Report(manifest, summarise(table, lenses, tops, n_layers, seed), tests, cautions)


def write_outputs(run: Run, report: Report) -> None:
    """Write trajectories, tables and figures."""
    run.write_trajectories(trajectory_tables(run, report.tops))
    _write_csv(run.path / "summary.csv", SummaryRow, report.rows)
    _write_csv(run.path / "inverted_u.csv", InvertedU, report.tests)
    profiles = layer_profiles(run, report.lenses, report.manifest["arguments"]["answer_tokens"])
    draw_figures(run, report, profiles)


def show_run(run: Run, console: Console, tops: tuple[int, ...] | None = None) -> None:
    """Print the table of a run from its predictions.

    Files that are missing are written if they can be and no sweep is at it. With other thresholds the run stays as
    it is.

    Raises:
        InputError: A damaged run, or thresholds that no rank can be held against.
    """
    if tops is not None:
        check_top(tops)
    report = read_report(run, tops)
    if tops is None and not all((run.path / name).exists() for name in DERIVED):
        with suppress(OSError, InputError), RunLock(run.path):
            write_outputs(run, report)
    print_table(console, report)


def _write_csv(path: Path, kind: type, rows: list) -> None:
    """One line per row, one column per field; an estimate has three, with its interval."""
    columns = []
    for field in fields(kind):
        names = ("", "_low", "_high") if field.type == "Estimate" else ("",)
        columns += [f"{field.name}{suffix}" for suffix in names]

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for row in rows:
                writer.writerow([cell for field in fields(kind) for cell in _cells(getattr(row, field.name))])

    write_whole(path, write)


def _cells(value) -> list:
    if isinstance(value, Estimate):
        return [_number(x) for x in (value.value, value.low, value.high)]
    if isinstance(value, tuple):
        return [" ".join(map(str, value))]
    return [_number(value) if isinstance(value, float) else value]


def _number(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.6g}"
