"""Files of other data sets as tasks: small ones in their shapes, written by hand, and what becomes of each question."""

import gzip
import json
import subprocess
import sys

import pytest

import refinelens
from refinelens import InputError, config
from refinelens.cli import main
from refinelens.data.questions import Document
from refinelens.data.sources import DATA_SETS, passage_around, passage_without
from refinelens.data.tasks import DistractorSource, load_task

ARTICLE = {
    "title": "Arven",
    "paragraphs": [
        {
            "context": "The door of Arven is red. It opens in the 1990s.",
            "qas": [
                {
                    "id": "a",
                    "question": " Which door? ",
                    "answers": [{"text": t, "answer_start": 21} for t in ("red",) * 3],
                },
                {"id": "b", "question": "Since when?", "answers": [{"text": "1990", "answer_start": 42}]},
                {"id": "c", "question": "Who?", "answers": [], "is_impossible": True, "plausible_answers": []},
            ],
        },
        {"context": "Brosk lies beside it.", "qas": [{"id": "d", "question": "What?", "answers": [{"text": "Brosk"}]}]},
    ],
}
SQUAD = {"version": "v2.0", "data": [ARTICLE]}
FLAT = [
    {"id": q["id"], "title": "Arven", "context": p["context"], "question": q["question"]}
    | {"answers": {"text": [a["text"] for a in q["answers"]], "answer_start": [0 for _ in q["answers"]]}}
    for p in ARTICLE["paragraphs"]
    for q in p["qas"]
]
HOTPOT = {
    "_id": "5a",
    "question": "Which colour has the door of the town beside Brosk?",
    "answer": "red",
    "supporting_facts": [["Brosk", 0], ["Arven", 1]],
    "context": [
        ["Calmi", ["Calmi has no door."]],
        ["Arven", ["Arven is a town.", " Its door is red."]],
        ["Dorra", ["Red stones lie in Dorra."]],
        ["Brosk", ["Brosk lies beside Arven."]],
    ],
}
UNFIT = [
    HOTPOT | {"answer": "yes"},
    HOTPOT | {"answer": "white"},
    HOTPOT | {"answer": "Arven"},  # in both of the supporting ones
    HOTPOT | {"answer": "Red stones"},  # in a paragraph that supports nothing
]


def as_datasets(record):
    """A question of HotpotQA as the package datasets exports it."""
    (titles, sentences), (named, places) = (zip(*record[name], strict=True) for name in ("context", "supporting_facts"))
    context, facts = {"title": titles, "sentences": sentences}, {"title": named, "sent_id": places}
    own = {name: value for name, value in record.items() if name != "_id"}
    return own | {"id": record["_id"], "context": context, "supporting_facts": facts}


def text(n_words, **words):
    """Words w0, w1 and so on, some of them others."""
    found = [f"w{place}" for place in range(n_words)]
    for place, word in words.items():
        found[int(place.lstrip("at"))] = word
    return " ".join(found)


TRIVIA = {
    "question": "Who wrote it?",
    "question_id": "tc_1",
    "answer": {"value": "Mark Twain", "aliases": ["Samuel Clemens", "Mark Twain"], "normalized_aliases": []},
    "entity_pages": {
        "filename": ["one.txt", "two.txt", "empty.txt"],
        "title": ["One", "Two", "Empty"],
        "wiki_context": [text(250, at3="Twain"), text(400, at300="Samuel", at301="Clemens."), ""],
    },
    "search_results": {
        "description": ["A page."],
        "title": ["Three"],
        "search_context": [text(230, at150="Mark", at151="Twain")],
    },
}


def original(record):
    """A question of TriviaQA as its authors write it: evidence is named, not told."""
    pages = [
        {"Filename": name, "Title": title}
        for name, title in zip(*list(record["entity_pages"].values())[:2], strict=True)
    ]
    answer = {"Value": record["answer"]["value"], "Aliases": record["answer"]["aliases"]}
    results = [{"Filename": "3/three.txt", "Title": "Three", "Description": "A page."}]
    return {
        "Question": record["question"],
        "QuestionId": "tc_1",
        "Answer": answer,
        "EntityPages": pages,
        "SearchResults": results,
    }


def written(path):
    raw = path.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()]


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def passage(title, text, gold=False):
    return {"title": title, "text": text, "hasanswer": gold, "isgold": gold}


