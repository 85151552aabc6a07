"""Key-value retrieval: the paper's files and prompts, and a generator of any size."""

import gzip
import json
import re
import uuid

import pyarrow.parquet as pq
import pytest

from refinelens.cli import main
from refinelens.data.generated import GENERATED, generate_task
from refinelens.data.prompts import Template
from refinelens.data.questions import DEFAULT, KV, QUERY_AWARE
from refinelens.data.tasks import DistractorSource, load_task
from refinelens.errors import InputError
from refinelens.store.results import open_run
from tiny import byte_tokenizer, save_tiny_model

PAIRS = [["key1", "value1"], ["key2", "value2"], ["key3", "value3"]]
RECORD = {"ordered_kv_records": PAIRS, "key": "key2", "value": "value2"}
TASK = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
DATA = 'JSON data:\n{"key1": "value1",\n "key2": "value2",\n "key3": "value3"}\n\n'


def write(path, *records):
    text = "".join(json.dumps(record) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.fixture
def file(tmp_path):
    """Named as the paper's are."""
    return write(tmp_path / "kv-retrieval-3_keys.jsonl.gz", RECORD, RECORD | {"key": "key3", "value": "value3"})


def prompt(question, template, gold_position=1):
    distractors = list(question.distractors)
    documents = [*distractors[:gold_position], question.gold, *distractors[gold_position:]]
    text, start, end = Template(KV, KV.templates[template]).fill(question, documents, gold_position)
    return text, text[start:end]


def test_prompts_are_the_papers(file):
    first, second = load_task(str(file)).questions
    assert first.answers == ("value2",) and second.gold.title == "key3"
    text, gold = prompt(first, DEFAULT)
    assert text == f'{TASK}{DATA}Key: "key2"\nCorresponding value:' and gold == ' "key2": "value2",'
    text, _ = prompt(first, QUERY_AWARE)
    assert text == f'{TASK}Key: "key2"\n\n{DATA}Key: "key2"\nCorresponding value:'


def test_the_gold_pair_moves_and_the_rest_stays(file):
    question = load_task(str(file)).questions[0]
    assert '{"key2": "value2",\n "key1": "value1",\n "key3": "value3"}' in prompt(question, DEFAULT, 0)[0]
    assert '{"key1": "value1",\n "key3": "value3",\n "key2": "value2"}' in prompt(question, DEFAULT, 2)[0]


def test_distractors_are_its_own(file):
    task = load_task(str(file))
    source = DistractorSource(task, 0)
    assert [pair.title for pair in source.choose(task.questions[0], 2)] == ["key1", "key3"]
    assert source.choose(task.questions[0], 3) is None, "other questions have pairs, which are not used"


def test_only_the_whole_value_is_an_answer(tmp_path):
    """Not a value or a key that holds it, and not an equal key."""
    pairs = [["a", "1"], ["b", "12"], ["c", "1 2"], ["1", "x"], ["d", "1"]]
    task = load_task(str(write(tmp_path / "kv.jsonl", {"ordered_kv_records": pairs, "key": "a", "value": "1"})))
    source, question = DistractorSource(task, 0), task.questions[0]
    assert [pair.title for pair in source.choose(question, 3)] == ["b", "c", "1"]
    assert source.choose(question, 4) is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ordered_kv_records": "x"}, "expected a list 'ordered_kv_records' of pairs"),
        ({"ordered_kv_records": [["a"]]}, "expected a list 'ordered_kv_records' of pairs"),
        ({"ordered_kv_records": [["a", 1]]}, "expected a list 'ordered_kv_records' of pairs"),
        ({"ordered_kv_records": [*PAIRS, ["key1", "x"]]}, "expected every key in 'ordered_kv_records' once"),
        ({"key": "key9"}, "expected 'key' and 'value' of a pair in 'ordered_kv_records', got 'key9' and 'value2'"),
        ({"value": "value3"}, "got 'key2' and 'value3'"),
    ],
)
def test_malformed_records_name_file_and_line(tmp_path, change, message):
    path = write(tmp_path / "kv.jsonl", RECORD, RECORD | change)
    with pytest.raises(InputError, match=f"kv.jsonl, line 2: .*{re.escape(message)}"):
        load_task(str(path))


def test_generated_questions_depend_on_seed_and_number_alone():
    task = generate_task("kv", 3, 75, seed=1)
    pairs = [pair for question in task.questions for pair in (question.gold, *question.distractors)]
    texts = [text for pair in pairs for text in (pair.title, pair.text)]
    assert {uuid.UUID(text).version for text in texts} == {4} and len(set(texts)) == 2 * 3 * 75, "all different"
    smaller, longer = generate_task("kv", 3, 10, seed=1), generate_task("kv", 5, 75, seed=1)
    assert [q.distractors[:9] for q in task.questions] == [q.distractors for q in smaller.questions]
    assert longer.questions[:3] == task.questions
    assert generate_task("kv", 3, 75, seed=1) == task
    assert generate_task("kv", 3, 75, seed=2).sha256 != task.sha256 != smaller.sha256
    assert len(generate_task("kv", None, 2, 0).questions) == GENERATED
    with pytest.raises(InputError, match="``examples``: expected 1 to 1000000 questions of ``task`` kv, got 0"):
        generate_task("kv", 0, 2, 0)


def test_a_generated_task_is_that_of_a_file_with_its_lines(tmp_path):
    """Its hash is the file's, so that it can be written out and given to others."""
    from refinelens.data.generated import _kv_line

    task = generate_task("kv", 4, 5, seed=3)
    path = tmp_path / "task.jsonl"
    path.write_text("".join(map(_kv_line, task.questions)))
    read = load_task(str(path))
    assert (read.questions, read.sha256, read.format) == (task.questions, task.sha256, KV)


@pytest.mark.medium
def test_sweep_of_generated_pairs(tmp_path, capsys):
    """At every position, oracle included; a resume makes the same task again."""
    model = save_tiny_model(tmp_path / "model", tokenizer=byte_tokenizer(), n_positions=1024)
    command = ["sweep", "--model", str(model), "--task", "kv", "--device", "cpu", "--examples", "3"]
    command += ["--template", "query-aware", "--generate", "2", "--out", str(tmp_path / "run")]
    assert main([*command, "--documents", "oracle,3"]) == 0
    run = open_run(tmp_path / "run")
    assert run.manifest["task"]["format"] == "kv" and run.manifest["task"]["path"] is None
    rows = pq.read_table(run.path / "predictions").to_pylist()
    assert {(r["documents"], r["gold_position"]) for r in rows} == {(1, 0), (3, 0), (3, 1), (3, 2)}
    capsys.readouterr()
    run.write_manifest(run.manifest | {"status": "interrupted"})
    assert main(["sweep", "--resume", str(tmp_path / "run")]) == 0
    assert main([*command, "--overwrite", "--documents", "closed-book,3"]) == 2
    assert "--documents closed-book: expected a task that can be asked closed-book, got kv" in capsys.readouterr().err
