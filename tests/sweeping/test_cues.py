"""Documents that disagree: where they stand, the ranks of both answers, and what tables and pages say of them."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

import refinelens
from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.data.prompts import arrange
from refinelens.data.questions import Document
from refinelens.data.scoring import has_answer, word_forms
from refinelens.data.tasks import DistractorSource, load_task
from refinelens.errors import InputError
from refinelens.placement import Placement, placements
from refinelens.report.cues import cue_rows
from refinelens.store.results import open_run
from refinelens.sweeping.inputs import SweepInputs

ASKED = {"task": "tiny-cues", "documents": ("closed-book", "oracle", 4), "examples": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "cues"
    refinelens.sweep("tiny", out=path, top=(1, 5), **ASKED)
    return open_run(path)


def rows_of(run):
    return pq.read_table(run.parts_path).to_pylist()


def table_of(run, name):
    with (run.path / name).open() as file:
        return list(csv.DictReader(file))


# Where documents stand.


def test_gold_documents_and_decoys_stand_where_they_should():
    question = load_task("cues").questions[3]
    others = [Document(f"d{i}", "") for i in range(4)]
    golds, decoys = [question.gold, question.golds[0]], [*question.decoys[:3]]
    found = arrange(question, others, Placement(5, 2, 1, 3))
    assert found == [others[0], *decoys, others[1], *golds, *others[2:]]
    found = arrange(question, others, Placement(0, 2, 6, 3))
    assert found == [*golds, *others, *decoys]
    assert arrange(question, others, Placement(2)) == [*others[:2], question.gold, *others[2:]]
    assert arrange(question, [], Placement()) == []


def test_every_placement_once_and_none_where_they_overlap():
    found = placements(5, "all", 2, "all", 1)
    assert len(set(found)) == len(found) == 12, "4 places of two gold documents, 3 are left for a decoy"
    for one in found:
        assert not set(one.spans["gold"]) & set(one.spans["decoy"])
        assert {*one.spans["gold"], *one.spans["decoy"]} <= set(range(5))
    assert placements(0, "all", 2, "all", 1) == [Placement()] and placements(1, "0,3", 1, "all", 1) == [Placement(0)]
    ends = [(one.gold_position, one.decoy_position) for one in placements(7, "ends-middle", 1, "0,6", 1)]
    assert ends == [(0, 6), (3, 0), (3, 6), (6, 0)]


@pytest.mark.parametrize(
    "given, words",
    [
        ({"documents": (3,), "golds": 2, "decoys": 2}, "``documents``: expected 4 or more"),
        ({"decoys": -1}, "``decoys``: expected 0 or more"),
        ({"golds": 0}, "``golds``: expected 1 or more"),
        ({"decoys": 1, "documents": (5,), "decoy_positions": "5"}, "``decoy_positions``: expected 0 to 4"),
        ({"decoys": 1, "documents": (5,), "gold_positions": "2", "decoy_positions": "2"}, "``decoy_positions``"),
        ({"task": "cues", "target": "prediction"}, "``target``: expected answer"),
    ],
)
def test_placements_that_do_not_fit_are_refused(given, words):
    with pytest.raises(InputError) as error:
        SweepConfig("tiny", **given)
    assert words in str(error.value)


# The tasks.


def test_the_cues_of_the_built_in_questions_state_another_answer():
    builtin, cues = load_task("builtin"), load_task("cues")
    assert builtin.sha256 != cues.sha256 and len(builtin.questions) == len(cues.questions)
    with_decoys = [question for question in cues.questions if question.decoys]
    assert len(with_decoys) > 0.9 * len(cues.questions)
    source = DistractorSource(cues, seed=0)
    for question in with_decoys:
        answer, other = question.answers[0], question.decoy_answer
        assert len(question.decoys) == len(question.golds) + 1 == 5
        for gold, decoy in zip((question.gold, *question.golds), question.decoys, strict=True):
            assert gold.text.replace(answer, other) == decoy.text and gold.title == decoy.title
            assert answer in gold.text and answer not in decoy.text and other not in gold.text
        for document in source.choose(question, 9):
            assert not any(has_answer(word_forms(document.text), words) for words in (answer, other))


def test_tiny_cues_differ_in_the_value_alone():
    task = refinelens.data.generated.generate_task("tiny-cues", 20, 10, seed=0)
    for question in task.questions:
        told = {document.text for document in (question.gold, *question.golds)}
        assert {text.replace(question.answers[0], question.decoy_answer) for text in told} == {
            document.text for document in question.decoys
        }
        assert not any(question.decoy_answer in document.text for document in question.distractors)
    plain = refinelens.data.generated.generate_task("tiny", 20, 10, seed=0)
    assert [q.gold for q in plain.questions] == [q.gold for q in task.questions]


def write_task(path, **changed):
    passages = [{"title": f"p{i}", "text": f"nothing of note {i}"} for i in range(4)]
    gold = {"title": "g", "text": "the badge of Elric Ashwell is red", "isgold": True}
    record = {"question": "What is the badge of Elric Ashwell?", "answers": ["acorn"], "ctxs": [gold, *passages]}
    decoys = [{"title": "d", "text": "the badge of Elric Ashwell is amber"}]
    path.write_text(json.dumps(record | {"decoys": decoys, "decoy_answer": "amber"} | changed) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "changed, words",
    [
        ({"decoys": "amber"}, "'decoys' of objects"),
        ({"golds": [{"title": "x"}]}, "'golds' of objects"),
        ({"decoy_answer": ""}, "expected another answer, 'decoy_answer'"),
        ({"decoy_answer": "acorn"}, "expected another answer, 'decoy_answer'"),
        ({"decoy_answer": 3}, "expected a string 'decoy_answer'"),
    ],
)
def test_decoys_of_a_file_are_checked(tmp_path, changed, words):
    with pytest.raises(InputError) as error:
        load_task(write_task(tmp_path / "task.jsonl", **changed))
    assert words in str(error.value) and "line 1" in str(error.value)


def test_questions_that_cannot_be_asked_so_are_left_out(tmp_path):
    def reasons(path, **given):
        options = SweepConfig("tiny", path, (3,), device="cpu", **given)
        inputs = SweepInputs.load(options)
        return inputs.builder().build(inputs.questions[0]).left_out

    path = write_task(tmp_path / "task.jsonl")
    assert reasons(path, decoys=1) == {}
    assert reasons(path, decoys=2) == {"3 documents: too few decoys": [0]}
    assert reasons(path, golds=2) == {"3 documents: too few gold documents": [0]}
    same = write_task(tmp_path / "same.jsonl", answers=["amber acorn"], decoy_answer="amber anchor")
    assert list(reasons(same, decoys=1)) == [
        "3 documents: an answer that begins with the same token as that of the decoys"
    ]


# What a run holds.


@pytest.mark.medium
def test_both_ranks_are_those_of_the_whole_distribution(run):
    loaded = refinelens.load_model("tiny", "cpu")
    lens = refinelens.LogitLens(loaded.model, loaded.tokenizer)
    inputs = SweepInputs.load(SweepConfig("tiny", **ASKED))
    contexts = [context for q in inputs.questions for context in inputs.builder().build(q).contexts]
    rows = {(r["question_id"], r["documents"], r["gold_position"], r["decoy_position"]): r for r in rows_of(run)}
    assert len(rows) == len(contexts) == 6 * (1 + 1 + 12)
    for context in contexts[::5]:
        placement = context.placement
        row = rows[context.question.id, context.n_documents, placement.gold_position, placement.decoy_position]
        reading = lens.read(list(context.input_ids), positions=-1, top_k=lens.head.vocab_size, kl=False)
        ids = reading.top_ids[:, 0].tolist()
        for id, name in ((context.answer_ids[0], "target"), (context.decoy_id, "decoy")):
            assert row[f"{name}_id"] == id
            assert row[f"{name}_rank"] == [layer.index(id) for layer in ids]
        text = loaded.tokenizer.decode(context.input_ids)
        told = [context.question.decoy_answer in text, context.n_documents < 2]
        assert told in ([True, False], [False, True])
        assert row["decoy_answer"] == context.question.decoy_answer


@pytest.mark.medium
def test_batches_and_golds_change_nothing_that_they_should_not(run, tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", top=(1, 5), batch_size=4, reuse_prefix="off", **ASKED)
    for own, other in zip(rows_of(run), rows_of(open_run(tmp_path / "run")), strict=True):
        assert own["decoy_rank"] == other["decoy_rank"] and own["decoy_position"] == other["decoy_position"]
        np.testing.assert_allclose(own["decoy_logprob"], other["decoy_logprob"], atol=1e-4)


@pytest.mark.medium
def test_a_run_without_decoys_has_no_such_columns(tmp_path):
    refinelens.sweep("tiny", out=tmp_path / "run", documents=(3,), examples=2, device="cpu")
    run = open_run(tmp_path / "run")
    assert not any(name.startswith("decoy") for name in rows_of(run)[0])
    assert not list(run.path.glob("cues*.csv")) and cue_rows(run, (1,)) == ([], [], [])


# Tables.


def settle_of(values):
    """The lowest layer from which all are true, by a plain loop."""
    layer = len(values)
    while layer and values[layer - 1]:
        layer -= 1
    return layer


@pytest.mark.medium
def test_tables_are_what_a_plain_loop_finds(run):
    rows, found = rows_of(run), table_of(run, "cues.csv")
    assert {row["top"] for row in found} == {"1", "5"}
    checked = 0
    for row in found:
        top, wanted = int(row["top"]), []
        for one in rows:
            gold, decoy = one["gold_position"], one["decoy_position"]
            order = "no decoy" if decoy < 0 else "gold first" if gold < decoy else "decoy first"
            if one["documents"] != int(row["documents"]) or row["order"] not in (order, "either"):
                continue
            if row["distance"] and abs(gold - decoy) != int(row["distance"]):
                continue
            ahead = [a < b for a, b in zip(one["target_rank"], one["decoy_rank"], strict=True)]
            seen = [min(ranks) < top for ranks in zip(one["target_rank"], one["decoy_rank"], strict=True)]
            first = seen.index(True) if True in seen else None
            loser = one["decoy_rank"] if ahead[-1] else one["target_rank"]
            values = {
                "gold_ahead": ahead[-1],
                "gold_correct": one["target_rank"][-1] < top,
                "decoy_correct": one["decoy_rank"][-1] < top,
                "mean_decided": settle_of([lead == ahead[-1] for lead in ahead]),
                "share_switched": np.nan if first is None else len(set(ahead[first:])) > 1,
                "share_loser_seen": min(loser) < top,
                "decoy_settle": np.nan,
            }
            if values["decoy_correct"]:
                values["decoy_settle"] = settle_of([rank < top for rank in one["decoy_rank"]])
            wanted.append(values)
        assert len(wanted) == int(row["examples"])
        for name in wanted[0]:
            values = [one[name] for one in wanted]
            mean = np.nan if np.isnan(values).all() else np.nanmean(values)
            if np.isnan(mean):
                assert row[name] == ""
            else:
                assert float(row[name]) == pytest.approx(mean, rel=1e-4, abs=1e-6), name
            checked += 1
    assert checked == 7 * 2 * (2 + 1 + 2 * 4)


@pytest.mark.medium
def test_layers_and_orders(run):
    rows = [row for row in rows_of(run) if row["documents"] == 4]
    for row in table_of(run, "cues_layers.csv"):
        if row["documents"] != "4":
            continue
        layer = int(row["layer"])
        first = row["order"] == "gold first"
        own = [r for r in rows if row["order"] == "either" or (r["gold_position"] < r["decoy_position"]) == first]
        ahead = np.mean([r["target_rank"][layer] < r["decoy_rank"][layer] for r in own])
        lead = np.mean([r["target_logprob"][layer] - r["decoy_logprob"][layer] for r in own])
        assert float(row["gold_ahead"]) == pytest.approx(ahead, rel=1e-4, abs=1e-6)
        assert float(row["lead"]) == pytest.approx(lead, rel=1e-3, abs=1e-5)
    (paired,) = [row for row in table_of(run, "cues_paired.csv") if row["top"] == "1"]
    means = []
    for first in (False, True):
        own = [r for r in rows if (r["gold_position"] < r["decoy_position"]) == first]
        means.append(np.mean([r["target_rank"][-1] < r["decoy_rank"][-1] for r in own]))
    assert float(paired["gold_ahead"]) == pytest.approx(means[0] - means[1], abs=1e-6)
    assert (paired["documents"], paired["questions"]) == ("4", "6")


@pytest.mark.medium
def test_distance_of_blocks_is_from_edge_to_edge(tmp_path):
    given = ASKED | {"documents": (6,), "examples": 2}
    refinelens.sweep("tiny", out=tmp_path / "run", golds=2, decoys=3, **given)
    run = open_run(tmp_path / "run")
    places = {(r["gold_position"], r["decoy_position"]) for r in rows_of(run)}
    assert places == {(0, 2), (0, 3), (1, 3), (3, 0), (4, 0), (4, 1)}
    found = {(r["order"], r["distance"]): int(r["examples"]) for r in table_of(run, "cues.csv") if r["distance"]}
    assert found == {(order, d): n for order in ("gold first", "decoy first") for d, n in (("1", 4), ("2", 2))}


# What is made of a run.


@pytest.mark.medium
def test_frames_and_exports_have_both_answers(run, tmp_path):
    loaded = refinelens.load_run(run.path)
    assert len(loaded.cues) == 2 * (5 + 2 * 3) and loaded.cues["distance"].isna().sum() == 2 * 5
    assert {"decoy_position", "decoy_rank", "decoy_logprob"} <= {*loaded.layers.columns} & {*loaded.predictions.columns}
    out = tmp_path / "rows.csv"
    assert main(["export", str(run.path), "--format", "csv", "--out", str(out)]) == 0
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9 * len(rows_of(run)) and rows[8]["decoy_rank"] == str(rows_of(run)[0]["decoy_rank"][8])


@pytest.mark.medium
def test_what_is_missing_is_written_again(run, tmp_path):
    copy = shutil.copytree(run.path, tmp_path / "copy")
    (copy / "cues_layers.csv").unlink()
    assert main(["show", str(copy)]) == 0
    assert (copy / "cues_layers.csv").read_bytes() == (run.path / "cues_layers.csv").read_bytes()


@pytest.mark.medium
def test_one_context_is_read_with_its_documents_marked(run, tmp_path, capsys):
    out = tmp_path / "map.json"
    which = ["--question", "2", "--documents", "4", "--gold-position", "0", "--decoy-position", "3"]
    assert main(["read", str(run.path), *which, "--json", str(out)]) == 0
    segments = [s["label"] for s in json.loads(out.read_text())["segments"]]
    assert segments[:4] == ["document 0, gold", "document 1", "document 2", "document 3, decoy"]
    assert main(["read", str(run.path), *which[:-1], "0"]) == 2
    assert "--decoy-position: expected one that the run has, such as 1, 2, 3" in capsys.readouterr().err


@pytest.mark.medium
def test_what_knows_no_decoys_says_so(run, tmp_path, capsys):
    assert main(["layers", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert "expected a run without --decoys" in error and error.count("\n") == 1
    refinelens.sweep("tiny", out=tmp_path / "run", **ASKED | {"decoys": 2, "documents": (4,), "examples": 2})
    other = open_run(tmp_path / "run")
    with pytest.raises(InputError, match="the same ``decoys``"):
        refinelens.compare_runs(run, other)
    agreement = refinelens.compare_runs(run, run)
    assert agreement.unpaired == (0, 0) and np.allclose(agreement.layers, 1.0)
