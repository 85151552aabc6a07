"""Prompts, gold positions and answer tokens."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinelens.data.prompts import DEFAULT_TEMPLATE, Template, build_context, load_template
from refinelens.data.questions import QA, Document, Question
from refinelens.errors import InputError
from refinelens.placement import gold_positions
from tiny import byte_tokenizer, word_tokenizer

GOLD = Document("arven", "the door is black iron gate .")
QUESTION = Question(0, "what is the door ?", ("black iron gate",), "", "", GOLD, ())
OTHERS = [Document("brosk", "red ."), Document("calmi", "white .")]


@pytest.mark.parametrize(
    "choice, n, expected",
    [
        ("all", 3, [0, 1, 2]),
        ("ends-middle", 10, [0, 4, 9]),
        ("ends-middle", 3, [0, 1, 2]),
        ("quarters", 10, [0, 2, 4, 6, 9]),
        ("quarters", 2, [0, 1]),
        ("ends-middle", 1, [0]),
        ("4,0", 5, [0, 4]),
    ],
)
def test_gold_positions(choice, n, expected):
    assert gold_positions(choice, n) == expected


@pytest.mark.parametrize("choice", ["5", "-1", "middle", "", "0;1"])
def test_unknown_gold_position(choice):
    with pytest.raises(InputError, match="``gold_positions``: expected"):
        gold_positions(choice, 5)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_gold_document_moves_and_the_rest_stays(position):
    tokenizer = word_tokenizer()
    context = build_context(tokenizer, DEFAULT_TEMPLATE, QUESTION, OTHERS, position)
    text = tokenizer.decode(context.input_ids)
    titles = sorted(("arven", "brosk", "calmi"), key=text.index)
    expected = ["brosk", "calmi"]
    expected.insert(position, "arven")
    assert titles == expected
    start, end = context.gold_span
    span = tokenizer.decode(context.input_ids[start:end])
    assert span.startswith("Document [") and "iron" in span and span.endswith(".") and "white" not in span
    assert (context.n_documents, context.gold_position) == (3, position)


def test_answer_is_teacher_forced():
    tokenizer = word_tokenizer()
    context = build_context(tokenizer, DEFAULT_TEMPLATE, QUESTION, OTHERS, 1)
    assert tokenizer.convert_ids_to_tokens(list(context.answer_ids)) == ["black", "iron", "gate"]
    assert context.answer_span.positions == range(context.prompt_length - 1, context.prompt_length + 2)
    assert context.input_ids[context.prompt_length :] == context.answer_ids[:2]
    assert tokenizer.decode(context.input_ids[: context.prompt_length]).endswith("Answer :")


def test_answer_prefix_follows_the_template():
    tokenizer = word_tokenizer()
    question = Question(0, "what is the door ?", ("red",), " the door of arven is", "", GOLD, ())
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, [], 0)
    assert tokenizer.decode(context.input_ids).endswith("Answer : the door of arven is")


def test_special_tokens_before_stay_and_after_go():
    """A beginning token belongs to the prompt; an end token, appended by the tokenizer, must not become the answer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    plain = build_context(tokenizer, DEFAULT_TEMPLATE, QUESTION, OTHERS, 1)
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <unk> <unk>", special_tokens=[("<pad>", 0), ("<unk>", 1)]
    )
    special = build_context(tokenizer, DEFAULT_TEMPLATE, QUESTION, OTHERS, 1)
    assert special.input_ids == (0, *plain.input_ids) and special.answer_ids == plain.answer_ids
    assert special.gold_span == (plain.gold_span[0] + 1, plain.gold_span[1] + 1)


def test_a_space_that_is_a_token_belongs_to_the_prompt():
    """As SmolLM2 does before digits: the first answer token is the digit, not the space."""
    from tokenizers import Regex, pre_tokenizers

    tokenizer = word_tokenizer()
    tokenizer.add_tokens([" "])
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]|\s"), "isolated")
    question = Question(0, "what is the door ?", ("1 2",), "", "", GOLD, ())
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, OTHERS, 0)
    assert tokenizer.convert_ids_to_tokens(list(context.answer_ids)) == ["1", " ", "2"]
    assert tokenizer.decode(context.input_ids[: context.prompt_length][-2:]) in (":  ", ": ")
    # The prompt by itself has no such space: it is the same for all answers, and what follows it has the space.
    assert (context.prompt_length, context.n_shared) == (len(context.prompt_ids) + 1, len(context.prompt_ids))
    assert context.input_ids[: context.n_shared] == context.prompt_ids
    assert tokenizer.convert_ids_to_tokens(list(context.reply_span.next_ids)) == [" ", "1", " ", "2"]
    assert context.reply_span.positions[0] == len(context.prompt_ids) - 1


