"""Files that appear whole or not at all, also when the power fails."""

from __future__ import annotations

import csv
import errno
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import FaultError, InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOLCK),
}


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write under a temporary name, flush to disk, rename, flush the folder: the file is there whole or not at all."""
    try:
        temporary = write_temporary(path, write)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary_of(path).unlink(missing_ok=True)


def write_cells(path: Path, lines: Iterable[Sequence]) -> None:
    """`write_whole` of a CSV file, its names first."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    write_whole(path, write)


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole` of a file that ``--out`` names.

    Raises:
        InputError: It cannot be written there.
        FaultError: No free disk.
    """
    try:
        write_whole(path, write)
    except OSError as error:
        raise disk_error(path, error, "file", begun=False) from None


def write_temporary(path: Path, write: Callable[[Path], object]) -> Path:
    """Write and flush the temporary file of ``path`` and return it; a failed one is removed."""
    temporary = temporary_of(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def temporary_of(path: Path) -> Path:
    """Where a file is written before it has its name."""
    return path.with_name(f".{path.name}.tmp")


def sync_folder(path: Path) -> None:
    """Flush the names in a folder: a rename is not on the disk before."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def disk_error(path: str | Path, error: OSError, kind: str = "folder", begun: bool = True) -> InputError | FaultError:
    """One line for a failed write to a folder or a single file: a fault, unless nobody could write there.

    Before anything was ``begun`` there, want of disk alone is a fault.
    """
    if error.errno in NO_ROOM:
        kept = " what was written stays readable;" if kind == "folder" else ""
        return FaultError(f"--out {path}: no free disk left;{kept} free some")
    message = f"--out {path}: expected a {kind} that can be written, got: {error.strerror or error}"
    return FaultError(message) if begun and error.errno not in NOT_ALLOWED else InputError(message)
