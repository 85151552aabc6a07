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

    def __call__(self, stage: str, done: int, total: int, rows: int = 0, contexts: int = 0, note: str = "") -> object:
        """Called with a stage, what is done of it, what there is to do, and what a sweep has so far.

        That are rows of the lens that were read, contexts, and in a few words how often the model was right.
        """


def unseen(stage: str, done: int, total: int, rows: int = 0, contexts: int = 0, note: str = "") -> None:
    """Progress that nobody follows."""


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Progress]:
    """Show stage, what is done of it, time left and, of a sweep, contexts a second and how often it was right."""
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
        TextColumn("{task.fields[note]}", style="dim"),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None, speed="", note="")

        def progress(stage: str, done: int, total: int, rows: int = 0, contexts: int = 0, note: str = "") -> None:
            if bar.tasks[0].description != stage:
                bar.reset(task, description=stage, total=total, completed=done)
            seconds = bar.tasks[0].elapsed
            speed = f"{contexts / seconds:.2g} contexts/s" if contexts and seconds else ""
            bar.update(task, completed=done, total=total, speed=speed, note=note)

        yield progress
