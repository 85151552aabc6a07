"""Several processes ask one sweep's questions: the same run, whatever befalls them."""

import errno
import os
import re
import shutil
import signal
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest

from faults import errors_in, wait_for
from refinelens.cli import main
from refinelens.config import EngineConfig, SweepConfig
from refinelens.errors import FaultError, InputError
from refinelens.machine import PACKAGE_ROOT, module_path
from refinelens.store.results import QuestionResult, open_run
from refinelens.sweeping.run_spec import RunSpec
from refinelens.sweeping.sweep import run_sweep
from refinelens.sweeping.workers import Workers, _Worker
from sweeps import assert_same_run

HAS_PROC = Path("/proc/self/stat").exists()
FAULT_FREE = {"part": 4}


@pytest.fixture(scope="module")
def sweep(tiny_model, many_questions):
    """The command line of a sweep, less the folder."""
    words = ["--model", tiny_model, "--task", many_questions, "--documents", "2,3", "--device", "cpu"]
    return ["sweep", *map(str, words)]


@pytest.fixture(scope="module")
def whole(fork_server, sweep, tmp_path_factory):
    """The sweep by one process."""
    folder = tmp_path_factory.mktemp("whole")
    assert fork_server.run(*sweep, "--out", folder / "run", log=folder / "log", **FAULT_FREE) == 0
    return open_run(folder / "run")


@pytest.fixture
def by_workers(fork_server, sweep, tmp_path):
    """Starts the sweep with this many workers, which meet what ``faults`` say; pid, log and their folder of traces."""

    def start(count, *faults, options=()):
        folder, log = tmp_path / "faults", tmp_path / "log"
        folder.mkdir()
        for fault in faults:
            (folder / fault).touch()
        command = [*sweep, "--workers", count, "--out", tmp_path / "run", *options]
        return fork_server.start(*command, log=log, workers_meet=str(folder), **FAULT_FREE), log, folder

    return start


@pytest.fixture
def finish(fork_server, whole, tmp_path):
    """Goes on with the sweep, once the fault is gone, and compares."""

    def resume(*options):
        command = ["sweep", "--resume", tmp_path / "run", *options]
        fault = {"workers_meet": str(tmp_path / "faults")} if options else {}
        assert fork_server.run(*command, log=tmp_path / "log", **FAULT_FREE, **fault) == 0
        assert_same(tmp_path / "run", whole)

    return resume


def assert_same(path, whole):
    run = assert_same_run(path, whole)
    assert run.manifest["prefix_reuse"]["used"] == whole.manifest["prefix_reuse"]["used"]


def only_error(log):
    (line,) = errors_in(log)
    return line


@pytest.mark.slow
def test_equal_to_one_process(tiny_model, many_questions, whole, tmp_path, capfd, threads):
    """Started as they are for users; the last part is short. `test_batches.py` has this of workers that are forked."""
    threads(1)  # as the run has that it is compared with
    options = SweepConfig(str(tiny_model), str(many_questions), (2, 3), device="cpu")
    run_sweep(options, tmp_path / "run", engine=EngineConfig(2), warn=pytest.fail, questions_per_part=4)
    assert_same(tmp_path / "run", whole)
    assert open_run(tmp_path / "run").manifest["workers"] == 2
    assert capfd.readouterr().err == ""


def test_a_killed_worker_loses_nothing(fork_server, by_workers, whole, tmp_path):
    pid, log, faults = by_workers(3, "kill-5", "kill-11")
    assert fork_server.wait(pid) == 0
    assert_same(tmp_path / "run", whole)
    assert open_run(tmp_path / "run").manifest["workers"] == 3
    said = r"refinelens: worker \d+ was ended by SIGKILL; its question goes to another; {} of 3 left"
    for left, line in zip((2, 1), errors_in(log), strict=True):
        assert re.fullmatch(said.format(left), line)
    assert not list(faults.glob("kill-*"))


def test_a_question_that_kills_every_worker(fork_server, by_workers, finish, tmp_path):
    """What was finished before it is kept; with the cause gone a resume, also by workers, lacks nothing."""
    pid, log, faults = by_workers(2, "always-kill-9")
    assert fork_server.wait(pid) == 1
    line = errors_in(log)[-1]
    assert "--workers 2: expected one that lives, got none; the last of them was ended by SIGKILL; refinelens" in line
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == 9
    (faults / "always-kill-9").unlink()
    finish("--workers", 2)
    assert open_run(tmp_path / "run").manifest["resumed"][0]["workers"] == 2


