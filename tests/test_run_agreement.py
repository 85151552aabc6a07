"""Two runs compared over the rows they share."""

from functools import partial

import numpy as np
import pytest

from refinelens.errors import InputError
from refinelens.rank_agreement import kendall_tau_b, spearman, top_k_overlap
from refinelens.results import KEYS, Run
from refinelens.run_agreement import compare_runs, paired_ranks
from tiny import write_part

N_POINTS = 4  # layers of the runs, the embedding output included


def make_run(folder, ranks, task="0" * 64, part_size=5, **arguments):
    """A run with these target ranks by question, every one at two gold positions."""
    run = Run(folder)
    run.parts_path.mkdir(parents=True)
    other_keys = {name: 0 for name, _ in KEYS} | {"lens": "plain"}
    rows = [
        other_keys | {"question_id": q, "documents": 2, "gold_position": p, "target_rank": (values + p).tolist()}
        for q, values in ranks.items()
        for p in (0, 1)
    ]
    parts = [write_part(run, i, rows[i : i + part_size]) for i in range(0, len(rows), part_size)]
    run.write_manifest({"task": {"name": "test", "sha256": task}, "arguments": arguments, "parts": parts})
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


@pytest.mark.parametrize("changed", [{"seed": 1}, {"target": "prediction"}, {"template": "own.txt"}])
def test_runs_that_ask_different_things_are_refused(tmp_path, changed):
    same = {"seed": 0, "target": "answer", "template": None}
    ranks = random_ranks(range(4), 0)
    run, other = make_run(tmp_path / "a", ranks, **same), make_run(tmp_path / "b", ranks, **same | changed)
    with pytest.raises(InputError, match=f"expected runs with the same --{next(iter(changed))}, got"):
        paired_ranks(run, other)