def test_an_answer_that_changes_the_last_token_of_the_prompt_leaves_the_prompt_by_itself():
    from tokenizers import Regex, pre_tokenizers

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r'"\w+|\w+|[^\w\s]'), "removed", invert=True)
    tokenizer.add_tokens(['"', '"red'])
    answers = ("red", "( red")
    question = Question(0, "what is the door ?", answers, ' "', "", GOLD, ())
    joined, apart = (build_context(tokenizer, DEFAULT_TEMPLATE, question, OTHERS, 0, alias) for alias in (0, 1))
    tokens = [tokenizer.convert_ids_to_tokens(list(context.answer_ids)) for context in (joined, apart)]
    assert tokens == [['"red'], ["red"]], "a bracket before the answer's first letter is not the answer"
    assert (joined.covers_before, apart.covers_before) == ('"', "")
    n = len(joined.prompt_ids)
    assert joined.prompt_ids == apart.prompt_ids == apart.input_ids[:n]
    assert (joined.n_shared, joined.prompt_length) == (n - 1, n - 1)
    assert (apart.n_shared, apart.prompt_length) == (n, n + 1)
    assert tokenizer.convert_ids_to_tokens(list(apart.reply_span.next_ids)) == ["(", "red"]
    assert joined.reply_span == joined.answer_span


def test_no_second_space_where_the_prompt_ends_in_one():
    tokenizer = word_tokenizer()
    seen = []
    whole = tokenizer.__class__.__call__

    class Spy(type(tokenizer)):
        def __call__(self, text, **kwargs):
            seen.append(text)
            return whole(self, text, **kwargs)

    tokenizer.__class__ = Spy
    build_context(tokenizer, Template(QA, "{documents} {question} is\n"), QUESTION, OTHERS[:1], 1)
    assert any(text.endswith("is\nblack iron gate") for text in seen)


def test_prompt_is_that_of_lost_in_the_middle():
    seen = []

    class Spy(type(word_tokenizer())):
        def __call__(self, text, **kwargs):
            seen.append(text)
            return super().__call__(text, **kwargs)

    tokenizer = word_tokenizer()
    tokenizer.__class__ = Spy
    build_context(tokenizer, DEFAULT_TEMPLATE, QUESTION, OTHERS[:1], 1)
    assert seen[0] == (
        "Write a high-quality answer for the given question using only the provided search results (some of which "
        "might be irrelevant).\n\nDocument [1](Title: brosk) red .\nDocument [2](Title: arven) the door is black iron "
        "gate .\n\nQuestion: what is the door ?\nAnswer:"
    )
    assert seen[0] + " black iron gate" in seen


def test_template_from_a_file(tmp_path):
    path = tmp_path / "template.txt"
    path.write_text("Question: {question}\n{documents}\nQuestion: {question}\nAnswer:\n")
    template = Template(QA, load_template(str(path)))
    tokenizer = word_tokenizer()
    text = tokenizer.decode(build_context(tokenizer, template, QUESTION, OTHERS, 0).input_ids)
    assert text.count("what is the door") == 2
    for text, counts in (("{documents}", "1 and 0"), ("{documents}{question}{documents}", "2 and 1")):
        path.write_text(text)
        with pytest.raises(InputError, match=f"and at least one .*, got {counts}"):
            load_template(str(path))
    with pytest.raises(InputError, match="expected default, query-aware or a readable text file"):
        load_template(str(tmp_path / "none.txt"))


TEXTS = st.text(min_size=1, max_size=20)  # of any characters
DOCUMENTS = st.builds(Document, TEXTS, TEXTS)
TOKENIZERS = {"words": word_tokenizer(), "bytes": byte_tokenizer()}


@pytest.mark.medium
@settings(max_examples=30, deadline=None)
@given(name=st.sampled_from(sorted(TOKENIZERS)), gold=DOCUMENTS, others=st.lists(DOCUMENTS, max_size=3), data=st.data())
def test_spans_of_any_documents(name, gold, others, data):
    """The gold document has exactly the tokens of its line by itself, wherever it stands and whatever is in it."""
    tokenizer, place = TOKENIZERS[name], data.draw(st.integers(0, len(others)))
    question = Question(0, "what is the door ?", ("red",), "", "", gold, ())
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, others, place)
    line = QA.lines([*others[:place], gold, *others[place:]])[place]
    start, end = context.gold_span
    assert list(context.input_ids[start:end]) == tokenizer(line, add_special_tokens=False)["input_ids"]
    assert context.input_ids[: context.n_shared] == context.prompt_ids[: context.n_shared]


@settings(max_examples=30, deadline=None)
@given(answer=TEXTS.filter(lambda text: text.strip() == text), prefix=st.sampled_from(["", " it is", ' "']))
def test_tokens_of_any_answer(answer, prefix):
    """They are those of the answer from its first letter on, or from its first sign, if it has no letter."""
    tokenizer = byte_tokenizer()
    question = Question(0, "what is the door ?", (answer,), prefix, "", GOLD, ())
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, OTHERS, 1)
    first = next((i for i, character in enumerate(answer) if character.isalnum()), 0)
    assert tokenizer.decode(context.answer_ids, clean_up_tokenization_spaces=False) == answer[first:]
    assert context.answer_span.next_ids == context.answer_ids
    assert (*context.input_ids, context.answer_ids[-1])[context.prompt_length :] == context.answer_ids
