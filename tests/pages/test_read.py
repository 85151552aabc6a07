"""`refinelens read`: a text, or a context of a run, in the terminal and in files; a reading in a notebook."""

import io
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import refinelens
from refinelens.cli import main
from refinelens.model.loading import load_model
from refinelens.pages.heatmap import visible
from refinelens.pages.terminal import print_heatmap
from refinelens.read import read_context, read_text, written
from refinelens.store.results import open_run
from refinelens.view_config import ReadConfig

TEXT = "The password of Alena Ashbury is acorn. What is the password of Alena Ashbury? Answer:"
TINY = ("--model", "tiny", "--device", "cpu")
pytestmark = pytest.mark.medium


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "one"
    refinelens.sweep("tiny", out=path, documents=(3,), examples=3, device="cpu")
    return open_run(path)


def table(map, width=200, color=False):
    file = io.StringIO()
    system = "truecolor" if color else None
    print_heatmap(Console(file=file, width=width, color_system=system, force_terminal=color), map)
    return file.getvalue()


def test_numbers_are_those_of_the_lens(lens, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    assert main(["read", TEXT, *TINY, "--target", "acorn", "--json", str(out)]) == 0
    found, reading = json.loads(out.read_text()), lens.read(TEXT, targets="acorn", top_k=10)
    (own,) = found["lenses"]
    assert own["argmax"] == reading.argmax.tolist() and own["rank"] == reading.rank.tolist()
    assert own["top_ids"] == reading.top_ids.tolist()
    for name in ("entropy", "kl", "logprob", "max_logprob", "top_logprobs"):
        assert np.allclose(own[name], getattr(reading, name).numpy(), atol=1e-5)
    trajectories = refinelens.trajectories(reading.rank)
    assert [-1 if layer is None else layer for layer in own["settle"]] == trajectories.settle.tolist()
    assert found["tokens"] == reading.tokens.input_ids[0].tolist() and found["target_is"] == "'acorn'"
    assert "18 tokens x 9 layers" in capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 200])
def test_a_terminal_shows_output_first_and_every_token(lens, width):
    map = lens.read(TEXT).heat_map()
    lines = table(map, width).splitlines()
    assert all(len(line) <= width for line in lines if re.match(r"target|output| token| {4,5}\d| +─", line))
    outputs = [line for line in lines if line.startswith("output")]
    cells = [cell.rstrip("*+ ") for line in outputs for cell in re.findall(r".{11}", line[7:] + " " * 12)]
    cells = [cell for cell in cells if cell]
    assert cells == [visible(map.texts[int(id)]) for id in map.lenses[0].argmax[-1]]
    first = lines.index(outputs[0])
    assert set(lines[first + 1].strip()) == {"─", " "} and lines[first + 2].startswith("     7 ")
    assert len(outputs) == (3 if width == 80 else 2)


def test_colours_are_there_where_a_terminal_has_them(lens):
    map = lens.read(TEXT).heat_map()
    assert "\x1b[" in table(map, color=True) and "\x1b[" not in table(map)


def test_words_of_any_width_keep_the_columns(lens):
    map = lens.read(TEXT).heat_map()
    wide = replace(map, texts={id: "東京都庁舎前" for id in map.texts})
    from rich.cells import cell_len

    lines = [line for line in table(wide, 80).splitlines() if line.startswith(("output", "     ", " token"))]
    assert {cell_len(line.rstrip()) for line in lines if "東" in line} <= set(range(60, 81))


def test_targets_in_words(lens):
    options = {"model": "tiny", "device": "cpu", "top_k": 3}
    ids = lens.tokenizer(TEXT)["input_ids"]
    own = read_text(TEXT, ReadConfig(**options))
    assert own.targets == own.lenses[0].argmax[-1].tolist() and (own.lenses[0].rank[-1] == 0).all()
    following = read_text(TEXT, ReadConfig(**options, target="next"))
    assert following.targets[:-1] == ids[1:] and following.targets[-1] == following.lenses[0].argmax[-1, -1]
    thinned = read_text(TEXT, ReadConfig(**options, layers="every 4", tokens=5))
    assert thinned.layers == [0, 4, 8] and thinned.tokens == ids[-5:]
    assert thinned.positions == list(range(len(ids) - 5, len(ids)))


