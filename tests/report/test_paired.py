"""Differences between gold positions against hand computation, and the reasons beside them."""

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from refinelens.cli import main
from refinelens.report.summary import paired_differences, read_cells
from refinelens.report.tables import paired_line
from refinelens.stats import share_difference
from refinelens.store.results import open_run

# question: gold position: (first token right, all right, generated right, depth or None where censored)
EXAMPLES = {
    0: {0: (1, 1, 1, 4), 1: (0, 0, 1, None), 2: (1, 0, 0, 2)},
    1: {0: (1, 1, 0, 3), 1: (1, 1, 0, 7), 2: (1, 1, 0, 1)},
    2: {0: (0, 0, 0, None), 1: (1, 0, 1, 5), 2: (1, 1, 1, 6)},
}


def table(examples, documents=3, **more):
    """Trajectories with a second answer token that says the same of the context, and a depth of its own."""
    rows = [
        {
            "question_id": question,
            "documents": documents,
            "gold_position": position,
            "answer_token": token,
            "lens": "plain",
            "top": 1,
            "depth": depth if depth is None or token == 0 else depth + 2,
            "final_correct": depth is not None,
            "answer_correct": bool(first) if token == 0 else not first,
            "all_correct": bool(whole),
            "generated_correct": None if generated is None else bool(generated),
        }
        | more
        for question, positions in examples.items()
        for position, (first, whole, generated, depth) in positions.items()
        for token in (0, 1)
    ]
    table = pa.Table.from_pylist(rows)
    place = table.column_names.index("generated_correct")
    return table.set_column(place, "generated_correct", table["generated_correct"].cast(pa.bool_()))


def differences(examples, documents=3):
    return paired_differences(read_cells(table(examples, documents), ("plain",), (1,)), 0)


def test_every_pair_over_the_questions_that_have_both():
    found = {(d.gold_position, d.less_position): d for d in differences(EXAMPLES)}
    assert list(found) == [(1, 0), (2, 0), (2, 1)]
    one = found[1, 0]
    assert one.questions == 3 and one.accuracy.value == pytest.approx(np.mean([-1, 0, 1]))
    assert one.accuracy_all.value == pytest.approx(np.mean([-1, 0, 0]))
    assert one.accuracy_generated.value == pytest.approx(np.mean([0, 0, 1]))
    assert one.questions_settled == 1 and one.depth.value == 4, "the others are censored at one of the two"
    two = found[2, 0]
    assert two.questions_settled == 2 and two.depth.value == pytest.approx(np.mean([-2, -2]))
    assert np.isnan(two.depth.low) and two.accuracy == share_difference(1, 0, 3)


def test_no_question_that_differs_is_no_certainty():
    same = {question: {position: (1, 1, 1, 3 + question + position) for position in range(2)} for question in range(12)}
    (found,) = differences(same)
    assert found.accuracy == found.accuracy_all == found.accuracy_generated == share_difference(0, 0, 12)
    assert found.accuracy.low < -0.15 and found.accuracy.high > 0.15
    assert found.questions_settled == 12 and (found.depth.low, found.depth.high) == (1, 1)


def test_a_question_without_a_position_does_not_count_there():
    examples = EXAMPLES | {3: {0: (1, 1, 1, 9)}}
    found = differences(examples)
    assert {d.questions for d in found} == {3}


def test_no_generation_and_no_second_position():
    silent = {q: {p: (*v[:2], None, v[3]) for p, v in positions.items()} for q, positions in EXAMPLES.items()}
    assert all(np.isnan(d.accuracy_generated.value) for d in differences(silent))
    alone = {q: {0: positions[0]} for q, positions in EXAMPLES.items()}
    assert differences(alone) == []
    closed_book = {q: {-1: positions[0]} for q, positions in EXAMPLES.items()}
    assert differences(closed_book, documents=0) == []


def test_line_compares_the_ends_and_the_middle():
    found = differences(EXAMPLES)
    words = "Accuracy, gold at one position less at another, 3 documents: 1 - 0: +0.00 [-0.78,0.78]; 2 - 0: +0.33 ["
    assert paired_line(found).startswith(words)
    pairs = zip(found, [(9, 0), (3, 0), (9, 4)], strict=True)
    ten = [replace(d, documents=10, gold_position=b, less_position=a) for d, (b, a) in pairs]
    assert "9 - 0" in paired_line(ten) and "9 - 4" in paired_line(ten) and "3 - 0" not in paired_line(ten)


@pytest.mark.medium
def test_left_out_questions_stand_in_the_summary(tiny_model, tmp_path, capsys):
    """Two of three questions have no passage without the answer; and 9 documents are more than there are."""
    lines = []
    for i, answer in enumerate(["red", "door", "door"]):
        text = f'{{"title": "arven {i}", "text": "the door of arven is {answer}", "isgold": true}}'
        lines.append(f'{{"question": "what is {i} ?", "answers": ["{answer}"], "ctxs": [{text}]}}')
    (tmp_path / "task.jsonl").write_text("\n".join(lines))
    command = ["sweep", "--model", str(tiny_model), "--task", str(tmp_path / "task.jsonl"), "--device", "cpu"]
    assert main([*command, "--documents", "oracle,2,9", "--out", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert all(f"{n} at {size} documents: too few passages without an answer" in out for n, size in ((2, 2), (3, 9)))
    rows = open_run(tmp_path / "run").path.joinpath("summary.csv").read_text().splitlines()
    assert rows[0].endswith(",left_out,left_out_why")
    assert [row.rsplit(",", 2)[1:] for row in rows[1:]] == [
        ["0", ""],
        *[["2", "2 too few passages without an answer"]] * 2,
    ]
