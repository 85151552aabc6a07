"""The command line as a user meets it: fast help, one line per error, exit codes."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from faults import at_pass, largest_file
from refinelens.cli import main
from refinelens.data.tasks import load_task
from refinelens.errors import InputError
from refinelens.lens.files import load_lens
from refinelens.lens.prefix import PROBE_TOKENS
from refinelens.store.files import temporary_of
from refinelens.store.results import open_run
from tiny import save_tiny_lens, save_tiny_model, tiny_gpt2, word_tokenizer


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "refinelens.cli", *arguments], capture_output=True, text=True)


def test_help_imports_nothing_but_this_package():
    """What takes long is what it would import: it needs no package, and few modules of Python's own."""
    code = """if True:
        import sys
        from refinelens.cli import main
        try:
            main(['--help'])
        finally:
            roots = {name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names
            print(sorted(root for root in roots if not root.startswith('_')), len(sys.modules))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    *printed, roots, number = done.stdout.split()
    assert "sweep" in printed and roots == "['refinelens']" and int(number) < 200


def test_version_and_doctor(capsys):
    assert run("--version").stdout.startswith("refinelens 0.")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("backend", "CUDA device", "Triton", "C++ extension", "smollm2"):
        assert word in out


@pytest.fixture
def sweep(tiny_model, question_file, tmp_path):
    arguments = ["sweep", "--model", str(tiny_model), "--task", str(question_file), "--documents", "2"]
    return [*arguments, "--device", "cpu", "--out", str(tmp_path / "run")]


@pytest.mark.medium
def test_sweep_then_show(sweep, tmp_path, capsys):
    assert main(sweep) == 0
    out = capsys.readouterr().out
    assert "Parity: the lens at layer 3 equals the model's own logits" in out and "summary.csv" in out
    assert main(["show", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() in out, "show prints the same table again"


@pytest.mark.medium
def test_show_top_equals_a_sweep_with_that_top(sweep, tmp_path, capsys):
    """The table is recomputed from the ranks; the run's files stay as they are, and torch is not needed."""
    assert main([*sweep, "--answer-tokens", "all"]) == 0
    files = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")}
    capsys.readouterr()
    assert main([*sweep[:-1], str(tmp_path / "other"), "--answer-tokens", "all", "--top", "20,9", "--no-report"]) == 0
    swept = capsys.readouterr().out.split(f"\n\n{tmp_path / 'other'}: ")[0]
    show = ["show", str(tmp_path / "run"), "--top", "20,9"]
    code = f"import sys; from refinelens.cli import main; main({show!r}); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown, swept = (re.sub("in [0-9]+ s[.]", "", text).strip().splitlines() for text in (done.stdout, swept))
    assert shown == swept
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*")} == files
    size = json.loads((tmp_path / "run" / "manifest.json").read_text())["model"]["vocab_size"]
    for top, message in (
        ("0", "expected numbers from 1 to"),
        ("five", "expected numbers such as 1,5,10"),
        ("9,9", "each once, got '9,9'"),
        (f"1,{size}", f"--top: expected less than the {size} tokens of the vocabulary, got {size}"),
    ):
        assert main(["show", str(tmp_path / "run"), "--top", top]) == 2
        assert_one_line(capsys.readouterr().err, message)
    assert main(["show", str(tmp_path / "run"), "--top", str(size - 1)]) == 0


def break_config(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": "three"}))


def break_weights(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def remove_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 4}))


def widen_the_vocabulary(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))


def remove_the_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_config, "expected a causal LM with its tokenizer"),
        (break_weights, "expected a causal LM with its tokenizer"),
        (remove_a_layer, "expected weights for every part of GPT2LMHeadModel, got none that fit for 12, such as"),
        (widen_the_vocabulary, "got none that fit for 1, such as transformer.wte.weight"),
        (remove_the_tokenizer, "expected a causal LM with its tokenizer"),
    ],
)
def test_a_damaged_model_is_refused_and_leaves_nothing_behind(sweep, tmp_path, capsys, damage, message):
    damage(save_tiny_model(tmp_path / "model"))
    sweep[sweep.index("--model") + 1] = str(tmp_path / "model")
    assert main(sweep) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["doctor", "sweep"])
