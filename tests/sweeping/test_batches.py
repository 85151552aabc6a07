"""Batches of contexts of several questions: the rows of contexts alone, and the same bits however a sweep goes on."""

from dataclasses import replace

import numpy as np
import pytest

from faults import at_pass
from refinelens.config import SweepConfig
from refinelens.errors import FaultError
from refinelens.store.process import Interrupted
from refinelens.store.results import open_run
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.predict import groups_of, questions_together
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions, stop_after

FLOATS = ("target_logprob", "max_logprob", "entropy", "kl")


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    given = {"documents": (0, 1, 3), "device": "cpu", "batch_size": "4", "generate": 3, "answer_tokens": "all"}
    return SweepConfig(str(tiny_model), str(question_file), **given)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


def assert_same_bits(run, whole):
    assert predictions(run) == predictions(whole)
    assert run.manifest["counts"] == whole.manifest["counts"]


@pytest.mark.medium
def test_a_batch_is_filled_with_contexts_of_several_questions(options, whole, tmp_path):
    """Five contexts of a question, four in a pass: no pass has fewer, but the last; the rows are those of one each."""
    sizes = []
    with at_pass(lambda ids, states: sizes.append(len(ids))):
        run = run_sweep(replace(options, batch_size="4", generate=0), tmp_path / "run")
    assert sizes[-9:] == [1, *[4] * 7, 2], "after the gates, which run one at a time"
    assert run.manifest["counts"]["contexts"] == 6 * 5
    alone = run_sweep(replace(options, batch_size="1", reuse_prefix="off"), tmp_path / "alone")
    for ours, single in zip(predictions(whole), predictions(alone), strict=True):
        exact = {name: value for name, value in ours.items() if name not in FLOATS}
        assert exact == {name: single[name] for name in exact}
        for name in FLOATS:
            np.testing.assert_allclose(ours[name], single[name], atol=1e-5)
    assert alone.manifest["counts"] == whole.manifest["counts"]


@pytest.mark.medium
@pytest.mark.parametrize("after", [1, 3])
def test_a_sweep_that_goes_on_has_the_same_batches(options, whole, tmp_path, after):
    """Stopped within the questions that share them: those that are finished run again beside the others."""
    with pytest.raises(Interrupted):
        run_sweep(options, tmp_path / "run", progress=stop_after(after), questions_per_part=2)
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == after
    assert_same_bits(resume_sweep(str(tmp_path / "run")), whole)


@pytest.mark.medium
def test_an_exception_in_one_of_them(options, tmp_path):
    """Its context is named, and what was finished before their batches is kept."""
    options = replace(options, documents=(2, 3, 4, 5, 6), generate=0)  # 20 contexts a question, 64 at a time
    assert questions_together(options, "cpu") == 3
    whole, inputs = run_sweep(options, tmp_path / "whole"), SweepInputs.load(options)
    (question,) = (question for question in inputs.questions if question.id == 4)
    broken = inputs.builder().build(question).contexts[7].input_ids

    def fault(ids, states):
        if any(row[: len(broken)] == list(broken) for row in ids.tolist()):
            raise RuntimeError("a fault in a driver")

    place = "question 4, 4 documents, gold position 2"
    with at_pass(fault), pytest.raises(FaultError, match=f"^{place}: RuntimeError: a fault in a driver; ``sweep.res"):
        run_sweep(options, tmp_path / "run")
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == 3
    assert_same_bits(resume_sweep(str(tmp_path / "run")), whole)


@pytest.mark.parametrize("faults", [(), ("kill-4",)], ids=["", "killed"])
def test_workers_have_the_same_batches(fork_server, options, tmp_path, faults):
    """Two of 5 contexts a pass and 12 questions a batch; the questions of a worker that dies go to the other."""
    task, lines = tmp_path / "task.jsonl", open(options.task, encoding="utf-8").read().splitlines()
    task.write_text("\n".join(line.replace(" door", f" {word} door") for word in ("given", "high") for line in lines))
    command = ["sweep", "--model", options.model, "--task", task, "--documents", "2,5", "--device", "cpu"]
    command += ["--batch-size", "4"]
    runs, folder = {}, tmp_path / "faults"
    folder.mkdir()
    for fault in faults:
        (folder / fault).touch()
    for count in (1, 2):
        out, log = tmp_path / str(count), tmp_path / f"log{count}"
        given = {"workers_meet": str(folder)} if count > 1 else {}
        arguments = [*command, "--workers", count, "--out", out]
        assert fork_server.run(*arguments, log=log, part=4, **given) == 0, log.read_text()
        runs[count] = open_run(out)
    assert_same_bits(runs[2], runs[1])
    assert runs[2].manifest["parts"] == runs[1].manifest["parts"]
    said = (tmp_path / "log2").read_text()
    assert ("was ended by SIGKILL; its questions go to another; 1 of 2 left" in said) == bool(faults)


@pytest.mark.parametrize(
    "device, change, together",
    [
        ("cuda", {"documents": (10,)}, 6),  # 60 contexts
        ("cuda", {"documents": (0,)}, 64),
        ("cuda", {"documents": (100,)}, 1),
        ("cuda", {"documents": (10,), "batch_size": "200"}, 20),
        ("cuda", {"documents": (10,), "batch_size": "1"}, 1),
        ("cuda", {"documents": (10,), "positions": "all"}, 1),
        ("cuda", {"documents": (10,), "reuse_prefix": "on"}, 1),
        ("cpu", {"documents": (10,)}, 1),
        ("cpu", {"documents": (10,), "batch_size": "16"}, 6),
    ],
)
def test_how_many_questions_share_batches(device, change, together):
    assert questions_together(SweepConfig(**change), device) == together


def test_groups_are_the_same_whatever_is_missing():
    assert groups_of(range(7), 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert groups_of([1, 2, 8, 12], 4) == [(1, 2), (8,), (12,)]
    assert groups_of([], 4) == []
