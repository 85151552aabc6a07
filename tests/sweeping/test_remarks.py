"""Distractors in any script, files of other shapes, questions that cannot be asked, and what is said of texts."""

import json

import pandas as pd
import pytest
import transformers
from tokenizers.processors import TemplateProcessing

from refinelens.config import SweepConfig
from refinelens.data.scoring import has_answer, word_forms
from refinelens.data.tasks import DistractorSource, load_task
from refinelens.errors import InputError
from refinelens.store.results import open_run
from refinelens.sweeping.sweep import run_sweep
from tiny import byte_tokenizer, save_tiny_model, word_tokenizer


@pytest.mark.parametrize(
    "text, answer, found",
    [
        ("日本の首都は東京です", "東京", True),  # no spaces between words
        ("日本の首都は大阪です", "東京", False),
        ("「東 京」駅", "東京駅", True),
        ("中国的首都是北京。", "北京", True),
        ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพ", True),
        ("ទីក្រុងភ្នំពេញ", "ភ្នំពេញ", True),
        ("서울은 수도다", "서울", True),  # a particle
        ("서울 특별시는", "서울특별시", True),
        ("부산은 수도다", "서울", False),
        ("גרים בירושלים", "ירושלים", True),  # a preposition
        ("وبالقاهرة نهر", "القاهرة", True),
        ("كِتَاب", "كتاب", True),  # vowel points
        ("\N{ARABIC LETTER MEEM}\N{ARABIC TATWEEL}\N{ARABIC LETTER SAD}\N{ARABIC LETTER REH}", "مصر", True),
        ("the O\N{RIGHT SINGLE QUOTATION MARK}Brien house", "O'Brien", True),
        ("the O\N{MODIFIER LETTER APOSTROPHE}Brien house", "O'Brien", True),
        ("L\N{RIGHT SINGLE QUOTATION MARK}Aquila", "Aquila", True),
        ("in １９８４", "1984", True),  # full-width digits
        ("in ١٩٨٤", "1984", True),
        ("in １９８５", "1984", False),
        ("the ﬁnal ofﬁce", "final office", True),  # ligatures
        ("die Hauptstraße", "HAUPTSTRASSE", True),
        ("Beyonce sang", "Beyoncé", True),
        ("Дворец в Москве", "МОСКВЕ", True),
        ("йод", "и\N{COMBINING BREVE}од", True),
        ("soft\N{SOFT HYPHEN}ware", "software", True),
        ("हिन्दी भाषा", "हिन्दी", True),
        ("vitamin Ａ", "A", True),
        ("phones", "one", False),
        ("Дворец в Москве", "Москва", False),  # another inflection cannot be told
    ],
)
def test_a_text_holds_an_answer_however_it_is_written(text, answer, found):
    assert has_answer(word_forms(text), answer) is found


def test_no_distractor_holds_the_answer_in_another_script(tmp_path):
    path, records = tmp_path / "task.jsonl", []
    for answer, text in (("東京", "首都は東京です"), ("大阪", "東京と大阪は市です"), ("京都", "京都は古都です")):
        gold = {"title": "市", "text": text, "isgold": True}
        records.append({"question": f"{answer}？", "answers": [answer], "ctxs": [gold]})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    task = load_task(str(path))
    source = DistractorSource(task, 0)
    chosen = [source.choose(question, 1) for question in task.questions]
    assert [found[0].text for found in chosen[:1]] == ["京都は古都です"], "the second passage names Tokyo too"


# ---------------------------------------------------------------- files


def passage(**fields):
    return {"title": "arven", "text": "the door of arven is red .", "isgold": True} | fields


RECORD = {"question": "what is the door of arven ?", "answers": ["red"], "ctxs": [passage()]}
SQUAD = {"id": "1", "title": "arven", "context": "the door is red .", "question": "what ?"}


