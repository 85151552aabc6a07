"""Parts are written and contexts built beside the passes: in order, the same bytes, no error lost."""

import errno
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from refinelens.config import SweepConfig
from refinelens.errors import FaultError, InputError
from refinelens.store.process import Interrupted
from refinelens.store.results import open_run
from refinelens.sweeping import recorder, worker
from refinelens.sweeping.contexts import ContextBuilder
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.predict import Predictor
from refinelens.sweeping.recorder import RunWriter
from refinelens.sweeping.run_spec import RunSpec
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    return SweepConfig(str(tiny_model), str(question_file), (2,), device="cpu", alias="first")


@pytest.fixture(scope="module")
def inputs(options):
    return SweepInputs.load(options)


@pytest.fixture
def held(monkeypatch):
    """Parts are not written before the event is set; the names of those that are."""
    may_go, names, own = threading.Event(), [], recorder.write_rows

    def write(rows, path):
        assert threading.current_thread() is not threading.main_thread() and may_go.wait(30)
        names.append(path.name)
        own(rows, path)

    monkeypatch.setattr(recorder, "write_rows", write)
    return may_go, names


def test_a_stop_waits_for_no_contexts_that_nobody_needs(inputs, monkeypatch):
    built, own, may_go = [], ContextBuilder._built, threading.Event()

    def build(self, question):
        built.append(question.id)
        assert may_go.wait(30)
        return own(self, question)

    def no_answer(self, questions, places):
        for place in (3, 4, 5):
            self.prepare(questions, [place])
        raise KeyboardInterrupt  # while at most the first one is built

    monkeypatch.setattr(ContextBuilder, "_built", build)
    monkeypatch.setattr(Predictor, "ask", no_answer)
    threading.Timer(0.2, may_go.set).start()
    with pytest.raises(KeyboardInterrupt):
        next(inputs.ask(list(range(6)), stopped=lambda: False))
    assert may_go.wait(30)
    time.sleep(0.3)
    assert len(built) <= 1, "those that nobody waits for are not built"


def test_the_folder_is_held_until_a_part_is_written(inputs, held, tmp_path, monkeypatch):
    """A signal that comes while the thread is waited for changes nothing."""
    may_go, names = held
    writer = writer_of(inputs, tmp_path)
    place, result = next(inputs.ask([0], stopped=lambda: False))
    writer.add(place, result)
    own = writer._thread.shutdown

    def interrupted(*given):
        monkeypatch.setattr(writer._thread, "shutdown", own)
        may_go.set()
        raise Interrupted(2)

    monkeypatch.setattr(writer._thread, "shutdown", interrupted)
    with pytest.raises(Interrupted):
        writer.release()
    assert names and writer._writing.done()


def writer_of(inputs, folder, part=1):
    from refinelens.store.results import Run

    (folder / "run").mkdir()
    return RunWriter(Run(folder / "run"), inputs.manifest(None, 1, part))


def test_questions_are_asked_while_a_part_is_written(inputs, held, tmp_path):
    """One part at most waits; what is done counts from when it is asked."""
    may_go, names = held
    writer = writer_of(inputs, tmp_path, part=2)
    results = list(inputs.ask([0, 1, 2, 3], lambda: False))
    for place, result in results[:3]:
        writer.add(place, result)
    assert writer.done == 3 and not names and not writer.run.manifest["parts"]
    timer = threading.Timer(0.2, may_go.set)
    timer.start()
    writer.add(*results[3])  # waits: the second part is whole while the first one is not written
    assert may_go.is_set() and names[0] == ".part-00000.parquet.tmp"
    writer.close("interrupted")
    assert [part["questions"] for part in writer.run.manifest["parts"]] == [[0, 2], [2, 4]]
    assert writer.run.manifest["prefix_reuse"] == results[3][1].notes["prefix_reuse"]
    writer.release()


def test_an_error_of_the_writer_is_raised_by_the_next_call(inputs, tmp_path, monkeypatch):
    def full(rows, path):
        raise OSError(errno.ENOSPC, "No space left on device")

    results = list(inputs.ask([0, 1, 2], lambda: False))
    monkeypatch.setattr(recorder, "write_rows", full)
    for call in ("add", "settle", "close"):
        folder = tmp_path / call
        folder.mkdir()
        writer = writer_of(inputs, folder)
        writer.add(*results[0])
        if call == "add":
            while not writer._writing.done():
                pass
        with pytest.raises(OSError, match="No space left"):
            getattr(writer, call)(*{"add": results[1], "settle": (), "close": ("interrupted",)}[call])
        writer.release()