def test_a_tokenizer_of_another_model(sweep, tmp_path, capsys, command):
    folder = save_tiny_model(tmp_path / "model", vocab_size=20)
    sweep[sweep.index("--model") + 1] = str(folder)
    largest = len(word_tokenizer()) - 1
    assert main(sweep if command == "sweep" else ["doctor", "--model", str(folder)]) == 2
    message = f"{folder}: expected token ids below 20, the rows of its embedding, got {largest} in its tokenizer; give"
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.medium
def test_an_added_token_without_embedding(sweep, question_file, tmp_path, capsys):
    """Real tokenizers have such, for padding: the question that has it is left out, and the sweep goes on."""
    tokenizer = word_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["<extra>"])
    sweep[sweep.index("--model") + 1] = str(save_tiny_model(tmp_path / "model", vocab_size=rows, tokenizer=tokenizer))
    assert main(sweep) == 0
    task, out = tmp_path / "task.jsonl", tmp_path / "other"
    task.write_text(question_file.read_text().replace("door of arven ?", "door of <extra> ?"))
    capsys.readouterr()
    assert main([*sweep, "--task", str(task), "--out", str(out)]) == 0
    counts = open_run(out).manifest["counts"]
    assert counts["left_out"] == {"2 documents: a token that the model has no embedding for": [0]}
    assert counts["done"] == counts["questions"] == 6 and counts["contexts"] == 10
    assert "no embedding for" in capsys.readouterr().out
    text = tmp_path / "text"
    text.write_text("the door of <extra> . " * 200)
    fit = ["fit", "--model", sweep[sweep.index("--model") + 1], "--device", "cpu", "--text", str(text)]
    assert main([*fit, "--tokens", "160", "--out", str(tmp_path / "lens")]) == 2
    message = f"expected token ids below {rows}, the rows of its embedding, got {rows} in"
    assert_one_line(capsys.readouterr().err, f"{message} --text {text}")
    assert not (tmp_path / "lens").exists()