def test_generated_tokens_are_read_where_they_were_written(lens):
    map = read_text(TEXT, ReadConfig(model="tiny", device="cpu", generate=3))
    n = len(lens.tokenizer(TEXT)["input_ids"])
    assert len(map.tokens) == n + 3
    (segment,) = map.segments
    assert (segment.start, segment.end, segment.kind) == (n, n + 3, "generated")
    assert map.tokens[n:] == map.lenses[0].argmax[-1, n - 1 : n + 2].tolist()


def test_a_context_of_a_run_has_its_documents_marked(run):
    map = read_context(run, ReadConfig(question=None, gold_position=2, target="next", top_k=3), ())
    kinds = [segment.kind for segment in map.segments]
    assert kinds == ["document", "document", "gold"]
    text = lambda s: " ".join(map.texts[id] for id in map.tokens[s.start : s.end])  # noqa: E731
    row = next(r for part in run.parts() for r in part.to_pylist() if r["gold_position"] == 2)
    gold = map.segments[2]
    assert (gold.start, gold.end) == (row["gold_start"], row["gold_end"]) and row["answer_text"].strip() in text(gold)
    assert map.targets[-1] == row["answer_id"]
    assert map.lenses[0].rank[:, -1].tolist() == row["target_rank"]
    assert all(row["answer_text"].strip() not in text(segment).split() for segment in map.segments[:2])