@pytest.mark.parametrize(
    "name, content",
    [
        ("one.json", json.dumps(SQUAD)),
        ("indented.json", json.dumps(SQUAD, indent=1)),
        ("article.jsonl", lines([ARTICLE])),
        ("flat.jsonl", "\n" + lines(FLAT)),
        ("flat.json", json.dumps(FLAT)),
        ("packed.json.gz", gzip.compress(json.dumps(SQUAD).encode())),
        ("packed-but-not-named-so", gzip.compress(lines(FLAT).encode())),
    ],
)
def test_every_form_of_squad(tmp_path, name, content):
    path, out = tmp_path / name, tmp_path / "task.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    found = refinelens.convert(path, from_="squad", out=out)
    door, place = "The door of Arven is red. It opens in the 1990s.", "Brosk lies beside it."
    assert written(out) == [
        {
            "id": "a",
            "question": "Which door?",
            "answers": ["red"],
            "ctxs": [passage("Arven", door, True)],
            "group": "Arven",
        },
        {
            "id": "d",
            "question": "What?",
            "answers": ["Brosk"],
            "ctxs": [passage("Arven", place, True)],
            "group": "Arven",
        },
    ]
    assert found.n_questions == 2 and sum(found.left_out.values()) == 2 and found.n_passages_left_out == 0
    task = load_task(str(out))
    assert [question.source_id for question in task.questions] == ["a", "d"]
    assert DistractorSource(task, 0).choose(task.questions[0], 1) == [Document("Arven", place)]


@pytest.mark.parametrize("form", [lambda record: record, as_datasets])
@pytest.mark.parametrize("whole", [json.dumps, lines])
def test_the_gold_paragraph_of_hotpotqa_and_the_bridge_before_the_others(tmp_path, form, whole):
    path, out = tmp_path / "hotpot.json", tmp_path / "task.jsonl.gz"
    path.write_text(whole([form(record) for record in (HOTPOT, *UNFIT)]))
    found = refinelens.convert(path, from_="hotpotqa", out=out)
    (line,) = written(out)
    bridge, other = passage("Brosk", "Brosk lies beside Arven."), passage("Calmi", "Calmi has no door.")
    assert line == {
        "id": "5a",
        "question": HOTPOT["question"],
        "answers": ["red"],
        "ctxs": [passage("Arven", "Arven is a town. Its door is red.", True), bridge, other],
    }
    assert found.left_out == {
        "no answer in a supporting paragraph as whole words": 2,
        "an answer of yes or no": 1,
        "an answer in more than one supporting paragraph": 1,
    }
    assert found.n_passages_left_out == 1, "that of red stones"
    assert [d.title for d in load_task(str(out)).questions[0].distractors] == ["Brosk", "Calmi"]


def test_passages_of_triviaqa(tmp_path):
    """A hundred words around the first answer are gold; of the other texts the first block without one."""
    path, out = tmp_path / "trivia.jsonl", tmp_path / "task.jsonl"
    empty = {"filename": [], "title": [], "wiki_context": []}
    unanswered = TRIVIA | {"answer": TRIVIA["answer"] | {"value": "Poe", "aliases": []}}
    path.write_text(lines([TRIVIA, TRIVIA | {"entity_pages": empty, "search_results": {}}, unanswered]))
    found = refinelens.convert(path, from_="triviaqa", out=out)
    (line,) = written(out)
    words = TRIVIA["entity_pages"]["wiki_context"][1].split()
    assert line["ctxs"][0] == passage("Two", " ".join(words[252:352]), True)
    first, third = (value.split() for value in (text(250, at3="Twain"), text(230)))
    assert line["ctxs"][1:] == [passage("One", " ".join(first[:100])), passage("Three", " ".join(third[:100]))]
    assert line["answers"] == ["Samuel Clemens", "Mark Twain"], "the one that stands in the gold document comes first"
    assert line["id"] == "tc_1"
    assert found.left_out == {"no text among the evidence": 1, "no answer in the evidence as whole words": 1}
    assert load_task(str(out)).questions[0].gold.title == "Two"


def test_the_authors_archive_of_triviaqa(tmp_path):
    """Texts lie in files beside it; where there is none, a search result has its description."""
    path, evidence = tmp_path / "qa" / "dev.json", tmp_path / "evidence" / "wikipedia"
    path.parent.mkdir()
    evidence.mkdir(parents=True)
    (evidence / "two.txt").write_text(TRIVIA["entity_pages"]["wiki_context"][1])
    outside = {"Filename": "../../secret.txt", "Title": "Outside"}
    (tmp_path / "secret.txt").write_text("no evidence")
    record = original(TRIVIA)
    record["EntityPages"].append(outside)
    path.write_text(json.dumps({"Domain": "Web", "Data": [record]}, indent=1))
    refinelens.convert(path, from_="triviaqa", out=tmp_path / "task.jsonl")
    (line,) = written(tmp_path / "task.jsonl")
    words = TRIVIA["entity_pages"]["wiki_context"][1].split()
    assert line["ctxs"] == [passage("Two", " ".join(words[252:352]), True), passage("Three", "A page.")]


@pytest.mark.parametrize(
    "place, start", [(0, 0), (1, 0), (49, 0), (50, 1), (99, 50), (199, 150), (200, 151), (220, 151)]
)
def test_the_answer_stands_in_the_middle_of_its_passage(place, start):
    """But near the ends of the text: 251 words, of which the answer is at any place, also across windows."""
    words = text(251, **{f"at{place}": "Twain", "at240": "Twain"})
    found = passage_around(Document("t", words), ["Mark", "Twain"])
    assert found.text.split() == words.split()[start : start + 100]
    assert passage_around(Document("Twain", text(30)), ["Twain"]) is None, "a title is no text to cut"
    assert passage_around(Document("t", "just Twain"), ["Twain"]).text == "just Twain"


