"""Shards of a run, made apart and merged: the run of one process, byte for byte, or a line that says why not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import refinelens
from refinelens.cli import main
from refinelens.config import EngineConfig, SweepConfig
from refinelens.errors import FaultError, InputError
from refinelens.machine import module_path
from refinelens.report.scope import scope_lines
from refinelens.store.results import open_run
from refinelens.sweeping.shards import merge_runs, shard_entry
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import stop_after

PART = 3  # questions per part, of 22: eight parts, the last one of a single question
# Of a manifest that say when, where and by what command a run was made, and that a folder is a merged one.
OF_THE_MAKING = ("argv", "finished", "merged", "run_id", "seconds", "started")


@pytest.fixture(scope="module")
def options():
    return SweepConfig("tiny", "tiny", (3,), "ends-middle", examples=22, device="cpu")


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The run of one process."""
    return run_sweep(options, tmp_path_factory.mktemp("whole") / "run", questions_per_part=PART)


def made(options, folder, of, **words):
    """All shards of a run."""
    return [
        run_sweep(options, folder / f"x.{i}", questions_per_part=PART, shard=f"{i}/{of}", **words).path
        for i in range(1, of + 1)
    ]


@pytest.fixture(scope="module")
def shards(options, tmp_path_factory):
    """Three shards, which tests leave as they are."""
    return made(options, tmp_path_factory.mktemp("shards"), 3)


def contents(run):
    """Every file of a run by its name, the manifest without what is of its making."""
    files = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop(run.joinpath("manifest.json").relative_to(run)))
    manifest["prefix_reuse"].pop("why")  # how far apart the first contexts of a process were in both ways
    return files, {key: value for key, value in manifest.items() if key not in OF_THE_MAKING}


@pytest.mark.medium
@pytest.mark.parametrize("of", [1, 2, 7])
def test_merged_it_is_the_run_of_one_process(options, whole, tmp_path, of):
    folders = made(options, tmp_path, of)
    asked = [open_run(folder).manifest["counts"]["questions"] for folder in folders]
    assert sum(asked) == 22 and max(asked) - min(asked) <= 2 * PART
    merged = merge_runs(folders[::-1], tmp_path / "run")
    assert contents(merged.path)[0] == contents(whole.path)[0]
    assert contents(merged.path)[1] == contents(whole.path)[1]
    assert [one["shard"] for one in merged.manifest["merged"]] == [f"{i}/{of}" for i in range(1, of + 1)]
    assert merged.manifest["seconds"] >= sum(open_run(folder).manifest["seconds"] for folder in folders)


@pytest.mark.medium
def test_a_shard_goes_on_and_a_merged_run_is_repaired(options, whole, shards, tmp_path):
    stopped = tmp_path / "x.2"
    with pytest.raises(KeyboardInterrupt):
        run_sweep(options, stopped, questions_per_part=PART, shard="2/3", progress=stop_after(4))
    with pytest.raises(InputError, match=r"x\.2: expected a finished shard, got one that is interrupted \(4 of 7 q"):
        merge_runs([shards[0], stopped, shards[2]], tmp_path / "run")
    resume_sweep(stopped, engine=EngineConfig(2))
    merged = merge_runs([shards[0], stopped, shards[2]], tmp_path / "run")
    assert contents(merged.path)[0] == contents(whole.path)[0]
    (merged.path / "predictions" / "part-00003.parquet").unlink()
    resume_sweep(merged.path)
    assert contents(merged.path)[0] == contents(whole.path)[0]


