"""Folders of results: files that appear whole or not at all, one writer at a time, and nothing foreign removed.

That holds also when the power fails. A JSON object that somebody else wrote is read with the entries that are needed.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import reprlib
import socket
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import FaultError, InputError
from ..machine import now

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_ALLOWED = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOLCK),
}
LARGEST_JSON = 16 * 2**20  # bytes
SHAPE_WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
WORDS = {str: "a text", int: "a positive whole number", bool: "true or false", dict: "an object"}


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
    """`write_whole` of a file that ``out`` names.

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
        return FaultError(f"``out`` {path}: no free disk left;{kept} free some")
    message = f"``out`` {path}: expected a {kind} that can be written, got: {error.strerror or error}"
    return FaultError(message) if begun and error.errno not in NOT_ALLOWED else InputError(message)


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


def check_entries(entries: dict, types: dict[str, type], name: str) -> None:
    """Refuse an object without the entries that are needed, or with some of another type.

    Args:
        entries: As JSON was read.
        types: ``str``, ``int`` (at least 1), ``bool`` or ``dict`` of every entry that must be there.
        name: Of the object, for the message.

    Raises:
        InputError: Names the first entry that does not fit.
    """
    for key, kind in types.items():
        if key not in entries:
            raise InputError(f"expected {key} in {name}, got none")
        value = entries[key]
        if type(value) is not kind or (kind is int and value < 1):
            raise InputError(f"expected {key} in {name} to be {WORDS[kind]}, got {reprlib.repr(value)}")


def check_shape(value, shape, name: str) -> None:
    """Refuse JSON of another shape than expected.

    Args:
        value: As JSON was read.
        shape: A type (``int`` from 0 on; ``float`` takes whole numbers too), an object with the entries that must be
            there, or a list with the shape of each of its entries, of which there must be one.
        name: Of the value, for the message.

    Raises:
        InputError: Names the first place that does not fit.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            check_shape(value.get(key), inner, f"{key} of {name}")
    elif isinstance(shape, list) and isinstance(value, list) and value:
        for entry in value:
            check_shape(entry, shape[0], f"an entry of {name}")
    elif not _is(value, shape):
        kind = {dict: "an object", list: "a list of one entry or more"}.get(type(shape)) or SHAPE_WORDS[shape]
        raise InputError(f"expected {kind} as {name}, got {reprlib.repr(value)}")


def _is(value, kind) -> bool:
    if kind is int:
        return type(value) is int and value >= 0
    return type(value) in ((int, float) if kind is float else (kind,))


def sha256_of(path: Path) -> str:
    """Of the bytes of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".refinelens.lock"


class RunLock:
    """Holds a folder, made if it is absent, while the block runs.

    The kernel lets go of the lock when the process ends, however it ends: a file that was left behind holds nothing.

    Raises:
        InputError: Another process holds the folder.
            Also if no such folder can be made, or its system or file system has no locks.
        FaultError: No free disk.
    """

    def __init__(self, folder: str | Path):
        if fcntl is None:
            raise InputError(
                "expected Linux or macOS, whose file locks keep runs whole, got another system; on Windows use WSL"
            )
        self._folder = Path(folder)
        self._path = self._folder / LOCK

    def __enter__(self) -> RunLock:
        try:
            self._made = not self._folder.exists()
            self._folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._acquire()
        except OSError as error:
            raise disk_error(self._folder, error, begun=False) from None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now()}
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        except OSError as error:
            self.__exit__()
            raise disk_error(self._folder, error, begun=False) from None
        return self

    def __exit__(self, *error) -> None:
        # Removed before it is let go: whoever opened this file meanwhile sees that it lost its name.
        with suppress(OSError):
            if _same_file(self._descriptor, self._path):
                self._path.unlink()
        os.close(self._descriptor)
        if self._made:
            with suppress(OSError):  # it holds something now
                self._folder.rmdir()

    def _acquire(self) -> int:
        tries = iter(range(5))
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _same_file(descriptor, self._path):
                    return descriptor
            except BlockingIOError:
                holder = os.pread(descriptor, 1000, 0)
                os.close(descriptor)
                if next(tries, None) is not None:  # `is_held` takes it for a moment
                    time.sleep(0.01)
                    continue
                raise InputError(
                    f"{self._folder}: expected a folder that no other process writes, got one held by "
                    f"{_words(holder)}; wait for it or stop it"
                ) from None
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def is_held(folder: str | Path) -> bool:
    """Whether a process holds a folder now; also where that cannot be told."""
    try:
        descriptor = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError as error:
        return not isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (OSError, AttributeError):  # or a system without locks
        return True
    finally:
        os.close(descriptor)
    return False


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _words(holder: bytes) -> str:
    try:
        entries = json.loads(holder)
        return f"process {entries['pid']} on {entries['host']} since {entries['started']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has just started"