def test_the_command_takes_a_run(run, tmp_path, capsys):
    out = tmp_path / "context.html"
    assert main(["read", str(run.path), "--question", "1", "--gold-position", "1", "--html", str(out)]) == 0
    assert "document 1, gold" in out.read_text()
    assert main(["read", str(run.path), "--gold-position", "1", "--tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert "gold position 1" in shown and "in document" not in shown  # the question's last tokens are in none
    assert main(["read", str(run.path), "--gold-position", "1"]) == 0
    assert "document 1, gold" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["x y", *TINY, "--question", "2"], "--question: expected the folder of a run beside this option"),
        (["", *TINY], "expected a value"),
        ([TEXT, *TINY, "--target", "Alena Ashbury"], "expected the text of one token"),
        ([TEXT, *TINY, "--layers", "some"], "--layers: expected all, or N"),
        ([TEXT, *TINY, "--top-k", "0"], "--top-k: expected 1 or more"),
        ([TEXT, *TINY, "--html", "no/such/folder.html"], "--html no/such/folder.html: expected a file in a folder"),
        (["RUN", "--model", "tiny"], "--model: expected none beside a run"),
        (["RUN", "--question", "99"], "--question: expected one that the run has"),
        (["x " * 5000, *TINY], "expected"),
    ],
)
def test_bad_input_gets_one_line(run, arguments, said, capsys):
    assert main(["read", *(str(run.path) if a == "RUN" else a for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_pictures(lens, tmp_path):
    out = tmp_path / "map.png"
    assert main(["read", TEXT, *TINY, "--png", str(out), "--measure", "rank"]) == 0
    assert out.exists()
    reading = lens.read(TEXT, targets="acorn")
    for measure in ("probability", "rank", "entropy", "kl"):
        figure = reading.plot(measure, tokens=6)
        panel = figure.axes[0]
        shown = [text.get_text() for text in panel.texts]
        assert len(shown) == 6 * len(reading) and visible(reading.text(int(reading.argmax[-1, -1]))) in shown


def test_a_notebook_shows_the_map(lens):
    reading = lens.read(TEXT)
    html = reading._repr_html_()
    assert html.startswith('<iframe sandbox="allow-scripts"') and "&lt;main id=" in html
    assert lens.read([TEXT, TEXT])._repr_html_().startswith("<iframe")
    assert reading[0]._repr_html_() is None, "one layer is no map; a notebook shows its text"
    hidden = lens.hidden(torch.tensor([lens.tokenizer(TEXT)["input_ids"]]), torch.tensor([0, 3]))
    assert "iframe" in lens.read_states(hidden[:, 0])._repr_html_()
    some = lens.read(TEXT, positions=[3, 7, -1]).heat_map()
    assert some.positions == [3, 7, 17] and len(some.tokens) == 3


def test_a_run_without_the_plain_lens_has_texts(tmp_path):
    refinelens.fit("tiny", out=tmp_path / "lens", tokens=2000, device="cpu")
    path = tmp_path / "run"
    refinelens.sweep("tiny", out=path, documents=(2,), examples=1, lens=[tmp_path / "lens"], device="cpu")
    map = read_context(open_run(path), ReadConfig(target="Answer", top_k=2), ())
    assert [lens.name for lens in map.lenses] == ["lens"] and map.target_is == "'Answer'"
    assert not any("<id" in map.texts[id] for id in map.tokens)


def test_control_characters_do_not_reach_a_terminal(lens):
    map = lens.read(TEXT).heat_map()
    hostile = replace(map, title="\x1b[31mred", texts={id: "\x1b]0;x\x07" for id in map.texts})
    assert "\x1b" not in table(hostile) and "\x07" not in table(hostile)


def test_part_of_a_reading_keeps_its_tokens_and_targets(lens):
    whole = lens.read(TEXT, targets="acorn")
    batch = lens.read([TEXT, TEXT], targets="acorn")
    part = batch.of(3, 6)
    assert part.shape == (len(whole), 3) and part.heat_map().positions == [3, 4, 5]
    assert part.heat_map().tokens == whole.tokens.input_ids[0, 3:6].tolist()
    assert torch.equal(part.rank, whole.rank[:, 3:6]) and part.heat_map().targets == [int(whole.targets)] * 3


def test_a_measure_that_was_not_read_is_refused(lens):
    with pytest.raises(refinelens.InputError, match="measure: expected one of probability, entropy, kl, got 'rank'"):
        lens.read(TEXT).plot("rank")
    with pytest.raises(refinelens.InputError, match="got 'sharpness'"):
        lens.read(TEXT).plot("sharpness")


def test_numbers_that_are_not_finite_are_null(lens):
    map = lens.read(TEXT, targets="acorn").heat_map()
    map.lenses[0].logprob[2, 3] = -np.inf
    assert json.loads(map.to_json())["lenses"][0]["logprob"][2][3] is None


def test_another_folder_is_no_text(tmp_path, capsys):
    assert main(["read", str(tmp_path)]) == 2
    assert "expected a text or the folder of a run, got another folder" in capsys.readouterr().err


def test_writing_goes_on_over_lines_and_stops_at_the_models_last_position(lens):
    loaded = load_model("tiny", "cpu")
    ids = list(loaded.tokenizer(TEXT)["input_ids"])
    wanted = list(ids)
    for _ in range(12):  # every token from the whole text
        wanted.append(int(lens.read([wanted], positions=-1).argmax[-1, 0, 0]))
    tokenizer, second = loaded.tokenizer, wanted[: len(ids) + 2]

    def written_with(max_tokens=None, end_ids=frozenset()):
        model = SimpleNamespace(tokenizer=tokenizer, max_tokens=max_tokens, end_ids=end_ids)
        return written(lens, model, ids, 12)

    assert written_with() == wanted
    assert written_with(max_tokens=len(ids) + 2) == second and written_with(max_tokens=len(ids)) == ids
    assert written_with(end_ids=frozenset({second[-1]})) == second