@pytest.mark.medium
def test_what_a_shard_says(shards, capsys):
    """Of its own questions it counts as a run does, and table and page name what it is a part of."""
    assert main(["show", str(shards[1])]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "This is shard 2 of 3: 7 of 22 questions; refinelens merge" in text and "(of 7)" in text


def changed(folder, tmp_path, change):
    """A copy of a shard with another manifest."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    change(manifest)
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


def other_weights(manifest):
    manifest["model"]["weights_sha256"] = "0" * 64


def other_seed(manifest):
    manifest["seed"] = manifest["arguments"]["seed"] = 1


def other_top(manifest):
    manifest["arguments"]["top"] = [1, 5]


def other_lens(manifest):
    manifest["lenses"][0]["sha256"] = "1" * 64


def other_count(manifest):
    manifest["shard"]["of"] = 4


@pytest.mark.parametrize(
    "change, words",
    [
        (other_weights, "expected model.weights_sha256 [0-9a-f]{12}, as .*x.1 has it, got 000000000000; it is a shard"),
        (other_seed, "expected seed 0, as .*x.1 has it, got 1; it is a shard of another run"),
        (other_top, r"expected top \[1\], as .*x.1 has it, got \[1, 5\]"),
        (other_lens, r"expected lenses \[\('plain', None\)\], as .*x.1 has it, got with sha256"),
        (other_count, "expected shard.of 3, as .*x.1 has it, got 4"),
    ],
)
def test_a_shard_of_another_run(shards, tmp_path, change, words):
    foreign = changed(shards[1], tmp_path, change)
    with pytest.raises(InputError, match=f"changed: {words}"):
        merge_runs([shards[0], foreign, shards[2]], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_shards_agree_on_whether_contexts_ran_in_chunks(shards, tmp_path):
    def ran(used):
        return lambda manifest: manifest.update(chunked_prefill={"used": used, "why": ""})

    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    first, second = changed(shards[0], tmp_path / "a", ran(True)), changed(shards[1], tmp_path / "b", ran(False))
    with pytest.raises(InputError, match="expected chunked_prefill.used True, as .* has it, got False"):
        merge_runs([first, second, shards[2]], tmp_path / "run")
    assert merge_runs([first, *shards[1:]], tmp_path / "run").exists


def test_names_that_differ_from_machine_to_machine(whole, shards, tmp_path):
    """Files are held to their contents, wherever they lie."""

    def moved(manifest):
        manifest["arguments"] |= {"model": "/elsewhere/tiny", "device": "auto", "lens": ["plain"]}
        manifest["model"]["device_name"] = "another processor"
        manifest["packages"]["torch"] = "9.9"

    other = changed(shards[1], tmp_path, moved)
    with (
        pytest.warns(UserWarning, match="on several devices: .*, another processor"),
        pytest.warns(UserWarning, match="several versions of torch: .*, 9.9"),
    ):
        assert len(refinelens.merge_runs([shards[0], other, shards[2]], out=tmp_path / "run").summary) == 3
    merged = open_run(tmp_path / "run")
    assert contents(merged.path)[0] == contents(whole.path)[0]
    assert merged.manifest["merged"][1]["device_name"] == "another processor"


def test_missing_doubled_damaged_and_no_shard(whole, shards, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(InputError, match="runs: expected 3 shards, got 2; missing: 2/3"):
        merge_runs([shards[0], shards[2]], out)
    twin = tmp_path / "twin"
    shutil.copytree(shards[1], twin)
    with pytest.raises(InputError, match=r"twin: expected each shard once, got 2/3 here and in .*x\.2"):
        merge_runs([*shards, twin], out)
    with pytest.raises(InputError, match="run: expected a shard, made with ``shard='I/N'``, got a whole run"):
        merge_runs([*shards[:2], whole.path], out)
    part = next((twin / "predictions").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"expected sha256 .*; ``sweep\(resume='.*twin'\)`` computes it again"):
        merge_runs([shards[0], twin, shards[2]], out)
    with pytest.raises(InputError, match="runs: expected the shards of a run, got none"):
        merge_runs([], out)
    assert not out.exists()


def test_a_folder_that_is_there(shards, tmp_path, capsys):
    """It is replaced on request alone, and never by something that fails."""
    out = tmp_path / "run"
    words = ["merge", *map(str, shards), "--out", str(out), "--no-report"]
    assert main(words) == 0
    first = contents(out)
    assert main(words) == 2
    assert "expected a new folder, got a run of the same arguments that is finished" in capsys.readouterr().err
    assert main(["merge", str(shards[0]), "--out", str(out), "--overwrite"]) == 2
    assert contents(out) == first
    assert main([*words, "--overwrite"]) == 0
    assert contents(out) == first


def test_a_shard_is_never_written_over(shards, tmp_path, capsys):
    """Also by another name of its folder."""
    for shard in shards:
        shutil.copytree(shard, tmp_path / shard.name)
    own = [tmp_path / shard.name for shard in shards]
    (tmp_path / "link").symlink_to(own[1])
    before = [contents(path) for path in own]
    for out in (*own, tmp_path / "link"):
        assert main(["merge", *map(str, own), "--out", str(out), "--overwrite"]) == 2
        assert "expected a folder of its own, got that of shard" in capsys.readouterr().err
    assert [contents(path) for path in own] == before


@pytest.mark.parametrize("there", ["nothing", "a run"])
def test_a_merge_that_is_cut_short_begins_again(whole, shards, tmp_path, monkeypatch, there):
    """It is no run to go on with: that would make here what machines have made."""
    out, copies = tmp_path / "run", []
    if there == "a run":
        shutil.copytree(whole.path, out)

    def full(source, target):
        copies.append(source)
        if len(copies) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return copy(source, target)

    copy = shutil.copyfile
    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(FaultError, match="no free disk left; .*; the same command begins again"):
            merge_runs(shards, out, overwrite=there == "a run")
    assert open_run(out).manifest["counts"]["done"] == 0
    with pytest.raises(InputError, match="``resume`` .*run: expected a run, got a merge that was stopped; merge again"):
        resume_sweep(out)
    assert contents(merge_runs(shards, out).path) == contents(whole.path)


def test_where_a_split_model_lay(shards, tmp_path):
    """In one shard, which was not held against the whole model, and so neither was the run."""

    def split(manifest):
        manifest["arguments"]["device_map"] = "auto"
        manifest["model"] |= {"places": {"": "disk"}, "whole_difference": None}

    other = changed(shards[1], tmp_path, split)
    merged = merge_runs([shards[0], other, shards[2]], tmp_path / "run")
    assert "The model was split over disk; it was not held against the whole model." in scope_lines(merged.manifest)
    assert [one["places"] for one in merged.manifest["merged"]] == [None, {"": "disk"}, None]


@pytest.mark.parametrize("text", ["", "2", "0/3", "4/3", "2/0", "1/x", "-1/3", "1/3/5", " 1/3", "01/3"])
def test_not_a_shard(text):
    with pytest.raises(InputError, match="``shard``: expected I/N such as 2/7, with I from 1 to N, got"):
        shard_entry(text, {"counts": {"questions": 22}, "questions_per_part": PART})


def test_more_shards_than_parts():
    with pytest.raises(InputError, match="``shard``: expected up to 8 shards, as 22 questions are"):
        shard_entry("1/9", {"counts": {"questions": 22}, "questions_per_part": PART})


@pytest.mark.medium
def test_a_shard_none_of_whose_questions_can_be_asked(tiny_model, tmp_path, capsys):
    """It ends well, says so, and counts in the merged run; where all are so the merge says so."""
    task, lines = tmp_path / "task.jsonl", []
    for place, answer in zip(["arven", "brosk", "calmi", "dorra"], ["red", "green", "door", "door"], strict=True):
        gold = {"title": place, "text": f"the door of {place} is {answer} .", "isgold": True}  # a door in each
        lines.append(json.dumps({"question": f"what is the door of {place} ?", "answers": [answer], "ctxs": [gold]}))
    task.write_text("\n".join(lines))
    options = SweepConfig(str(tiny_model), str(task), (2,), device="cpu")
    whole, said = run_sweep(options, tmp_path / "whole", questions_per_part=1), []
    folders = [
        run_sweep(options, tmp_path / f"x.{i}", questions_per_part=1, shard=f"{i}/4", warn=said.append).path
        for i in range(1, 5)
    ]
    assert len([line for line in said if "none of the questions of this shard could be asked (1 at 2 doc" in line]) == 2
    assert main(["show", str(folders[3])]) == 2
    assert "got none: no question of this shard could be asked" in capsys.readouterr().err
    assert contents(merge_runs(folders, tmp_path / "run").path) == contents(whole.path)
    assert contents(resume_sweep(folders[3]).path)[1]["status"] == "finished"


SLURM = Path(__file__).parents[2] / "examples" / "slurm.sh"
WORDS = ["--model", "tiny", "--task", "tiny", "--documents", "3", "--gold-positions", "ends-middle", "--examples", "22"]


def array_job(out, index, of):
    """What one job of the array runs, with the variables that SLURM sets."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    own = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_ARRAY_TASK_COUNT": str(of), "PATH": path}
    return ["bash", str(SLURM), str(out), *WORDS, "--device", "cpu"], os.environ | own | module_path()


