"""Progress of a sweep and of a fit on a terminal.

Nothing is shown where there is no terminal, so that logs hold results and errors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn


@dataclass
class SweepProgress:
    """What a sweep tells while it runs."""

    questions: int
    done: int = 0
    rows: int = 0  # rows of the lens, layers x positions, of this process


@contextmanager
def fit_progress(console: Console) -> Iterator[Callable[..., None]]:
    """Show a stage, how much of it is done and, in words, how fast, while the block runs; yields the reporter."""
    if not _is_shown(console):
        yield lambda stage, done, total, speed=None: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None, speed="")

        def report(stage: str, done: int, total: int, speed: Callable[[float], str] = lambda seconds: "") -> None:
            if bar.tasks[0].description != stage:
                bar.reset(task, description=stage, total=total, completed=done)
            seconds = bar.tasks[0].elapsed
            bar.update(task, completed=done, total=total, speed=speed(seconds) if seconds else "")

        yield report


@contextmanager
def sweep_progress(console: Console) -> Iterator[Callable[[SweepProgress], None]]:
    """The same of a sweep: questions done and lens rows per second."""
    with fit_progress(console) as report:
        yield lambda now: report("questions", now.done, now.questions, lambda s: f"{now.rows / s:,.0f} rows/s")


def _is_shown(console: Console) -> bool:
    return console.is_jupyter or console.file.isatty()  # rich also takes FORCE_COLOR for a terminal
