"""SIGINT and SIGTERM in a sweep: the first lets the current question finish, the second ends the sweep at once."""

from __future__ import annotations

import os
import signal
import sys
import threading

from ..runs.results import Run

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HINT = b"\nrefinelens: finishing the current question, then its tables; once more to stop at once\n"


class SweepInterrupted(KeyboardInterrupt):
    """A sweep was stopped; ``run`` holds all finished questions, or is None if there are none yet."""

    def __init__(self, signum: int, run: Run | None = None):
        self.signum = signum
        self.run = run


class StopSignals:
    """Takes the signals while the block runs, and gives them back after it.

    They end the block at once until `wait_for_questions` is called: before, there is nothing to finish.
    """

    def __init__(self):
        self.received: int | None = None
        self._patient = False
        self._old: dict = {}

    def wait_for_questions(self) -> None:
        """From now on the first signal is only noted in ``received``."""
        self._patient = True

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
            raise SweepInterrupted(signum)
        self.received = signum
        if sys.stderr.isatty():
            os.write(sys.stderr.fileno(), HINT)  # print might be in the middle of another line
