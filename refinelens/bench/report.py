"""What a benchmark found: plain values, ready for a table or a JSON file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
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
    group: str  # ours, peer or product
    measured_rows: int  # where fewer than the problem has, seconds are scaled up
    seconds: float  # median
    spread: float  # (slowest - fastest) / median
    ratio: float | None  # naive over this: median of the ratios within a round
    flops: float  # per second, of the matrix product alone
    peak_share: float | None
    extra_bytes: int | None  # growth of the peak memory in a first call, on the measured rows
    verdict: Verdict | None  # None for a bare product
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
        Result(**result | {"verdict": None if result["verdict"] is None else Verdict(**result["verdict"])})
        for result in values["results"]
    ]
    return Report(**values | {"results": results})