@pytest.mark.medium
def test_a_full_disk_behind_the_last_question_keeps_what_was_written(options, tmp_path, monkeypatch):
    """Nobody asks for another one that would raise what the last part met."""
    whole = run_sweep(options, tmp_path / "whole", questions_per_part=2)
    n_parts, own, count = len(whole.manifest["parts"]), recorder.write_rows, []

    def full_at_last(rows, path):
        count.append(path)
        if len(count) == n_parts:
            raise OSError(errno.ENOSPC, "No space left on device")
        own(rows, path)

    monkeypatch.setattr(recorder, "write_rows", full_at_last)
    with pytest.raises(FaultError, match="no free disk left"):
        run_sweep(options, tmp_path / "run", questions_per_part=2)
    assert len(open_run(tmp_path / "run").manifest["parts"]) == n_parts - 1
    assert predictions(resume_sweep(tmp_path / "run")) == predictions(whole)


@pytest.mark.medium
def test_contexts_are_built_ahead_and_the_bytes_are_the_same(options, tmp_path, monkeypatch):
    own, threads = ContextBuilder._built, []

    def built(self, question):
        threads.append(threading.current_thread() is threading.main_thread())
        return own(self, question)

    monkeypatch.setattr(ContextBuilder, "_built", built)
    ahead = run_sweep(options, tmp_path / "ahead")
    assert not any(threads) and len(threads) > 2
    threads.clear()
    with pytest.raises(InputError, match="got none"):  # which this model needs for no question
        run_sweep(replace(options, keep="needs-document"), tmp_path / "kept")
    assert all(threads) and threads, "whether to keep a question is for the model to say"
    monkeypatch.setattr(Predictor, "prepare", lambda *given: None)
    plain = run_sweep(options, tmp_path / "plain")
    files = [sorted((run.path / "predictions").iterdir()) for run in (ahead, plain)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


@pytest.mark.medium
def test_an_error_in_contexts_comes_in_its_turn(options, tmp_path, monkeypatch):
    """What was asked before is kept, and the question is named."""
    own, asked = ContextBuilder._built, []

    def built(self, question):
        asked.append(question.id)
        if len(asked) == 3:
            raise ValueError("no context")
        return own(self, question)

    monkeypatch.setattr(ContextBuilder, "_built", built)
    with pytest.raises(FaultError, match=r"^question \d+: ValueError: no context") as raised:
        run_sweep(options, tmp_path / "run", questions_per_part=1)
    assert f"question {asked[2]}:" in str(raised.value)
    assert [part["questions"] for part in open_run(tmp_path / "run").manifest["parts"]] == [[0, 1], [1, 2]]


@pytest.mark.medium
def test_a_worker_builds_what_it_will_be_asked_next(options, tmp_path, monkeypatch):
    """By one thread, once each, while it answers."""
    run = run_sweep(options, tmp_path / "run", questions_per_part=2)
    built, asked, answers = [], [], []
    own, ask = ContextBuilder._built, Predictor.ask

    def recorded(self, question):
        built.append((question.id, threading.current_thread().name))
        return own(self, question)

    def asks(self, questions, places):
        asked.append([questions[place].id for place in places])
        return ask(self, questions, places)

    monkeypatch.setattr(ContextBuilder, "_built", recorded)
    monkeypatch.setattr(Predictor, "ask", asks)
    said = iter([(options, RunSpec(run.path, run.manifest, "resume")), ((0,), (3,)), ((3,), ()), EOFError()])

    def recv():
        message = next(said)
        if isinstance(message, Exception):
            raise message
        return message

    with pytest.raises(EOFError):
        worker._answer(SimpleNamespace(recv=recv, send=answers.append))
    ids = [one for group in asked for one in group]
    assert [id for id, _ in built] == ids and len(ids) == 2
    assert {name for _, name in built} == {"contexts_0"}
    assert answers[0] is None and len(answers) == 3
