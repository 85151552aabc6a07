"""Ray asks the questions of one sweep: by actors of this machine, or of the nodes of a cluster.

Ray Data hands places of questions to a pool of `RayWorker`s and brings back their answers in order; it asks again what
a dead actor or node was asked, and starts actors anew. Here are the connection to it, how many workers have room and
with how many threads, and the end of all that by a signal, a fault, or a head of the cluster that is gone.
"""

from __future__ import annotations

import gc
import inspect
import logging
import os
import pickle
import queue
import secrets
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, suppress
from functools import cache
from importlib.util import find_spec
from math import inf
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from ..config import EngineConfig, SweepConfig
from ..errors import FaultError, InputError
from ..machine import module_path, package_version
from ..store.folder import MadeOf
from ..store.process import SIGNALS
from ..store.results import QuestionResult
from .predict import groups_of, questions_together
from .ray_worker import ANSWER, RayWorker

OLDEST = (2, 60)
RETRIES = 1  # of a question whose actor dies; of a node that is gone Ray uses them up within a second
POOLS = 2  # in a row that may end so without an answer
INIT_DEATHS = 3  # in a row, of actors that die while they load
POLL_SECONDS = 0.2  # how soon a signal is seen while every worker is busy
WATCH_SECONDS = 2.0  # how often the head is asked for its nodes
SILENT_SECONDS = 15.0  # without an answer until the head is taken to be gone; after 60 Ray ends this process
CONNECT_SECONDS = 5.0
PART_SECONDS = 30.0  # that a connection may take to end
# What Ray prints here, what it sends home, and that a thread which outlives a connection makes a new one.
QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_AUTO_CONNECT": "0"}


def check_ray(engine: EngineConfig) -> None:
    """Refuse, before anything heavy is loaded, to begin without Ray, or where none answers.

    Raises:
        InputError: No package ray, one that is too old, or an address at which nothing listens.
    """
    found = package_version("ray") if find_spec("ray") else None
    if found is None or tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        raise InputError(
            f"``engine='ray'``: expected the package ray {'.'.join(map(str, OLDEST))} or newer, got {found or 'none'}; "
            "pip install 'refinelens[ray]'"
        )
    if engine.address not in (None, "auto"):
        try:
            _touch(engine.address)
        except OSError as error:
            raise InputError(
                f"``address`` {engine.address}: expected the head of a Ray that runs, got none: "
                f"{error.strerror or error}"
            ) from None


class RayWorkers:
    """Asks questions by actors of Ray, as `refinelens.sweeping.workers.Workers` does by processes of its own."""

    worker: type = RayWorker

    def __init__(self, options: SweepConfig, spec: MadeOf, engine: EngineConfig, warn: Callable[[str], None]):
        self._setup, self._engine, self._warn = (options, spec), engine, warn
        device_type = spec.manifest["model"]["device"]
        self._together = questions_together(options, device_type)
        gpus = engine.gpus_per_worker
        self._gpus = float(device_type == "cuda") if gpus is None else gpus

    def ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, QuestionResult]]:
        """Ask the questions at these places, each with its result, in their order.

        Once ``stopped`` says so only the questions that are under way are waited for. Everything of Ray that was
        started here ends with the iterator.

        Raises:
            FaultError: What went wrong in a worker, a question that no worker survives, nodes without room for any
                worker, or a head that is gone.
            InputError: What a worker could not load, or a Ray that cannot be connected to.
        """
        gc.collect()
        torch.cuda.empty_cache()  # a model that was loaded here leaves its memory to theirs
        done = fruitless = 0
        while done < len(places):
            before = done
            try:
                with closing(self._ask(places[done:], stopped)) as results:
                    for place, result in results:
                        done += 1
                        yield place, result
                return
            except _RoomLost as lost:
                self._warn(f"{lost}; goes on with those that are left")
            except _WorkersLost as lost:
                fruitless = 0 if done > before else fruitless + 1
                if fruitless == POOLS:
                    raise FaultError(
                        f"``engine='ray'``: expected workers that live, got questions that none survives: {lost}"
                    ) from None
                self._warn(f"workers of Ray died: {lost}; starts others")

    def _ask(self, places: list[int], stopped: Callable[[], bool]) -> Iterator[tuple[int, QuestionResult]]:
        """As `ask`, by one pool.

        Raises:
            _RoomLost: Nodes are gone, and not all of its workers have room any more.
            _WorkersLost: A question was asked as often as Ray does it.
        """
        groups = list(groups_of(places, self._together))
        with _Answers() as answers, _connected(self._engine) as ray:
            pool = _Pool.that_fits(ray, min(self._engine.workers, len(groups)), self._gpus, self._warn)
            answers.take(self._dataset(ray, groups, pool))
            head, done, ends = _Head(ray), 0, inf
            try:
                while done < len(places):
                    for place, begun, answer in answers.next():
                        if isinstance(answer, Exception):
                            raise answer
                        done += 1
                        yield place, answer
                        if begun > ends:  # all that was under way is here
                            return
                    if stopped() and ends == inf:
                        if not done:  # workers load models
                            return
                        ends = time.time()
                    pool.check(head.nodes())
            finally:
                head.close()

    def _dataset(self, ray: Any, groups: list, pool: _Pool) -> Any:
        """The answers to groups of places, a block each, as Ray Data has them."""
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        context.execution_no_progress_timeout_s = -1  # a question may take its time
        context.max_consecutive_actor_init_deaths = INIT_DEATHS
        asked = ray.data.from_items([{"places": list(group)} for group in groups], override_num_blocks=len(groups))
        return _map_batches(
            asked,
            self.worker,
            fn_constructor_args=(*self._setup, pool.threads),
            batch_size=None,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=pool.size, max_tasks_in_flight_per_actor=1),
            num_cpus=pool.threads,
            num_gpus=self._gpus or None,
        )


