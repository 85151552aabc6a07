"""Worked examples before the question: their text, which questions they are, and that none gives an answer away."""

import json
import re
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.data.generated import generate_task
from refinelens.data.prompts import DEFAULT_TEMPLATE, Chat, Shots, Template, build_context, find_documents, render_chat
from refinelens.data.questions import DEFAULT, KV, QA, Document, Question
from refinelens.data.shots import draw_shots
from refinelens.data.tasks import Task, choose_questions, load_task
from refinelens.errors import InputError
from refinelens.read import read_context
from refinelens.store.results import open_run
from refinelens.sweeping.contexts import ANSWER_IN_SHOTS
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.run_spec import RunSpec
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from refinelens.view_config import ReadConfig
from sweeps import predictions
from tiny import word_tokenizer

TASK = "Write a high-quality answer for the given question using only the provided search results "
TASK += "(some of which might be irrelevant).\n\n"
OTHER = Document("brosk", "the wall is white .")
WORKED = Question(
    7, "what is the gate ?", ("black stone", "stone"), "", "", Document("arven", "it is black stone ."), ()
)
ASKED = Question(8, "what is the door ?", ("red",), "", "", Document("dorra", "the door is red ."), (OTHER,))
CHAT = "{% for m in messages %}<pad> {{ m.role }}: {{ m.content }} <unk>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<pad> assistant: {% endif %}"


def task_of(*questions, format=QA):
    return Task("task", None, "", questions, format)


def drawn(options, task=None, template=DEFAULT_TEMPLATE):
    """Worked examples, and the questions that are asked, of options and a task of a file."""
    options = SweepConfig(**{"model": "m", "task": "file.jsonl", **options})
    asked = choose_questions(task, options.examples, options.seed)
    shots = draw_shots(options, task, asked, template)
    return shots, [question for question in asked if question.id not in shots.ids]


def test_an_example_is_a_prompt_with_its_answer_and_a_blank_line():
    shots, asked = drawn({"shots": 1, "examples": 1}, task_of(WORKED, ASKED))
    assert (shots.ids, asked) == ([7], [ASKED])
    template = replace(DEFAULT_TEMPLATE, shots=shots)
    text, start, end = template.fill(ASKED, [OTHER, ASKED.gold], 1)
    assert text == (
        f"{TASK}Document [1](Title: arven) it is black stone .\n\nQuestion: what is the gate ?\nAnswer: black stone\n\n"
        f"{TASK}Document [1](Title: brosk) the wall is white .\nDocument [2](Title: dorra) the door is red .\n\n"
        "Question: what is the door ?\nAnswer:"
    )
    assert text[start:end] == "Document [2](Title: dorra) the door is red ."
    closed_book = template.fill(ASKED, [], -1)[0]
    assert closed_book == ("Question: what is the gate ?\nAnswer: black stone\n\nQuestion: what is the door ?\nAnswer:")
    assert Shots.of_entries(json.loads(json.dumps(shots.entries()))) == shots


def test_spans_are_those_of_the_question_not_of_the_example():
    """The example has the question's distractor as its own gold document: the later one is meant."""
    twin = replace(WORKED, gold=OTHER, answers=("white",), distractors=(ASKED.gold,))
    shots, asked = drawn({"shots": 1, "shot_documents": 2, "examples": 1}, task_of(twin, ASKED))
    assert asked == [ASKED]
    tokenizer, template = word_tokenizer(), replace(DEFAULT_TEMPLATE, shots=shots)
    n_before = len(tokenizer(shots.before_prompt(True))["input_ids"])
    plain, behind = (build_context(tokenizer, one, ASKED, [OTHER], 1) for one in (DEFAULT_TEMPLATE, template))
    assert behind.input_ids[n_before:] == plain.input_ids and n_before > 30
    assert behind.gold_span == tuple(place + n_before for place in plain.gold_span)
    assert behind.prompt_length == plain.prompt_length + n_before
    documents = [OTHER, ASKED.gold]
    spans = find_documents(tokenizer, template, ASKED, documents)
    for (start, end), number, document in zip(spans, "12", documents, strict=True):
        words = tokenizer(f"Document [{number}](Title: {document.title}) {document.text}")["input_ids"]
        assert start >= n_before and list(behind.input_ids[start:end]) == words


