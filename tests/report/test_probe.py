"""The probe of the gold position on planted states, and of a run."""

import csv
import math
import shutil

import numpy as np
import pytest

import refinelens
from refinelens.cli import main
from refinelens.report.probe import FEWEST, probe_rows, rows_of_size
from refinelens.report.summary import read_report
from refinelens.store.results import open_run

N_LAYERS, PLANTED, WIDTH, POSITIONS = 6, 3, 17, (0, 2, 4)


def planted(n_questions, labels=None, seed=0):
    """States that say the gold position from layer `PLANTED` on; the lens is right from the layer after it on."""
    rng = np.random.default_rng(seed)
    shape = (n_questions, len(POSITIONS))
    states = rng.normal(size=(*shape, N_LAYERS + 1, WIDTH))
    places = np.tile(np.arange(len(POSITIONS)), (n_questions, 1)) if labels is None else labels
    states[:, :, PLANTED:, :3] += 12 * np.eye(3)[places][:, :, None]
    answer = np.full(shape, 7)
    argmax = np.where(np.arange(N_LAYERS + 1) > PLANTED, 7, 5) * np.ones((*shape, 1), int)
    return {
        "question_id": np.tile(np.arange(n_questions)[:, None], (1, 3)),
        "gold_position": np.tile(POSITIONS, (n_questions, 1)),
        "answer_id": answer,
        "argmax": argmax,
        "states": states.reshape(*shape, -1).astype(np.float16),
    }


def whole_of(rows):
    return [row for row in rows if row.gold_position is None]


def test_planted_positions_are_found_from_their_layer_on():
    rows = list(rows_of_size(5, planted(40), seed=0))
    whole = whole_of(rows)
    assert [row.layer for row in whole] == list(range(N_LAYERS + 1)) and {row.questions for row in rows} == {40}
    for row in whole:
        assert row.chance == pytest.approx(1 / 3)
        assert (row.accuracy.value == 1) == (row.layer >= PLANTED)
        assert (row.lens_accuracy.value, row.output_accuracy.value) == (float(row.layer > PLANTED), 1.0)
    for layer in range(N_LAYERS + 1):
        recalls = [row.accuracy.value for row in rows if row.layer == layer and row.gold_position is not None]
        assert len(recalls) == 3 and np.mean(recalls) == pytest.approx(whole[layer].accuracy.value)


@pytest.mark.medium
@pytest.mark.parametrize("permuted", [False, True])
def test_noise_and_permuted_labels_are_found_by_chance(permuted):
    """Layers below the planted ones, or planted ones of which each question has its own order: 24 estimates.

    In simulations they have a standard deviation of 0.057, and 11 of 100 intervals do not hold the chance.
    """
    values, missed, layers = [], 0, range(PLANTED, 2 * PLANTED) if permuted else range(PLANTED)
    for seed in range(8):
        rng = np.random.default_rng(100 + seed)
        labels = np.stack([rng.permutation(3) for _ in range(40)]) if permuted else None
        rows = whole_of(rows_of_size(5, planted(40, labels, seed), seed=0))
        values += [rows[layer].accuracy.value for layer in layers]
        missed += sum(not rows[layer].accuracy.low <= 1 / 3 <= rows[layer].accuracy.high for layer in layers)
    # Three layers of one permutation have nearly one value: as good as 8 estimates.
    assert np.mean(values) == pytest.approx(1 / 3, abs=3 * 0.057 / np.sqrt(8 if permuted else 24))
    assert missed <= 8


def test_a_position_may_have_several_contexts_of_a_question():
    """As with decoys, which stand at every other place: two contexts at one position, one at each other."""
    one = planted(40)
    several = {name: values[:, [0, 0, 1, 2]] for name, values in one.items()}
    rows, wanted = list(rows_of_size(5, several, seed=0)), list(rows_of_size(5, one, seed=0))
    assert {row.chance for row in rows} == {0.5} and len(rows) == len(wanted)
    for row, alone in zip(rows, wanted, strict=True):
        assert (row.gold_position, row.layer, row.questions) == (alone.gold_position, alone.layer, 40)
        assert row.lens_accuracy.value == alone.lens_accuracy.value
        assert row.layer < PLANTED or row.accuracy.value == 1


