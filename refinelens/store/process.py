"""The process that writes a folder: it holds the folder alone, and a signal lets it finish what is under way."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import FaultError, InputError
from ..machine import now
from .files import disk_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".refinelens.lock"
SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "started": now()}
            try:
                os.ftruncate(self._descriptor, 0)
                os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
            except OSError:
                self.__exit__()
                raise
        except OSError as error:
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


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM ended the work; ``folder`` holds what is finished, None where there is nothing yet."""

    def __init__(self, signum: int, folder=None):
        self.signum = signum
        self.folder = folder


class StopSignals:
    """Takes SIGINT and SIGTERM while the block runs, and gives them back after it.

    Before `finish_first` there is nothing to finish, and they end the block at once. From then on the first one is
    noted in ``received``, and the work asks for it between its units; a second one ends the block at once.

    Args:
        unit: What is finished first, for the line that a terminal gets.

    Raises:
        Interrupted: In the block, as said above.
    """

    def __init__(self, unit: str):
        self.received: int | None = None
        self._hint = f"\nrefinelens: finishing {unit}; once more to stop at once\n".encode()
        self._patient = False
        self._old: dict = {}

    def finish_first(self) -> None:
        """From now on the first signal is only noted in ``received``."""
        self._patient = True

    def stop_if_received(self) -> None:
        """Raise `Interrupted` between two units of work, if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # signals are the business of no other thread
            heard = [signum for signum in SIGNALS if signal.getsignal(signum) is not signal.SIG_IGN]  # as under nohup
            self._old = {signum: signal.signal(signum, self._take) for signum in heard}
        return self

    def __exit__(self, *error) -> None:
        for signum, handler in self._old.items():
            signal.signal(signum, handler)

    def _take(self, signum: int, frame) -> None:
        if self.received is not None or not self._patient:
            raise Interrupted(signum)
        self.received = signum
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), self._hint)  # print might be in the middle of another line


@contextmanager
def working_on(folder: Path, unit: str, advice: Callable[[], str]) -> Iterator[StopSignals]:
    """Hold a folder while the block works on it, with signals as `StopSignals` takes them; what breaks is one line.

    The block begins what it writes or goes on with it, asks for signals between its units, and ends it.

    Args:
        folder: Made if it is absent.
        unit: See `StopSignals`.
        advice: Called after a fault: how to go on with what is written, "" where nothing is.

    Raises:
        InputError: See `RunLock`; also where nobody could write.
        FaultError: No free disk, or what the block raises, with the advice.
        Interrupted: See `StopSignals`.
    """
    with StopSignals(unit) as signals, RunLock(folder):
        try:
            yield signals
        except OSError as error:
            fault = disk_error(folder, error)
            raise type(fault)("; ".join(filter(None, [str(fault), advice()]))) from None
        except FaultError as error:
            raise FaultError("; ".join(filter(None, [str(error), advice()]))) from error.__cause__
