"""The folder that a run is written to: what may be replaced there, and whether it has room."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from ..errors import InputError
from .durable import disk_error, temporary_of
from .lock import LOCK
from .results import MANIFEST, OUTPUTS, read_manifest


def check_folder(path: str | Path) -> None:
    """Refuse an output folder that holds anything that is not a run's.

    Raises:
        InputError: Names a file that a run does not have, or that is there without the manifest of its run.
    """
    path = Path(path)
    try:
        names = sorted(p.name for p in path.iterdir()) if path.exists() else []
    except OSError as error:
        raise disk_error(path, error, begun=False) from None
    left_by_a_kill = {LOCK, *(temporary_of(path / name).name for name in OUTPUTS)}
    names = [name for name in names if name not in left_by_a_kill]
    foreign = [name for name in names if name not in OUTPUTS]
    if foreign or (names and MANIFEST not in names):
        other = (foreign + names)[0]
        raise InputError(f"--out {path}: expected a new folder or a run to overwrite, got other files, such as {other}")
    if names:
        read_manifest(path)  # a run of another schema version may be overwritten too


def check_overwrite(path: str | Path, overwrite: bool, arguments: dict) -> None:
    """Refuse to replace a run that is there, in a folder that is held here, unless that was asked for.

    Raises:
        InputError: A run is there and ``overwrite`` is not set; says how its arguments differ.
    """
    path = Path(path)
    if overwrite or not (path / MANIFEST).exists():
        return
    manifest = read_manifest(path)
    old = manifest["arguments"]
    changed = [f"{k} {old.get(k)!r} there, {v!r} here" for k, v in arguments.items() if old.get(k) != v]
    finished = manifest["status"] == "finished"
    command = f"see it with refinelens show {path}" if finished else f"go on with refinelens sweep --resume {path}"
    command = "" if changed else f"{command}, "
    what = f"other arguments ({'; '.join(changed)})" if changed else "the same arguments"
    raise InputError(
        f"--out {path}: expected a new folder, got a run of {what} that is {status_words(manifest, held=False)}; "
        f"{command}choose another folder or pass --overwrite"
    )


def status_words(manifest: dict, held: bool) -> str:
    """``finished``, or how far a run is: it is ``running`` only while a process holds its folder."""
    status, counts = manifest["status"], manifest["counts"]
    if status == "finished" or (status == "running" and held):
        return status
    word = "unfinished" if status == "running" else status  # whatever ended it left no time to say so
    return f"{word} ({counts.get('done', 0)} of {counts.get('questions', 0)} questions)"


def check_disk(path: str | Path, needed: int) -> None:
    """Refuse to start a run that will not fit.

    Raises:
        InputError: Less than ``needed`` bytes are free where ``path`` will be.
    """
    existing = next(p for p in [Path(path).absolute(), *Path(path).absolute().parents] if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--out {path}: expected a folder that can be written, got no permission for {existing}")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"--out {path}: expected {needed / 1e6:.1f} MB of free disk, got {free / 1e6:.1f} MB; free some"
        )
