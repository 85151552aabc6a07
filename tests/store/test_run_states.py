"""A run that is begun, killed, damaged, gone on with and replaced in any order: hypothesis draws what befalls it.

The model is a function of the question, so that a step takes milliseconds. Every process is a fork of this one.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from faults import faulty_disk
from refinelens.store.files import write_whole
from refinelens.store.folder import go_on, process_entry
from refinelens.store.process import LOCK, RunLock
from refinelens.store.results import DERIVED, PREDICTIONS, SCHEMA_VERSION, QuestionResult, Run
from refinelens.sweeping.recorder import RunWriter

QUESTIONS, PER_PART, SUMMARY = 7, 3, DERIVED[1]
FOREIGN = ("predictions/notes.txt", ".hidden")
RESULT = {"parity": {"max_difference": 0.0, "tolerance": 1.0, "logit_range": 1.0}, "n_layers": 2}


def manifest_of(run_id):
    arguments = {"model": "m", "target": "answer", "positions": "answer", "answer_tokens": "first", "generate": 0}
    return process_entry(None) | {
        "schema_version": SCHEMA_VERSION,
        "run_id": run_id,
        "status": "running",
        "seed": 0,
        "seconds": None,
        "resumed": [],
        "questions_per_part": PER_PART,
        "lenses": [{"name": "plain", "kind": "plain"}],
        "arguments": arguments | {"top": [1]},
        "model": {"name": "m", "backend": "cpp", "dtype": "float32", "device": "cpu", **RESULT},
        "task": {"name": "t"},
        "counts": {"questions": QUESTIONS, "left_out": {}},
        "parts": [],
    }


def rows_of(run_id, place):
    """Of the third question there are none: it cannot be asked."""
    number = 0 if place == 2 else 1 + place % 2
    keys = {"documents": 2, "gold_position": 0, "lens": run_id}
    return [{"question_id": place, "answer_token": token, **keys} for token in range(number)]


def answer(run_id, place):
    rows = rows_of(run_id, place)
    left_out = {} if rows else {"2 documents": [place]}
    return QuestionResult(pa.Table.from_pylist(rows, PREDICTIONS), {"contexts": len(rows)}, left_out, {}, ())


def work(path, run_id, n_questions, overwrite):
    """What a process does: begin or go on, ask some questions, and write the table once all are asked."""
    run = Run(path)
    with RunLock(path):
        run.check_replaceable()
        resumed = run.exists and not overwrite
        manifest = manifest_of(run_id)
        if resumed:
            there = run.checked_manifest()
            run_id, manifest = there["run_id"], go_on(there, run.whole_parts(there), process_entry(None))
        writer = RunWriter(run, manifest, resumed)
        missing = writer.missing()
        for place in missing[:n_questions]:
            writer.add(place, answer(run_id, place))
        is_last = n_questions >= len(missing)
        writer.close("finished" if is_last else "interrupted")
        if is_last:
            write_whole(path / SUMMARY, lambda file: file.write_text(run_id))


class RunStates(RuleBasedStateMachine):
    """A folder, and what must be in it."""

    def __init__(self):
        super().__init__()
        self.path = Path(tempfile.mkdtemp())
        self.begun = 0  # runs
        self.kept = {}  # by run id: places that a whole part holds
        self.foreign = {}

    def teardown(self):
        shutil.rmtree(self.path)

    @property
    def manifest(self):
        return Run(self.path / "run").checked_manifest() if Run(self.path / "run").exists else None

    def whole(self):
        """Places of the questions that are there: run id, and the set."""
        manifest = self.manifest
        parts = Run(self.path / "run").whole_parts(manifest)
        return manifest["run_id"], {place for part in parts for place in range(*part.questions)}

    @rule(n_questions=st.integers(1, QUESTIONS), step=st.none() | st.integers(1, 30), overwrite=st.booleans())
    def run_a_process(self, n_questions, step, overwrite):
        """Killed before this step on the disk, without any clearing up, or not."""
        path, self.begun = self.path / "run", self.begun + 1
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with faulty_disk(lambda number, _: number == step and os._exit(9)):
                    work(path, f"run{self.begun}", n_questions, overwrite)
                code = 0
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 9) and (code == 0 or step)
        if code == 0:
            assert (path / SUMMARY).exists() or len(self.whole()[1]) < QUESTIONS
            assert not [name for name in path.rglob(".*") if name.name not in (LOCK, ".hidden")]
            assert not (path / LOCK).exists()

    @precondition(lambda self: self.manifest and any(part["file"] for part in self.manifest["parts"]))
    @rule(data=st.data(), damage=st.sampled_from(["flipped", "cut short", "removed"]))
    def damage_a_part(self, data, damage):
        files = [part["file"] for part in self.manifest["parts"] if part["file"]]
        part = self.path / "run" / "predictions" / data.draw(st.sampled_from(files))
        if part.exists() and damage == "removed":
            part.unlink()
        elif part.exists() and (whole := part.read_bytes()):
            part.write_bytes(whole[:-5] if damage == "cut short" else bytes([whole[0] ^ 1]) + whole[1:])
        run_id, self.kept[run_id] = self.whole()

    @precondition(lambda self: (self.path / "run" / "predictions").exists())
    @rule(name=st.sampled_from(FOREIGN))
    def somebody_leaves_a_file(self, name):
        self.foreign[name] = b"precious"
        (self.path / "run" / name).write_bytes(self.foreign[name])

    @invariant()
    def nothing_is_lost(self):
        """What whole parts hold stays, until another run takes the place."""
        if self.manifest:
            run_id, places = self.whole()
            assert self.kept.get(run_id, set()) <= places
            self.kept = {run_id: places}

    @invariant()
    def the_manifest_is_true(self):
        """Every part that it names has the rows of its questions, in order; the sums are those of its parts."""
        manifest, run = self.manifest, Run(self.path / "run")
        if not manifest:
            return
        run_id, parts = manifest["run_id"], run.whole_parts(manifest)
        for part in parts:
            expected = [row for place in range(*part.questions) for row in rows_of(run_id, place)]
            found = run.read_part(part, ["question_id", "answer_token", "documents", "gold_position", "lens"])
            found = found.to_pylist() if part.file else []
            assert found == expected and part.rows == len(expected)
        if manifest["status"] == "finished":
            assert [part.questions for part in run.parts_of(manifest)] == [(0, 3), (3, 6), (6, 7)]
            assert manifest["counts"]["done"] == QUESTIONS
            assert manifest["counts"]["rows"] == sum(part.rows for part in run.parts_of(manifest))

    @invariant()
    def a_table_is_of_the_run_that_the_manifest_names(self):
        """Also right after a kill: whoever reads the folder then must not see another run's numbers."""
        table = self.path / "run" / SUMMARY
        assert not table.exists() or table.read_text() == self.manifest["run_id"]

    @invariant()
    def what_is_not_its_own_stays(self):
        for name, content in self.foreign.items():
            assert (self.path / "run" / name).read_bytes() == content


TestRunStates = pytest.mark.medium(RunStates.TestCase)
TestRunStates.settings = settings(max_examples=7, stateful_step_count=8, deadline=None)


@pytest.mark.slow
class TestManyRunStates(RunStates.TestCase):
    """Longer and more of them."""

    settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
