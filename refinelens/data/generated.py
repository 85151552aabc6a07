"""Generated tasks: key-value retrieval of any size, and the language of the model in the package.

Key-value retrieval is that of Liu et al. 2023 (arXiv 2307.03172). The tiny model's language is who has which password,
emblem or nickname, and who is whose friend: a question about the emblem of somebody's friend takes two hops. All are
seeded.
"""

from __future__ import annotations

import hashlib
import json
import random
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from ..errors import InputError
from .questions import DEFAULT, KV, Document, Format, Question
from .tasks import Task, kv_question

GENERATED = 100  # questions, where none are counted
MOST_GENERATED = 1_000_000  # questions, all held in memory
TEXTS = 4000  # contexts of the text that a lens is fitted to

FIRST_NAMES = [
    start + end
    for start in ("Al", "Bel", "Cor", "Dan", "El", "Fen", "Gal", "Hil")
    for end in ("a", "bert", "ena", "ic", "mund", "o", "ric", "wen")
]
LAST_NAMES = [
    start + end
    for start in ("Ash", "Birch", "Clay", "Dun", "East", "Flint", "Green", "Hart")
    for end in ("bury", "dale", "field", "ford", "ley", "mere", "ton", "well")
]
RELATIONS = (
    "badge charm codename crest emblem gift keyword label mark motto nickname password prize seal sign signal"
).split()
VALUES = (
    "acorn amber anchor anvil apple arrow barley basket beacon beetle bell biscuit blanket bottle bramble bridge "
    "bronze bucket butter button cabin candle canoe carpet castle cedar cherry chimney cinder clover cobalt comet "
    "copper coral cotton cradle crimson crystal curtain cypress dagger daisy desert diamond dolphin dragon eagle ember "
    "engine falcon feather fern fiddle flame flute forest fountain fox garden garnet ginger glacier granite hammer "
    "harbour harp hazel heron honey hornet indigo island ivory ivy jasmine juniper kettle ladder lantern lark laurel "
    "lemon lichen lily linen lizard maple marble meadow mirror moss nectar needle nettle oak oasis ochre olive onyx "
    "orchid otter owl oyster paddle pearl pebble pepper pigeon pine plum pocket poppy prism quartz quill rabbit raven "
    "ribbon river robin saddle saffron salmon silver spindle spruce tulip walnut"
).split()
WORDINGS = (
    "The {relation} of {entity} is {value}.",
    "{entity} has {value} as {relation}.",
    "For {entity} the {relation} is {value}.",
    "As {relation} {entity} has {value}.",
)
QUESTION = "What is the {relation} of {entity}?"
FRIEND = "friend"  # stands where a relation does
WHO = "Who is the friend of {entity}?"
TWO_HOPS = "What is the {relation} of the friend of {entity}?"
ANSWER = "\nAnswer:"

_PAIRS = [(i, j) for i in range(len(FIRST_NAMES)) for j in range(len(LAST_NAMES))]
TRAINED, HELD_OUT = (  # names as the model saw them in training, and names it never saw
    [f"{FIRST_NAMES[i]} {LAST_NAMES[j]}" for i, j in _PAIRS if ((i + j) % 8 == 0) == held_out]
    for held_out in (False, True)
)
FRIENDS, HOPS, TINY_CUES = "tiny-friends", "tiny-hops", "tiny-cues"  # tasks in the language of `TINY`


def _kv_question(number: int, n_pairs: int, seed: int) -> Question:
    source = random.Random(f"{seed}/{number}")
    pairs = [Document(_random_uuid(source), _random_uuid(source)) for _ in range(max(1, n_pairs))]
    return kv_question(number, pairs[0], pairs[1:])


def _random_uuid(source: random.Random) -> str:
    return str(uuid.UUID(int=source.getrandbits(128), version=4))


def _kv_line(question: Question) -> str:
    """A question as the paper's files have it."""
    pairs = [[pair.title, pair.text] for pair in (question.gold, *question.distractors)]
    record = {"ordered_kv_records": pairs, "key": question.question, "value": question.answers[0]}
    return json.dumps(record) + "\n"


def _text_lines(documents: Sequence[Document]) -> list[str]:
    return [document.text for document in documents]


TINY = Format(
    name="tiny",
    templates={DEFAULT: "{documents}\n{question}" + ANSWER},
    closed_book="{question}" + ANSWER,
    lines=_text_lines,
    own_documents=True,
)