def _map_batches(dataset: Any, *given: Any, **options: Any) -> Any:
    """Of a dataset, with a limit to how often a question is asked again; Ray says that from 2.64 on it takes none."""
    taken = inspect.signature(dataset.map_batches).parameters.values()
    if any(one.name == "max_task_retries" or one.kind is one.VAR_KEYWORD for one in taken):
        options["max_task_retries"] = RETRIES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dataset.map_batches(*given, **options)


class _RoomLost(Exception):
    """Not all workers of a pool have room on the nodes that are left."""


class _WorkersLost(Exception):
    """Those that were asked a question died."""


class _Pool:
    """How many workers there are, and what each of them takes of its node."""

    def __init__(self, size: int, threads: int, gpus: float):
        self.size, self.threads, self._gpus = size, threads, gpus

    @classmethod
    def that_fits(cls, ray: Any, wanted: int, gpus: float, warn: Callable[[str], None]) -> _Pool:
        """The pool of ``wanted`` workers, or of as many as have room, with as many threads as leave them that room.

        Raises:
            FaultError: No worker has room.
        """
        nodes = _nodes(ray)
        for threads in range(max((int(node.get("CPU", 0)) for node in nodes), default=0), 0, -1):
            if _room(nodes, threads, gpus) >= wanted:
                return cls(wanted, threads, gpus)
        room = _room(nodes, 1, gpus)
        per_worker = "a CPU" + (f" and {gpus:g} GPU" if gpus else "")
        if not room:
            raise FaultError(f"``engine='ray'``: expected a node with {per_worker} for a worker, got none")
        warn(f"``workers`` {wanted}: expected nodes with {per_worker} for each, got room for {room}; starts these")
        return cls(room, 1, gpus)

    def check(self, nodes: list[dict[str, float]]) -> None:
        """Raise `_RoomLost` if actors of nodes that are gone can be started on no other: they would wait for ever."""
        room = _room(nodes, self.threads, self._gpus)
        if room < self.size:
            raise _RoomLost(f"nodes of Ray are gone: {len(nodes)} left, with room for {room} of {self.size} workers")


def _nodes(ray: Any) -> list[dict[str, float]]:
    """What each living node has."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _room(nodes: list[dict[str, float]], cpus: int, gpus: float) -> int:
    """How many workers that take this have room."""
    takes = {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}
    return sum(min(int(node.get(name, 0) // amount) for name, amount in takes.items()) for node in nodes)


class _Answers:
    """Takes the answers of a dataset as they come, in a thread of its own: Ray's waiting hears no signal."""

    def __init__(self):
        self._arrived: queue.Queue = queue.Queue(1)  # so that what is not written yet stays with Ray, which has limits
        self._closed, self._thread = threading.Event(), None

    def __enter__(self) -> _Answers:
        return self

    def __exit__(self, *error) -> None:
        """Once the connection is gone the thread ends; one that outlived it would disturb the next."""
        self._closed.set()
        if self._thread:
            self._thread.join(CONNECT_SECONDS)

    def take(self, dataset: Any) -> None:
        """Begin."""
        self._thread = threading.Thread(target=self._take, args=[dataset], daemon=True)
        self._thread.start()

    def _take(self, dataset: Any) -> None:
        try:
            for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                self._put(block)
                if self._closed.is_set():
                    return
            self._put(FaultError("``engine='ray'``: expected an answer to every question, got an end before"))
        except BaseException as error:
            self._put(error)

    def _put(self, one: pa.Table | BaseException) -> None:
        while not self._closed.is_set():
            with suppress(queue.Full):
                self._arrived.put(one, timeout=POLL_SECONDS)
                return

    def next(self) -> list[tuple[int, float, QuestionResult | Exception]]:
        """The next ones, each with its place and the time at which it was begun; none if none came for a moment.

        Raises:
            _WorkersLost: Ray gave up a question.
            FaultError: Whatever else Ray met.
        """
        try:
            block = self._arrived.get(timeout=POLL_SECONDS)
        except queue.Empty:
            return []
        if isinstance(block, FaultError):
            raise block
        if isinstance(block, BaseException):
            lost = "Actor" in type(block).__name__
            raise _WorkersLost(_in_one_line(block)) if lost else FaultError(f"``engine='ray'``: {_in_one_line(block)}")
        columns = (block[name].to_pylist() for name in ANSWER.names)
        return [(place, begun, pickle.loads(answer)) for place, begun, answer in zip(*columns, strict=True)]