def test_examples_of_a_chat_are_its_turns():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    worked = [replace(WORKED, id=number, answer_prefix=" the gate is") for number in (1, 2)]
    shots, _ = drawn({"shots": 2, "examples": 1, "chat": True, "seed": 2}, task_of(ASKED, *worked))
    assert sorted(shots.ids) == [1, 2]
    template = Template(QA, DEFAULT_TEMPLATE.text, render_chat(tokenizer, 2), shots)
    for documents, gold, reply in (([ASKED.gold], 0, "the gate is black stone"), ([], -1, "the gate is black stone")):
        user = [DEFAULT_TEMPLATE.fill(q, documents and [q.gold], gold)[0] for q in (*worked, ASKED)]
        turns = [{"role": "user", "content": user[0]}, {"role": "assistant", "content": reply}]
        turns += [{"role": "user", "content": user[1]}, {"role": "assistant", "content": reply}]
        turns.append({"role": "user", "content": user[2]})
        text, start, end = template.fill(ASKED, documents, gold)
        assert text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        assert text[start:end] == ("Document [1](Title: dorra) the door is red ." if documents else "")


def test_a_chat_template_that_drops_a_turn_is_refused():
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{{ messages[-1].content }}"
    assert render_chat(tokenizer).text == "{prompt}"
    with pytest.raises(InputError, match="``shots``: expected a chat template that writes every turn once"):
        render_chat(tokenizer, 1)


def test_text_that_looks_like_a_field_stays():
    """In a chat the texts are filled in at once: what one of them contains is not looked at again."""
    shot = {"question_id": 1, "source_id": None, "content": "", "prompt": "{answer_0} {prompt}", "answer": "{shot_0}"}
    template = Template(
        QA, "{documents}{question}", Chat("", "{shot_0}|{answer_0}|{prompt}|"), Shots.of_entries([shot])
    )
    text, start, end = template.fill(replace(ASKED, question="?"), [ASKED.gold], 0)
    assert text == "{answer_0} {prompt}|{shot_0}|Document [1](Title: dorra) the door is red .?|"
    assert text[start:end] == "Document [1](Title: dorra) the door is red ."


@pytest.mark.parametrize("name", ["tiny", "tiny-hops", "tiny-friends", "kv"])
def test_generated_tasks_have_the_numbers_after_those_asked(name):
    options = SweepConfig("tiny", name, shots=2, shot_documents=3, examples=5, documents=(2,), seed=3)
    task = generate_task(name, 5, 2, 3)
    template = Template(task.format, task.format.templates[DEFAULT])
    shots = draw_shots(options, task, list(task.questions), template)
    more = generate_task(name, 7, 3, 3).questions
    assert shots.ids == [5, 6]
    for shot, question in zip(shots.shots, more[5:], strict=True):
        lines = [line for d in (question.gold, *question.distractors) for line in (d.text, d.title)]
        assert all(line in shot.content for line in lines) and question.question in shot.prompt
        assert shot.answer.strip(' "') == question.answers[0]
        assert (shot.closed_book_prompt is None) == (name == "kv")


def test_the_value_of_a_pair_is_closed():
    """Its prompt ends in the opening quote."""
    task = generate_task("kv", 2, 2, 0)
    options = SweepConfig("tiny", "kv", shots=1, examples=2)
    shots = draw_shots(options, task, [], Template(KV, KV.templates[DEFAULT]))
    (value,) = generate_task("kv", 3, 1, 0).questions[2].answers
    assert shots.before_prompt(True).endswith(f'Corresponding value: "{value}"\n\n')


WORDS = st.sampled_from("ash birch cedar elm fir oak pine rowan".split())


