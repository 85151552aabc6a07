"""The language of the model in the package: its documents, questions and words."""

import random
import re
from itertools import islice

import pytest

from refinelens.data.generated import (
    FRIENDS,
    HELD_OUT,
    HOPS,
    RELATIONS,
    TINY_CUES,
    TRAINED,
    VALUES,
    WORDINGS,
    Facts,
    Friends,
    context_text,
    friends_text,
    generate_task,
    vocabulary,
)
from refinelens.data.tasks import DistractorSource
from refinelens.data.texts import load_text
from refinelens.errors import InputError


def test_entities_held_out_are_new_pairs_of_known_names():
    assert not set(TRAINED) & set(HELD_OUT) and len(TRAINED) + len(HELD_OUT) == 64 * 64
    for place in (0, 1):
        known = {entity.split()[place] for entity in TRAINED}
        assert {entity.split()[place] for entity in HELD_OUT} == known and len(known) == 64


def test_documents_of_a_context_share_the_relation_alone():
    facts = Facts.draw(random.Random(0), 20, TRAINED)
    assert len(set(facts.values)) == len({document.title for document in facts.documents}) == 20
    forms = set()
    for document, value in zip(facts.documents, facts.values, strict=True):
        assert document.title in TRAINED and value in VALUES and facts.relation in RELATIONS
        filled = [w.format(entity=document.title, relation=facts.relation, value=value) for w in WORDINGS]
        forms.add(filled.index(document.text))
    assert forms == {0, 1, 2, 3}


@pytest.mark.parametrize("n_documents, n_questions", [(1, 3), (4, 10), (20, 10)])
def test_a_text_asks_about_every_document_before_it_repeats_one(n_documents, n_questions):
    text, last = context_text(random.Random(1), n_documents, n_questions, TRAINED)
    lines = text.split("\n")
    documents, questions, answers = lines[:n_documents], lines[n_documents::2], lines[n_documents + 1 :: 2]
    asked = []
    for question, answer in zip(questions, answers, strict=True):
        entity, value = question.split(" of ")[1].removesuffix("?"), answer.removeprefix("Answer: ")
        asked += [place for place, document in enumerate(documents) if entity in document]
        assert value in documents[asked[-1]].rstrip(".").split()
    assert len(asked) == n_questions and asked[-1] == last
    for start in range(0, n_questions, n_documents):
        assert len(set(asked[start : start + n_documents])) == len(asked[start : start + n_documents])


def test_the_vocabulary_has_every_word_once():
    words = vocabulary()
    assert len(set(words)) == len(words)
    for text in islice(load_text("tiny").pieces(), 300):
        assert set(re.findall(r"\w+|[.?:]", text)) <= set(words)


@pytest.mark.parametrize("name", ["tiny", FRIENDS, HOPS, TINY_CUES])
def test_a_question_depends_on_seed_and_number_alone(name):
    task = generate_task(name, 5, 10, seed=3)
    again, fewer = generate_task(name, 5, 10, seed=3), generate_task(name, 2, 4, seed=3)
    assert task.sha256 == again.sha256 != generate_task(name, 5, 10, seed=4).sha256
    for ours, short in zip(task.questions, fewer.questions, strict=False):
        assert (short.gold, short.question, short.distractors) == (ours.gold, ours.question, ours.distractors[:3])
    assert len(fewer.questions) == 2 and len(generate_task(name, None, 2, 0).questions) == 100


def test_the_questions_of_one_hop_are_those_that_were_always_asked():
    sha256 = generate_task("tiny", 5, 10, seed=3).sha256
    assert sha256 == "c33909331543d0dd5cc09c707ca94ec92d59283a3cff87f16add9bce64ea4fca"


def test_questions_are_about_held_out_entities_and_can_be_asked():
    task = generate_task("tiny", 20, 20, seed=0)
    for question in task.questions:
        titles = [question.gold.title, *(document.title for document in question.distractors)]
        assert set(titles) <= set(HELD_OUT) and question.gold.title in question.question
        assert len(DistractorSource(task, 0).choose(question, 19)) == 19, "no other document has the answer"
        assert question.answers[0] in question.gold.text


def told_by(text):
    """Relation, entity and value that a document tells, or "friend", person and friend."""
    fields = {"entity": r"(?P<entity>\w+ \w+)", "relation": r"(?P<relation>\w+)", "value": r"(?P<value>\w+( \w+)?)"}
    found = [re.fullmatch(wording.replace(".", r"\.").format(**fields), text) for wording in WORDINGS]
    (match,) = filter(None, found)
    return match["relation"], match["entity"], match["value"]