@pytest.mark.parametrize("value, word", [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite(sweep, tmp_path, capsys, value, word):
    model = tiny_gpt2(len(word_tokenizer()))
    model.transformer.h[1].mlp.c_proj.bias.data[3] = value
    model.save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    sweep[sweep.index("--model") + 1] = str(tmp_path / "model")
    for command in (sweep, ["doctor", "--model", str(tmp_path / "model")]):
        assert main(command) == 2
        message = f"GPT2LMHeadModel: expected finite states and logits, got {word} at layer 2; check the weights\n"
        assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


def assert_one_line(error, message):
    assert error.startswith("refinelens: ") and error.count("\n") == 1 and error.endswith("\n"), error
    assert message in error


@pytest.mark.parametrize(
    "change, message",
    [
        (["--documents", "two"], "--documents: expected closed-book, oracle or sizes such as 5,10, got 'two'"),
        (["--gold-positions", "9"], "--gold-positions: expected 0 to 1 with 2 documents, got 9"),
        (["--task", "missing.jsonl"], "got no file at missing.jsonl"),
        (["--template", "missing.txt"], "--template missing.txt: expected default, query-aware or a readable"),
        (["--model", "./missing"], "got no folder at ./missing"),
        (["--model", "missing.gguf"], "got no file at missing.gguf"),
        (["--model", "FILE"], "--model FILE: expected a folder, a .gguf file or a hub name, got another file"),
        (["--model="], "--model: expected a value, got ''"),
        (["--out", " "], "--out: expected a value, got ' '"),
        (["--out", "/proc/none"], "--out /proc/none: expected a folder that can be written, got: No such file"),
        (["--examples", "99"], "--examples: expected 1 to 6"),
        (["--top", "1,1"], "--top: expected numbers from 1 to 2147483647 such as 1,5,10, each once, got '1,1'"),
        (["--top", "1,9999"], "tokens of the vocabulary, got 9999"),
        (["--template", "FIELDS"], "expected no field but {documents} and {question}, got {foo}"),
        (["--template", "WORDS"], "--template WORDS: expected words that the tokenizer of --model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(sweep, change, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE").write_text("{}")
    (tmp_path / "FIELDS").write_text("{documents} {foo} {question}")
    (tmp_path / "WORDS").write_text("Question : {question} {documents} unheard-of")
    assert main([*sweep, *change]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not (tmp_path / "run").exists()


def test_a_template_may_hold_special_tokens(sweep, tmp_path):
    """Also the one that stands for unknown words, which many tokenizers begin a text with."""
    template = tmp_path / "template"
    template.write_text(word_tokenizer().unk_token + "{documents} Question : {question}")
    assert main([*sweep, "--template", str(template)]) == 0


@pytest.mark.parametrize("change", [["--seed", "abc"], ["--target", "foo"], ["--nonsense"]])
def test_bad_options_are_one_line_too(sweep, change, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*sweep, *change])
    assert stop.value.code == 2
    assert_one_line(capsys.readouterr().err, change[0])


@pytest.mark.medium
def test_names_are_shown_as_they_are(sweep, tmp_path, capsys):
    """Brackets are markup to the terminal library and dollars are formulas to the figure's."""
    folder = save_tiny_model(tmp_path / "m[b]$x_$")
    sweep[sweep.index("--model") + 1] = str(folder)
    assert main(sweep) == 0
    assert capsys.readouterr().out.startswith("m[b]$x_$ on questions.jsonl: ")


def test_unused_weights_are_said(sweep, tmp_path, capsys):
    folder = save_tiny_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    sweep[sweep.index("--model") + 1] = str(folder)
    assert main(sweep) == 0
    assert "Caution: 11 tensors of the checkpoint have no place in this model" in capsys.readouterr().out


@pytest.mark.medium
@pytest.mark.parametrize(
    "change, message",
    [
        (["--documents", "two"], "--documents: expected closed-book, oracle or sizes"),
        pytest.param(["--examples", "99"], "--examples: expected 1 to 6", marks=pytest.mark.slow),  # loads the model
    ],
)
def test_bad_input_in_a_real_process(sweep, monkeypatch, change, message):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as some continuous integrations do
    done = run(*sweep, *change)
    assert done.returncode == 2 and done.stdout == ""
    assert_one_line(done.stderr, message)


def test_a_hub_name_without_network(sweep, capsys):
    assert main([*sweep, "--model", "nobody/nothing"]) == 2
    assert_one_line(capsys.readouterr().err, "without network pass a folder")


def test_no_cuda_device(sweep, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([*sweep, "--device", "cuda"]) == 2
    assert_one_line(capsys.readouterr().err, "expected a CUDA device")


def test_show_of_something_else(tmp_path, capsys):
    assert main(["show", str(tmp_path)]) == 2
    assert_one_line(capsys.readouterr().err, "expected a run folder with manifest.json")
    (tmp_path / "manifest.json").write_text("{}")
    assert main(["show", str(tmp_path)]) == 2
    message = "expected the manifest of a run, got something else; bring it back, or remove the folder"
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.medium
def test_show_of_a_damaged_run(sweep, tmp_path, capsys):
    assert main(sweep) == 0
    run = tmp_path / "run"
    table = capsys.readouterr().out.split("\n\n" + str(run))[0]
    (run / "summary.csv").unlink()
    (run / "trajectories.parquet").write_text("what show prints comes from the predictions")
    assert main(["show", str(run)]) == 0 and (run / "summary.csv").exists(), "what is missing is written again"
    assert capsys.readouterr().out.strip() == table.strip()
    part = run / "predictions" / "part-00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(b"PAR1")
    assert main(["show", str(run)]) == 2
    assert_one_line(capsys.readouterr().err, f"(4 bytes); refinelens sweep --resume {run} computes it again")
    part.unlink()
    assert main(["show", str(run)]) == 2
    assert_one_line(capsys.readouterr().err, "part-00000.parquet: expected a file that can be read, got: No such file")
    part.write_bytes(whole)
    manifest = json.loads((run / "manifest.json").read_text())
    for change, message in (
        ({"counts": []}, "expected the manifest of a run"),
        ({"parts": [{"file": "part-00000.parquet"}]}, "expected the manifest of a run, got one without its parts"),
        ({"seed": "none"}, f"expected seed in {run}/manifest.json to be a whole number, got 'none'; bring it back"),
        ({"schema_version": 99}, "expected schema version 6, got 99"),
    ):
        (run / "manifest.json").write_text(json.dumps(manifest | change))
        assert main(["show", str(run)]) == 2
        assert_one_line(capsys.readouterr().err, message)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["trajectories.parquet", "summary.csv", "depth.png"])
def test_show_writes_nothing_where_it_may_not(sweep, tmp_path, capsys, name):
    assert main(sweep) == 0
    (tmp_path / "run" / name).unlink()
    temporary_of(tmp_path / "run" / name).mkdir()  # nobody may write there, an administrator neither
    capsys.readouterr()
    assert main(["show", str(tmp_path / "run")]) == 0
    assert "refinement by gold position" in capsys.readouterr().out


def test_show_needs_no_disk(sweep, tmp_path, capsys):
    """Not even for its lock."""
    assert main(sweep) == 0
    (tmp_path / "run" / "depth.png").unlink()
    capsys.readouterr()

    with largest_file(0):
        assert main(["show", str(tmp_path / "run")]) == 0
    assert "refinement by gold position" in capsys.readouterr().out
    assert not (tmp_path / "run" / "depth.png").exists()


def test_ctrl_c_in_a_sweep(sweep, tmp_path, capsys):
    third = word_tokenizer().convert_tokens_to_ids("calmi")

    def interrupt(ids, states):
        if ids.shape[1] > PROBE_TOKENS and third in ids[0, -8:]:  # where the question stands
            raise KeyboardInterrupt

    with at_pass(interrupt):
        assert main(sweep) == 130
    captured = capsys.readouterr()
    assert_one_line(captured.err, "interrupted; the finished questions stay readable, refinelens sweep --resume")
    assert "This run is interrupted: 2 of 6 questions" in captured.out


@pytest.mark.parametrize(
    "place, what",
    [
        ("transformers.PreTrainedModel.to", "--model"),
        ("transformers.AutoModelForCausalLM.from_pretrained", "--model"),
        ("refinelens.lens.logit_lens.check_parity", "GPT2LMHeadModel"),
        ("refinelens.lens.logit_lens.LogitLens.adapted", "--lens half"),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()], ids=["gpu", "cpu"])
def test_no_memory_to_load(tiny_model, question_file, tmp_path, capsys, monkeypatch, place, what, error):
    lens = save_tiny_lens(tmp_path / "half", tiny_model, scale=0.5)

    def full(*arguments, **options):
        raise error

    monkeypatch.setattr(place, full)
    command = ["sweep", "--model", tiny_model, "--task", question_file, "--documents", "2", "--lens", f"plain,{lens}"]
    assert main([*map(str, command), "--device", "cpu", "--out", str(tmp_path / "run")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"refinelens: {what}") and "expected memory to load it, got out of memory; free some" in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", ["--out", "--task", "--model", "--lens", "--template"])
def test_names_that_are_not_utf8_are_refused_before_anything_is_loaded(option, sweep, no_model, capsys):
    """No manifest could hold them."""
    name = os.fsdecode(b"r\xe9sum\xe9")
    assert main([*sweep, option, name]) == 2
    assert_one_line(capsys.readouterr().err, r"command line: expected UTF-8, got 'r\udce9sum\udce9'; rename the file")


def test_other_names_that_are_not_utf8(tiny_model, tmp_path, monkeypatch):
    """A variable and a folder that one stands in."""
    folder = tmp_path / os.fsdecode(b"\xe9")
    monkeypatch.setenv("REFINELENS_NQ", str(folder))
    with pytest.raises(InputError, match=r"^\$REFINELENS_NQ: expected UTF-8, got "):
        load_task("nq")
    monkeypatch.chdir(save_tiny_lens(folder, tiny_model, scale=0.5))
    with pytest.raises(InputError, match=r"^``lens`` \.: name of the folder: expected UTF-8, got "):
        load_lens(".")
