"""The language of the model in the package: who has which password, emblem or nickname, as seeded questions."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

from .formats import DEFAULT, Format
from .question import Document, Question
from .task import Task, generated_task

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
ANSWER = "\nAnswer:"

_PAIRS = [(i, j) for i in range(len(FIRST_NAMES)) for j in range(len(LAST_NAMES))]
TRAINED, HELD_OUT = (  # names as the model saw them in training, and names it never saw
    [f"{FIRST_NAMES[i]} {LAST_NAMES[j]}" for i, j in _PAIRS if ((i + j) % 8 == 0) == held_out]
    for held_out in (False, True)
)


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


def training_texts() -> Iterator[str]:
    """Contexts like those that the model was trained on, of 1 to 20 documents, always the same."""
    source = random.Random(0)
    for _ in range(TEXTS):
        yield context_text(source, source.randint(1, 20), 10, TRAINED)[0] + "\n"


def generate_task(count: int | None, n_documents: int, seed: int) -> Task:
    """Questions about entities that the model was not trained on; their SHA-256 is that of the questions as JSON.

    A question depends on the seed and its number alone: of fewer documents or questions it has the first ones.

    Args:
        count: Questions, at least 1; 100 when None.
        n_documents: Documents of a question, the gold one included.
        seed: Of all that is drawn.

    Raises:
        InputError: Fewer than one question, or more than a million.
    """
    return generated_task(TINY, count, lambda number: _generate(number, n_documents, seed), _line)


def _line(question: Question) -> str:
    record = asdict(question)
    del record["source_id"]  # there is no file that could have one
    return json.dumps(record) + "\n"


def _generate(number: int, n_documents: int, seed: int) -> Question:
    facts = Facts.draw(random.Random(f"{seed}/{number}"), len(VALUES), HELD_OUT)
    gold, *others = facts.documents[: max(1, n_documents)]
    return Question(number, facts.question(0), (facts.values[0],), "", "", gold, tuple(others))


def vocabulary() -> list[str]:
    """Every word and sign of the language, each once."""
    frame = " ".join((*WORDINGS, QUESTION, ANSWER))
    for field in ("{entity}", "{relation}", "{value}"):
        frame = frame.replace(field, " ")
    for sign in ".?:":
        frame = frame.replace(sign, f" {sign} ")
    return list(dict.fromkeys([*frame.split(), *RELATIONS, *FIRST_NAMES, *LAST_NAMES, *VALUES]))