def test_the_first_block_without_an_answer():
    words = text(230, at99="Twain", at100="Twain")
    (found,) = passage_without(Document("t", words), ["twain"])
    assert found.text.split() == words.split()[200:]
    assert passage_without(Document("t", text(90, at0="Twain")), ["twain"]) == []


@pytest.mark.parametrize(
    "content, source, message",
    [
        (lines([HOTPOT]), "squad", "line 1: expected a question of SQuAD .*, got a question of HotpotQA; ``convert"),
        (json.dumps(SQUAD), "hotpotqa", r"entry 1: expected a question of HotpotQA .*, got an article of SQuAD; ``con"),
        (json.dumps(FLAT), "triviaqa", "entry 1: expected a question of TriviaQA .*, got a question of SQuAD"),
        (lines([TRIVIA]), "hotpotqa", "line 1: expected a question of HotpotQA .*, got a question of TriviaQA"),
        (lines([{"question": "q", "ctxs": []}]), "squad", "in our form already; pass the file as ``task``"),
        (lines([FLAT[0], {"question": 3}]), "squad", r"line 2: .*: expected 'answers' to be an object, got None"),
        (lines([FLAT[0] | {"context": None}]), "squad", "line 1: .*: expected 'context' to be a text, got None"),
        (lines([HOTPOT | {"context": [["a", ["b"], "c"]]}]), "hotpotqa", "'context' to be a list of pairs that begin"),
        (lines([as_datasets(HOTPOT) | {"context": {"title": ["a"], "sentences": []}}]), "hotpotqa", "for every title"),
        (lines([FLAT[0]]) + "{", "squad", "line 2: expected JSON of SQuAD, got Expecting property name"),
        ("[3]", "squad", "entry 1: .*: expected an object, got int"),
        ("context,question\na,b\n", "squad", "expected JSON of SQuAD, got a table; write its rows"),
        ("", "squad", r"expected a question that can be asked, got none \(it is empty\)"),
        (json.dumps([FLAT[2]]), "squad", r"got none \(1, no answer in the file, as SQuAD 2"),
        (b"\xff\xfe", "squad", "expected JSON of SQuAD, got .*can't decode"),
        (gzip.compress(lines(FLAT).encode())[:-9], "squad", "expected a whole gzip file, got"),
    ],
)
def test_what_is_refused_says_what_it_is(tmp_path, content, source, message):
    path, out = tmp_path / "file.json", tmp_path / "task.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"^{path}.*{message}") as error:
        refinelens.convert(path, from_=source, out=out)
    assert "\n" not in str(error.value)
    assert [one.name for one in tmp_path.iterdir()] == ["file.json"], "nothing is left of it"


def test_half_a_surrogate_pair_is_counted(tmp_path):
    path, out = tmp_path / "flat.jsonl", tmp_path / "task.jsonl"
    path.write_text(lines([FLAT[0] | {"question": "\ud83d?"}, FLAT[0]]))
    assert refinelens.convert(path, from_="squad", out=out).left_out == {"text that is not valid Unicode": 1}
    assert len(load_task(str(out)).questions) == 1


def test_nothing_is_written_over(tmp_path):
    path, out = tmp_path / "flat.jsonl", tmp_path / "task.jsonl"
    path.write_text(lines(FLAT))
    with pytest.raises(InputError, match="^``out`` .*: expected a new file, got one that is there"):
        refinelens.convert(path, from_="squad", out=path)
    assert path.read_text() == lines(FLAT)
    with pytest.raises(InputError, match="^``from_``: expected squad, hotpotqa, triviaqa, got 'nq'"):
        refinelens.convert(path, from_="nq", out=out)
    with pytest.raises(InputError, match="missing: expected a file of SQuAD, got no file there"):
        refinelens.convert(tmp_path / "missing", from_="squad", out=out)


def test_packed_tasks_are_the_same_bytes(tmp_path):
    path = tmp_path / "flat.jsonl"
    path.write_text(lines(FLAT))
    outs = [tmp_path / f"{name}.jsonl.gz" for name in "ab"]
    for out in outs:
        refinelens.convert(path, from_="squad", out=out)
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_by_the_command(tmp_path, capsys):
    path, out = tmp_path / "hotpot.json", tmp_path / "task.jsonl"
    path.write_text(json.dumps([HOTPOT, UNFIT[0]]))
    assert main(["convert", str(path), "--from", "hotpotqa", "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{out}: 1 of 2 questions",
        "left out: 1, an answer of yes or no",
        "passages left out: 1, an answer beside the gold document",
    ]
    assert main(["convert", str(path), "--from", "squad", "--out", str(tmp_path / "other")]) == 2
    assert "refinelens convert --from hotpotqa makes a task of the file" in capsys.readouterr().err


def test_data_sets_are_those_of_the_option():
    assert tuple(DATA_SETS) == config.DATA_SETS


def test_it_needs_no_torch():
    code = "import sys, refinelens; refinelens.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
