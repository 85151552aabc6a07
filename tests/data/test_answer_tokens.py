"""The first token of an answer is of the answer, whatever the tokenizer joins; and tokenizers of every kind."""

import json

import pytest
import transformers
from tokenizers import Regex, pre_tokenizers

from refinelens.cli import main
from refinelens.data.answer_tokens import joint, tokenise
from refinelens.data.prompts import DEFAULT_TEMPLATE, Template, build_context
from refinelens.data.questions import QA, Document, Question
from refinelens.errors import CannotAskError
from refinelens.model import identity
from refinelens.model.identity import tokenizer_sha256
from refinelens.store.results import open_run
from tiny import byte_tokenizer, save_tiny_model, word_tokenizer


def splitting(pattern, *extra):
    """A tokenizer of the pieces that match a pattern."""
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(list(extra))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return tokenizer


JOINS = splitting(r": |\w+'?|[^\w\s]|\s", ": ", "what'", " ")  # a sign with the space behind it is one token
OPENS = splitting(r'"?\w+|[^\w\s]', '"red')


@pytest.mark.parametrize(
    "tokenizer, prompt, answer, first, before",
    [
        (JOINS, "Answer:", " red gate", "red", ""),  # not ": ", which holds none of it
        (JOINS, "Answer", ": red", "red", ""),  # nor a sign of the answer's own
        (JOINS, "what'", "red", "red", ""),
        (JOINS, "Answer", " ? red", "red", ""),
        (JOINS, "Answer", " ?", "?", ""),  # there is nothing else of it
        (OPENS, 'is "', "red", '"red', '"'),  # a token that ends the prompt and begins the answer
        (OPENS, "is", ' "red', '"red', ""),  # here the quote is the answer's own
        (byte_tokenizer(), "is", " red", "r", ""),
        (byte_tokenizer(), "is", " 京", "ä", ""),  # the first of the three bytes of a character
        (byte_tokenizer(), "是「", "京」", "ä", ""),
        (transformers.ByT5Tokenizer(), "is:", ' "red"', "r", ""),  # a slow one, which knows no offsets
        (transformers.ByT5Tokenizer(), "是「", "京」", None, ""),
        (transformers.ByT5Tokenizer(), "is", " -5 °", "5", ""),
    ],
)
def test_first_token_holds_a_letter_of_the_answer(tokenizer, prompt, answer, first, before):
    found = tokenise(tokenizer, prompt, answer, special=False)
    assert found.covers_before == before
    token = tokenizer.convert_ids_to_tokens([found.whole[found.answer]])[0]
    assert token == first or first is None
    letters = [c for c in answer if c.isalnum()] or [answer.strip()[0]]
    written = tokenizer.decode(found.whole[found.answer :]).replace('"', "").strip()
    assert written[0] == letters[0], "nothing of the prompt is left but what is recorded"
    assert found.prompt == identity.ids_of(tokenizer, prompt)


def test_the_token_may_hold_the_end_of_the_prompt():
    tokenizer = splitting(r"\w+ \w+|\w+|[^\w\s]", "is red")
    found = tokenise(tokenizer, "the door is", " red gate", special=False)
    assert tokenizer.convert_ids_to_tokens(found.whole[found.answer :]) == ["is red", "gate"]
    assert found.covers_before == "is" and found.parts == found.answer == 1


@pytest.mark.parametrize("answer", ["", " "])
def test_an_answer_without_a_token(answer):
    with pytest.raises(CannotAskError, match="an answer without a token of its own"):
        tokenise(word_tokenizer(), "what is", answer, special=False)


@pytest.mark.parametrize(
    "text, between",
    [
        ("", ""),
        ("Answer:", " "),
        ("Answer: ", ""),
        ("Answer:\n", ""),
        ("the door is", " "),
        ('the "', ""),
        ('he said "', ""),
        ('the "door"', " "),  # a closing quote
        ('{"key":"', ""),
        ("the door's", " "),
        ("the (", ""),
        ("f(", ""),
        ("the [", ""),
        ("the “", ""),
        ("das «", ""),
        ("das „", ""),
        ("the “door”", " "),
        ("the (door)", " "),
        ("答えは", ""),
        ("回答：", ""),  # a full-width colon
        ("回答:", " "),
        ("首都は「", ""),
        ("首都は『", ""),
        ("是《", ""),
        ("（", ""),
        ("です。", ""),
        ("東京、", ""),
        ("คำตอบคือ", ""),
        ("답은", " "),  # Korean sets words apart
        ("الجواب هو", " "),
        ("\N{FULLWIDTH LATIN SMALL LETTER A}", " "),
        ("\N{SLIGHTLY SMILING FACE}", " "),
    ],
)
def test_joint(text, between):
    assert joint(text) == between


GOLD = Document("arven", "the door of arven is red .")


def context_of(tokenizer, *answers, text="{documents}\n{question}\nAnswer :", document=GOLD, alias=0):
    question = Question(0, "what is the door ?", answers, "", "", document, ())
    return build_context(tokenizer, Template(QA, text), question, [], 0, alias)


def test_unknown_words_are_no_answer():
    tokenizer = word_tokenizer()
    with pytest.raises(CannotAskError, match="an answer in words that the tokenizer does not know"):
        context_of(tokenizer, "Paris")
    with pytest.raises(CannotAskError, match="an answer in words that the tokenizer does not know"):
        context_of(tokenizer, "red Paris")
    assert context_of(tokenizer, "Paris", "red", alias=1).answer_ids


