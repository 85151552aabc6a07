"""Two runs compared over the rows they share."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest

import refinelens
from refinelens.config import SweepConfig
from refinelens.errors import InputError
from refinelens.op.ranks import kendall_tau_b, spearman, top_k_overlap
from refinelens.report.agreement import compare_runs, paired_ranks
from refinelens.store.results import KEYS, Run
from refinelens.sweeping.sweep import run_sweep
from tiny import write_part

N_POINTS = 4  # layers of the runs, the embedding output included


def make_run(folder, ranks, task="0" * 64, part_size=5, text="{documents} {question}", second=(), **arguments):
    """A run with these target ranks by question, every one at two gold positions.

    ``text`` is its template; the target of the questions ``second`` is their second answer.
    """
    run = Run(folder)
    run.parts_path.mkdir(parents=True)
    shared = {name: 0 for name, _ in KEYS} | {"lens": "plain", "documents": 2}
    rows = [
        shared
        | {"question_id": q, "alias": int(q in second), "gold_position": p, "target_rank": (values + p).tolist()}
        for q, values in ranks.items()
        for p in (0, 1)
    ]
    parts = [write_part(run, i, rows[i : i + part_size]) for i in range(0, len(rows), part_size)]
    manifest = {"task": {"name": "test", "sha256": task}, "arguments": arguments, "template": text, "parts": parts}
    run.write_manifest(manifest)
    return run


def random_ranks(questions, seed, n_points=N_POINTS):
    generator = np.random.default_rng(seed)
    return {q: generator.integers(0, 9, n_points) for q in questions}


@pytest.mark.parametrize("compare", [kendall_tau_b, spearman, partial(top_k_overlap, k=3)])
def test_shared_rows_are_paired_by_key(tmp_path, compare):
    of_a, of_b = random_ranks([0, 1, 2, 3, 5, 8, 9], 0), random_ranks([9, 8, 3, 2, 1, 7], 1)
    run_a, run_b = make_run(tmp_path / "a", of_a), make_run(tmp_path / "b", of_b, part_size=3)
    shared = [(q, p) for q in of_a if q in of_b for p in (0, 1)]
    x = np.array([of_a[q] + p for q, p in shared])
    y = np.array([of_b[q] + p for q, p in shared])
    found = paired_ranks(run_a, run_b)
    np.testing.assert_array_equal(found, (x, y))
    result = compare_runs(run_a, run_b, compare)
    assert result.rows == len(shared) and result.layers.shape == (N_POINTS,)
    assert result.unpaired == (2 * len(of_a) - len(shared), 2 * len(of_b) - len(shared))
    np.testing.assert_array_equal(result.layers, [compare(x[:, i], y[:, i]) for i in range(N_POINTS)])


def test_a_run_agrees_with_itself(tmp_path):
    run = make_run(tmp_path / "a", random_ranks(range(6), 0))
    assert compare_runs(run, run).layers.tolist() == [1] * N_POINTS


def test_refusals(tmp_path):
    run = make_run(tmp_path / "run", random_ranks(range(4), 0))
    others = {
        r"rows with equal question_id, .*answer_token.*, got none among 8 and 4 rows; sweep": make_run(
            tmp_path / "disjoint", random_ranks([7, 8], 0)
        ),
        "the same number of layers, got 3 and 5; choose": make_run(tmp_path / "deeper", random_ranks(range(4), 0, 6)),
        r"one task, got test \(00000000\) and test \(ffffffff\); sweep": make_run(
            tmp_path / "task", random_ranks(range(4), 0), task="f" * 64
        ),
        "expected a run with rows, got none; finish": make_run(tmp_path / "empty", {}),
    }
    for message, other in others.items():
        with pytest.raises(InputError, match=message) as caught:
            compare_runs(run, other)
        assert "\n" not in str(caught.value) and str(other.path) in str(caught.value)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"seed": 1}, "``seed``, got 0 and 1: their rows"),
        ({"target": "prediction"}, "``target``, got answer and prediction: their rows"),
        ({"text": "{question} {documents}"}, r"``template``, got own.txt \([0-9a-f]{8}\) and own.txt \([0-9a-f]{8}\):"),
    ],
)
def test_runs_that_ask_different_things_are_refused(tmp_path, changed, message):
    same = {"seed": 0, "target": "answer", "template": "own.txt"}
    ranks = random_ranks(range(4), 0)
    run, other = make_run(tmp_path / "a", ranks, **same), make_run(tmp_path / "b", ranks, **same | changed)
    with pytest.raises(InputError, match=f"expected runs with the same {message}"):
        paired_ranks(run, other)


def test_one_template_may_stand_in_two_files(tmp_path):
    ranks = random_ranks(range(4), 0)
    runs = [make_run(tmp_path / name, ranks, template=f"{name}/own.txt") for name in "ab"]
    assert compare_runs(*runs).rows == 8


def test_rows_of_different_answers_are_not_paired(tmp_path):
    """Each run has the answer that its model finds likelier as the target of a question."""
    ranks = random_ranks(range(4), 0)
    runs = [make_run(tmp_path / name, ranks, second=own) for name, own in (("a", (1, 2)), ("b", (2, 3)))]
    result = compare_runs(*runs)
    assert (result.rows, result.unpaired) == (4, (4, 4))
    expected = np.array([ranks[q] + p for q in (0, 2) for p in (0, 1)])
    np.testing.assert_array_equal(paired_ranks(*runs), (expected, expected))
    with pytest.raises(InputError, match="expected rows with equal question_id, .*, alias, got none among 8 and 8"):
        paired_ranks(runs[0], make_run(tmp_path / "c", ranks, second=(0, 3)))


@pytest.mark.medium
def test_generated_tasks_share_their_first_questions_and_documents(tmp_path):
    options = SweepConfig("tiny", "tiny", documents=(2,), examples=3, device="cpu")
    run = run_sweep(options, tmp_path / "run")
    more = run_sweep(replace(options, documents=(2, 4), examples=4), tmp_path / "more")
    assert run.manifest["task"]["sha256"] != more.manifest["task"]["sha256"]
    found = compare_runs(run, more)
    assert (found.rows, found.unpaired) == (3 * 2, (0, 2 + 4 * 4))
    np.testing.assert_array_equal(*paired_ranks(run, more))
    names = ["documents", "question_id", "gold_position", "n_tokens", "gold_start", "answer_text"]
    rows, of_more = ([row for part in one.parts(names) for row in part.to_pylist()] for one in (run, more))
    assert rows == [row for row in of_more if row["documents"] == 2 and row["question_id"] < 3]
    more.write_manifest(more.manifest | {"refinelens_version": "another"})
    same = run_sweep(options, tmp_path / "same")
    same.write_manifest(same.manifest | {"refinelens_version": "another"})
    assert compare_runs(run, same).rows == 3 * 2, "the task is equal as a whole"
    with pytest.raises(InputError, match="one task, got tiny .* and tiny .*; .* with one version of refinelens$"):
        compare_runs(run, more)


def test_folders_are_opened(tiny_model, question_file, tmp_path):
    options = SweepConfig(str(tiny_model), str(question_file), documents=(2,), examples=3, device="cpu")
    path = run_sweep(options, tmp_path / "run").path
    assert refinelens.compare_runs(path, str(path)).layers.tolist() == [1] * N_POINTS
    with pytest.raises(InputError, match="expected a run folder with manifest.json, got none"):
        refinelens.compare_runs(path, tmp_path)