@dataclass(frozen=True)
class Facts:
    """What a context tells: documents of one relation, whose entities (their titles) and values all differ."""

    relation: str
    documents: list[Document]
    values: list[str]  # of the documents

    @classmethod
    def draw(cls, source: random.Random, count: int, entities: Sequence[str]) -> Facts:
        """Draw ``count`` documents, at most as many as there are values."""
        relation = source.choice(RELATIONS)
        titles, values = source.sample(entities, count), source.sample(VALUES, count)
        wordings = source.choices(WORDINGS, k=count)
        texts = [
            wording.format(entity=title, relation=relation, value=value)
            for wording, title, value in zip(wordings, titles, values, strict=True)
        ]
        return cls(relation, [Document(*pair) for pair in zip(titles, texts, strict=True)], values)

    def question(self, place: int) -> str:
        """What is asked about a document."""
        return QUESTION.format(relation=self.relation, entity=self.documents[place].title)


def context_text(source: random.Random, n_documents: int, n_questions: int, entities: Sequence[str]) -> tuple[str, int]:
    """Documents, then questions about them with their answers, and which document the last question is about.

    Every document is asked about once before one is asked about again.
    """
    facts = Facts.draw(source, n_documents, entities)
    lines = _text_lines(facts.documents)
    places = [p for _ in range(0, n_questions, n_documents) for p in source.sample(range(n_documents), n_documents)]
    lines += [f"{facts.question(place)}{ANSWER} {facts.values[place]}" for place in places[:n_questions]]
    return "\n".join(lines), places[n_questions - 1]