@st.composite
def tasks(draw):
    """Questions whose documents and answers share few words, so that many stand in each other's."""
    texts = st.lists(WORDS, min_size=1, max_size=4).map(" ".join)
    questions = []
    for id in range(draw(st.integers(3, 9))):
        answers = draw(st.lists(st.lists(WORDS, min_size=1, max_size=2).map(" ".join), max_size=2))
        gold = Document(draw(texts), draw(texts) + " ".join(answers))
        others = tuple(Document(f"own {id} {number}", draw(texts)) for number in range(draw(st.integers(0, 2))))
        questions.append(Question(id, draw(texts), tuple(answers), "", "", gold, others))
    return task_of(*questions)


@pytest.mark.medium
@settings(max_examples=150, deadline=None)
@given(tasks(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99), st.none() | st.integers(1, 6))
def test_no_example_has_an_answer_of_a_question_that_is_asked(task, wanted, size, seed, examples):
    """Looked for word by word in all that the model reads before the prompt; the template has none of these words."""
    assume(examples is None or examples <= len(task.questions))
    try:
        options = {"shots": wanted, "shot_documents": size, "seed": seed, "examples": examples}
        shots, drawn_questions = drawn(options, task)
    except InputError as error:
        assert "``shots``" in str(error)
        return
    assert len(set(shots.ids)) == wanted and drawn_questions and not {q.id for q in drawn_questions} & set(shots.ids)
    assert examples is None or len(drawn_questions) == examples
    by_id = {question.id: question for question in task.questions}
    for shot in shots.shots:
        assert shot.prompt.count("Document [") == size and by_id[shot.question_id].gold.text in shot.prompt
        assert shot.answer == f" {by_id[shot.question_id].answers[0]}"
    for has_documents in (True, False):
        read = re.sub(r"\W+", " ", shots.before_prompt(has_documents))
        for question in (q for q in drawn_questions if not shots.has_answer_of(q)):
            assert not any(re.search(rf"\b{answer}\b", read) for answer in question.answers)


def test_too_few_other_questions(question_file):
    task = load_task(str(question_file))
    message = "^``shots``: expected {} questions that are not asked, .* and {} documents, got {}; use fewer ``shots``"
    with pytest.raises(InputError, match=message.format(3, 1, 2)):
        drawn({"shots": 3, "examples": 4}, task)
    with pytest.raises(InputError, match=message.format(6, 1, 5)):
        drawn({"shots": 6}, task)
    assert len(drawn({"shots": 5}, task)[1]) == 1
    with pytest.raises(InputError, match=message.format(1, 7, 0)):
        drawn({"shots": 1, "shot_documents": 7, "examples": 1}, task)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"shots": -1}, "``shots``: expected a number of worked examples, 0 for none, got -1"),
        ({"shots": 1, "shot_documents": 0}, "``shot_documents``: expected 1 to 100000 with ``shots`` 1, got 0"),
        ({"shot_documents": 2}, "``shot_documents``: expected 1 to 1 with ``shots`` 0, got 2"),
    ],
)
def test_options_that_do_not_fit(given, message):
    with pytest.raises(InputError, match=f"^{message}"):
        SweepConfig("tiny", **given)


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    given = {"documents": (0, 1, 3), "shots": 2, "device": "cpu"}
    return SweepConfig(str(tiny_model), str(question_file), **given)


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


def test_examples_are_held_out_and_said(finished, question_file):
    manifest = finished.manifest
    ids = [entry["question_id"] for entry in manifest["shots"]]
    assert len(set(ids)) == 2 and manifest["counts"]["questions"] == manifest["counts"]["done"] == 4
    assert {row["question_id"] for row in predictions(finished)} == set(range(6)) - set(ids)
    words = f"the worked examples are questions of the task that are not asked, {ids[0]}, {ids[1]}"
    assert manifest["remarks"] == [f"``shots`` 2: {words}"]
    records = [json.loads(line) for line in question_file.read_text().splitlines()]
    assert [entry["answer"] for entry in manifest["shots"]] == [f" {records[id]['answers'][0]}" for id in ids]