def asked_by(question):
    """Relation and person of a question about a friend; "friend" where it asks who that is."""
    if found := re.fullmatch(r"Who is the friend of (\w+ \w+)\?", question):
        return "friend", found[1]
    found = re.fullmatch(r"What is the (\w+) of the friend of (\w+ \w+)\?", question)
    return found and (found[1], found[2])


@pytest.mark.parametrize("n_documents", [2, 9, 20])
def test_two_hops_lead_over_the_bridge_alone(n_documents):
    task = generate_task(HOPS, 20, n_documents, seed=0)
    for question in task.questions:
        relation, person = asked_by(question.question)
        bridge = question.distractors[0]
        assert told_by(bridge.text) == ("friend", person, question.gold.title) and bridge.title == person
        assert told_by(question.gold.text) == (relation, question.gold.title, question.answers[0])
        others = [document for document in (question.gold, *question.distractors) if document is not bridge]
        assert not any(person in document.text for document in others), "only the bridge is about who is asked about"
        assert len(DistractorSource(task, 0).choose(question, n_documents - 1)) == n_documents - 1


def test_no_way_but_two_hops_tells_the_answer():
    """Every value is that of somebody's friend, in documents of the same wordings, so none of them stands out."""
    relations, wordings = set(), {"friend": set(), "fact": set()}
    for question in generate_task(HOPS, 100, 20, seed=0).questions:
        documents = (question.gold, *question.distractors)
        told = [told_by(document.text) for document in documents]
        relation, _ = asked_by(question.question)
        values = {entity: value for what, entity, value in told if what == relation}
        friends = {person: friend for what, person, friend in told if what == "friend"}
        assert len(values) == len(friends) == len(set(values.values())) == len(set(friends.values())) == 10
        assert set(values) == set(friends.values()) and not set(values) & set(friends)
        assert len({name.split()[0] for name in (*values, *friends)}) == 20 and {*values, *friends} <= set(HELD_OUT)
        relations.add(relation)
        for document, (what, entity, value) in zip(documents, told, strict=True):
            forms = [wording.format(entity=entity, relation=what, value=value) for wording in WORDINGS]
            wordings["friend" if what == "friend" else "fact"].add(forms.index(document.text))
    assert relations <= set(RELATIONS) and len(relations) > 10
    assert wordings == {"friend": {0, 1, 2, 3}, "fact": {0, 1, 2, 3}}


def test_who_a_friend_is_is_asked_of_the_same_persons():
    task, hops = generate_task(FRIENDS, 20, 10, seed=0), generate_task(HOPS, 20, 11, seed=0)
    for question, in_hops in zip(task.questions, hops.questions, strict=True):
        assert asked_by(question.question) == ("friend", asked_by(in_hops.question)[1])
        assert question.gold == in_hops.distractors[0] and question.distractors == in_hops.distractors[1:]
        assert question.answers == (in_hops.gold.title,)
        assert len(DistractorSource(task, 0).choose(question, 9)) == 9, "no other document has the friend"


@pytest.mark.parametrize("n_documents, n_questions, hops", [(2, 10, 1), (4, 6, 2), (12, 10, 5), (20, 8, 4)])
def test_half_of_the_questions_of_a_text_take_two_hops(n_documents, n_questions, hops):
    lines = friends_text(random.Random(1), n_documents, n_questions, TRAINED).split("\n")
    documents, questions, answers = lines[:n_documents], lines[n_documents::2], lines[n_documents + 1 :: 2]
    assert len(set(questions)) == len(questions) == len(answers) == min(n_questions, n_documents + hops)
    told = {(what, entity): value for what, entity, value in map(told_by, documents)}
    assert len(told) == n_documents
    two_hops = 0
    for question, answer in zip(questions, (answer.removeprefix("Answer: ") for answer in answers), strict=True):
        if (asked := asked_by(question)) is None:
            what, entity = re.fullmatch(r"What is the (\w+) of (.+)\?", question).groups()
            assert answer == told[what, entity]
        elif asked[0] == "friend":
            assert answer == told[asked]
        else:
            assert answer == told[asked[0], told["friend", asked[1]]]
            two_hops += 1
    assert two_hops == hops


@pytest.mark.parametrize("count, got", [(1, 1), (7, 7), (64, 64), (65, 64)])
def test_documents_of_two_hops_are_as_many_as_asked_or_as_first_names(count, got):
    friends = Friends.draw(random.Random(0), count, TRAINED)
    assert len(friends.documents) == len(friends.told) == got
    assert {document.title for document in friends.documents} <= set(TRAINED)


def test_no_question_is_refused():
    with pytest.raises(InputError, match="``examples``: expected 1 to 1000000 questions of ``task`` tiny, got 0"):
        generate_task("tiny", 0, 5, 0)
