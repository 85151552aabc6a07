"""Progress of a sweep on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from . import sweep


@contextmanager
def sweep_progress(console: Console) -> Iterator[Callable[[sweep.Progress], None]]:
    """Show questions done, lens rows per second and time left while the block runs; yields the reporter."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("loading the model", total=None, rate="")

        def report(progress: sweep.Progress) -> None:
            seconds = bar.tasks[0].elapsed or 0.0
            if progress.done == 0:
                bar.reset(task, total=progress.questions, description="questions")
            elif seconds:
                bar.update(task, completed=progress.done, rate=f"{progress.rows / seconds:,.0f} rows/s")

        yield report