class _Head:
    """The process that a Ray is run by. It is asked in a thread of its own: of a head that is gone Ray's calls hang."""

    def __init__(self, ray: Any):
        self._address = ray.get_runtime_context().gcs_address
        self._nodes, self._heard, self._closed = _nodes(ray), time.monotonic(), threading.Event()
        threading.Thread(target=self._ask, args=[ray], daemon=True).start()

    def _ask(self, ray: Any) -> None:
        while not self._closed.wait(WATCH_SECONDS):
            with suppress(Exception):
                self._nodes, self._heard = _nodes(ray), time.monotonic()

    def nodes(self) -> list[dict[str, float]]:
        """What each living node has.

        Raises:
            FaultError: The head is silent; said before Ray ends this process for it.
        """
        if time.monotonic() - self._heard > SILENT_SECONDS:
            raise FaultError(
                f"``engine='ray'``: expected the head of Ray at {self._address}, got no answer for "
                f"{SILENT_SECONDS:.0f} seconds"
            )
        return self._nodes

    def close(self) -> None:
        """Ask it no more."""
        self._closed.set()


def _touch(address: str) -> None:
    """Raise an OSError if nothing listens there."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


@contextmanager
def _connected(engine: EngineConfig) -> Iterator[Any]:
    """The module ray, connected to a cluster or to a Ray of its own on this machine, while the block runs.

    Raises:
        InputError: It cannot be connected to.
        FaultError: None could be started.
    """
    with _own_environment(engine) as folder:
        import ray  # which reads the variables
        import ray.data

        if ray.is_initialized():
            raise InputError(
                "``engine='ray'``: expected a process without Ray, got one that uses it; call ray.shutdown() first"
            )
        for name in ("ray", "ray.data"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        ray._private.worker._worker_logs_enabled = False  # what died, in lines on stdout, whatever was asked for
        handlers = {signum: signal.getsignal(signum) for signum in SIGNALS}
        try:
            _connect(ray, engine, folder)
            _take_back(handlers)
            yield ray
        finally:
            _take_back(handlers)
            _in_time(ray.shutdown)


@contextmanager
def _own_environment(engine: EngineConfig) -> Iterator[str | None]:
    """Variables that Ray reads, and a folder for one that is started here; both go again."""
    before = dict(os.environ)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    folder_of_its_own: AbstractContextManager = nullcontext()
    if engine.address is None:
        # Sockets lie in it, whose paths may have 107 bytes.
        folder_of_its_own = tempfile.TemporaryDirectory(prefix="rl-ray-", dir="/tmp", ignore_cleanup_errors=True)
        os.environ |= module_path()
        if "RAY_AUTH_TOKEN_PATH" not in os.environ and not (Path.home() / ".ray" / "auth_token").exists():
            os.environ.setdefault("RAY_AUTH_TOKEN", _token())
    try:
        with folder_of_its_own as folder:
            yield folder
    finally:
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ |= before


@cache
def _token() -> str:
    """Of every Ray that this process starts, which reads it once; else it would write one into the home folder."""
    return secrets.token_hex(32)


def _connect(ray: Any, engine: EngineConfig, folder: str | None) -> None:
    options: dict[str, Any] = {"configure_logging": False, "log_to_driver": False}
    if engine.address is None:
        options |= {"num_cpus": max(torch.get_num_threads(), engine.workers), "include_dashboard": False}
        options |= {"_temp_dir": folder, "_node_ip_address": "127.0.0.1"}
    try:
        with _hushed(), _kept_to_loopback(ray) if engine.address is None else nullcontext():
            ray.init(engine.address or "local", **options)
    except Exception as error:
        if engine.address is None:
            raise FaultError(f"``engine='ray'``: expected to start Ray, could not: {_in_one_line(error)}") from None
        raise InputError(
            f"``address`` {engine.address}: expected a Ray that has this machine as a node, could not connect: "
            f"{_in_one_line(error)}"
        ) from None


@contextmanager
def _kept_to_loopback(ray: Any) -> Iterator[None]:
    """Ray does as on systems where it has no clusters; on Linux it takes the machine's own address instead."""
    constants = ray._private.ray_constants
    before, constants.ENABLE_RAY_CLUSTER = constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = before


@contextmanager
def _hushed() -> Iterator[None]:
    """Nothing goes to stderr: Ray's C++ says there which level of lines it was told to leave out."""
    own, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(own, 2)
        os.close(own)
        os.close(nowhere)


def _take_back(handlers: dict) -> None:
    """Signals are the business of the sweep."""
    if threading.current_thread() is threading.main_thread():
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def _in_time(work: Callable[[], None]) -> None:
    """Do some work, but do not wait for long: a cluster without its head answers nothing."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PART_SECONDS)


def _in_one_line(error: BaseException) -> str:
    """The kind of an error of Ray's and how what it says begins; it brings whole tracebacks."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
