"""Several processes that ask the questions of one sweep, each with a model of its own."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import torch

from ..config import SweepConfig
from ..errors import FaultError
from ..machine import module_command, module_path
from ..store.folder import MadeOf
from ..store.results import QuestionResult
from .predict import groups_of, questions_together

AHEAD = 4  # questions per worker that may be finished before an earlier one is
POLL_SECONDS = 0.2  # how soon a signal is seen while every worker is busy


class Workers:
    """Asks questions in processes of their own; results come back in order, so that one process writes them.

    On a machine with several GPUs each worker sees one of them; on a CPU they share the threads. The question of a
    worker that dies goes to another; all that a worker knows of the run is its options and its manifest.
    """

    def __init__(self, options: SweepConfig, spec: MadeOf, count: int, warn: Callable[[str], None]):
        self._setup = (options, spec)
        device_type = spec.manifest["model"]["device"]
        self._on_gpu, self._together = device_type == "cuda", questions_together(options, device_type)
        self._count = count
        self._warn = warn

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, QuestionResult]]:
        """Ask the questions at these places, each with its result, in their order.

        Once ``stopped`` says so no further question is begun but those before one that is under way or answered, which
        would be lost without them. The workers end with the iterator.

        Raises:
            FaultError: What went wrong in a worker, that one could not be started, or that none is left.
            InputError: What a worker could not load.
        """
        gc.collect()
        torch.cuda.empty_cache()  # a model that was loaded here leaves its memory to theirs
        count = min(self._count, len(places))
        workers: list[_Worker] = []
        try:
            for index in range(count):
                workers.append(self._start(index, count))
            yield from self._ask(workers, places, stopped)
        finally:
            for worker in workers:
                worker.end()

    def _start(self, index: int, count: int) -> _Worker:
        """Start a process and tell it what it will be asked about."""
        try:
            ours, theirs = socket.socketpair()
            with ours, theirs:
                process = start_process(self._environment(index, count), theirs.fileno())
                worker = _Worker(process, Connection(ours.detach()))
        except OSError as error:
            raise FaultError(
                f"``workers`` {self._count}: expected {count} processes, could not start number {index + 1}: "
                f"{error.strerror or error}; use fewer"
            ) from None
        with suppress(OSError):  # one that has just died is heard of by `receive`
            worker.connection.send(self._setup)
        return worker

    def _ask(
        self, workers: list[_Worker], places: list[int], stopped: Callable[[], bool]
    ) -> Iterator[tuple[int, QuestionResult]]:
        todo, ahead = deque(groups_of(places, self._together)), AHEAD * self._count * self._together
        arrived: dict[int, QuestionResult] = {}
        index, left = {place: number for number, place in enumerate(places)}, deque(places)

        def take(at_least: int) -> Sequence[int]:
            """The next questions, while so many groups are left and the first is not too far ahead."""
            is_near = len(todo) >= at_least and index[todo[0][0]] < len(places) - len(left) + ahead
            return todo.popleft() if is_near else ()

        def put_back(groups: list[Sequence[int]]) -> None:
            in_order = sorted([*todo, *filter(None, groups)], key=lambda group: group[0])
            todo.clear()
            todo.extend(in_order)

        while left:
            for worker in wait(workers, POLL_SECONDS):
                try:
                    arrived |= worker.receive()
                except EOFError:
                    workers.remove(worker)
                    self._on_worker_exit(worker, len(workers))
                    put_back([worker.task, worker.soon])
            while left and left[0] in arrived:
                yield left[0], arrived.pop(left.popleft())
            if stopped():
                put_back([worker.soon for worker in workers])  # for whoever is free first
                last = max([*arrived, *(place for worker in workers for place in worker.task)], default=-1)
                for worker in workers:
                    worker.soon = ()
                while todo and todo[-1][0] > last:
                    todo.pop()
                if not todo and not any(worker.task for worker in workers):
                    return
            for worker in workers:
                if worker.is_free and (task := worker.soon or take(1)):
                    worker.send(task, take(len(workers)))  # the last ones are for whoever is free first

    def _on_worker_exit(self, worker: _Worker, left: int) -> None:
        """Say that a worker died and how.

        Raises:
            FaultError: There is no other.
        """
        code = worker.end()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        if not left:
            raise FaultError(f"``workers`` {self._count}: expected one that lives, got none; the last of them {how}")
        again = f"; its question{'s go' if len(worker.task) > 1 else ' goes'} to another" if worker.task else ""
        self._warn(f"worker {worker.process.pid} {how}{again}; {left} of {self._count} left")

    def _environment(self, index: int, count: int) -> dict[str, str]:
        """Variables of a worker: its share of the threads and, of several GPUs, its own."""
        environment = os.environ | module_path()
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // count))
        if self._on_gpu:
            everyone = ",".join(map(str, range(torch.cuda.device_count())))
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", everyone).split(",")
            environment["CUDA_VISIBLE_DEVICES"] = visible[index % len(visible)]
        return environment


def start_process(environment: dict[str, str], descriptor: int) -> subprocess.Popen:
    """Start a worker that is spoken to over this descriptor of a socket."""
    return subprocess.Popen(
        module_command("refinelens.sweeping.worker", descriptor),
        pass_fds=[descriptor],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C on the terminal is for the sweep, not for its workers
    )


@dataclass(eq=False)
class _Worker:
    """A process, the connection to it, and what it was asked."""

    process: subprocess.Popen
    connection: Connection
    is_ready: bool = False
    task: Sequence[int] = ()  # places of the questions that it has yet to answer, in order
    soon: Sequence[int] = ()  # of those that it will be asked then

    @property
    def is_free(self) -> bool:
        """Whether it waits for a question."""
        return self.is_ready and not self.task

    def fileno(self) -> int:
        """For `wait`."""
        return self.connection.fileno()

    def send(self, places: Sequence[int], soon: Sequence[int]) -> None:
        """Ask questions, and say which come next."""
        self.task, self.soon = places, soon
        with suppress(OSError):
            self.connection.send((places, soon))

    def receive(self) -> dict[int, QuestionResult]:
        """What it answered, by the place of its question.

        Raises:
            EOFError: It has died.
            FaultError: A file that it could not use.
            Exception: What else it met.
        """
        try:
            message = self.connection.recv()
        except OSError as error:
            raise EOFError from error
        if isinstance(message, OSError):  # raised as it is here, it would look like one of the run's own files
            raise FaultError(f"worker {self.process.pid}: {type(message).__name__}: {message}") from message
        if isinstance(message, Exception):
            raise message
        if isinstance(message, QuestionResult):
            place, *self.task = self.task
            return {place: message}
        self.is_ready = True
        return {}

    def end(self) -> int:
        """Whatever it does, it ends; its exit code, negative for a signal."""
        self.connection.close()
        self.process.kill()
        return self.process.wait()
