"""What a benchmark found: plain values for JSON, and the one table, as text."""

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


def text_table(report: Report) -> str:
    """Header, aligned columns and notes, ready to print."""
    unit = "TFLOP/s" if report.device_type == "cuda" else "GFLOP/s"
    table = aligned([[heading.format(unit=unit) for heading in HEADINGS], *(_row(report, r) for r in report.results)])
    under = [textwrap.fill(note, WIDTH) for note in notes(report)]
    return "\n".join([*header(report), "", *table, "", *under])


def aligned(rows: list[list[str]]) -> list[str]:
    """Lines of a table of texts, its heading first and ruled off: the first column to the left, others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


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


def _row(report: Report, result: Result) -> list[str]:
    verdict = result.verdict
    off = (verdict.argmax_off, verdict.rank_off) if verdict else (None, None)
    return [
        result.title,
        f"{result.seconds * 1e3:.3g}" if result.seconds < 1 else f"{result.seconds * 1e3:.0f}",
        f"{result.spread:.0%}",
        "-" if result.ratio is None else f"{result.ratio:.2f}",
        _rate(report, result.flops).split()[0],
        "-" if result.peak_share is None else f"{result.peak_share:.0%}",
        "-" if result.extra_bytes is None else f"{result.extra_bytes / 1e6:.0f}",
        *("-" if count is None else f"{count} of {verdict.rows}" for count in off),
        "-" if verdict is None else f"{verdict.error:.0e}",
    ]


def _rate(report: Report, flops: float) -> str:
    return f"{flops / 1e12:.3g} TFLOP/s" if report.device_type == "cuda" else f"{flops / 1e9:.3g} GFLOP/s"
