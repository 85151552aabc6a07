"""The one table of a benchmark, as text for a terminal or as Markdown."""

from __future__ import annotations

import textwrap

from .report import Report, Result, Verdict

WIDTH = 110  # of the notes under a text table

HEADINGS = ("", "ms", "spread", "x naive", "{unit}", "of peak", "extra MB", "argmax off", "rank off", "error")


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


def _off(count: int | None, verdict: Verdict | None) -> str:
    return "-" if verdict is None or count is None else f"{count} of {verdict.rows}"


def _rate(report: Report, flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if report.device_type == "cuda" else f"{flops / 1e9:.3g} GFLOP/s"
