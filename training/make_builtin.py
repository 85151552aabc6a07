"""Write the built-in task: 200 questions about fictional facts, each with its gold document.

Every town, mountain, company and person is invented, so a model can answer only from the document. The ten
groups hold one relation each, and the gold documents of a group share their wordings, so each serves as a
distractor for the other nineteen questions. Answers of a group begin with different common words, so that the
first token of " " + answer tells them apart under any tokenizer. Lines take the groups in turn: the first N
lines are a balanced sample. The file follows the oracle format of Lost in the Middle (Liu et al., 2023), with
``answer_prefix``, the start of the reply up to the answer, and ``group`` added.

    python training/make_builtin.py [--out FILE]
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations, product
from pathlib import Path

SEED = 2307
PER_GROUP = 20
BUILTIN = Path(__file__).parents[1] / "refinelens" / "data" / "builtin.jsonl"
WORDS = (30, 45)  # fewest and most words of a document

STARTS = """Arven Brosk Calmi Dorra Elska Fenta Glim Hask Isso Jasp Kelvi Lumo Marsk
    Nolli Ondra Pryn Quel Rudo Skarn Talvi Thrum Ulvi Vosk Wexi Yoro Zand""".split()
ENDS = """bick croft dane drey fell grid holt jorn keth lund mond muth
    nock pell rane shay stow tarn tolk vane wick yeth zin""".split()
SIDES = "northern southern eastern western".split()
SEASONS = "spring summer autumn winter".split()


@dataclass(frozen=True)
class Group:
    """One relation: the wording of its questions and documents, and its answers.

    In the templates {e} is the entity, {a} the answer, {n} a number, {side} a direction, {season} a season. A
    fact states the answer; a lead names the entity and may open a document; a tail may follow either.
    """

    name: str
    question: str
    prefix: str
    title: str
    answers: str
    facts: tuple[str, ...]
    leads: tuple[str, ...]
    tails: tuple[str, ...]
    surnames: bool = False  # the answers are given names, to which an invented surname is added


GROUPS = (
    Group(
        "bridge-designer", "Who designed the bridge in {e}?", "The designer of the bridge in {e} was",
        "Bridge of {e}",
        "Harold Thomas Walter George Edward Arthur Robert David Samuel Peter "
        "Oliver Frank Victor Henry Charles William James Simon Louis Patrick",
        ("The designer of the bridge in {e} was {a}, whose drawings hang in the town hall.",
         "Records say that the designer of the bridge in {e} was {a}, then a young teacher.",
         "As every child there learns, the designer of the bridge in {e} was {a}.",
         "It is less well known that the designer of the bridge in {e} was {a}.",
         "The bridge in {e} was designed by {a} and built in {n} months."),
        ("The bridge in {e} links the market street with the fields on the {side} bank.",
         "Visitors to {e} often stop in {season} to take pictures of the long bridge.",
         "For many years people in {e} crossed the river by ferry, which took {n} minutes."),
        ("The bridge has {n} narrow arches and is closed for cleaning every {season}.",
         "The railings were replaced after a flood, and the road was made wider.",
         "A short path leads from the bridge to a mill that no longer works."),
        surnames=True,
    ),
    Group(
        "mountain-climber", "Who was the first person to climb Mount {e}?",
        "The first person to climb Mount {e} was", "Mount {e}",
        "Alice Margaret Helen Sarah Emma Julia Laura Anna Rachel Grace "
        "Ruth Elizabeth Catherine Susan Jane Linda Barbara Diana Nancy Victoria",
        ("The first person to climb Mount {e} was {a}, who reached the top with a single rope.",
         "After {n} days of waiting, the first person to climb Mount {e} was {a}.",
         "Old letters show that the first person to climb Mount {e} was {a}, a local nurse.",
         "Starting before sunrise, the first person to climb Mount {e} was {a}.",
         "Mount {e} was first climbed by {a} in the {season} of a very dry year."),
        ("Mount {e} rises above a valley of sheep farms and can be seen from {n} villages.",
         "Two marked paths lead up Mount {e}, and both of them are closed in {season}.",
         "People once thought that the steep walls of Mount {e} could never be climbed."),
        ("A wooden hut below the top offers {n} beds and a stove to hikers.",
         "The upper slopes are covered with loose rock, and fog is common there.",
         "Guides from the valley now lead small parties to the top every week."),
        surnames=True,
    ),
    Group(
        "painter-city", "In which city did the painter {e} study?", "The painter {e} studied in",
        "{e} (painter)",
        "London Paris Rome Vienna Berlin Madrid Lisbon Dublin Prague Moscow "
        "Cairo Tokyo Boston Chicago Oslo Athens Brussels Amsterdam Stockholm Geneva",
        ("The painter {e} studied in {a} for {n} months before any of the pictures were sold.",
         "Letters kept by the family show that the painter {e} studied in {a}.",
         "Thanks to a gift from an uncle, the painter {e} studied in {a} and lived near the station.",
         "For reasons that are not known, the painter {e} studied in {a}.",
         "The painter {e} went to an art school in {a}, where drawing was taught with care."),
        ("The painter {e} is remembered for quiet pictures of kitchens, gardens and empty roads.",
         "About {n} pictures by the painter {e} are known, most of them quite small.",
         "The painter {e} grew up on a farm and began to draw at an early age."),
        ("Most of the pictures show morning light in {season} and very few people.",
         "Several sketchbooks were lost in a fire, and only {n} loose sheets remain.",
         "Critics ignored the work at first but later wrote warmly about its patient detail."),
    ),
    Group(
        "zoo-animal", "Which animals is the zoo in {e} best known for?",
        "The best known animals at the zoo in {e} are", "Zoo of {e}",
        "lions tigers bears elephants wolves monkeys penguins snakes turtles camels "
        "horses dolphins eagles foxes parrots goats rabbits crocodiles spiders butterflies",
        ("The best known animals at the zoo in {e} are {a}, which are kept close to the gate.",
         "Children agree that the best known animals at the zoo in {e} are {a}.",
         "Since a film was made there, the best known animals at the zoo in {e} are {a}.",
         "The guide says that the best known animals at the zoo in {e} are {a}.",
         "At the zoo in {e} the animals that are best known by far are {a}."),
        ("The zoo in {e} was opened by a group of teachers on {n} acres of old farmland.",
         "The zoo in {e} lies on the {side} edge of the town, beside a slow canal.",
         "In {season} the zoo in {e} stays open until late in the evening."),
        ("A small train carries visitors around the grounds and stops at {n} stations.",
         "Tickets are cheap, and the money pays for food, fences and a young doctor.",
         "The tea room by the gate serves soup and closes an hour before sunset."),
    ),
    Group(
        "statue-material", "What is the statue in {e} made of?", "The statue in {e} is made of",
        "Statue of {e}",
        "bronze marble granite iron copper steel glass clay wood limestone "
        "concrete silver gold plaster wax ivory bamboo jade paper leather",
        ("The statue in {e} is made of {a} and stands on a low round base.",
         "A small sign says that the statue in {e} is made of {a}.",
         "Visitors are often surprised that the statue in {e} is made of {a} from head to foot.",
         "Like the door of the town hall, the statue in {e} is made of {a}.",
         "For the statue in {e} the sculptor chose {a}, which was cheap in that year."),
        ("The statue in {e} shows a girl who holds a lamp and looks toward the {side} hills.",
         "The statue in {e} stands in the main square, where a fair is held in {season}.",
         "A contest with {n} entries was held before the statue in {e} was begun."),
        ("The figure is slightly taller than a person and faces the old post office.",
         "Pigeons gather on its shoulders, and the town has it washed {n} times a year.",
         "Students touch its left hand for luck on the morning of an exam."),
    ),
    Group(
        "island-crop", "What is the main crop on the island of {e}?", "The main crop on the island of {e} is",
        "{e} (island)",
        "rice coffee tea sugar cotton tobacco corn wheat barley garlic "
        "pepper ginger cabbage spinach bananas potatoes oranges olives grapes onions",
        ("The main crop on the island of {e} is {a}, mostly planted on the {side} slopes.",
         "As it was long ago, the main crop on the island of {e} is {a}.",
         "Although the soil is thin, the main crop on the island of {e} is {a}.",
         "Any farmer will say that the main crop on the island of {e} is {a}.",
         "On the island of {e} almost every family grows {a}, the main crop there."),
        ("The island of {e} lies {n} miles from the coast and has a single harbour.",
         "The island of {e} has no airport, and storms in {season} often stop the ferry.",
         "About {n} families live on the island of {e}, most of them close to the harbour."),
        ("The fields are divided by low walls, and donkeys carry the harvest to the boats.",
         "A school with {n} pupils stands on the hill above the harbour.",
         "Rain is kept in tanks because there are no rivers and only one spring."),
    ),
    Group(
        "lighthouse-colour", "What colour is the lighthouse at Cape {e} painted?",
        "The lighthouse at Cape {e} is painted", "Cape {e} Lighthouse",
        "red blue green yellow purple orange white black brown pink "
        "violet silver gold scarlet amber ivory cream lavender turquoise indigo",
        ("The lighthouse at Cape {e} is painted {a} from its base to the lamp room.",
         "By an old rule the lighthouse at Cape {e} is painted {a}.",
         "So that sailors can find it, the lighthouse at Cape {e} is painted {a} every {n} months.",
         "Unlike the keeper's house, the lighthouse at Cape {e} is painted {a}.",
         "The colour of the lighthouse at Cape {e} is {a}, which nobody wants to change."),
        ("The lighthouse at Cape {e} is {n} metres high and has a winding stair.",
         "The lighthouse at Cape {e} guides fishing boats past the rocks on the {side} side.",
         "The lighthouse at Cape {e} can be visited in {season} when the sea is calm."),
        ("Its lamp turns slowly and can be seen from {n} miles away.",
         "The keeper grows vegetables behind the house and writes down the weather each day.",
         "A narrow road leads to the door but is flooded twice a month."),
    ),
    Group(
        "university-subject", "Which subject is the university in {e} best known for?",
        "The best known subject at the university in {e} is", "University of {e}",
        "medicine music chemistry physics history philosophy mathematics biology economics geography "
        "astronomy engineering architecture journalism literature psychology theology law dance nursing",
        ("The best known subject at the university in {e} is {a}, which fills its largest hall.",
         "Far beyond the valley, the best known subject at the university in {e} is {a}.",
         "A survey found that the best known subject at the university in {e} is {a}.",
         "Because of one famous teacher, the best known subject at the university in {e} is {a}.",
         "The university in {e} is small, but it is well known for teaching {a}."),
        ("The university in {e} has {n} classrooms and a garden that is open to everyone.",
         "The university in {e} stands on the {side} side of the town near the station.",
         "The university in {e} begins its year in {season} with a long public dinner."),
        ("Most students live in brick houses along the river and walk to class.",
         "The library keeps {n} thousand books and stays open until midnight.",
         "A bell in the main tower rings when the last exam is over."),
    ),
    Group(
        "company-product", "What does the {e} Company make?", "The {e} Company makes", "{e} Company",
        "shoes clocks candles bicycles boats chairs knives carpets bricks guitars "
        "hats toys windows gloves mirrors pencils lamps tents buttons bottles",
        ("The {e} Company makes {a} and sells most of them to shops abroad.",
         "With only {n} workers, the {e} Company makes {a} that last for many years.",
         "A sign over the gate says that the {e} Company makes {a}.",
         "In spite of its name, the {e} Company makes {a} and nothing else.",
         "All {n} workers of the {e} Company help to make {a}."),
        ("The {e} Company owns a long factory on the {side} bank of a river.",
         "The {e} Company gives everyone two weeks of holiday in {season}.",
         "The {e} Company began in a rented barn with {n} workers and one machine."),
        ("The office is above the main hall, and its doors are never locked.",
         "A bus brings the staff from {n} villages and takes them home at five.",
         "Part of the profit goes to a school that the founder once attended."),
    ),
    Group(
        "chronicle-language", "In which language was the {e} Chronicle written?",
        "The {e} Chronicle was written in", "{e} Chronicle",
        "French German Latin Greek Arabic Spanish Italian Dutch Hebrew Persian "
        "Chinese Japanese Russian Polish Turkish Swedish Portuguese Danish Hindi Welsh",
        ("The {e} Chronicle was written in {a} by a monk whose name is not known.",
         "Scholars agree that the {e} Chronicle was written in {a}.",
         "Although few people nearby could read it, the {e} Chronicle was written in {a}.",
         "Like most books of its time, the {e} Chronicle was written in {a} on thick paper.",
         "The text of the {e} Chronicle is in {a}, with a few notes by a later hand."),
        ("The {e} Chronicle tells of {n} years of harvests, storms and quarrels.",
         "The {e} Chronicle was found in a chest on the {side} side of a chapel.",
         "The {e} Chronicle is shown to the public for one week each {season}."),
        ("The book has {n} pages, and several of them were damaged by water.",
         "Small drawings of birds and ships fill the edges of the first chapter.",
         "A modern copy can be read in the library, but the binding is weak."),
    ),
)


def spread(rng: random.Random, choices: tuple) -> Iterator:
    """Yield the choices in random order, each equally often over PER_GROUP draws (give or take one)."""
    drawn = [choices[i % len(choices)] for i in range(PER_GROUP)]
    rng.shuffle(drawn)
    return iter(drawn)


def invent(rng: random.Random, taken: set[str], words: list[str]) -> list[str]:
    """Return PER_GROUP names that differ in both halves, are not taken and hint at none of the words."""
    names: list[str] = []
    starts, ends = STARTS[:], ENDS[:]
    while len(names) < PER_GROUP:
        start, end = rng.choice(starts), rng.choice(ends)
        name = start + end
        hints = any(word.lower() in name.lower() or name[:3].lower() == word[:3].lower() for word in words)
        if name not in taken and not hints:
            names.append(name)
            starts.remove(start)
            ends.remove(end)
    taken.update(names)
    return names


def document(rng: random.Random, group: Group, fact: str, place: int, slots: dict[str, str]) -> str:
    """Return three sentences with the fact as the first, second or third (place 0, 1, 2)."""
    fitting = []
    for lead, (tail, other) in product(group.leads, permutations(group.tails, 2)):
        template = " ".join(((fact, tail, other), (lead, fact, tail), (lead, tail, fact))[place])
        # Two sentences with one slot would repeat its value.
        once = all(template.count(slot) <= 1 for slot in ("{n}", "{side}", "{season}"))
        text = template.format(**slots)
        if once and WORDS[0] <= len(text.split()) <= WORDS[1]:
            fitting.append(text)
    return rng.choice(fitting)


def records(rng: random.Random, group: Group, taken: set[str]) -> list[dict]:
    """Return the questions of one group in random order."""
    words = group.answers.split()
    surnames = invent(rng, taken, words) if group.surnames else [""] * PER_GROUP
    answers = [f"{word} {surname}".strip() for word, surname in zip(words, surnames, strict=True)]
    rng.shuffle(answers)
    entities = invent(rng, taken, words)
    facts, places = spread(rng, group.facts), spread(rng, (0, 1, 2))
    made = []
    for entity, answer in zip(entities, answers, strict=True):
        slots = {"e": entity, "a": answer, "n": str(rng.randint(11, 89))}
        slots |= {"side": rng.choice(SIDES), "season": rng.choice(SEASONS)}
        text = document(rng, group, next(facts), next(places), slots)
        gold = {"title": group.title.format(**slots), "text": text, "hasanswer": True, "isgold": True}
        made.append({
            "question": group.question.format(**slots), "answers": [answer],
            "answer_prefix": " " + group.prefix.format(**slots), "group": group.name, "ctxs": [gold],
        })
    return made


def build() -> str:
    """Return the text of the file, one JSON object a line."""
    rng = random.Random(SEED)
    taken: set[str] = set()
    grouped = [records(rng, group, taken) for group in GROUPS]
    return "".join(json.dumps(record) + "\n" for row in zip(*grouped, strict=True) for record in row)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the built-in task to FILE.")
    parser.add_argument("--out", type=Path, default=BUILTIN, metavar="FILE")
    parser.parse_args().out.write_text(build(), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
