"""Files that are there whole or not at all, also when the power fails; JSON that others wrote, checked when read."""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import reprlib
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import FaultError, InputError

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOLCK),
}
LARGEST_JSON = 16 * 2**20  # bytes
WORDS = {str: "a text", int: "a {}whole number", float: "a number", bool: "true or false", dict: "an object"}
WORDS[list] = "a list"
NESTED = {dict: "an object", list: "a list of one entry or more"}


def write_whole(
    path: Path, write: Callable[[Path], object], on_disk: Callable[[Path], object] = lambda temporary: None
) -> None:
    """Write under a temporary name, flush to disk, rename, flush the folder: the file is there whole or not at all.

    Args:
        path: The file.
        write: Writes the file of the name it is given.
        on_disk: Called with that name before the file gets its own.
    """
    temporary = temporary_of(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        on_disk(temporary)
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_cells(path: Path, lines: Iterable[Sequence]) -> None:
    """`write_whole` of a CSV file, its names first."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerows(lines)

    write_whole(path, write)


def write_output(path: Path, write: Callable[[Path], object]) -> None:
    """`write_whole` of a file that ``out`` names.

    Raises:
        InputError: It cannot be written there.
        FaultError: No free disk.
    """
    try:
        write_whole(path, write)
    except OSError as error:
        raise disk_error(path, error, "file", begun=False) from None


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
        return FaultError(f"``out`` {path}: no free disk left;{kept} free some")
    message = f"``out`` {path}: expected a {kind} that can be written, got: {error.strerror or error}"
    return FaultError(message) if begun and error.errno not in NOT_ALLOWED else InputError(message)


def check_disk(path: str | Path, needed: int) -> None:
    """Refuse to begin what will not fit.

    Raises:
        InputError: Less than ``needed`` bytes are free where ``path`` will be.
    """
    existing = next(p for p in [Path(path).absolute(), *Path(path).absolute().parents] if p.exists())
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"``out`` {path}: expected a folder that can be written, got no permission for {existing}")
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"``out`` {path}: expected {needed / 1e6:.1f} MB of free disk, got {free / 1e6:.1f} MB; free some"
        )


def read_json_object(path: Path) -> dict:
    """The JSON object in a file of at most `LARGEST_JSON` bytes.

    Raises:
        InputError: No such file, a larger one, or something else in it.
        OSError: It cannot be read.
    """
    if not path.is_file():
        raise InputError(f"expected the file {path.name}, got none")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"expected at most {LARGEST_JSON} bytes in {path.name}, got {path.stat().st_size}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON object in {path.name}, got: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"expected a JSON object in {path.name}, got {reprlib.repr(entries)}")
    return entries


def check_entries(entries: dict, shape: dict, name: str, least: int = 0) -> None:
    """Refuse an object without the entries that are needed, or with some of another shape.

    Args:
        entries: As JSON was read.
        shape: By entry a type (``float`` takes whole numbers too), an object of such, or a list with the shape of each
            of its entries, of which there must be one.
        name: Of the object, for the message.
        least: The smallest whole number that fits, 0 or 1.

    Raises:
        InputError: Names the first entry that does not fit.
    """
    for key, kind in shape.items():
        if key not in entries:
            raise InputError(f"expected {key} in {name}, got none")
        value = entries[key]
        if isinstance(kind, list) and isinstance(value, list) and value:
            value = {f"entry {index}": entry for index, entry in enumerate(value)}
            kind = dict.fromkeys(value, kind[0])
        if isinstance(kind, dict) and isinstance(value, dict):
            check_entries(value, kind, f"{key} of {name}", least)
        elif type(value) not in ((int, float) if kind is float else (kind,)) or (kind is int and value < least):
            words = NESTED.get(type(kind)) or WORDS[kind].format("positive " * least)
            raise InputError(f"expected {key} in {name} to be {words}, got {reprlib.repr(value)}")


def sha256_of(path: Path) -> str:
    """Of the bytes of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
