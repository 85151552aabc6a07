"""Ray asks one sweep's questions: the same run, whatever befalls actors, nodes, the driver or the cluster's head."""

import os
import signal
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from faults import errors_in, wait_for
from refinelens import sweep as sweep_by_python
from refinelens.cli import main
from refinelens.config import EngineConfig, SweepConfig
from refinelens.errors import FaultError, InputError
from refinelens.store.results import open_run
from refinelens.sweeping import ray_engine
from refinelens.sweeping.ray_engine import RayWorkers, _Pool, check_ray
from refinelens.sweeping.sweep import run_sweep
from sweeps import assert_same_run

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="the package ray is not installed")
ON_RAY = ("--engine", "ray", "--workers")


@pytest.fixture(scope="module")
def options(tiny_model, many_questions):
    return SweepConfig(str(tiny_model), str(many_questions), (2, 3), device="cpu")


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The sweep by one process."""
    return run_sweep(options, tmp_path_factory.mktemp("whole") / "run", questions_per_part=4)


@pytest.fixture
def on_ray(options, tmp_path):
    """Starts the sweep, or goes on with it, with these options, which meets the faults of that name."""
    import ray_faults

    folder = tmp_path / "faults"
    folder.mkdir()

    def start(*words, faults=(), resume=False):
        for fault in faults:
            (folder / fault).touch()
        new = ["--model", options.model, "--task", options.task, "--documents", "2,3", "--device", "cpu"]
        command = ["--resume", tmp_path / "run"] if resume else [*new, "--out", tmp_path / "run"]
        log = tmp_path / "log"
        return ray_faults.start("sweep", *command, *words, log=log, FAULTS=str(folder), RAY_AUTH_MODE="disabled")

    start.folder, start.log = folder, tmp_path / "log"
    return start


@pytest.fixture
def finish(on_ray, whole, tmp_path):
    """Goes on with the sweep in one process and compares."""

    def resume(*words):
        for fault in on_ray.folder.glob("*-9"):
            fault.unlink()
        assert on_ray(*words, resume=True).wait() == 0
        assert_same_run(tmp_path / "run", whole)

    return resume


def done(path):
    return open_run(path).manifest["counts"]["done"]


def only_error(log):
    (line,) = errors_in(log)
    assert "Traceback" not in log.read_text() and "(raylet)" not in log.read_text()
    return line


@contextmanager
def three_nodes():
    """A head and two more nodes, room for a worker on each; the cluster, and its nodes by the pids of their raylets."""
    from ray.cluster_utils import Cluster

    import ray_faults

    before = dict(os.environ)
    os.environ |= ray_faults.environment() | {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    cluster = None
    try:
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        nodes = [cluster.head_node, cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)]
        yield cluster, {node.all_processes["raylet"][0].process.pid: node for node in nodes}
    finally:
        if cluster:
            cluster.shutdown()
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ |= before


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def pids_in(folder):
    return [int(path.name.removeprefix("pid-")) for path in folder.glob("pid-*")]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_ray
@pytest.mark.medium
def test_equal_to_one_process(options, whole, tmp_path, capfd):
    """Started as it is for users; nothing but our lines is printed, signals are ours again, and no file is left."""
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    engine, before, addresses = EngineConfig(2, engine="ray"), dict(os.environ), set()

    def progress(what, done, *rest):
        import ray

        if done:
            addresses.update(node["NodeManagerAddress"] for node in ray.nodes())

    given = {"engine": engine, "warn": pytest.fail, "questions_per_part": 4}
    run_sweep(options, tmp_path / "run", progress=progress, **given)
    assert addresses == {"127.0.0.1"}
    assert_same_run(tmp_path / "run", whole)
    assert open_run(tmp_path / "run").manifest["workers"] == 2
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert {name: value for name, value in os.environ.items() if name != "RAY_CLIENT_MODE"} == before
    printed = capfd.readouterr()
    assert not printed.out and "ray" not in printed.err.lower()


@needs_ray
@pytest.mark.slow
def test_a_killed_actor_loses_nothing(on_ray, whole, tmp_path):
    assert on_ray(*ON_RAY, "2", faults=["kill-5", "kill-11"]).wait() == 0
    assert_same_run(tmp_path / "run", whole)
    assert not list(on_ray.folder.glob("kill-*"))
    assert {path.read_text() for path in on_ray.folder.glob("threads-*")} == {"1"}
    assert not errors_in(on_ray.log) and "raylet" not in on_ray.log.read_text()


@needs_ray
@pytest.mark.slow
def test_a_question_that_kills_every_actor(on_ray, finish, tmp_path):
    assert on_ray(*ON_RAY, "2", faults=["always-kill-9"]).wait() == 1
    *_, line = errors_in(on_ray.log)
    assert "--engine ray: expected workers that live, got questions that none survives: Actor" in line
    assert "goes on with the finished questions" in line and done(tmp_path / "run") >= 4
    finish()


@needs_ray
@pytest.mark.slow
def test_an_exception_in_an_actor(on_ray, finish, tmp_path):
    assert on_ray(*ON_RAY, "2", faults=["raise-9"]).wait() == 1
    line = only_error(on_ray.log)
    assert f"question 9: RuntimeError: a fault in a driver; refinelens sweep --resume {tmp_path}" in line
    assert done(tmp_path / "run") == 9
    finish()


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_every_question_finish(on_ray, finish, tmp_path, signum, code):
    """Two are asked when it comes, to the actors too where it is Ctrl-C; both are there afterwards, and no actor is."""
    process, faults = on_ray(*ON_RAY, "2", faults=["hold-8", "hold-9"]), on_ray.folder
    wait_for(lambda: all((faults / f"holds-{i}").exists() for i in (8, 9)))
    actors = pids_in(faults)
    for pid in (*(actors if signum == signal.SIGINT else ()), process.pid):
        os.kill(pid, signum)
    wait_for((faults / "heard").exists)
    for i in (8, 9):
        (faults / f"hold-{i}").unlink()
    assert process.wait() == code
    assert "interrupted; the finished questions stay readable" in only_error(on_ray.log)
    assert done(tmp_path / "run") >= 10
    wait_for(lambda: not any(map(is_alive, actors)))
    finish()


@needs_ray
@pytest.mark.slow
def test_a_second_signal_ends_it_at_once(on_ray, finish):
    process, faults = on_ray(*ON_RAY, "2", faults=["hold-9"]), on_ray.folder
    wait_for((faults / "holds-9").exists)
    process.send_signal(signal.SIGINT)
    wait_for((faults / "heard").exists)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    finish()


@needs_ray
@pytest.mark.slow
def test_a_killed_driver_on_this_machine(on_ray, finish):
    process, faults = on_ray(*ON_RAY, "2", faults=["hold-9"]), on_ray.folder
    wait_for((faults / "holds-9").exists)
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(is_alive, pids_in(faults))))
    finish()


@needs_ray
@pytest.mark.slow
def test_nodes_and_drivers_are_killed(on_ray, finish, whole, tmp_path):
    """The driver in the middle; then, while a question is under way there, a node that no other has room for."""
    faults = on_ray.folder
    with three_nodes() as (cluster, nodes):
        words = (*ON_RAY, "3", "--address", cluster.address)
        process = on_ray(*words, faults=["hold-9"])
        wait_for((faults / "holds-9").exists)
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(is_alive, pids_in(faults))))
        for path in faults.iterdir():
            path.unlink()
        process = on_ray(*words, faults=[f"hold-{i}" for i in (8, 9, 10)], resume=True)
        wait_for(lambda: len(list(faults.glob("holds-*"))) == 3)
        assert {parent(pid) for pid in pids_in(faults)} == {*nodes}
        cluster.remove_node([*nodes.values()][1], allow_graceful=False)
        wait_for(lambda: "of Ray" in on_ray.log.read_text())  # they are gone, or workers are
        for i in (8, 9, 10):
            (faults / f"hold-{i}").unlink()
        assert process.wait() == 0
        words = ("of Ray are gone: 2 left", "workers of Ray died: ", "got room for 2; starts these")
        assert all(any(word in line for word in words) for line in errors_in(on_ray.log))
    assert_same_run(tmp_path / "run", whole)


@needs_ray
@pytest.mark.slow
def test_the_head_is_gone(on_ray, finish, tmp_path):
    with three_nodes() as (cluster, _):
        address = cluster.address
        process = on_ray(*ON_RAY, "3", "--address", address, faults=["hold-9"])
        wait_for((on_ray.folder / "holds-9").exists)
        cluster.head_node.kill_gcs_server()
        assert process.wait() == 1
        line = only_error(on_ray.log)
        assert f"expected the head of Ray at {address}, got no answer for 15 seconds; refinelens sweep" in line
    finish()


@needs_ray
def test_an_address_where_nothing_listens(options, tmp_path, capfd):
    words = ["--model", options.model, "--task", options.task, "--out", str(tmp_path / "run")]
    assert main(["sweep", *words, *ON_RAY, "2", "--address", "127.0.0.1:1"]) == 2
    said = "refinelens: --address 127.0.0.1:1: expected the head of a Ray that runs, got none: Connection refused\n"
    assert capfd.readouterr().err == said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("version", [None, "2.9.3"])
def test_no_ray_or_an_old_one(monkeypatch, version, tmp_path):
    monkeypatch.setattr(ray_engine, "package_version", lambda name: version)
    monkeypatch.setattr(ray_engine, "find_spec", lambda name: version)
    said = (
        f"^``engine='ray'``: expected the package ray 2.60 or newer, got {version or 'none'}; pip install 'refinelens"
    )
    with pytest.raises(InputError, match=said):
        check_ray(EngineConfig(engine="ray"))
    with pytest.raises(InputError, match=said):
        sweep_by_python("tiny", out=tmp_path / "run", engine="ray")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given, said",
    [
        ({"address": "auto"}, "``address``: expected ``engine='ray'``, which alone has this option, got processes"),
        ({"gpus_per_worker": 1}, "``gpus_per_worker``: expected ``engine='ray'``, which alone has this option"),
        ({"engine": "dask"}, "``engine``: expected processes, ray, got 'dask'"),
        ({"engine": "ray", "address": "ray://head:1"}, "``address``: expected auto or HOST:PORT, got 'ray://head:1'"),
        ({"engine": "ray", "address": "head"}, "``address``: expected auto or HOST:PORT, got 'head'"),
        ({"engine": "ray", "gpus_per_worker": "-1"}, "``gpus_per_worker``: expected a number of 0 or more, got '-1'"),
    ],
)
def test_options_that_do_not_fit(given, said):
    with pytest.raises(InputError) as error:
        EngineConfig(**given)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "cpus, gpus, wanted, each, size, threads",
    [
        ([4, 4, 4], 0, 3, 0, 3, 4),  # one on each node
        ([4, 4, 4], 0, 2, 0, 2, 4),  # of 12 CPUs six each would have room on none
        ([4, 2], 0, 3, 0, 3, 2),
        ([2, 2], 0, 5, 0, 4, 1),  # more than there are
        ([8, 8], 2, 3, 1, 3, 4),
        ([8, 8], 1, 4, 0.5, 4, 4),
        ([8, 8], 1, 4, 1, 2, 1),
    ],
)
def test_how_many_have_room(cpus, gpus, wanted, each, size, threads):
    nodes = [{"Alive": True, "Resources": {"CPU": float(n), "GPU": float(gpus)}} for n in cpus]
    dead, said = {"Alive": False, "Resources": {"CPU": 64.0}}, []
    pool = _Pool.that_fits(SimpleNamespace(nodes=lambda: [*nodes, dead]), wanted, each, said.append)
    assert (pool.size, pool.threads) == (size, threads)
    assert len(said) == (size < wanted)


def test_no_room_at_all():
    nothing = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2.0}}])
    with pytest.raises(
        FaultError, match="^``engine='ray'``: expected a node with a CPU and 1 GPU for a worker, got none"
    ):
        _Pool.that_fits(nothing, 1, 1.0, pytest.fail)


def test_gpus_of_a_worker(tmp_path):
    def gpus(device, engine):
        spec = SimpleNamespace(manifest={"model": {"device": device}})
        return RayWorkers(SweepConfig(), spec, engine, pytest.fail)._gpus

    assert gpus("cuda", EngineConfig(engine="ray")) == 1 and gpus("cpu", EngineConfig(engine="ray")) == 0
    assert gpus("cuda", EngineConfig(engine="ray", gpus_per_worker=0.5)) == 0.5
