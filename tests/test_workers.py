"""Several processes ask one sweep's questions: the same run, whatever befalls them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from faults import quick_figures
from refinelens.cli import main
from refinelens.errors import InputError
from refinelens.options import SweepOptions
from refinelens.results import open_run
from refinelens.resume import Terms
from refinelens.workers import Workers, check_workers

FAULTY_WORKER = Path(__file__).with_name("faulty_worker.py")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """One thread, as two workers have on a small machine, small parts and no figures."""
    monkeypatch.setattr("refinelens.derived.draw_figures", quick_figures)
    monkeypatch.setattr("refinelens.sweep.QUESTIONS_PER_PART", 4)
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def sweep(tiny_model, question_file, tmp_path):
    """The command line of a sweep over 18 questions, and its folder."""
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(question_file.read_text().splitlines() * 3))
    options = ["--model", tiny_model, "--task", task, "--documents", "2,3", "--device", "cpu"]
    return ["sweep", *map(str, options), "--out", str(tmp_path / "run")]


@pytest.fixture
def whole(sweep, tmp_path):
    """The same sweep by one process."""
    assert main([*sweep[:-1], str(tmp_path / "whole")]) == 0
    return open_run(tmp_path / "whole")


@pytest.fixture
def befalls(tmp_path, monkeypatch):
    """Say what befalls the workers, in the words of `faulty_worker`; returns the folder where they leave traces."""
    folder = tmp_path / "faults"
    folder.mkdir()
    monkeypatch.setattr("refinelens.workers.COMMAND", (sys.executable, str(FAULTY_WORKER), str(folder)))

    def befalls(*faults):
        for fault in faults:
            (folder / fault).touch()
        return folder

    return befalls


def assert_same(path, whole):
    """Every byte that tells of predictions, and every sum."""
    run = open_run(path)
    assert run.manifest["status"] == "finished"
    assert run.manifest["parts"] == whole.manifest["parts"] and run.manifest["counts"] == whole.manifest["counts"]
    assert run.manifest["prefix_reuse"]["used"] == whole.manifest["prefix_reuse"]["used"]
    for name in ("trajectories.parquet", "summary.csv", "paired.csv", "inverted_u.csv"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()


def one_line(error):
    assert error.startswith("refinelens: ") and error.count("\n") == 1, error
    return error


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_equal_to_one_process(sweep, whole, tmp_path, capfd):
    """Three of them: more than there are cores, and the last part is short."""
    assert main([*sweep, "--workers", "3"]) == 0
    assert_same(tmp_path / "run", whole)
    assert open_run(tmp_path / "run").manifest["workers"] == 3
    assert capfd.readouterr().err == ""


def test_a_killed_worker_loses_nothing(sweep, whole, tmp_path, capsys, befalls):
    faults = befalls("kill-5", "kill-11")
    assert main([*sweep, "--workers", "3"]) == 0
    assert_same(tmp_path / "run", whole)
    said = r"refinelens: worker \d+ was ended by SIGKILL; its question goes to another; {} of 3 left\n"
    assert re.fullmatch("".join(said.format(left) for left in (2, 1)), capsys.readouterr().err)
    assert not list(faults.glob("kill-*"))


def test_a_question_that_kills_every_worker(sweep, whole, tmp_path, capsys, befalls):
    """What was finished before it is kept; with the cause gone a resume, also by workers, lacks nothing."""
    faults = befalls("always-kill-9")
    assert main([*sweep, "--workers", "2"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "--workers 2: expected one that lives, got none; the last of them was ended by SIGKILL; refinelens" in line
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == 9
    (faults / "always-kill-9").unlink()
    assert main(["sweep", "--resume", str(tmp_path / "run"), "--workers", "2"]) == 0
    assert_same(tmp_path / "run", whole)
    assert open_run(tmp_path / "run").manifest["resumed"][0]["workers"] == 2


def test_an_exception_in_a_worker(sweep, whole, tmp_path, capsys, befalls):
    faults = befalls("raise-9")
    assert main([*sweep, "--workers", "2"]) == 1
    line = one_line(capsys.readouterr().err)
    assert f"question 9: RuntimeError: a fault in a driver; refinelens sweep --resume {tmp_path}" in line
    (faults / "raise-9").unlink()
    assert main(["sweep", "--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_question_finish(sweep, whole, tmp_path, capsys, befalls, signum, code):
    """Two are asked when it comes, to the workers too; both are there afterwards, and no worker is."""
    faults = befalls("hold-8", "hold-9")

    def stop():
        wait_for(lambda: all((faults / f"holds-{i}").exists() for i in (8, 9)))
        for pid in pids_in(faults):
            os.kill(pid, signum)
        os.kill(os.getpid(), signum)
        time.sleep(0.1)
        for i in (8, 9):
            (faults / f"hold-{i}").unlink()

    thread = threading.Thread(target=stop)
    thread.start()
    assert main([*sweep, "--workers", "2"]) == code
    thread.join()
    assert "interrupted; the finished questions stay readable" in one_line(capsys.readouterr().err)
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == 10
    assert len(pids_in(faults)) == 2 and not any(is_alive(pid) for pid in pids_in(faults))
    assert main(["sweep", "--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


def test_workers_do_not_outlive_a_killed_sweep(sweep, whole, tmp_path, befalls):
    faults = befalls("hold-9")
    code = "import sys; from refinelens import cli, sweep, workers; sweep.QUESTIONS_PER_PART = 4; "
    code += f"workers.COMMAND = {(sys.executable, str(FAULTY_WORKER), str(faults))!r}; sys.exit(cli.main(sys.argv[1:]))"
    process = subprocess.Popen([sys.executable, "-c", code, *sweep, "--workers", "2"])
    wait_for(lambda: (faults / "holds-9").exists() and open_run(tmp_path / "run").manifest["parts"])
    process.kill()
    process.wait()
    (faults / "hold-9").unlink()
    wait_for(lambda: not any(is_alive(pid) for pid in pids_in(faults)))
    assert main(["sweep", "--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


def test_a_worker_compares_what_it_loads(sweep, tmp_path, tiny_model, capsys, befalls, monkeypatch):
    """A model that changes while the sweep starts is not asked."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    start = Workers.ask

    def ask_another(self, places, stopped):
        config = model / "config.json"
        config.write_text(config.read_text().replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 0.001'))
        return start(self, places, stopped)

    monkeypatch.setattr(Workers, "ask", ask_another)
    assert main([*sweep, "--model", str(model), "--workers", "2"]) == 2
    assert "expected model.config_sha256" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def pids_in(folder):
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def is_alive(pid):
    """Whether a process runs, a zombie not counted."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_share_threads_and_gpus(monkeypatch, tmp_path):
    def environments(device, count):
        workers = Workers(SweepOptions(), Terms(tmp_path, {"model": {"device": device}}), count, pytest.fail)
        return [workers._environment(i, count) for i in range(count)]

    monkeypatch.setattr("torch.get_num_threads", lambda: 7)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [e["OMP_NUM_THREADS"] for e in environments("cpu", 3)] == ["2"] * 3
    assert {e["OMP_NUM_THREADS"] for e in environments("cpu", 9)} == {"1"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments("cuda", 3)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5a")
    assert [e["CUDA_VISIBLE_DEVICES"] for e in environments("cuda", 2)] == ["3", "GPU-5a"]


@pytest.mark.parametrize("count", [0, -1])
def test_no_such_number(count):
    with pytest.raises(InputError, match=f"--workers: expected 1 or more processes, got {count}"):
        check_workers(count)