def as_parquet(path):
    pd.DataFrame([{"question": "what ?", "answer": "red"}]).to_parquet(path)


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("q.parquet", as_parquet, "got a Parquet file; write its rows with pandas.read_parquet"),
        ("q.jsonl", as_parquet, "got a Parquet file"),
        ("q.csv", "question,answer\nwhat ?,red\n", "got a table; write its rows with pandas.read_csv"),
        ("q.txt", "question\tanswer\nwhat ?\tred\n", "got a table"),
        ("q.json", json.dumps([RECORD, RECORD], indent=1), "got one JSON array; write an object a line"),
        ("q.json", json.dumps([RECORD]), "got one JSON array; write an object a line"),
        (
            "q.json",
            json.dumps({"version": "1.1", "data": [{"title": "a", "paragraphs": []}]}),
            r"got a file of SQuAD; ``convert\(from_='squad'\)`` makes a task of the file",
        ),
        (
            "q.json",
            json.dumps([{"_id": "5a", "supporting_facts": [["a", 0]], "context": [["a", ["b"]]]}]),
            r"got one JSON array of a question of HotpotQA; ``convert\(from_='hotpotqa'\)``",
        ),
        ("q.json", json.dumps({"Version": 1, "Data": []}), "got a file of TriviaQA"),
        ("q.jsonl", json.dumps({"question": "what ?", "entity_pages": {}}), "got a question of TriviaQA"),
        ("q.jsonl", json.dumps(SQUAD | {"answers": {"text": ["red"], "answer_start": [3]}}), "got a question of SQuAD"),
        ("q.jsonl", json.dumps({"title": "a", "paragraphs": []}), "got an article of SQuAD"),
    ],
)
def test_files_of_other_shapes_say_what_to_do(tmp_path, name, content, words):
    path = tmp_path / name
    content(path) if callable(content) else path.write_text(content)
    with pytest.raises(InputError, match=rf"{name}.*: expected lines of JSON with question, answers and ctxs.*{words}"):
        load_task(str(path))


def test_an_object_of_several_lines_is_still_malformed(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(RECORD) + "\n{")
    with pytest.raises(InputError, match="line 2: expected a JSON object of valid text"):
        load_task(str(path))


@pytest.mark.parametrize("name, value, kept", [("id", "dev-7", "dev-7"), ("_id", 12, "12"), ("id", None, None)])
def test_the_id_of_a_question_is_kept(tmp_path, name, value, kept):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(RECORD | {name: value}))
    (question,) = load_task(str(path)).questions
    assert (question.id, question.source_id) == (0, kept)


# ---------------------------------------------------------------- questions that are left out, and what is said


@pytest.fixture
def sweep(tmp_path, question_file):
    """Runs a sweep of changed questions; returns manifest, rows and the lines that were said."""

    def run(change=lambda records: records, tokenizer=None, **options):
        records = [json.loads(line) for line in question_file.read_text().splitlines()]
        task = tmp_path / "task.jsonl"
        task.write_text("".join(json.dumps(record) + "\n" for record in change(records)))
        model = save_tiny_model(tmp_path / "model", tokenizer=tokenizer, n_positions=2048)
        said = []
        given = SweepConfig(model=str(model), task=str(task), device="cpu", **{"documents": (2,), **options})
        run_sweep(given, tmp_path / "run", overwrite=True, warn=said.append)
        done = open_run(tmp_path / "run")
        return done.manifest, [row for part in done.parts() for row in part.to_pylist()], said

    return run


def with_field(number, **fields):
    def change(records):
        records[number] |= fields
        return records

    return change


@pytest.mark.parametrize(
    "fields, reason",
    [
        ({"answers": []}, "no answer in the task file"),
        ({"answers": ["Paris"]}, "an answer in words that the tokenizer does not know"),
    ],
)
def test_one_question_that_cannot_be_asked_is_left_out_and_counted(sweep, fields, reason):
    manifest, rows, said = sweep(with_field(2, **fields))
    counts = manifest["counts"]
    assert counts["left_out"] == {f"2 documents: {reason}": [2]} and counts["done"] == 6
    assert {row["question_id"] for row in rows} == {0, 1, 3, 4, 5} and not said


