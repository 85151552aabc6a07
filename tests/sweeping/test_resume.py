"""Sweeps that are killed, run out of disk, lose power, are damaged or interrupted: resumed, they lack no row."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from faults import at_pass, full_disk_at, wait_for
from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.errors import FaultError
from refinelens.store.folder import MANIFEST
from refinelens.store.process import LOCK, RunLock
from refinelens.store.results import DERIVED, LAYERS, PAGE, open_run
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.predict import Predictor
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from tiny import save_tiny_lens, save_tiny_model

PART = 4  # questions per part, of 14


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """14 questions: the last part is a short one; every seventh cannot be asked, all passages have its answer."""
    path = tmp_path_factory.mktemp("task") / "questions.jsonl"
    places = ["arven", "brosk", "calmi", "dorra", "elska", "fenta"]
    answers = ["red", "blue stone", "green", "black iron gate"]
    lines = []
    for i in range(14):
        place, answer = places[i % 6], "door" if i % 7 == 5 else answers[(i + i // 12) % 4]
        gold = {"title": place, "text": f"the door of {place} is {answer} .", "isgold": True}
        record = {"question": f"what is the door of {place} ?", "answers": [answer], "ctxs": [gold]}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def sweep(tiny_model, task):
    """The command line of the sweep that all faults befall, less the folder."""
    return ["sweep", "--model", str(tiny_model), "--task", str(task), "--documents", "2,3", "--device", "cpu"]


@pytest.fixture(scope="module")
def options(tiny_model, task):
    """The same sweep in this process."""
    return SweepConfig(str(tiny_model), str(task), (2, 3), device="cpu")


@pytest.fixture(scope="module")
def whole(fork_server, sweep, tmp_path_factory):
    """A run that nothing befell, and the seconds it took."""
    folder = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    assert fork_server.run(*sweep, "--out", folder / "run", log=folder / "log", part=PART) == 0
    seconds = time.monotonic() - start
    run = open_run(folder / "run")
    assert run.manifest["counts"]["left_out"] == {
        f"{n} documents: too few passages without an answer": [5, 12] for n in (2, 3)
    }
    assert [part.questions for part in run.parts_of(run.manifest)][-2:] == [(8, 12), (12, 14)]
    return run, seconds


@pytest.fixture
def stopped(fork_server, sweep, tmp_path):
    """A run that SIGTERM stopped in its tenth question: two whole parts, and one of two questions of four."""
    out = ["--out", tmp_path / "run"]
    fault = {"part": PART, "signal_at": [(10, signal.SIGTERM)]}
    assert fork_server.run(*sweep, *out, log=tmp_path / "log", **fault) == 143
    return open_run(tmp_path / "run")


def rows_of(run):
    """All rows in the folder, whether or not the manifest names their files."""
    return pq.read_table(run.parts_path).to_pylist()


def assert_lacks_nothing(path, whole):
    """The run at ``path`` is the one that nothing befell: every row, sum and table; and nothing else lies there."""
    run = open_run(path)
    assert rows_of(run) == rows_of(whole)
    assert run.manifest["status"] == "finished"
    assert run.manifest["parts"] == whole.manifest["parts"] and run.manifest["counts"] == whole.manifest["counts"]
    for name in ("summary.csv", "paired.csv", "inverted_u.csv", "trajectories.parquet"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes(), name
    ours, names = ({path.relative_to(r.path) for path in r.path.rglob("*")} for r in (run, whole))
    assert ours - {Path(PAGE)} == names - {Path(PAGE)}, "but for the page, which the command line alone writes"


def write_analysis(folder, run_id):
    """Files as `refinelens layers` leaves them, not all of them; returns them."""
    manifest = {"schema_version": 1, "run_id": run_id, "status": "finished", "lens": "plain", "seconds": 0}
    manifest |= {"arguments": {"interventions": [], "at": "all"}, "resumed": [], "questions": [0], "parts": []}
    (folder / "parts").mkdir(parents=True)
    (folder / "parts" / "part-00000.parquet").touch()
    (folder / "layers.csv").write_text("layer")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return files_in(folder)


def files_in(folder):
    return {file.relative_to(folder): file.read_bytes() for file in folder.rglob("*.*") if file.is_file()}


def one_line(error):
    assert error.startswith("refinelens: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("wanted, different", [(4, 2), pytest.param(40, 3, marks=pytest.mark.slow)])
def test_killed_at_random_moments(fork_server, sweep, whole, tmp_path, wanted, different):
    """Killed random times after random questions, and so are resumes of killed ones; then resumed to the end."""
    whole, seconds = whole
    moments, kills, places = random.Random(0), 0, set()
    for number in range(2 * wanted):
        path, log = tmp_path / f"run{number}", tmp_path / "log"
        for _ in range(2):
            command = ["sweep", "--resume"] if (path / MANIFEST).exists() else [*sweep, "--out"]
            moment = moments.randint(0, 12), max(1e-6, moments.uniform(0, 0.2) * seconds)
            if fork_server.run(*command, path, log=log, part=PART, kill_after=moment) != -signal.SIGALRM:
                break
            kills += 1
            places.add(len(open_run(path).manifest["parts"]) if (path / MANIFEST).exists() else None)
        command = ["sweep", "--resume"] if (path / MANIFEST).exists() else [*sweep, "--out"]
        assert fork_server.run(*command, path, log=log, part=PART) == 0, log.read_text()
        assert_lacks_nothing(path, whole)
        shutil.rmtree(path)
        if kills >= wanted:
            break
    assert kills >= wanted and len(places) >= different, f"{kills} kills, with so many parts: {places}"


# Only the first steps differ in a new folder; one that is overwritten takes about 60. `make test` has a few of them;
# every step of the same writer, with a model that takes no time, is in `test_run_states.py` and `test_folder.py`.
@pytest.mark.parametrize(
    "overwrite, steps",
    [
        (False, range(1, 11, 3)),
        (True, range(1, 102, 17)),
        pytest.param(False, range(1, 11), marks=pytest.mark.slow, id="False-every"),
        pytest.param(True, range(1, 102), marks=pytest.mark.slow, id="True-every"),
    ],
)
@pytest.mark.medium
def test_killed_before_every_step_on_the_disk(fork_server, sweep, tmp_path, overwrite, steps):
    """Before each flush, rename and removal in turn. A run that was to be overwritten is there, or the new one is."""
    small = [*sweep, "--documents", "1", "--reuse-prefix", "off", "--examples", "3"]
    log, path, old, whole = (tmp_path / name for name in ("log", "run", "old", "whole"))
    for out, seed in ((old, "1"), (whole, "0")):
        assert fork_server.run(*small, "--seed", seed, "--out", out, log=log, part=1) == 0
    old, whole = open_run(old), open_run(whole)
    analysis = write_analysis(old.path / LAYERS, old.manifest["run_id"])
    for step in steps:
        command = [*small, "--out", path]
        if overwrite:
            shutil.copytree(old.path, path)
            command.append("--overwrite")
        status = fork_server.run(*command, log=log, part=2, kill_at_step=step)
        if status == 0:
            assert not (path / LAYERS).exists()
            break
        assert status == -signal.SIGKILL, log.read_text()
        if overwrite and open_run(path).manifest["run_id"] == old.manifest["run_id"]:
            assert rows_of(open_run(path)) == rows_of(old)
            assert files_in(path / LAYERS) == analysis
        elif (path / MANIFEST).exists():
            assert fork_server.run("sweep", "--resume", path, log=log) == 0, log.read_text()
            assert not (path / LAYERS).exists()
            assert rows_of(open_run(path)) == rows_of(whole)
            assert open_run(path).manifest["counts"] == whole.manifest["counts"]
            hidden = {name for name in os.listdir(path) + os.listdir(path / "predictions") if name[0] == "."}
            assert hidden <= {LOCK}, "of a run that was killed when all was done, and held by nobody"
        shutil.rmtree(path, ignore_errors=True)
    assert 20 < step or not overwrite


@pytest.mark.medium
@pytest.mark.parametrize("damage", ["truncated", "emptied", "bit flipped", "removed"])
@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_a_damaged_part_is_found_named_and_computed_again(state, damage, whole, request, tmp_path, capsys):
    whole, path = whole[0], tmp_path / state
    shutil.copytree(whole.path if state == "finished" else request.getfixturevalue("stopped").path, path)
    part = path / "predictions" / "part-00001.parquet"
    data = bytearray(part.read_bytes())
    place = random.Random(damage + state).randrange(len(data))
    if damage == "bit flipped":
        data[place] ^= 1 << place % 8
    part.write_bytes(data[:place] if damage == "truncated" else data if damage == "bit flipped" else b"")
    if damage == "removed":
        part.unlink()
    assert main(["show", str(path)]) == 2
    line = one_line(capsys.readouterr().err)
    assert str(part) in line and f"refinelens sweep --resume {path} computes it again" in line
    assert main(["sweep", "--resume", str(path)]) == 0
    assert one_line(capsys.readouterr().err) == line
    assert_lacks_nothing(path, whole)


@pytest.mark.medium
def test_power_loss_before_a_rename(whole, stopped, capsys):
    """Temporary files without their names, files that no manifest names, in every combination a loss can leave."""
    whole, parts = whole[0], stopped.parts_path
    good = (whole.parts_path / "part-00003.parquet").read_bytes()
    (parts / ".part-00002.parquet.tmp").write_bytes(good[:100])
    (parts / "part-00002.parquet").write_bytes(b"")  # renamed, its bytes lost, the manifest not yet written
    (parts / "part-00003.parquet").write_bytes(good)
    (parts / "part-00004-first-1.parquet").write_bytes(good)
    for name in (MANIFEST, *DERIVED):
        (stopped.path / f".{name}.tmp").write_bytes(b"{")
    (stopped.path / LOCK).write_text('{"pid": 1')
    assert main(["show", str(stopped.path)]) == 0
    assert "10 of 14 questions" in capsys.readouterr().out
    assert main(["sweep", "--resume", str(stopped.path)]) == 0
    assert_lacks_nothing(stopped.path, whole)


@pytest.mark.medium
@pytest.mark.parametrize("signum, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_lets_the_question_finish(fork_server, sweep, whole, tmp_path, capsys, signum, code):
    """Three times, the last one in the first question after a resume; every time one question more is there."""
    whole, path, log = whole[0], tmp_path / "run", tmp_path / "log"
    for done, command in ((10, [*sweep, "--out"]), (11, ["sweep", "--resume"]), (12, ["sweep", "--resume"])):
        at = 10 if done == 10 else 1
        assert fork_server.run(*command, path, log=log, part=PART, signal_at=[(at, signum)]) == code
        assert f"interrupted; the finished questions stay readable, refinelens sweep --resume {path}" in log.read_text()
        run = open_run(path)
        assert run.manifest["status"] == "interrupted" and run.manifest["counts"]["done"] == done
        assert rows_of(run) == rows_of(whole)[: len(rows_of(run))]
        assert main(["show", str(path)]) == 0
        assert f"{done} of 14 questions; refinelens sweep --resume goes on with it" in capsys.readouterr().out
    assert main(["sweep", "--resume", str(path)]) == 0
    assert_lacks_nothing(path, whole)
    assert len(open_run(path).manifest["resumed"]) == 3


def test_a_signal_while_a_resume_loads(stopped, capsys):
    """What was finished before is there."""
    before = (stopped.path / MANIFEST).read_bytes()
    with at_pass(lambda ids, states: os.kill(os.getpid(), signal.SIGTERM)):  # of the gates
        assert main(["sweep", "--resume", str(stopped.path)]) == 143
    kept = f"the finished questions stay readable, refinelens sweep --resume {stopped.path} goes on with them"
    assert one_line(capsys.readouterr().err) == f"refinelens: interrupted; {kept}\n"
    assert (stopped.path / MANIFEST).read_bytes() == before


def test_a_second_signal_stops_at_once(fork_server, sweep, whole, tmp_path):
    whole, path, log = whole[0], tmp_path / "run", tmp_path / "log"
    twice = [(10, signal.SIGINT), (10, signal.SIGTERM)]
    assert fork_server.run(*sweep, "--out", path, log=log, part=PART, signal_at=twice) == 143
    assert open_run(path).manifest["counts"]["done"] == 8, "nothing more is written"
    assert fork_server.run("sweep", "--resume", path, log=log) == 0
    assert_lacks_nothing(path, whole)


@pytest.mark.medium
def test_two_processes_and_one_folder(fork_server, sweep, whole, tmp_path, capsys):
    """Whoever comes second is told who is there, whatever it wants; once the first is killed the folder is free."""
    whole, path, log = whole[0], tmp_path / "run", tmp_path / "log"
    pid = fork_server.start(*sweep, "--out", path, log=log, part=PART, hold_at=6)
    wait_for((tmp_path / "log.holds").exists)
    for command in ([*sweep, "--out"], [*sweep, "--overwrite", "--out"], ["sweep", "--resume"]):
        assert main([*command, str(path)]) == 2
        assert f"held by process {pid} on {os.uname().nodename} since 20" in one_line(capsys.readouterr().err)
    assert main(["show", str(path)]) == 0
    assert "4 of 14 questions" in capsys.readouterr().out and not (path / "summary.csv").exists()
    assert open_run(path).manifest["finished"] is None
    os.kill(pid, signal.SIGKILL)
    assert fork_server.wait(pid) == -signal.SIGKILL and (path / LOCK).exists()
    assert main(["sweep", "--resume", str(path)]) == 0
    assert_lacks_nothing(path, whole)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 16 MB in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no permission to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


# Pages left: none; for some of a part; for a part and not its manifest; for some tables; slow: for some figures.
@pytest.mark.parametrize(
    "pages", [0, 2, 4, 10, *(pytest.param(pages, marks=pytest.mark.slow) for pages in (1, 3, 6, 20, 30, 40))]
)
@pytest.mark.medium
def test_a_full_disk(small_disk, options, whole, request, pages):
    """A real one, filled by somebody else before the tenth question is asked."""
    if pages >= 20:
        request.getfixturevalue("drawn")
    path, ballast = small_disk / "run", small_disk / "ballast"

    def fill(stage, done, total, *so_far):
        if done == 9:
            free = os.statvfs(small_disk)
            with ballast.open("wb") as file:
                file.write(bytes(max(free.f_bfree - pages, 0) * free.f_bsize))

    said = "no free disk left; what was written stays readable; free some; ``sweep.resume="
    with pytest.raises(FaultError, match=said):
        run_sweep(options, path, progress=fill, questions_per_part=PART)
    assert not list(path.rglob("*.tmp"))
    assert rows_of(open_run(path)) == rows_of(whole[0])[: len(rows_of(open_run(path)))]
    ballast.unlink()
    assert main(["sweep", "--resume", str(path)]) == 0
    assert_lacks_nothing(path, whole[0])


@pytest.mark.medium
@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_no_write_may_fail_unseen(options, tmp_path, every):
    """Every seventh flush, rename and removal, or every one, fails as on a full disk; needs no right to mount one."""
    small = replace(options, documents=(1,), reuse_prefix="off", examples=3)
    whole, path = run_sweep(small, tmp_path / "whole", questions_per_part=2), tmp_path / "run"
    for step in range(1, 100, every):
        try:
            with full_disk_at(step):
                run_sweep(small, path, questions_per_part=2)
            break
        except FaultError as error:
            assert "no free disk left" in str(error)
        if (path / MANIFEST).exists():
            resume_sweep(path)
            assert rows_of(open_run(path)) == rows_of(whole)
            assert open_run(path).manifest["counts"] == whole.manifest["counts"]
        shutil.rmtree(path, ignore_errors=True)
    assert step > 20


@pytest.mark.medium
@pytest.mark.parametrize(
    "error, words",
    [
        (RuntimeError("a fault in\na driver"), "RuntimeError: a fault in\na driver"),
        (OSError(errno.EMFILE, "Too many open files"), "OSError: [Errno 24] Too many open files"),
    ],
)
def test_an_exception_in_a_question(options, whole, tmp_path, error, words):
    path, done = tmp_path / "run", [0]

    def fault(ids, states):
        if done[-1] == 9:
            raise error

    named = rf"^question 9, \d documents, gold position \d: {re.escape(words)}; ``sweep.resume='{path}'.`` goes on"
    with at_pass(fault), pytest.raises(FaultError, match=named):
        run_sweep(options, path, progress=lambda stage, asked, *_: done.append(asked), questions_per_part=PART)
    assert open_run(path).manifest["counts"]["done"] == 9
    resume_sweep(path)
    assert_lacks_nothing(path, whole[0])


def test_an_exception_while_contexts_are_built(options):
    inputs = SweepInputs.load(options)

    class Builder:
        def build(self, question):
            raise OSError(errno.EMFILE, "Too many open files")

    predictor = Predictor(options, Builder(), inputs.loaded, inputs.logit_lens, inputs.lenses)
    with pytest.raises(FaultError, match=r"^question 0: OSError: \[Errno 24\] Too many open files$"):
        predictor.ask(inputs.questions, [0])


def save_other_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))


def save_other_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace("<unk>", "<unknown>"))


def save_other_end(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [7, 9]}))


def in_manifest(**changes):
    """A run that was made elsewhere."""

    def change(folder, run):
        manifest = run.manifest
        for field, value in changes.items():
            place = manifest
            *path, last = field.split("__")
            for key in path:
                place = place[key]
            place[last] = value
        run.write_manifest(manifest)

    return change


@pytest.mark.medium
@pytest.mark.parametrize(
    "field, change",
    [
        ("model.config_sha256", lambda here, run: save_other_config(here / "model")),
        ("model.weights_sha256", lambda here, run: save_tiny_model(here / "model", seed=1)),
        ("model.tokenizer_sha256", lambda here, run: save_other_tokenizer(here / "model")),
        ("model.end_ids", lambda here, run: save_other_end(here / "model")),
        ("model.dtype", in_manifest(model__dtype="bfloat16")),
        ("model.device", in_manifest(model__device="cuda")),
        ("model.backend", in_manifest(model__backend="triton")),
        ("task.sha256", lambda here, run: (here / "task.jsonl").write_text((here / "task.jsonl").read_text() + "\n")),
        ("template", lambda here, run: (here / "template").write_text("{documents}\n{question} !")),
        ("lenses.1.sha256", lambda here, run: save_tiny_lens(here / "lens", here / "model", scale=0.2)),
        ("schema version", in_manifest(schema_version=99)),
    ],
)
def test_a_run_of_something_else_is_refused(field, change, task, tmp_path, capsys):
    """Names the field and both values, and leaves every byte of the run as it is."""
    model, template, path = save_tiny_model(tmp_path / "model"), tmp_path / "template", tmp_path / "run"
    template.write_text("{documents}\n{question}")
    shutil.copy(task, tmp_path / "task.jsonl")
    lens = save_tiny_lens(tmp_path / "lens", model, scale=0.1)
    command = ["sweep", "--model", model, "--task", tmp_path / "task.jsonl", "--template", template, "--documents", "2"]
    command += ["--lens", f"plain,{lens}", "--device", "cpu", "--examples", "6", "--out", path, "--generate", "1"]
    assert main(list(map(str, command))) == 0
    run = open_run(path)
    run.write_manifest(run.manifest | {"status": "interrupted"})
    change(tmp_path, run)
    before = {file: file.read_bytes() for file in path.rglob("*.*")}
    capsys.readouterr()
    assert main(["sweep", "--resume", str(path)]) == 2
    line = one_line(capsys.readouterr().err)
    words = re.search(rf"expected {field} (.+), as the run has it, got (.+); bring that back", line)
    if field == "schema version":
        words = re.search(r"expected schema version (6), got (99);", line)
    assert words and words[1] != words[2], line
    assert {file: file.read_bytes() for file in path.rglob("*.*")} == before


@pytest.mark.medium
def test_resume_of_a_finished_run_shows_it(whole, tmp_path, capsys):
    path = tmp_path / "run"
    shutil.copytree(whole[0].path, path)
    assert main(["show", str(path)]) == 0
    table = capsys.readouterr().out
    (path / "summary.csv").unlink()  # as when it was killed before its tables were written
    code = f"import sys; from refinelens.cli import main; main(['sweep', '--resume', {str(path)!r}]); "
    done = subprocess.run([sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0 and done.stdout.decode() == f"{path}: finished already\n\n{table}"
    assert_lacks_nothing(path, whole[0])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--resume", "RUN", "--seed", "0"], "--resume: expected no other option but --workers, --engine,"),
        (["--overwrite", "--resume=RUN"], "--gpus-per-worker: the run has its own, got --over"),
        (["--resume", "RUN/predictions"], "expected a run folder with manifest.json, got none"),
        (["--resume", "RUN/nowhere"], "expected a run folder with manifest.json, got none"),
    ],
)
def test_resume_of_nothing_or_with_options(words, message, whole, capsys):
    words = [word.replace("RUN", str(whole[0].path)) for word in words]
    assert main(["sweep", *words]) == 2
    assert message in one_line(capsys.readouterr().err)
    assert not (whole[0].path / "nowhere").exists()


@pytest.mark.medium
def test_a_run_without_rows_yet(fork_server, sweep, whole, tmp_path, capsys):
    """Killed in its first part: it has a manifest and nothing else."""
    path, log = tmp_path / "run", tmp_path / "log"
    code = fork_server.run(*sweep, "--out", path, log=log, part=PART, signal_at=[(2, signal.SIGKILL)])
    assert code == -signal.SIGKILL
    assert main(["show", str(path)]) == 2
    assert "expected a run with rows, got none yet; refinelens sweep --resume" in one_line(capsys.readouterr().err)
    assert main([*sweep, "--out", str(path)]) == 2
    line = one_line(capsys.readouterr().err)
    assert "got a run of the same arguments that is unfinished (0 of 14 questions); go on with refinelens sweep" in line
    assert main(["layers", str(path)]) == 2
    line = one_line(capsys.readouterr().err)
    assert f"got one that is unfinished (0 of 14 questions); refinelens sweep --resume {path} goes on with it" in line
    with RunLock(path):
        assert main(["layers", str(path)]) == 2
    assert "expected a finished run, got one that is running; wait for it" in one_line(capsys.readouterr().err)
    assert main(["sweep", "--resume", str(path)]) == 0
    assert_lacks_nothing(path, whole[0])
