"""Progress of a sweep, a fit or an analysis of layers on a terminal or in a notebook.

Nothing is shown where there is neither, so that logs hold results and errors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress(Protocol):
    """What is told how far some work is."""

    def __call__(self, stage: str, done: int, total: int, rows: int = 0) -> object:
        """Called with a stage, what is done of it, what there is to do, and rows of the lens that were read so far."""


def unseen(stage: str, done: int, total: int, rows: int = 0) -> None:
    """Progress that nobody follows."""


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Progress]:
    """Show stage, what is done of it and, where rows are told, how many a second, while the block runs."""
    console = Console(stderr=True)
    if not wanted or not (console.is_jupyter or console.file.isatty()):  # rich also takes FORCE_COLOR for a terminal
        yield unseen
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None, speed="")

        def progress(stage: str, done: int, total: int, rows: int = 0) -> None:
            if bar.tasks[0].description != stage:
                bar.reset(task, description=stage, total=total, completed=done)
            seconds = bar.tasks[0].elapsed
            speed = f"{rows / seconds:,.0f} rows/s" if rows and seconds else ""
            bar.update(task, completed=done, total=total, speed=speed)

        yield progress
