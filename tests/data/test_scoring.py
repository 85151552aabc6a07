"""best_subspan_em: by hand, and against the definition of Lost in the Middle written down a second time."""

import random
import string

import pytest

from refinelens.data.scoring import best_subspan_em, first_line, has_answer, word_forms


@pytest.mark.parametrize(
    "generated, answers, right",
    [
        (" Wilhelm Conrad Röntgen, in 1901.", ["Wilhelm Conrad Röntgen"], True),
        ("It was RED!", ["red"], True),
        ("the red, iron gate", ["A red iron gate"], True),  # articles and punctuation go on both sides
        ("an answer of two words", ["answer two"], False),  # a span stands together
        ("reddish", ["red"], True),  # a span of characters, not of words
        ("blue", ["red", "blue"], True),  # any answer does
        ("blue", ["red", "green"], False),
        ("", ["red"], False),
        ("green\nDocument [1] red", ["red"], False),  # what is copied behind the first line does not count
        ("\nred", ["red"], False),  # nor is there anything before it
        ("u.s.a.", ["USA"], True),
        ("1,000 lamps", ["1000"], True),
        ("well-known", ["well known"], False),  # punctuation goes without a space
        ("Beyonce\u0301", ["beyonc\xe9"], True),  # two spellings of one name
        ("vitamin C", ["A"], False),  # an answer of articles alone is looked for as it stands
        ("vitamin A", ["A"], True),
        ("vitamin Alpha", ["A"], False),
    ],
)
def test_by_hand(generated, answers, right):
    assert best_subspan_em(generated, answers) is right


@pytest.mark.parametrize(
    "text, answer, found",
    [
        ("The phone rang in London.", "one", False),  # a span of words, not of characters
        ("Only one rang.", "one", True),
        ("because of rain", "US", False),
        ("in the U.S. alone", "US", True),
        ("a London-based bank", "London", True),
        ("a London\u2013Paris train", "paris", True),  # with a dash
        ("so \u201cParis\u201d it is", "Paris", True),
        ("1,000 lamps", "1000", True),
        ("21,000 lamps", "1000", False),
        ("the red, iron gate", "a Red Iron Gate", True),
        ("red iron gates", "red iron gate", False),
        ("vitamin C", "A", False),  # an answer of articles alone is looked for as it stands
        ("vitamin A", "A", True),
        ("J.K. Rowling's book", "J.K. Rowling", True),
        ("a 1,000-strong army", "1,000", True),
        ("The U.S.-led talks", "U.S.", True),
        ("Coca-Cola/Pepsi", "Coca-Cola", True),
        ("Jean Luc Picard", "Jean-Luc Picard", True),
        ("J.K. Rowlings", "J.K. Rowling", False),
    ],
)
def test_whole_words(text, answer, found):
    assert has_answer(word_forms(text), answer) is found


def definition(prediction, ground_truths):
    """The paper's: lower case, no ASCII punctuation, no articles, single spaces; a span of the first line."""

    def normal(text):
        kept = "".join(" " if c.isspace() else c for c in text.lower() if c not in set(string.punctuation))
        return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))

    line = normal(prediction[: prediction.index("\n")] if "\n" in prediction else prediction)
    return max(float(normal(truth) in line) for truth in ground_truths)


def test_on_the_papers_definition():
    """5,000 drawn texts and answers, in which spans, articles, punctuation, cases and newlines come up."""
    draw = random.Random(0)
    pieces = "red Iron gate the A an an, theatre A. 1,000 o'clock well-known".split() + ["\n", "?"]
    right = 0
    for _ in range(5000):
        text = draw.choice(["", " "]) + " ".join(draw.choices(pieces, k=draw.randrange(8)))
        answers = [" ".join(["gate", *draw.choices(pieces[:-2], k=draw.randrange(2))]) for _ in range(2)]
        assert best_subspan_em(text, answers) == bool(definition(text, answers)), (text, answers)
        right += best_subspan_em(text, answers)
    assert 500 < right < 4500


def test_first_line():
    assert first_line(" red \n blue") == "red" and first_line("\nblue") == "" and first_line("") == ""
