"""Reading task files and choosing distractors."""

import gzip
import json

import pytest

from refinelens.data.scoring import normalise_answer
from refinelens.data.tasks import DistractorSource, choose_questions, load_task
from refinelens.errors import InputError


def passage(title, text, gold=False):
    return {"title": title, "text": text, "hasanswer": gold, "isgold": gold}


def record(question="q?", answers=("red",), ctxs=None, **extra):
    return {"question": question, "answers": list(answers), "ctxs": ctxs or [passage("t", "red", True)], **extra}


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_plain_and_gzip_are_the_same(tmp_path, question_file):
    packed = tmp_path / "q.jsonl.gz"
    packed.write_bytes(gzip.compress(question_file.read_bytes()))
    assert load_task(str(packed)).questions == load_task(str(question_file)).questions


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "expected at least one question, got an empty file"),
        ("\n \n", "expected at least one question"),
        ("\n{", r"line 2: expected a JSON object of valid text, got: [^0-9]+ \(column 2\)$"),
        ("[]", "line 1: expected a JSON object, got list"),
        (json.dumps(record()) + "\nnonsense\n", "line 2: expected a JSON object"),
        (json.dumps(record(question=" ")), "line 1: expected a non-empty string 'question'"),
        (json.dumps(record(answers=["red", " "])), "line 1: expected a list of non-empty strings 'answers', got"),
        (json.dumps(record(answers=[3])), r"line 1: expected a list of non-empty strings 'answers', got \[3\]"),
        (json.dumps(record() | {"id": 1.5}), "line 1: expected a string or a number 'id', got 1.5"),
        (json.dumps(record(ctxs=["text"])), "line 1: expected a list 'ctxs' of objects with .*, got 'text'$"),
        (json.dumps(record() | {"ctxs": None}), "line 1: expected a list 'ctxs' of objects with .*, got None$"),
        (json.dumps(record(ctxs=[passage("t", "x", "false")])), "1: expected isgold true or false .*, got 'false'$"),
        (json.dumps(record(ctxs=[passage("t", "x")])), "line 1: expected one passage with isgold true, got 0"),
        (json.dumps(record(group=4)), "line 1: expected a string 'group', got 4"),
        (json.dumps(record()) + "\n" + json.dumps(record("\ud83d")), "line 2: expected a JSON object of valid text"),
        ("[" * 100_000, "line 1: expected a JSON object of valid text"),
    ],
)
def test_malformed_files_name_file_and_line(tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load_task(str(path))
    assert str(path) in str(error.value)


def test_not_gzip(tmp_path):
    path = tmp_path / "bad.jsonl.gz"
    path.write_text("plain")
    with pytest.raises(InputError, match="gzip if it ends in .gz"):
        load_task(str(path))


def test_missing_files_and_variable(monkeypatch):
    monkeypatch.delenv("REFINELENS_NQ", raising=False)
    with pytest.raises(InputError, match="REFINELENS_NQ"):
        load_task("nq")
    with pytest.raises(InputError, match="expected builtin, cues, nq, kv, tiny, .* or a .jsonl"):
        load_task("no-such-file.jsonl")


@pytest.mark.parametrize(
    "text, plain",
    [
        ("The  Red, Gate!", "red gate"),
        ("an A-team", "ateam"),
        ("theatre", "theatre"),
        ("Beyonce\u0301", "beyonc\xe9"),  # two spellings of one name
    ],
)
def test_normalisation(text, plain):
    assert normalise_answer(text) == plain


def test_distractors_own_first_then_group_never_an_answer(tmp_path):
    own = [passage("own", "blue things"), passage("own", "RED, things")]  # the second holds the answer
    first = record("q1", ["red"], [passage("g", "it is red", True), *own], group="colour")
    others = [record(f"c{i}", [f"a{i}"], [passage(f"c{i}", f"a{i}", True)], group="colour") for i in range(5)]
    others += [record(f"m{i}", [f"b{i}"], [passage(f"m{i}", f"b{i} the red", True)], group="metal") for i in range(5)]
    others += [record(f"n{i}", [f"n{i}"], [passage(f"n{i}", f"n{i}", True)]) for i in range(5)]
    task = load_task(str(write(tmp_path / "t.jsonl", first, *others)))
    question = task.questions[0]
    chosen = DistractorSource(task, seed=1).choose(question, 8)
    titles = [d.title for d in chosen]
    assert titles[0] == "own" and set(titles[1:6]) == {f"c{i}" for i in range(5)}
    assert all(t.startswith("n") for t in titles[6:]), "passages with the answer must not be used"
    assert DistractorSource(task, seed=1).choose(question, 4) == chosen[:4], "sizes are nested, the seed decides"
    assert DistractorSource(task, seed=2).choose(question, 8) != chosen
    assert DistractorSource(task, seed=1).choose(question, 12) is None, "11 passages can be used"


def test_an_answer_inside_a_word_excludes_nothing(tmp_path):
    """And a question's own passages that hold an answer are counted where others stand for them."""
    own = [passage("phone", "The phone rang."), passage("two", "Only one rang."), passage("three", "It rained.")]
    task = load_task(str(write(tmp_path / "t.jsonl", record("?", ["one"], [passage("g", "one", True), *own]))))
    source, question = DistractorSource(task, seed=0), task.questions[0]
    assert [d.title for d in source.choose(question, 2)] == ["phone", "three"]
    assert [source.replaced(question, count) for count in (0, 1, 2, 3)] == [0, 0, 1, 1]


def test_an_answer_of_articles_alone_is_looked_for_as_it_stands(tmp_path):
    vitamin = record("which vitamin?", ["A"], [passage("g", "vitamin A", True), passage("x", "Vitamin A again")])
    other = record("other?", ["red"], [passage("h", "a red door", True)])
    task = load_task(str(write(tmp_path / "t.jsonl", vitamin, other)))
    chosen = DistractorSource(task, seed=0).choose(task.questions[0], 1)
    assert [d.title for d in chosen] == ["h"]


def test_choose_questions_is_seeded(question_file):
    task = load_task(str(question_file))
    assert choose_questions(task, 3, seed=0) == choose_questions(task, 3, seed=0)
    assert len({tuple(q.id for q in choose_questions(task, 3, seed=s)) for s in range(10)}) > 1
    assert choose_questions(task, None, 0) == list(task.questions)
    with pytest.raises(InputError, match="``examples``: expected 1 to 6"):
        choose_questions(task, 7, seed=0)