def test_all_contexts_begin_with_the_same_examples(finished, options, question_file):
    """They run once a question, where contexts share what they begin with."""
    inputs = SweepInputs.load(finished_spec(finished).options, finished_spec(finished))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    for question in inputs.questions:
        for context in inputs.builder().build(question).contexts:
            before = tokenizer(inputs.template.shots.before_prompt(context.n_documents > 0))["input_ids"]
            assert list(context.input_ids[: len(before)]) == before
            span = tokenizer.decode(context.input_ids[slice(*context.gold_span)]) if context.gold_span else ""
            assert (question.gold.title in span) == (context.n_documents > 0)
    assert finished.manifest["counts"]["tokens_saved"] > 4 * 2 * len(before)


def finished_spec(run):
    return RunSpec(run.path, run.manifest, "read")


def test_documents_are_marked_where_they_stand(finished, options):
    """Also those of a page of one context."""
    id = predictions(finished)[0]["question_id"]
    map = read_context(finished, ReadConfig(question=id, documents=3, gold_position=2))
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    texts = {segment.label: tokenizer.decode(map.tokens[segment.start : segment.end]) for segment in map.segments}
    names = ["document 0", "document 1", "document 2, gold"]
    assert [texts[name][:12] for name in names] == [f"Document [ {number}" for number in (1, 2, 3)]
    (row,) = [r for r in predictions(finished) if (r["question_id"], r["documents"], r["gold_position"]) == (id, 3, 2)][
        :1
    ]
    (gold,) = [segment for segment in map.segments if "gold" in segment.label]
    assert (row["gold_start"], row["gold_end"]) == (gold.start, gold.end)


def test_a_question_whose_answer_they_tell_is_left_out(options, tmp_path):
    """The example is the first question; the second has the same answer, of which the third's is a part."""
    path = tmp_path / "task.jsonl"
    with path.open("w") as file:
        for number, answer in enumerate(["black iron", "black iron", "iron", "red"]):
            gold = {"title": f"arven {number}", "text": f"the door is {answer} .", "isgold": True}
            record = {"question": f"what is the door {number} ?", "answers": [answer], "ctxs": [gold]}
            file.write(json.dumps(record) + "\n")
    given = {"task": str(path), "documents": (0, 1), "shots": 1}
    seed = next(seed for seed in range(99) if drawn(given | {"seed": seed}, load_task(str(path)))[0].ids == [0])
    run = run_sweep(replace(options, **given, seed=seed), tmp_path / "run")
    reasons = [f"{size}: {ANSWER_IN_SHOTS}" for size in ("closed-book", "oracle")]
    assert run.manifest["counts"]["left_out"] == dict.fromkeys(reasons, [1, 2])
    assert {row["question_id"] for row in predictions(run)} == {3}


@pytest.mark.medium
def test_a_resume_takes_them_from_the_manifest(finished, options, tmp_path):
    run = run_sweep(replace(options, documents=(1,)), tmp_path / "run")
    whole = predictions(run)
    first, *others = run.manifest["shots"]
    shots = [first | {"prompt": f"the {first['prompt']}"}, *others]
    run.write_manifest(run.manifest | {"status": "interrupted", "parts": [], "shots": shots})
    (run.parts_path / "part-00000.parquet").unlink()
    resume_sweep(run.path)
    assert run.manifest["shots"] == shots
    assert [r["n_tokens"] - 1 for r in predictions(run)] == [r["n_tokens"] for r in whole]


@pytest.mark.medium
def test_by_the_command(tmp_path, capsys):
    command = [
        "sweep",
        "--model",
        "tiny",
        "--documents",
        "3",
        "--examples",
        "4",
        "--shots",
        "2",
        "--shot-documents",
        "2",
    ]
    assert main([*command, "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    assert (
        "--shots 2: the worked examples are questions of the task that are not asked, 4, 5" in capsys.readouterr().err
    )
    assert "the worked examples are" in (tmp_path / "run" / "report.html").read_text()
    assert main(["sweep", "--model", "tiny", "--shot-documents", "2", "--out", str(tmp_path / "none")]) == 2
    assert "--shot-documents: expected 1 to 1 with --shots 0, got 2" in capsys.readouterr().err
    assert open_run(tmp_path / "run").manifest["arguments"]["shot_documents"] == 2
