"""The language of the model in the package: its documents, questions and words."""

import random
import re
from itertools import islice

import pytest

from refinelens.data.generated import (
    HELD_OUT,
    RELATIONS,
    TRAINED,
    VALUES,
    WORDINGS,
    Facts,
    context_text,
    generate_task,
    vocabulary,
)
from refinelens.data.tasks import DistractorSource
from refinelens.errors import InputError
from refinelens.fitting.text import load_text


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


def test_a_question_depends_on_seed_and_number_alone():
    task = generate_task("tiny", 5, 10, seed=3)
    again, fewer = generate_task("tiny", 5, 10, seed=3), generate_task("tiny", 2, 4, seed=3)
    assert task.sha256 == again.sha256 != generate_task("tiny", 5, 10, seed=4).sha256
    for ours, short in zip(task.questions, fewer.questions, strict=False):
        assert (short.gold, short.question, short.distractors) == (ours.gold, ours.question, ours.distractors[:3])
    assert len(fewer.questions) == 2 and len(generate_task("tiny", None, 2, 0).questions) == 100


def test_questions_are_about_held_out_entities_and_can_be_asked():
    task = generate_task("tiny", 20, 20, seed=0)
    for question in task.questions:
        titles = [question.gold.title, *(document.title for document in question.distractors)]
        assert set(titles) <= set(HELD_OUT) and question.gold.title in question.question
        assert len(DistractorSource(task, 0).choose(question, 19)) == 19, "no other document has the answer"
        assert question.answers[0] in question.gold.text


def test_no_question_is_refused():
    with pytest.raises(InputError, match="``examples``: expected 1 to 1000000 questions of ``task`` tiny, got 0"):
        generate_task("tiny", 0, 5, 0)