def test_special_tokens_in_a_document_are_text():
    """But for a prompt that has some of its own, where the tokenizer reads all alike."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|user|>"]})
    odd = Document("arven", "red </s> it is")
    plain = context_of(tokenizer, "red", document=odd)
    assert tokenizer.eos_token_id not in plain.input_ids
    assert "red </s> it is" in tokenizer.decode(plain.input_ids)
    own = context_of(tokenizer, "red", text="<|user|>{documents}\n{question}\nAnswer :", document=odd)
    assert own.input_ids[0] == tokenizer.convert_tokens_to_ids("<|user|>")
    assert tokenizer.eos_token_id in own.input_ids


class Foreign:
    """A tokenizer that has what mistral-common's has of Transformers' interface, and no more."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.bos_token_id = self.eos_token_id = None
        self.unk_token_id, self.all_special_tokens = tokenizer.unk_token_id, tokenizer.all_special_tokens

    def __call__(self, text, add_special_tokens=True, **options):
        if options.pop("split_special_tokens", False):
            raise ValueError("`Foreign` does not support `split_special_tokens`.")
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return transformers.BatchEncoding({"input_ids": ids})

    def __len__(self):
        return len(self._tokenizer)

    def decode(self, ids, skip_special_tokens=False):
        if any(not 0 <= id < len(self) for id in ids):
            raise IndexError("OUT_OF_RANGE: piece id is out of range.")
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def get_vocab(self):
        return self._tokenizer.get_vocab()

    def added_tokens_decoder(self):
        raise NotImplementedError

    def get_chat_template(self, *_):
        raise NotImplementedError


@pytest.mark.medium
def test_a_sweep_with_a_tokenizer_that_is_not_transformers_own(
    tiny_model, question_file, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: Foreign(word_tokenizer()))
    sweep = ["sweep", "--model", str(tiny_model), "--task", str(question_file), "--documents", "2", "--device", "cpu"]
    assert main([*sweep, "--generate", "2", "--out", str(tmp_path / "run")]) == 0
    rows = [row for part in open_run(tmp_path / "run").parts() for row in part.to_pylist()]
    assert [row["answer_text"] for row in rows][:4] == ["red", "red", "blue", "stone"]
    assert all(row["gold_start"] is None for row in rows), "it knows no offsets"
    capsys.readouterr()
    assert main([*sweep, "--chat", "--out", str(tmp_path / "chat")]) == 2
    assert "--chat: expected a tokenizer with a chat template, got Foreign without one" in capsys.readouterr().err


def test_the_hash_of_a_tokenizer_without_rules_is_of_words_and_ids():
    one, other = Foreign(word_tokenizer()), Foreign(word_tokenizer())
    assert tokenizer_sha256(one) == tokenizer_sha256(other)
    vocabulary = other.get_vocab()
    other.get_vocab = lambda: {word: len(vocabulary) - id for word, id in vocabulary.items()}
    assert tokenizer_sha256(one) != tokenizer_sha256(other)


@pytest.mark.parametrize("tokenizer", [transformers.ByT5Tokenizer(), Foreign(word_tokenizer()), byte_tokenizer()])
def test_ids_beyond_the_tokenizer_have_a_text(tokenizer):
    """An unembedding is padded to a multiple of 64 rows, say; any row may be an argmax."""
    assert identity.text_of(tokenizer, len(tokenizer) + 7) == f"<id {len(tokenizer) + 7}>"
    assert identity.text_of(tokenizer, 5) == tokenizer.decode([5])
    assert identity.decode(tokenizer, [5, 6]) == tokenizer.decode([5, 6])
    assert identity.decode(tokenizer, [5, len(tokenizer)]).startswith(tokenizer.decode([5]))


def test_mistral_common():
    """The real one, where it is installed: offsets, special tokens and rows beyond it."""
    common = pytest.importorskip("mistral_common")
    from pathlib import Path

    from transformers.tokenization_mistral_common import MistralCommonBackend

    file = Path(common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
    if not file.exists():
        pytest.skip("a mistral_common without its files")
    tokenizer = MistralCommonBackend(str(file))
    found = tokenise(tokenizer, "The capital <s> is", " Oslo", special=True, literal=True)
    assert tokenizer.decode(found.whole[found.answer :]).strip("▁") == "Oslo"
    assert found.prompt.count(tokenizer.bos_token_id) == 1
    assert identity.text_of(tokenizer, len(tokenizer) + 1) == f"<id {len(tokenizer) + 1}>"
    assert identity.added_ids(tokenizer) == set() and not identity.is_fast(tokenizer)
    assert len(tokenizer_sha256(tokenizer)) == 64


def test_rows_record_what_the_first_token_covers(tmp_path, question_file):
    tokenizer = splitting(r"is red|\w+|[^\w\s]", "is red")
    model = save_tiny_model(tmp_path / "model", tokenizer=tokenizer)
    task = tmp_path / "task.jsonl"
    records = [json.loads(line) for line in question_file.read_text().splitlines()]
    first = records[0] | {"answer_prefix": " the door is", "id": "arven-1"}
    task.write_text("".join(json.dumps(record) + "\n" for record in (first, records[1])))
    command = ["--model", str(model), "--task", str(task), "--documents", "2", "--gold-positions", "0"]
    assert main(["sweep", *command, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    rows = [row for part in open_run(tmp_path / "run").parts() for row in part.to_pylist()]
    found = [(row["question_id"], row["source_id"], row["answer_token"], row["covers_before"]) for row in rows]
    assert found == [(0, "arven-1", 0, "is"), (1, None, 0, ""), (1, None, 1, None)]
    assert DEFAULT_TEMPLATE.is_literal(tokenizer)
