"""The page of a run in a browser: what it says is what the run holds, and everything on it works."""

import json
import re
import shutil

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from browser import opened

import refinelens
from refinelens.cli import main
from refinelens.run_page import report_page, write_report_page
from refinelens.store.results import open_run
from refinelens.store.trajectory import choose_tokens

pytestmark = pytest.mark.medium
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "one"
    refinelens.sweep("tiny", out=path, documents=("closed-book", 3), examples=5, generate=2, device="cpu")
    return open_run(path)


@pytest.fixture(scope="module")
def path(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("pages") / "run.html"
    write_report_page([run], path)
    return path


def rows_of(run):
    """First answer tokens, as the page has them."""
    tables = [choose_tokens(part, "first") for part in run.parts()]
    return [row for table in tables for row in table.to_pylist()]


def head_of(text):
    return json.loads(re.search(r'id="head">(.*?)</script>', text, re.DOTALL)[1])


def test_every_context_is_a_row_with_its_numbers(chromium, run, path):
    with opened(chromium, path, height=1600) as page:
        shown = [
            [cell.text_content() for cell in row.locator("span").all()] for row in page.locator(".rows .row").all()
        ]
    wanted = []
    for row in rows_of(run):
        found = refinelens.trajectories(np.asarray(row["target_rank"]))
        numbers = [int(found.depth), int(found.first_correct), int(found.settle), int(found.flips)]
        right = row["argmax"][-1] == row["answer_id"]
        context = "closed-book" if row["documents"] == 0 else f"{row['documents']} documents"
        gold = "-" if row["gold_position"] < 0 else str(row["gold_position"])
        wanted.append(
            [str(row["question_id"]), context, gold, "yes" if right else "no"]
            + ["-" if number < 0 else str(number) for number in numbers]
            + [f"{row['target_rank'][-1] + 1:,}"]
        )
    assert sorted(row[:1] + row[2:] for row in shown) == sorted(wanted) and len(wanted) == 20


def test_tokens_of_a_context_are_those_of_the_run(chromium, run, path):
    row = next(r for r in rows_of(run) if r["documents"] == 3 and r["gold_position"] == 2)
    with opened(chromium, path, height=1600) as page:
        page.select_option("#questions .bar select >> nth=2", "3")
        page.select_option("#questions .bar select >> nth=3", "2")
        page.fill("#filter", str(row["question_id"]))
        page.locator(".rows .row").first.click()
        lines = page.locator("#tokens table tbody tr").all()
        assert len(lines) == len(row["argmax"])
        for layer, line in enumerate(reversed(lines)):
            cells = [cell.text_content() for cell in line.locator("td").all()]
            assert cells[1] == row["argmax_text"][layer]
            assert cells[2] == f"{row['target_rank'][layer] + 1:,}"
        assert row["generated"] in page.locator("#tokens").text_content()
        page.locator("#tokens summary").click()
        documents = page.locator("#tokens .documents li").all()
        assert len(documents) == 3 and "gold" in documents[2].get_attribute("class")
        assert row["answer_text"].strip() in documents[2].text_content()
        command = page.locator("#tokens code").text_content()
        assert f"--question {row['question_id']} --documents 3 --gold-position 2" in command


def test_rows_sort_filter_and_stand_side_by_side(chromium, run, path):
    with opened(chromium, path, height=1600) as page:
        assert page.locator("#count").text_content() == "20 of 20 contexts"
        page.select_option("#questions .bar select >> nth=2", "3")
        assert page.locator("#count").text_content() == "15 of 20 contexts"
        page.locator(".heads button", has_text="gold").click()
        golds = [row.locator("span").nth(3).text_content() for row in page.locator(".rows .row").all()]
        assert golds == sorted(golds) and set(golds) == {"0", "1", "2"}
        page.locator(".heads button", has_text="gold").click()
        assert page.locator(".rows .row").first.locator("span").nth(3).text_content() == "2"
        page.locator(".rows .row").first.click()
        page.locator(".rows .row").nth(1).click(modifiers=["Shift"])
        assert page.locator(".context").count() == 2 and page.locator(".row.chosen").count() == 2
        page.focus(".list")
        page.keyboard.press("ArrowDown")
        assert page.locator(".context").count() == 1


def test_findings_have_their_n_and_the_table_its_numbers(chromium, run, path):
    import csv

    with (run.path / "summary.csv").open() as file:
        wanted = list(csv.DictReader(file))
    with opened(chromium, path) as page:
        text = page.locator("#finding").inner_text()
        lines = page.locator("#finding tbody tr").all()
        assert len(lines) == len(wanted)
        for line, row in zip(lines, wanted, strict=True):
            cells = [cell.text_content() for cell in line.locator("td").all()]
            assert cells[4] == row["n"] and cells[5].startswith(f"{float(row['accuracy']):.2f}")
            assert cells[6] == row["settled"]
        assert "5 questions" in text and "Checked before anything was read" in text
        assert page.locator("#finding svg").count() == 2 and page.locator("#layers svg").count() == 3
        page.select_option("#layers select >> nth=1", "0")
        assert "no document" in page.locator("#layers .names").first.text_content()


def test_an_analysis_of_layers_is_on_the_page(chromium, run, tmp_path):
    other = tmp_path / "analysed"
    shutil.copytree(run.path, other)
    refinelens.essential_layers(other, interventions=("skip",), examples=3)
    out = tmp_path / "page.html"
    write_report_page([open_run(other)], out)
    with opened(chromium, out) as page:
        text = page.locator("#layers").inner_text()
        assert "Essential layers" in text and "cost of skip" in text and "Early exit" in text


def test_runs_are_compared_over_what_they_share(chromium, run, tmp_path):
    other = tmp_path / "two"
    refinelens.sweep("tiny", out=other, documents=(3, 4), examples=4, device="cpu")
    text, _ = report_page([run, open_run(other)])
    out = tmp_path / "page.html"
    out.write_text(text, encoding="utf-8")
    said = head_of(text)["runs"][1]
    assert said["compared"][0].startswith("Over 4 questions in 12 contexts that both have: accuracy +0.000")
    assert len(said["agreement"]) == 9 and set(said["agreement"]) <= {1.0, None}  # null where all ranks are equal
    with opened(chromium, out) as page:
        compared = page.locator("#compare")
        assert "over 12 shared contexts" in compared.inner_text() and compared.locator("svg").count() == 2


def test_texts_of_strangers_stay_texts(chromium, tmp_path):
    task = tmp_path / "hostile.jsonl"
    passages = [{"title": SCRIPT, "text": f"The acorn {i} {SCRIPT}", "isgold": i == 0} for i in range(3)]
    question = {"question": "What is the password of Alena Ashbury?", "answers": ["acorn"], "ctxs": passages}
    lines = [question, question]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    run = tmp_path / "run"
    refinelens.sweep("tiny", task=str(task), out=run, documents="oracle", device="cpu")
    out = tmp_path / "page.html"
    write_report_page([open_run(run)], out)
    with opened(chromium, out) as page:
        assert page.locator("main script").count() == 0
        assert SCRIPT in page.locator("#tokens .documents").text_content()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_and_both_themes_have_everything(chromium, path, scheme):
    with opened(chromium, path, width=390, height=800, color_scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("#finding svg").first.is_visible() and page.locator(".list").is_visible()


def larger(run, path, times):
    """The run with its questions again and again, under numbers of their own."""
    shutil.copytree(run.path, path)
    manifest = json.loads((path / "manifest.json").read_text())
    (file,) = (path / "predictions").iterdir()
    table = pq.read_table(file)
    import hashlib

    import pyarrow as pa

    step = int(pc.max(table["question_id"]).as_py()) + 1
    at = table.column_names.index("question_id")
    copies = [table.set_column(at, "question_id", pc.add(table["question_id"], i * step)) for i in range(times)]
    pq.write_table(pa.concat_tables(copies).cast(table.schema), file)
    manifest["parts"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    return open_run(path)


def test_two_thousand_contexts_are_small_and_quick(chromium, run, tmp_path):
    text, words = report_page([larger(run, tmp_path / "large", 100)])
    assert "2000 contexts" in words and len(text.encode()) < 8_000_000
    out = tmp_path / "page.html"
    out.write_text(text, encoding="utf-8")
    with opened(chromium, out) as page:
        assert page.locator("#count").text_content() == "2000 of 2000 contexts"
        assert page.locator(".rows .row").count() < 60
        page.fill("#filter", "77 ")
        assert page.locator(".rows .row").count() > 0


def test_a_larger_run_is_a_sample_and_says_so(run, tmp_path):
    text, words = report_page([larger(run, tmp_path / "larger", 30)], most_contexts=100)
    said = head_of(text)["runs"][0]
    assert words == "a sample of 25 questions of 150, 100 of 600 contexts" == said["sample"]
    assert len(said["contexts"]) == 100
    assert all(row["n"] == 150 for row in said["summary"])  # findings are of all


def test_a_task_that_changed_shows_no_documents(run, tmp_path):
    other = tmp_path / "moved"
    shutil.copytree(run.path, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["task"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    said = head_of(report_page([open_run(other)])[0])["runs"][0]
    assert said["questions"] == {} and "no longer the one that was asked" in said["documents_why"]


def test_the_command_writes_the_page(run, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert main(["report", str(run.path), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: all 5 questions in 20 contexts\n"
    assert main(["report", str(run.path), "--out", str(out)]) == 2
    assert "--out" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 2


def test_thresholds_lenses_and_targets_are_those_that_are_said(run, tmp_path):
    """Depth of both runs at one threshold; ranks of different things are not subtracted."""
    options = dict(documents=(3,), examples=4, device="cpu")
    refinelens.sweep("tiny", out=tmp_path / "five", top=(5, 2), **options)
    refinelens.sweep("tiny", out=tmp_path / "own", target="prediction", **options)
    heads = head_of(report_page([run, open_run(tmp_path / "five"), open_run(tmp_path / "own")])[0])["runs"]
    assert "refinement depth +0.00 layers (rank <= 1" in heads[1]["compared"][0]
    assert "through lens plain" in heads[1]["compared"][0] and heads[1]["top"] == 1
    assert heads[2]["compared"] == ["Ranks are of answer in the one run and of prediction in the other."]
    (alone,) = head_of(report_page([open_run(tmp_path / "five")])[0])["runs"]
    assert alone["top"] == 2, "the lowest, also where it is not the first"


def test_runs_of_different_tasks_are_not_compared(chromium, run, tmp_path):
    question = {"question": "What is the password of Alena Ashbury?", "answers": ["acorn"]}
    question["ctxs"] = [{"title": "", "text": "The password of Alena Ashbury is acorn.", "isgold": True}]
    task = tmp_path / "task.jsonl"
    task.write_text(json.dumps(question) + "\n")
    refinelens.sweep("tiny", task=str(task), out=tmp_path / "other", documents="closed-book", device="cpu")
    task.unlink()
    text, _ = report_page([run, open_run(tmp_path / "other")])
    out = tmp_path / "page.html"
    out.write_text(text, encoding="utf-8")
    with opened(chromium, out) as page:
        assert "share no question" in page.locator("#compare").inner_text()
        assert page.locator("#compare svg").count() == 0


def test_an_unfinished_run_says_so(run, tmp_path):
    other = tmp_path / "interrupted"
    shutil.copytree(run.path, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["status"] = "interrupted"
    (other / "manifest.json").write_text(json.dumps(manifest))
    said = head_of(report_page([open_run(other)])[0])["runs"][0]
    assert said["cautions"][0] == "This run is not finished: 5 of 5 questions. All numbers are of those."
    assert "closed-book and 3 documents with every gold position" in said["finding"][0]


def test_what_was_measured_is_drawn(chromium, tmp_path):
    asked = {"documents": ("oracle", 3), "examples": 10, "generate": 2, "device": "cpu"}
    refinelens.sweep("tiny", out=tmp_path / "run", measures="jsd,top5,frequency,states", **asked)
    write_report_page([open_run(tmp_path / "run")], tmp_path / "run.html")
    with opened(chromium, tmp_path / "run.html", height=1600) as page:
        layers = page.locator("#layers")
        titles = [caption.text_content() for caption in layers.locator("figcaption").all()]
        assert titles[3:] == [
            "Jensen-Shannon divergence from the output, mean",
            "Five likeliest tokens that are the output's, mean",
            "Best tokens by how frequent they are",
            "Best tokens that are not the output's",
            "Gold position found in the state, answer read from it, 3 documents",
        ]
        probe = layers.locator("figure").last
        assert probe.locator("svg circle").count() == 3 * 9  # probe, lens and chance at every layer
        settling = layers.locator("table").first.locator("tbody tr").first.locator("td").all()
        assert re.fullmatch(r"\d\.\d\d \[\d\.\d\d, \d\.\d\d\]", settling[-1].text_content())


def test_two_answers_and_who_wins(chromium, tmp_path):
    asked = {"task": "tiny-cues", "documents": ("oracle", 4), "examples": 4, "device": "cpu"}
    refinelens.sweep("tiny", out=tmp_path / "run", **asked)
    run = open_run(tmp_path / "run")
    text, _ = report_page([run])
    (head,) = head_of(text)["runs"]
    assert head["decoys"] == 1 and len(head["contexts"]) == 4 * 13
    write_report_page([run], tmp_path / "page.html")
    row = next(r for r in rows_of(run) if (r["gold_position"], r["decoy_position"]) == (2, 0))
    with opened(chromium, tmp_path / "page.html", height=1600) as page:
        words = page.locator("#layers").text_content()
        assert "Two answers" in words and "decoy first" in words and "no decoy" in words
        page.fill("#filter", str(row["question_id"]))
        page.locator(".rows .row", has_text="4 documents20").first.click()
        tokens = page.locator("#tokens")
        assert "gold position 2, decoy position 0" in tokens.text_content()
        assert f"decoys: {row['decoy_answer']}" in tokens.text_content()
        assert "--gold-position 2 --decoy-position 0" in tokens.text_content()
        kinds = [item.get_attribute("class") for item in page.locator("#tokens ol.documents li").all()]
        assert kinds == ["decoy", "", "gold", ""]
        assert row["decoy_answer"] in page.locator("#tokens li.decoy").text_content()