@dataclass(frozen=True)
class Friends:
    """What a context of two hops tells, by turns: the value of a person, and whose friend that person is.

    Document 2k is the fact of the friend that document 2k + 1 names: who is asked about in two hops has no fact of
    their own, and every friend has one. Persons differ in their first names, so that one token tells who is meant.
    """

    relation: str  # of the facts
    documents: list[Document]
    told: list[str]  # by the documents: a value, the name of a friend

    @classmethod
    def draw(cls, source: random.Random, count: int, entities: Sequence[str]) -> Friends:
        """Draw ``count`` documents, or as many as there are first names."""
        relation, named = source.choice(RELATIONS), {}
        while len(named) < min(count, len(FIRST_NAMES)):
            person = source.choice(entities)
            named.setdefault(person.split()[0], person)
        persons, values = list(named.values()), source.sample(VALUES, (len(named) + 1) // 2)
        told = [persons[i - 1] if i % 2 else values[i // 2] for i in range(len(persons))]
        texts = [
            source.choice(WORDINGS).format(entity=person, relation=FRIEND if i % 2 else relation, value=what)
            for i, (person, what) in enumerate(zip(persons, told, strict=True))
        ]
        return cls(relation, [Document(*pair) for pair in zip(persons, texts, strict=True)], told)

    def question(self, place: int) -> str:
        """What is asked about a document."""
        wording = WHO if place % 2 else QUESTION
        return wording.format(relation=self.relation, entity=self.documents[place].title)

    def two_hops(self, place: int) -> str:
        """What is asked about a document with a friend and the one before it, the friend's fact."""
        return TWO_HOPS.format(relation=self.relation, entity=self.documents[place].title)


def friends_text(source: random.Random, n_documents: int, n_questions: int, entities: Sequence[str]) -> str:
    """Documents in any order, then different questions with their answers: half in two hops, or all of those."""
    friends = Friends.draw(source, n_documents, entities)
    bridges, places = range(1, n_documents, 2), range(n_documents)
    hops = source.sample(bridges, min(len(bridges), (n_questions + 1) // 2))
    asked = [(friends.two_hops(place), friends.told[place - 1]) for place in hops]
    rest = source.sample(places, min(n_documents, n_questions - len(hops)))
    asked += [(friends.question(place), friends.told[place]) for place in rest]
    lines = _text_lines(source.sample(friends.documents, n_documents))
    source.shuffle(asked)
    return "\n".join(lines + [f"{question}{ANSWER} {answer}" for question, answer in asked])


def training_texts() -> Iterator[str]:
    """Contexts of one hop like those that the model was trained on, of 1 to 20 documents, always the same."""
    source = random.Random(0)
    for _ in range(TEXTS):
        yield context_text(source, source.randint(1, 20), 10, TRAINED)[0] + "\n"


def _tiny_line(question: Question) -> str:
    record = asdict(question)
    del record["source_id"]  # there is no file that could have one
    if not record["decoys"]:
        del record["golds"], record["decoys"], record["decoy_answer"]
    return json.dumps(record) + "\n"


def _tiny_question(number: int, n_documents: int, seed: int) -> Question:
    facts = Facts.draw(random.Random(f"{seed}/{number}"), len(VALUES), HELD_OUT)
    gold, *others = facts.documents[: max(1, n_documents)]
    return Question(number, facts.question(0), (facts.values[0],), "", "", gold, tuple(others))


def _cues_question(number: int, n_documents: int, seed: int) -> Question:
    """In one hop, of documents that disagree: each wording tells the value and, as a decoy, one of no document."""
    source = random.Random(f"{seed}/{number}")
    facts = Facts.draw(source, len(VALUES), HELD_OUT)
    gold, *others = facts.documents[: min(max(1, n_documents), len(VALUES) - 1)]
    decoy_answer, entity = facts.values[-1], gold.title

    def told(wording: str, value: str) -> Document:
        return Document(entity, wording.format(entity=entity, relation=facts.relation, value=value))

    golds = [told(wording, facts.values[0]) for wording in WORDINGS]
    decoys = [told(wording, decoy_answer) for wording in source.sample(WORDINGS, len(WORDINGS))]
    more = {"golds": tuple(one for one in golds if one != gold), "decoys": tuple(decoys), "decoy_answer": decoy_answer}
    return Question(number, facts.question(0), (facts.values[0],), "", "", gold, tuple(others), **more)


def _hops_question(number: int, n_documents: int, seed: int) -> Question:
    """In two hops; the first distractor is the bridge, which names the friend."""
    friends = Friends.draw(random.Random(f"{seed}/{number}"), len(FIRST_NAMES), HELD_OUT)
    gold, *others = friends.documents[: max(1, n_documents)]
    return Question(number, friends.two_hops(1), (friends.told[0],), "", "", gold, tuple(others))


def _friend_question(number: int, n_documents: int, seed: int) -> Question:
    """The first hop alone, about the same person; the friend's fact, which has the answer in it, is left out."""
    friends = Friends.draw(random.Random(f"{seed}/{number}"), len(FIRST_NAMES), HELD_OUT)
    gold, *others = friends.documents[1 : 1 + max(1, n_documents)]
    return Question(number, friends.question(1), (friends.told[1],), "", "", gold, tuple(others))


# By name: how contexts are written, the question of a number, and a question as a file would have it.
GENERATORS = {
    KV.name: (KV, _kv_question, _kv_line),
    TINY.name: (TINY, _tiny_question, _tiny_line),
    FRIENDS: (TINY, _friend_question, _tiny_line),
    HOPS: (TINY, _hops_question, _tiny_line),
    TINY_CUES: (TINY, _cues_question, _tiny_line),
}


def generate_task(name: str, count: int | None, n_documents: int, seed: int) -> Task:
    """The task of a name among `GENERATORS`; its SHA-256 is that of its lines, gold document first.

    A question depends on the seed and its number alone: of fewer documents or questions it has the first ones.

    Args:
        name: ``kv``, random version-4 UUIDs; ``tiny``, entities that the model was not trained on; ``tiny-friends``,
            whose friend they are; ``tiny-hops``, the value of a person's friend; or ``tiny-cues``, of whom two values
            are told.
        count: Questions, at least 1; `GENERATED` when None.
        n_documents: Documents, or pairs, of a question, the gold one included.
        seed: Of all that is drawn.

    Raises:
        InputError: Fewer than one question, or more than `MOST_GENERATED`.
    """
    format, _, line = GENERATORS[name]
    count = GENERATED if count is None else count
    if not 1 <= count <= MOST_GENERATED:
        raise InputError(f"``examples``: expected 1 to {MOST_GENERATED} questions of ``task`` {name}, got {count}")
    questions = tuple(generate_questions(name, range(count), n_documents, seed))
    return Task(name, None, hashlib.sha256("".join(map(line, questions)).encode()).hexdigest(), questions, format)


def generate_questions(name: str, numbers: Iterable[int], n_documents: int, seed: int) -> list[Question]:
    """The questions of some numbers of a task, as `generate_task` has them."""
    _, question, _ = GENERATORS[name]
    return [question(number, n_documents, seed) for number in numbers]


def vocabulary() -> list[str]:
    """Every word and sign of the language, each once."""
    frame = " ".join((*WORDINGS, QUESTION, ANSWER, WHO, TWO_HOPS))
    for field in ("{entity}", "{relation}", "{value}"):
        frame = frame.replace(field, " ")
    for sign in ".?:":
        frame = frame.replace(sign, f" {sign} ")
    return list(dict.fromkeys([*frame.split(), *RELATIONS, *FIRST_NAMES, *LAST_NAMES, *VALUES]))
