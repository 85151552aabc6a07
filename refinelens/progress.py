"""Progress of a sweep and of a fit on a terminal."""

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
def sweep_progress(console: Console) -> Iterator[Callable[[SweepProgress], None]]:
    """Show questions done, lens rows per second and time left while the block runs; yields the reporter.

    Nothing is shown where there is no terminal, so that logs hold results and errors only.
    """
    if not console.file.isatty():  # rich also takes FORCE_COLOR for a terminal
        yield lambda progress: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("questions"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    loading = console.status("loading the model")
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task("", start=False, rate="")

    def report(progress: SweepProgress) -> None:
        if not bar.tasks[0].started:
            loading.stop()
            bar.start()
            bar.reset(task, total=progress.questions, completed=progress.done)
        seconds = bar.tasks[0].elapsed
        rate = f"{progress.rows / seconds:,.0f} rows/s" if seconds else ""
        bar.update(task, completed=progress.done, rate=rate)

    loading.start()
    try:
        yield report
    finally:
        loading.stop()
        bar.stop()


@contextmanager
def fit_progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """Show the stage of a fit and how much of it is done; yields the reporter. Nothing without a terminal."""
    if not console.file.isatty():
        yield lambda stage, done, total: None
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading the model", total=None)

        def report(stage: str, done: int, total: int) -> None:
            if bar.tasks[0].description != stage:
                bar.reset(task, description=stage, total=total)
            bar.update(task, completed=done, total=total)

        yield report
