"""Folders of results of any kind, by one of a kind made here: killed before every step, damaged, foreign, others'."""

import json
import os
import shutil
from dataclasses import dataclass
from functools import partial

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from faults import faulty_disk, full_disk_at
from refinelens.errors import FaultError, InputError
from refinelens.store.files import write_whole
from refinelens.store.folder import MANIFEST, Folder, FolderWriter, MadeOf, go_on, process_entry
from refinelens.store.process import RunLock

PARTS = 3


@dataclass(frozen=True)
class Sum:
    """A part of the kind."""

    first: int
    file: str
    sha256: str


class Sums(Folder):
    """All that a kind needs."""

    NAME = "a sum"
    MAKE = "add something"
    REMAKE = "add it up again"
    REPAIR = "adding to {path} computes it again"
    VERSION = 2
    KEYS = {"schema_version": int, "run_id": str, "status": str}
    SHAPE = {"numbers": int, "resumed": list, "parts": list}
    PART = Sum
    PARTS = "sums"
    NAMED = {"start.txt": "start_sha256"}
    DERIVED = ("total.txt",)


def new(run_id="one", numbers=PARTS):
    manifest = {"schema_version": 2, **process_entry(None), "run_id": run_id, "status": "running", "seconds": None}
    return manifest | {"numbers": numbers, "resumed": [], "start_sha256": None, "parts": []}


def add_up(path, manifest=None, overwrite=False):
    """Begin such a folder, or go on with it, and end it."""
    folder = Sums(path)
    with RunLock(path):
        folder.check_foreign()
        if folder.exists and not overwrite:
            there = folder.checked_manifest()
            manifest = go_on(there, folder.whole_parts(there), process_entry(None))
        writer = FolderWriter(folder, manifest or new())
        writer.place()
        if not folder.is_whole("start.txt", writer.manifest):
            writer.write_named("start.txt", lambda file: file.write_text("0"))
        for index in range(writer.manifest["numbers"]):
            if index not in {part["first"] for part in writer.manifest["parts"]}:
                table, part = pa.table({"sum": [index, 2 * index]}), folder.part_path(index)
                writer.append(Sum(index, part.name, writer.write(part, partial(pq.write_table, table))))
        write_whole(path / "total.txt", lambda file: file.write_text(str(total(folder))))
        writer.save(status="finished")
    return folder


def total(folder):
    return sum(sum(folder.read_part(part)["sum"].to_pylist()) for part in folder.parts_of(folder.manifest))


def killed(work, step):
    """The exit code of a process that is killed before a step on the disk, without any clearing up; 0 if it ends."""
    pid = os.fork()
    if pid == 0:
        with faulty_disk(lambda number, path: number == step and os._exit(9)):
            work()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def files_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def assert_same(path, whole):
    ours, theirs = files_of(path), files_of(whole)
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name != MANIFEST)
    assert Sums(path).manifest["parts"] == Sums(whole).manifest["parts"]


@pytest.mark.medium
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_before_every_step(tmp_path, overwrite, every):
    """And gone on with: what is overwritten is there, or the new one is; and nothing of the old one is left at last.

    All steps are slow, every fifth is not. Of what is overwritten only what can be made of the rest may be gone.
    """
    whole, old, path = add_up(tmp_path / "whole").path, tmp_path / "old", tmp_path / "sum"
    add_up(old, new("other", numbers=PARTS + 2))
    for step in range(1, 100, every):
        if overwrite:
            shutil.copytree(old, path)
        code = killed(lambda: add_up(path, new(), overwrite), step)
        if code == 0:
            break
        assert code == 9
        if overwrite and Sums(path).manifest["run_id"] == "other":
            kept = {name: content for name, content in files_of(old).items() if name not in Sums.DERIVED}
            assert files_of(path).items() >= kept.items()
        else:
            assert_same(add_up(path).path, whole)
        shutil.rmtree(path)
    assert step > 20
    assert_same(path, whole)


@pytest.mark.medium
def test_no_step_may_fail_unseen(tmp_path):
    whole, path = add_up(tmp_path / "whole").path, tmp_path / "sum"
    for step in range(1, 100):
        try:
            with full_disk_at(step):
                add_up(path)
            break
        except (OSError, FaultError):
            pass
        assert_same(add_up(path).path, whole)
        shutil.rmtree(path)
    assert step > 20


@pytest.mark.parametrize("file", ["sums/part-00001.parquet", "start.txt", "total.txt"])
def test_what_is_damaged_is_made_again(tmp_path, file):
    whole, folder = add_up(tmp_path / "whole").path, add_up(tmp_path / "sum")
    (folder.path / file).write_bytes(b"damaged")
    damaged = []
    parts = folder.whole_parts(folder.checked_manifest(), damaged.append)
    assert (len(parts), len(damaged)) == ((PARTS - 1, 1) if "part" in file else (PARTS, 0))
    assert all("got" in line and f"adding to {folder.path} computes it again" in line for line in damaged)
    assert_same(add_up(folder.path).path, whole)


def test_what_is_not_its_own_stays(tmp_path):
    folder = add_up(tmp_path / "sum")
    for name in ("notes.txt", "sums/notes.txt", ".hidden"):
        (folder.path / name).write_text("precious")
    with pytest.raises(InputError, match="expected a new folder or a sum, got other files, such as notes.txt"):
        add_up(folder.path)
    (folder.path / "notes.txt").unlink()
    add_up(folder.path, new(), overwrite=True)
    folder.remove()
    assert files_of(folder.path) == {"sums/notes.txt": b"precious", ".hidden": b"precious"}
    with pytest.raises(InputError, match="such as sums"):
        add_up(folder.path)


KNOWN = {"schema_version": 2, "run_id": "one", "status": "running"}


@pytest.mark.parametrize(
    "manifest, message",
    [
        (None, "sum: expected a sum folder with manifest.json, got none; add something"),
        ([], "expected the manifest of a sum, got something else; bring it back, or add it up again"),
        ({"schema_version": 2, "status": "running"}, "got something else"),
        (KNOWN | {"schema_version": 1}, "expected schema version 2, got 1; add it up again, or read it with"),
        (KNOWN | {"resumed": []}, "expected numbers in .*manifest.json, got none; bring it back, or add it up again"),
        (KNOWN | {"numbers": -1}, "expected numbers in .* to be a whole number, got -1"),
        (KNOWN | {"numbers": 1, "resumed": [], "parts": [{}]}, "one without its parts"),
    ],
)
def test_a_manifest_that_cannot_be_used(tmp_path, manifest, message):
    path = tmp_path / "sum"
    path.mkdir()
    if manifest is not None:
        (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=message):
        Sums(path).checked_manifest()


def test_another_that_took_the_place_is_left_alone(tmp_path):
    """As where somebody removed the lock."""
    path = tmp_path / "sum"
    path.mkdir()
    writer = FolderWriter(Sums(path), new())
    writer.place()
    add_up(path, new("other"), overwrite=True)
    before = files_of(path)
    with pytest.raises(FaultError, match="expected this process's own, got another that replaced it"):
        writer.save(status="finished")
    assert not writer.is_placed and files_of(path) == before


def test_whoever_goes_on_is_held_to_what_it_was_made_of(tmp_path):
    made_of = MadeOf(tmp_path, {"model": {"name": "tiny"}, "lenses": [{"kind": "plain"}]}, "--resume")
    made_of.require("lenses.0.kind", "plain")
    with pytest.raises(InputError, match="expected model.name tiny, as the run has it, got other; bring that back"):
        made_of.require("model.name", "other")