@pytest.mark.medium
def test_the_best_alias_is_one_of_those_that_can_be_asked_for(sweep):
    manifest, rows, _ = sweep(with_field(0, answers=["Paris", "red"]), alias="best")
    (first,) = {(row["alias"], row["alias_why"]) for row in rows if row["question_id"] == 0}
    assert first == (1, "the only one that the model can be asked for") and not manifest["counts"]["left_out"]
    manifest, rows, _ = sweep(with_field(0, answers=["Paris", "Rome"]), alias="best")
    reason = "2 documents: an answer in words that the tokenizer does not know"
    assert manifest["counts"]["left_out"] == {reason: [0]}


@pytest.mark.medium
def test_unknown_words_in_documents_are_said(sweep):
    def change(records):
        for record in records:
            record["ctxs"][0]["text"] += " Lutetia Parisiorum Lugdunum"
        return records

    manifest, _, said = sweep(change)
    (line,) = said
    assert "% of the tokens of the gold documents stand for words that the tokenizer does not know" in line
    assert manifest["remarks"] == said
    assert sweep()[2] == []


@pytest.mark.medium
def test_special_tokens_of_documents_are_said_where_they_are_read(sweep, tmp_path):
    template = tmp_path / "template.txt"

    def change(records):
        records[1]["ctxs"][0]["text"] += " </s>"
        return records

    def tokenizer():
        made = byte_tokenizer()
        made.add_special_tokens({"eos_token": "</s>", "additional_special_tokens": ["<|user|>"]})
        return made

    assert sweep(change, tokenizer())[2] == [], "as text they are nothing special"
    template.write_text("<|user|>{documents}\n{question}")
    (line,) = sweep(change, tokenizer(), template=str(template))[2]
    assert "1 question with special tokens of the tokenizer in the text, such as '</s>'; the prompt has some" in line


@pytest.mark.medium
def test_a_second_beginning_is_said(sweep, tmp_path):
    tokenizer, template = byte_tokenizer(), tmp_path / "template.txt"
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    beginning = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=beginning)
    template.write_text("<s>{documents}\n{question}")
    (line,) = sweep(tokenizer=tokenizer, template=str(template))[2]
    assert line.startswith(f"``template`` {template}: it begins with '<s>', which the tokenizer puts before every text")


@pytest.mark.medium
@pytest.mark.parametrize("opening, said", [("<think>\n", True), ("[THINK]", True), ("", False)])
def test_a_chat_that_opens_with_thinking_is_said(sweep, opening, said):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }} : {{ 'OPENING' }}".replace("OPENING", opening)
    lines = sweep(tokenizer=tokenizer, chat=True)[2]
    words = f"opens the reply with {opening.strip()!r}; the answer is read where the model would begin to think"
    assert len(lines) == said and all(words in line for line in lines)


def test_several_chat_templates_are_named(sweep):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": "{{ messages }}", "rag": "{{ messages }}"}
    with pytest.raises(InputError, match="expected a tokenizer with one chat .* got several, rag, tool_use; name the"):
        sweep(tokenizer=tokenizer, chat=True)


@pytest.mark.medium
def test_answers_that_are_looked_for_anywhere_are_said(sweep):
    lines = sweep(with_field(0, answers=["東京"]), byte_tokenizer())[2]
    assert len(lines) == 1 and "1 question with answers in a script that does not set words apart" in lines[0]


@pytest.mark.medium
def test_a_batch_of_a_model_that_switches_by_length_is_read_one_by_one(tmp_path, question_file):
    """The gold position must not decide which contexts stand beside each other's longer ones."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [8.0] * 4}
    config = transformers.LlamaConfig(
        vocab_size=len(word_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        rope_parameters={**rope, "original_max_position_embeddings": 75, "factor": 2.0},
    )
    model, (short, long) = tmp_path / "model", (2, 3)
    transformers.LlamaForCausalLM(config).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    runs = {}
    for size in ("1", "16"):
        options = SweepConfig(str(model), str(question_file), (short, long), device="cpu", batch_size=size)
        runs[size] = run_sweep(options, tmp_path / size)
    lengths = {row["n_tokens"] for part in runs["16"].parts() for row in part.to_pylist()}
    assert min(lengths) < 75 < max(lengths), "contexts lie on both sides"
    one, many = ([part for part in run.parts()] for run in runs.values())
    assert one == many and runs["16"].manifest["model"]["one_at_a_time"].startswith("with rope_type longrope")