def test_few_questions_have_no_probe():
    assert list(rows_of_size(5, planted(FEWEST - 1), seed=0)) == []
    assert len(list(rows_of_size(5, planted(FEWEST), seed=0))) == (N_LAYERS + 1) * 4


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    asked = {"documents": ("closed-book", 3), "examples": 12, "lens": ("plain",), "measures": "states"}
    refinelens.sweep("tiny", out=path, device="cpu", **asked)
    return open_run(path)


@pytest.mark.medium
def test_of_a_run_it_is_that_of_its_states(run):
    """Rows of the file against states put together by hand, in another order."""
    frame = refinelens.load_run(run.path).states
    own = frame[frame.documents == 3].sort_values(["gold_position", "question_id"])
    states = np.stack(own.states.tolist()).reshape(3, 12, 9, -1).swapaxes(0, 1)
    rows = [row for part in run.parts() for row in part.to_pylist()]
    argmax = {
        (r["question_id"], r["gold_position"]): r["argmax"]
        for r in rows
        if r["documents"] == 3 and not r["answer_token"]
    }
    ids = sorted(set(own.question_id))
    size = {
        "question_id": np.tile(np.asarray(ids)[:, None], (1, 3)),
        "gold_position": np.tile([0, 1, 2], (12, 1)),
        "answer_id": own.answer_id.to_numpy().reshape(3, 12).T,
        "argmax": np.asarray([[argmax[id, position] for position in range(3)] for id in ids]),
        "states": states.reshape(12, 3, -1),
    }
    wanted = list(rows_of_size(3, size, seed=0))
    with (run.path / "probe.csv").open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == len(wanted) == 9 * 4
    for line, row in zip(table, wanted, strict=True):
        assert line["gold_position"] == ("" if row.gold_position is None else str(row.gold_position))
        assert float(line["accuracy"]) == pytest.approx(row.accuracy.value, rel=1e-5)
        assert float(line["lens_accuracy"]) == pytest.approx(row.lens_accuracy.value, rel=1e-5)
    assert float(table[0]["accuracy"]) == pytest.approx(1 / 3)  # the same token before every answer


@pytest.mark.medium
def test_it_is_read_back_and_written_again(run, tmp_path, capsys):
    copy = open_run(shutil.copytree(run.path, tmp_path / "copy"))
    written = (copy.path / "probe.csv").read_bytes()
    (copy.path / "probe.csv").unlink()
    assert main(["show", str(copy.path)]) == 0
    assert (copy.path / "probe.csv").read_bytes() == written
    assert "Probe of the gold position, 3 documents: found in" in capsys.readouterr().out
    text = written.decode().replace("\n3,,8,12,", "\n3,,8,13,")
    (copy.path / "probe.csv").write_text(text)
    assert probe_rows(copy)[8].questions == 13
    (copy.path / "probe.csv").write_text("layer\n1\n")
    assert probe_rows(copy)[8].questions == 12


@pytest.mark.medium
def test_a_run_of_few_questions_says_so(tmp_path, capsys):
    asked = ["--documents", "closed-book,3", "--examples", "2", "--measures", "states", "--device", "cpu"]
    assert main(["sweep", "--model", "tiny", *asked, "--out", str(tmp_path / "run"), "--no-report"]) == 0
    out = capsys.readouterr().out
    assert "Probe of the gold position, 3 documents: none; expected at least 10 questions" in out
    assert out.count("Probe of the gold position") == 1
    assert (tmp_path / "run" / "probe.csv").read_text().count("\n") == 1
    assert read_report(open_run(tmp_path / "run")).probe == []
    assert all(not math.isnan(row.accuracy.value) for row in read_report(open_run(tmp_path / "run")).rows)
