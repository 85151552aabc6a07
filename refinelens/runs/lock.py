"""The lock of the folder of a run, an analysis or a lens: one process writes it, and another is told which."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from ..errors import InputError
from ..machine import now
from .durable import disk_error

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