def test_an_exception_in_a_worker(fork_server, by_workers, finish, tmp_path):
    pid, log, _ = by_workers(2, "raise-9")
    assert fork_server.wait(pid) == 1
    line = only_error(log)
    assert f"question 9: RuntimeError: a fault in a driver; refinelens sweep --resume {tmp_path}" in line
    finish()


@pytest.mark.medium
def test_no_room_for_a_process(tmp_path, monkeypatch):
    """What is said is about processes, not about the disk, and the one that was started ends."""
    ended = []
    first = SimpleNamespace(pid=0, kill=lambda: ended.append(first), wait=lambda: -signal.SIGKILL)
    answers = iter([first, BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")])

    def start(*arguments, **options):
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("subprocess.Popen", start)
    said = "^``workers`` 3: expected 3 processes, could not start number 2: Resource temporarily unavailable; use fewer"
    workers = Workers(SweepConfig(), RunSpec(tmp_path, {"model": {"device": "cpu"}}, "out"), 3, pytest.fail)
    with pytest.raises(FaultError, match=said):
        next(workers.ask([0, 1, 2], lambda: False))
    assert ended == [first]


def test_no_room_for_any_process_leaves_no_run(sweep, tmp_path, capfd, monkeypatch):
    """Here there is no Python to start; the command says it in one line."""
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    assert main([*sweep, "--workers", "3", "--out", str(tmp_path / "run")]) == 1
    said = "--workers 3: expected 3 processes, could not start number 1: No such file or directory; use fewer"
    assert capfd.readouterr().err == f"refinelens: {said}\n"
    assert not (tmp_path / "run").exists()


def test_a_file_that_a_worker_cannot_use():
    """It is said to be the worker's, not one of the run's."""
    ours, theirs = Pipe()
    theirs.send(OSError(errno.EMFILE, "Too many open files"))
    with pytest.raises(FaultError, match=r"^worker 7: OSError: \[Errno 24\] Too many open files$"):
        _Worker(SimpleNamespace(pid=7), ours).receive()


@pytest.mark.parametrize(
    "signum, code", [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)]
)
def test_a_signal_lets_every_question_finish(fork_server, by_workers, finish, tmp_path, signum, code):
    """Two are asked when it comes, to the workers too; both are there afterwards, those before them, and no worker."""
    late = range(8, 16)
    pid, log, faults = by_workers(2, *(f"hold-{i}" for i in late))
    wait_for(lambda: len({path.read_text() for path in faults.glob("holds-*")} - {""}) == 2)
    asked = [i for i in late if (faults / f"holds-{i}").exists()]
    workers = pids_in(faults)
    for each in (*workers, pid):
        os.kill(each, signum)
    wait_for((tmp_path / "log.heard").exists)
    for i in late:
        (faults / f"hold-{i}").unlink()
    assert fork_server.wait(pid) == code
    assert "interrupted; the finished questions stay readable" in only_error(log)
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == max(asked) + 1 and len(asked) == 2
    assert len(workers) == 2 and not any(map(is_alive, workers))
    finish()


@pytest.fixture
def pair(tmp_path):
    """Two workers that are played here: what asks them, both of them, and the ends at which they hear and answer."""
    (ours_a, a), (ours_b, b) = Pipe(), Pipe()
    processes = [SimpleNamespace(pid=pid, kill=lambda: None, wait=lambda: -signal.SIGKILL) for pid in (1, 2)]
    both = [_Worker(process, ours) for process, ours in zip(processes, (ours_a, ours_b), strict=True)]
    a.send(None), b.send(None)  # ready
    lines = []
    asks = Workers(SweepConfig(), RunSpec(tmp_path, {"model": {"device": "cpu"}}, "out"), 2, lines.append)
    return asks, both, a, b, lines


def answered(end):
    """What a worker is asked, and what comes next, which it answers."""
    heard = end.recv()
    for _ in heard[0]:
        end.send(QuestionResult(None, {}, {}, {}, ()))
    return heard


def test_what_a_dead_worker_would_have_been_asked_goes_to_another(pair):
    """What it was asked comes first, then what it was told to expect."""
    asks, both, a, b, lines = pair
    heard, rounds = [], iter(range(1000))

    def each_round():
        next(rounds)
        if not b.closed and b.poll():
            assert b.recv() == ((2,), (3,))
            b.close()
        elif b.closed and a.poll():
            heard.append(answered(a))

    assert [place for place, _ in asks._ask(both, list(range(5)), each_round)] == [0, 1, 2, 3, 4]
    assert heard == [((0,), (1,)), ((1,), (2,)), ((2,), (3,)), ((3,), (4,)), ((4,), ())]
    assert lines == ["worker 2 was ended by SIGKILL; its question goes to another; 1 of 2 left"]


def test_a_stop_asks_what_comes_before_a_question_under_way(pair):
    """And nothing behind it; without the former its answer would be thrown away."""
    asks, both, a, b, _ = pair
    heard, rounds = [], iter(range(1000))

    def stopped():
        next(rounds)
        heard.extend(answered(end) for end in (a, b) if end.poll())
        return bool(heard)

    assert [place for place, _ in asks._ask(both, list(range(9)), stopped)] == [0, 1, 2]
    assert heard == [((0,), (1,)), ((2,), (3,)), ((1,), ())]


@pytest.mark.skipif(not HAS_PROC, reason="the system does not say whether a process runs")
def test_workers_do_not_outlive_a_killed_sweep(fork_server, by_workers, finish, tmp_path):
    pid, _, faults = by_workers(2, "hold-9")
    wait_for(lambda: (faults / "holds-9").exists() and open_run(tmp_path / "run").manifest["parts"])
    os.kill(pid, signal.SIGKILL)
    assert fork_server.wait(pid) == -signal.SIGKILL
    (faults / "hold-9").unlink()
    wait_for(lambda: not any(map(is_alive, pids_in(faults))))
    finish()


def test_a_worker_compares_what_it_loads(fork_server, by_workers, tmp_path, tiny_model):
    """A model that changes while the sweep starts is not asked."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    pid, log, faults = by_workers(2, "hold-start", options=["--model", model])
    wait_for((faults / "holds-start").exists)
    config = model / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 0.001'))
    (faults / "hold-start").unlink()
    assert fork_server.wait(pid) == 2
    assert f"--out {tmp_path / 'run'}: expected model.config_sha256" in only_error(log)
    assert not (tmp_path / "run").exists()


def pids_in(folder):
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def is_alive(pid):
    """Whether a process runs, a zombie not counted; on a system without /proc no process does."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_share_threads_and_gpus(monkeypatch, tmp_path, threads):
    def environments(device, count):
        workers = Workers(SweepConfig(), RunSpec(tmp_path, {"model": {"device": device}}, "out"), count, pytest.fail)
        return [workers._environment(i, count) for i in range(count)]

    threads(7)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [e["OMP_NUM_THREADS"] for e in environments("cpu", 3)] == ["2"] * 3
    assert {e["OMP_NUM_THREADS"] for e in environments("cpu", 9)} == {"1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments("cuda", 3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments("cuda", 2)] == ["3", "GPU-5a"]


def test_a_worker_is_deaf_to_the_current_folder(monkeypatch, tmp_path):
    """Started from a folder whose modules have names of the standard library, a real one answers."""
    for name in ("tempfile", "socket"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not the one you want')")
    monkeypatch.chdir(tmp_path)
    workers = Workers(SweepConfig(), RunSpec(tmp_path, {"model": {"device": "cpu"}}, "out"), 1, pytest.fail)
    workers._setup = ("neither options nor spec", None, None)
    worker = workers._start(0, 1)
    with pytest.raises(ValueError, match="too many values to unpack"):
        worker.receive()
    assert worker.process.wait() == 0
    worker.end()


@pytest.mark.parametrize(
    "path, imported",
    [
        (["", "/first", PACKAGE_ROOT, "/last"], ["/first", PACKAGE_ROOT, "/last"]),
        (["", "/first"], [PACKAGE_ROOT, "/first"]),
    ],
)
def test_a_process_imports_this_package(monkeypatch, path, imported):
    """Wherever it was found: on the path, or by the current folder or an import hook."""
    monkeypatch.setattr("sys.path", path)
    assert module_path() == {"PYTHONPATH": os.pathsep.join(imported)}


@pytest.mark.parametrize("count", [0, -1])
def test_no_such_number(count, tmp_path):
    with pytest.raises(InputError, match=f"``workers``: expected 1 or more processes, got {count}"):
        run_sweep(SweepConfig(), tmp_path / "run", engine=EngineConfig(count))
    assert not (tmp_path / "run").exists()
