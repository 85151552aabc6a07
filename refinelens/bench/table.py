"""What a benchmark found: plain values for JSON, and the one table, as text for a terminal or as Markdown."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

WIDTH = 110  # of the notes under a text table

HEADINGS = ("", "ms", "spread", "x naive", "{unit}", "of peak", "extra MB", "argmax off", "rank off", "error")


@dataclass(frozen=True)
class CheckResult:
    """How the statistics of a competitor differ from fp64; None where it computes no such statistic."""

    rows: int  # compared
    argmax_off: int | None
    rank_off: int | None
    error: float  # largest of the real-valued statistics, nats
    fell_back: int | None  # rows that an exact path had to take
    wrong: str | None  # what rounding does not explain


@dataclass(frozen=True)
class Result:
    """One competitor's row. Seconds and bytes of one call on all rows of the problem."""

    name: str
    title: str
    group: str  # ours, baseline or product
    measured_rows: int  # where fewer than the problem has, seconds are scaled up
    seconds: float  # median
    spread: float  # (slowest - fastest) / median
    ratio: float | None  # naive over this: median of the ratios within a round
    flops: float  # per second, of the matrix product alone
    peak_share: float | None
    extra_bytes: int | None  # growth of the peak memory in a first call, on the measured rows
    verdict: CheckResult | None  # None for a bare product
    note: str | None  # what else a reader must know of the row


@dataclass(frozen=True)
class Report:
    """A whole benchmark of one problem on one machine."""

    device: str
    device_type: str  # cpu or cuda
    instruction_set: str | None  # of the C++ extension, if built
    threads: int
    clock: str
    versions: dict[str, str]
    date: str
    rows: int
    d_model: int
    vocab: int
    dtype: str
    states: str  # random, or the model's name
    rounds: int
    peak: str | None  # what it is
    peak_flops: float | None  # per second
    results: list[Result]  # those that are right, timed
    left_out: dict[str, str]  # title: why
    failed: list[str]  # our own paths that fp64 refutes or that did not run to the end

    def result(self, name: str) -> Result | None:
        """The row of a competitor, if it has one."""
        return next((r for r in self.results if r.name == name), None)


def report_from_json(values: dict) -> Report:
    """The report that ``dataclasses.asdict`` made into ``values``."""
    results = [
        Result(**result | {"verdict": None if result["verdict"] is None else CheckResult(**result["verdict"])})
        for result in values["results"]
    ]
    return Report(**values | {"results": results})


def text_table(report: Report) -> str:
    """Header, aligned columns and notes, ready to print."""
    table = [_headings(report), *_cells(report)]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in table
    ]
    under = [textwrap.fill(note, WIDTH) for note in notes(report)]
    return "\n".join([*header(report), "", lines[0], "-" * len(lines[0]), *lines[1:], "", *under])


def markdown_table(report: Report) -> str:
    """The same for a Markdown file."""
    table = markdown_rows([_headings(report), *_cells(report)])
    return "\n".join([" ".join(header(report)), "", table, "", *(f"- {note}" for note in notes(report))])


def markdown_rows(rows: list[list[str]]) -> str:
    """A Markdown table whose first row is the heading."""
    rule = ["---"] + ["--:"] * (len(rows[0]) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], rule, *rows[1:]])


def header(report: Report) -> list[str]:
    """What was measured, and where."""
    states = "random states" if report.states == "random" else f"states of {report.states}"
    where = [report.device]
    if report.device_type == "cpu":
        where += [f"{report.threads} thread{'s' if report.threads > 1 else ''}"]
        where += [f"C++ for {report.instruction_set}" if report.instruction_set else "no C++ extension"]
    where += [f"{name} {number}" for name, number in report.versions.items()] + [report.date]
    return [
        f"{report.rows} rows x {report.d_model} dimensions x {report.vocab} tokens, {report.dtype}, {states}.",
        ", ".join(where) + ".",
        f"Time: {report.clock}; medians of {report.rounds} rounds in which all take turns"
        + (f"; peak {_rate(report, report.peak_flops)} ({report.peak})." if report.peak else "; peak not measured."),
    ]


def notes(report: Report) -> list[str]:
    """What the columns mean, and who is missing."""
    lines = [
        "x naive: how many times faster than naive. Rates count the matrix product alone. extra MB: growth of the peak "
        "memory in a first call, in a fresh process on a CPU. off: rows that differ from fp64, of those compared; "
        "error: largest of any real statistic, nats.",
    ]
    lines += [f"{result.title}: {result.note}." for result in report.results if result.note]
    return lines + [f"Left out: {title}: {reason}." for title, reason in report.left_out.items()]


def _headings(report: Report) -> list[str]:
    unit = "TFLOP/s" if report.device_type == "cuda" else "GFLOP/s"
    return [heading.format(unit=unit) for heading in HEADINGS]


def _cells(report: Report) -> list[list[str]]:
    return [_row(report, result) for result in report.results]


def _row(report: Report, result: Result) -> list[str]:
    verdict = result.verdict
    return [
        result.title,
        f"{result.seconds * 1e3:.3g}" if result.seconds < 1 else f"{result.seconds * 1e3:.0f}",
        f"{result.spread:.0%}",
        "-" if result.ratio is None else f"{result.ratio:.2f}",
        _rate(report, result.flops).split()[0],
        "-" if result.peak_share is None else f"{result.peak_share:.0%}",
        "-" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:.0f}",
        _off(verdict and verdict.argmax_off, verdict),
        _off(verdict and verdict.rank_off, verdict),
        "-" if verdict is None else f"{verdict.error:.0e}",
    ]


def _off(count: int | None, verdict: CheckResult | None) -> str:
    return "-" if verdict is None or count is None else f"{count} of {verdict.rows}"


def _rate(report: Report, flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if report.device_type == "cuda" else f"{flops / 1e9:.3g} GFLOP/s"