@pytest.mark.slow
def test_an_array_of_jobs_by_submitit(tmp_path):
    """Its local executor stands for the cluster; every job is run twice, as one that was begun before."""
    submitit = pytest.importorskip("submitit", reason="runs jobs as SLURM does: pip install submitit")
    from submitit.helpers import CommandFunction

    executor = submitit.LocalExecutor(folder=tmp_path / "log")
    executor.update_parameters(timeout_min=10)
    whole = run_sweep(SweepConfig("tiny", "tiny", (3,), "ends-middle", examples=22, device="cpu"), tmp_path / "whole")
    for _ in range(2):
        commands = [array_job(tmp_path / "x", index, 3) for index in (1, 2, 3)]
        jobs = [executor.submit(CommandFunction(command, env=env, verbose=False)) for command, env in commands]
        assert all("x." in job.result() for job in jobs)
    merged = merge_runs([tmp_path / f"x.{index}" for index in (1, 2, 3)], tmp_path / "run")
    assert contents(merged.path)[0] == contents(whole.path)[0]


@pytest.mark.medium
def test_a_job_of_an_array(tmp_path):
    """Begun, and begun again."""
    command, env = array_job(tmp_path / "x", 3, 3)
    first = subprocess.run(command, env=env, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert open_run(tmp_path / "x.3").manifest["shard"] == {"index": 3, "of": 3, "questions": 22}
    assert b"finished already" in subprocess.run(command, env=env, capture_output=True).stdout
