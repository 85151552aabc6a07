"""`refinelens layers` on a sweep of a tiny model: every output, interrupts, damage, and what is refused."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from families import save
from faults import at_pass, faulty_disk
from refinelens.cli import main
from refinelens.config import LayersConfig, SweepConfig
from refinelens.data.prompts import DEFAULT_TEMPLATE, build_context
from refinelens.data.tasks import DistractorSource, load_task
from refinelens.errors import FaultError, InputError, UnsupportedModelError
from refinelens.layers.analysis import run_layers
from refinelens.lens.blocks import PROBE_TOKENS
from refinelens.store.frames import load_run
from refinelens.store.layers import ATTRIBUTION, FIGURE, LAYER_ROWS, MEANS, PARTS, ROWS, TABLES
from refinelens.store.process import Interrupted, RunLock
from refinelens.sweeping.sweep import run_sweep
from tiny import save_tiny_lens, save_tiny_model

pytestmark = pytest.mark.medium

ABLATIONS = ("skip", "mean", "attn", "mlp")
N_LAYERS, TOP = 3, 23  # a threshold that the target passes at some gold positions of a question
CONTEXTS = 6 * (2 + 4)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Weights so large that where the gold document stands makes a difference."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 25
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def swept(model, question_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    lens = save_tiny_lens(folder / "lens", model, 0.05)
    options = SweepConfig(str(model), str(question_file), (2, 4), top=(TOP,), lens=("plain", str(lens)), device="cpu")
    return run_sweep(options, folder / "run")


@pytest.fixture(scope="session")
def finished(swept, drawing):
    with drawing():
        return run_layers(swept.path, LayersConfig())


SMALL = LayersConfig(("skip", "mean"), examples=4)


@pytest.fixture(scope="session")
def small(swept, tmp_path_factory):
    """An analysis for faults to befall: four questions, the means and a way that needs none."""
    folder = tmp_path_factory.mktemp("small") / "run"
    shutil.copytree(swept.path, folder, ignore=shutil.ignore_patterns("layers"))
    return run_layers(folder, SMALL)


@pytest.fixture
def run(swept, tmp_path):
    """A copy to do damage to."""
    shutil.copytree(swept.path, tmp_path / "run", ignore=shutil.ignore_patterns("layers"))
    return replace(swept, path=tmp_path / "run")


def rows_of(folder):
    return pq.read_table(folder.path / ROWS)


def only(rows, **values):
    return [row for row in rows.to_pylist() if all(row[name] == value for name, value in values.items())]


def test_all_outputs_are_there(swept, finished):
    folder, report = finished
    assert folder.path == swept.path / "layers"
    names = {path.name for path in folder.path.iterdir()}
    assert names == {"manifest.json", PARTS, MEANS, ROWS, FIGURE, *TABLES}
    rows = rows_of(folder)
    assert rows.schema.equals(LAYER_ROWS.append(ATTRIBUTION))
    for name in ABLATIONS:
        assert len(only(rows, intervention=name)) == CONTEXTS * N_LAYERS
    assert len(only(rows, intervention="control")) == 6 * N_LAYERS
    assert report.manifest["status"] == "finished" and len(report.manifest["parts"]) == 6
    assert (folder.path / FIGURE).read_bytes().startswith(b"\x89PNG")


def test_the_sweeps_own_files_stay_and_it_can_be_overwritten(swept, finished):
    assert (swept.path / "layers.png").exists()
    swept.check_replaceable()


def test_clean_runs_are_the_sweeps(swept, finished):
    stored = {}
    for row in pq.read_table(swept.path / "predictions").to_pylist():
        if row["answer_token"] == 0:
            key = (row["question_id"], row["documents"], row["gold_position"])
            stored[key] = row["target_logprob"][-1], row["target_rank"][-1], row["target_id"]
    for row in rows_of(finished[0]).to_pylist():
        logprob, rank, target = stored[row["question_id"], row["documents"], row["gold_position"]]
        assert row["target_logprob"] - row["logprob_change"] == pytest.approx(logprob, abs=1e-4)
        assert (row["target_rank"] - row["rank_change"], row["target_id"]) == (rank, target)
        assert row["correct"] == (row["target_rank"] < TOP)
    assert finished[1].largest_difference < 1e-4 and finished[1].noise < 1e-4


def test_a_row_is_the_model_with_a_hook(finished, model, question_file):
    """Skip of the second block at every token, computed from whole logits."""
    tokenizer, own = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()
    task = load_task(str(question_file))
    question = task.questions[3]
    others = DistractorSource(task, seed=0).choose(question, 3)
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, others, 2)
    own.transformer.h[1].register_forward_hook(lambda _, args, output: args[0])
    with torch.no_grad():
        logits = own(torch.tensor([context.input_ids])).logits[0, context.prompt_length - 1]
    wanted = {"question_id": 3, "documents": 4, "gold_position": 2, "intervention": "skip", "layer": 2}
    (row,) = only(rows_of(finished[0]), **wanted)
    answer = context.answer_ids[0]
    assert row["target_id"] == answer
    assert row["target_rank"] == int((logits > logits[answer]).sum())
    assert row["target_logprob"] == pytest.approx(float(logits.log_softmax(-1)[answer]), abs=1e-4)


def test_trajectories_are_of_what_remains(swept, finished):
    """A skip of the last block leaves the layers below as the sweep read them, and the output as layer n - 1."""
    plain, lens = {}, finished[1].manifest["lens"]
    for row in pq.read_table(swept.path / "predictions").to_pylist():
        if row["answer_token"] == 0 and row["lens"] == lens:
            plain[row["question_id"], row["documents"], row["gold_position"]] = row["target_rank"]
    rows = only(rows_of(finished[0]), intervention="skip", layer=N_LAYERS)
    assert len(rows) == CONTEXTS
    for row in rows:
        below = plain[row["question_id"], row["documents"], row["gold_position"]][:N_LAYERS]
        correct = [rank < TOP for rank in [*below, row["target_rank"]]]
        first = correct.index(True) if any(correct) else None
        wrong = [layer for layer, is_correct in enumerate(correct) if not is_correct]
        settle = (wrong[-1] + 1 if wrong else 0) if correct[-1] else None
        assert (row["first_correct"], row["settle"]) == (first, settle)
        assert row["depth"] == (None if settle is None else settle - first)
    assert any(row["settle_change"] is not None for row in rows)


def test_patches_go_between_success_and_failure(finished):
    rows = rows_of(finished[0])
    restored, destroyed = only(rows, intervention="restore"), only(rows, intervention="destroy")
    assert len(restored) == len(destroyed) > 0, "the model is to succeed at some positions of a question alone"
    for row in restored + destroyed:
        succeeded = row["target_rank"] - row["rank_change"] < TOP
        assert succeeded == (row["intervention"] == "destroy")
        assert row["source_position"] != row["gold_position"] and row["at"] == "answer"
        if row["layer"] == N_LAYERS:
            assert row["correct"] == (row["intervention"] == "restore")
    pairs = {(r["question_id"], r["documents"], r["gold_position"], r["source_position"]) for r in restored}
    back = {(r["question_id"], r["documents"], r["source_position"], r["gold_position"]) for r in destroyed}
    assert pairs == back
    assert {p.intervention for p in finished[1].patchings} == {"restore", "destroy"}


def test_at_the_answer_the_other_tokens_stay(run, monkeypatch):
    """Held keys and values, or whole contexts where the gate or a real context refuses them: the same to rounding."""
    options = LayersConfig(("skip", "mean"), at="answer", examples=2)
    tables = []
    update, longest = DynamicCache.update, 10**9

    def forget(cache, keys, values, layer, *rest):  # the first tokens, of contexts that are longer
        keys, values = update(cache, keys, values, layer, *rest)
        if keys.shape[-2] > longest:
            cache.layers[layer].values[..., :3, :] = 0
        return keys, values

    monkeypatch.setattr(DynamicCache, "update", forget)
    for longest in (10**9, 0, PROBE_TOKENS):  # noqa: B007 - `forget` reads it
        tables.append(rows_of(run_layers(run.path, options, overwrite=True)[0]))
    assert tables[1].equals(tables[2])
    assert len(set(tables[0]["question_id"].to_pylist())) == 2
    for name in ("target_rank", "settle"):
        assert tables[0][name].equals(tables[1][name])
    changes = [table["logprob_change"].to_numpy() for table in tables[:2]]
    np.testing.assert_allclose(*changes, atol=1e-4)
    assert np.abs(changes[0]).max() > 0.01


def test_a_context_twice_as_long_is_compared_again(tiny_model, question_file, tmp_path):
    (tmp_path / "template").write_text("{documents}\n{question}")
    documents, template = (1, 6), str(tmp_path / "template")
    sweep = SweepConfig(str(tiny_model), str(question_file), documents, template=template, examples=2, device="cpu")
    run = run_sweep(sweep, tmp_path / "run")
    ran = []
    with at_pass(lambda ids, states: ran.append(ids.shape[1])):
        run_layers(run.path, LayersConfig(("skip",), at="answer"))
    # All tokens but the last, the last by itself, then all together to compare.
    compared = [n for first, last, n in zip(ran, ran[1:], ran[2:], strict=False) if (last, n) == (1, first + 1)]
    assert len([n for n in compared if n > PROBE_TOKENS]) == 2, "an oracle context, then one of six documents"


def test_fewer_runs_at_a_time_once_memory_ran_out(run):
    stages, sizes, options = [], [], LayersConfig(("skip",), at="answer", examples=1)
    wanted = rows_of(run_layers(run.path, options)[0])

    def small_machine(block, inputs):
        if isinstance(block, GPT2Block) and stages[-1] == "questions":  # the gates run before
            sizes.append(len(inputs[0]))
            if len(inputs[0]) > 1:
                raise torch.OutOfMemoryError

    hook = register_module_forward_pre_hook(small_machine)
    try:
        found = rows_of(run_layers(run.path, options, None, True, None, lambda stage, *_: stages.append(stage))[0])
    finally:
        hook.remove()
    assert found["target_rank"].equals(wanted["target_rank"])
    last = max(index for index, size in enumerate(sizes) if size > 1)
    assert last < 0.5 * len(sizes), "no second try at what did not fit"


@pytest.mark.parametrize(
    "stage, before, kept, signum", [("questions", 2, 3, signal.SIGINT), ("means", 0, 0, signal.SIGTERM)]
)
def test_interrupted_and_gone_on_with(small, run, stage, before, kept, signum):
    def stop(*now):
        if now[:2] == (stage, before):
            os.kill(os.getpid(), signum)

    with pytest.raises(Interrupted) as stopped:
        run_layers(run.path, SMALL, progress=stop)
    assert stopped.value.signum == signum
    manifest = json.loads((run.path / "layers" / "manifest.json").read_text())
    assert len(manifest["parts"]) == kept and not (run.path / "layers" / ROWS).exists()
    folder, report = run_layers(run.path, SMALL)
    assert (folder.path / ROWS).read_bytes() == (small[0].path / ROWS).read_bytes()
    assert (folder.path / "layers.csv").read_bytes() == (small[0].path / "layers.csv").read_bytes()
    assert len(report.manifest["resumed"]) == 1


def test_a_second_signal_ends_it_at_once(run):
    def twice(stage, done, total):
        if (stage, done) == ("questions", 1):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run_layers(run.path, LayersConfig(("skip",)), progress=twice)
    assert len(json.loads((run.path / "layers" / "manifest.json").read_text())["parts"]) == 1


def test_a_fault_names_the_question_and_keeps_the_others(small, run):
    asked = [-1]

    def at_question(number, act):
        return at_pass(lambda ids, states: asked[-1] == number and act())

    def progress(stage, done, total):
        asked.append(done if stage == "questions" else -1)

    said = "question 1: ZeroDivisionError: .*; the same command goes on"
    with at_question(1, lambda: 1 / 0), pytest.raises(FaultError, match=said):
        run_layers(run.path, SMALL, progress=progress)
    said = "question 0: FileNotFoundError: .*; the same command without ``overwrite=True`` goes on"
    with at_question(0, lambda: open("/nowhere/weights")), pytest.raises(FaultError, match=said):
        run_layers(run.path, SMALL, overwrite=True, progress=progress)
    folder, _ = run_layers(run.path, SMALL)
    assert rows_of(folder).equals(rows_of(small[0]))


@pytest.mark.parametrize("file", [f"{PARTS}/part-00002.parquet", MEANS, ROWS])
@pytest.mark.parametrize("damage", ["flipped", "absent"])
def test_damaged_files_are_made_again(small, run, file, damage):
    shutil.copytree(small[0].path, run.path / "layers")
    path, heard = run.path / "layers" / file, []
    whole = path.read_bytes()
    path.unlink() if damage == "absent" else path.write_bytes(whole[:40] + bytes([whole[40] ^ 1]) + whole[41:])
    folder, _ = run_layers(run.path, SMALL, warn=heard.append)
    assert rows_of(folder).equals(rows_of(small[0]))
    assert [file.split("/")[1] in line for line in heard] == ([True] if "part" in file else [])


def test_a_full_disk_and_a_part_that_no_manifest_names(small, run):
    def full(number, path):
        if path and path.endswith("part-00002.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")

    with faulty_disk(full), pytest.raises(FaultError, match="no free disk left"):
        run_layers(run.path, SMALL)
    path = run.path / "layers" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert len(manifest["parts"]) == 2
    path.write_text(json.dumps(manifest | {"parts": manifest["parts"][:1]}))  # killed before it was written
    folder, _ = run_layers(run.path, SMALL)
    assert rows_of(folder).equals(rows_of(small[0]))


def test_finished_already_needs_no_model(finished, run, no_model):
    shutil.copytree(finished[0].path, run.path / "layers")
    for same in (LayersConfig(), LayersConfig(lens="lens", examples=6)):
        _, report = run_layers(run.path, same)
        assert report.manifest["resumed"] == [] and report.essentials == finished[1].essentials


def test_the_lens_alone_needs_no_model(run, no_model):
    folder, report = run_layers(run.path, LayersConfig((), lens="plain"))
    assert report.manifest["lens"] == "plain" and len(rows_of(folder)) == 0
    assert {row.of for row in report.statistics} == {"lens"} and report.exits and not report.agreements


def refused(capsys, *arguments):
    """The line that a command ends in, with exit code 2."""
    assert main(["layers", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("refinelens: ")]
    assert len(lines) == 1 and not captured.out
    return lines[0]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--interventions", "skip,zero"), "--interventions: expected none or some of skip,mean,attn,mlp,patch"),
        (("--interventions", "skip,skip"), "each once, got 'skip,skip'"),
        (("--examples", "0"), "--examples: expected 1 or more, got 0"),
        (("--examples", "7"), "--examples: expected 1 to 6"),
        (("--lens", "other"), "--lens: expected one of the run's, plain, lens, got other"),
    ],
)
def test_options_that_do_not_fit(swept, capsys, arguments, message, no_model):
    assert message in refused(capsys, swept.path, *arguments)


def test_folders_that_do_not_fit(finished, run, capsys, tmp_path, no_model):
    assert "expected a run folder" in refused(capsys, tmp_path / "nothing")
    (tmp_path / "notes.txt").touch()
    assert "got other files, such as notes.txt" in refused(capsys, run.path, "--out", tmp_path)
    assert "expected a folder that can be written" in refused(capsys, run.path, "--out", tmp_path / "notes.txt")
    shutil.copytree(finished[0].path, run.path / "layers")
    line = refused(capsys, run.path, "--interventions", "skip")
    assert "expected --interventions skip,mean,attn,mlp,patch, as the analysis has it, got skip" in line
    assert "--overwrite" in line
    assert "expected --at all, as the analysis has it, got answer" in refused(capsys, run.path, "--at", "answer")
    assert "expected --examples 6, as the analysis has it, got 5" in refused(capsys, run.path, "--examples", "5")
    manifest = json.loads((run.path / "manifest.json").read_text())
    (run.path / "manifest.json").write_text(json.dumps(manifest | {"run_id": "another"}))
    assert f"expected run_id {manifest['run_id']}, as the analysis has it, got another" in refused(capsys, run.path)
    (run.path / "manifest.json").write_text(json.dumps(manifest | {"status": "interrupted"}))
    assert "expected a finished run, got one that is interrupted" in refused(capsys, run.path)
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    (run.path / "layers" / "manifest.json").write_text("{}")
    assert "make the analysis again with --overwrite" in refused(capsys, run.path)
    whole = json.loads((finished[0].path / "manifest.json").read_text())
    for name in ("parts", "resumed"):
        (run.path / "layers" / "manifest.json").write_text(json.dumps(whole | {name: None}))
        assert f"expected {name} in {run.path}/layers/manifest.json to be a list, got None" in refused(capsys, run.path)


def test_one_process_at_a_time(run, capsys, no_model):
    with RunLock(run.path / "layers"):
        assert "held by process" in refused(capsys, run.path, "--interventions", "none")


def test_another_model_is_refused_and_costs_nothing(finished, run, model, capsys):
    shutil.copytree(finished[0].path, run.path / "layers")
    before = sorted((path.name, path.stat().st_size) for path in (run.path / "layers").iterdir())
    weights = (model / "model.safetensors").read_bytes()
    try:
        save_tiny_model(model, seed=1)
        line = refused(capsys, run.path, "--overwrite")
    finally:
        (model / "model.safetensors").write_bytes(weights)
    assert f"layers {run.path}: expected model.weights_sha256" in line
    assert sorted((path.name, path.stat().st_size) for path in (run.path / "layers").iterdir()) == before


def test_a_family_without_halves_is_refused_by_name_and_can_be_skipped(question_file, tmp_path):
    folder, template = save("opt-350m", tmp_path / "model"), tmp_path / "template.txt"
    template.write_text("{documents}\n{question}\n")
    options = SweepConfig(folder, str(question_file), documents=(2,), template=str(template), device="cpu")
    run_sweep(options, tmp_path / "run")
    with pytest.raises(UnsupportedModelError, match="OPTForCausalLM: expected blocks that add attention .* block 1"):
        run_layers(tmp_path / "run", LayersConfig())
    assert not (tmp_path / "run" / "layers").exists()
    found, _ = run_layers(tmp_path / "run", LayersConfig(("skip", "mean", "patch")))
    assert len(only(rows_of(found), intervention="mean")) == 6 * 2 * 3


def test_rows_as_a_data_frame(swept, finished, run):
    frame = load_run(swept.path).interventions
    assert len(frame) == len(rows_of(finished[0])) and str(frame["settle"].dtype) == "Int32"
    with pytest.raises(InputError, match="make one with refinelens layers"):
        load_run(run.path).interventions  # noqa: B018
    shutil.copytree(finished[0].path, run.path / "layers")
    for path, change in ((run.path, {"run_id": "new"}), (run.path / "layers", {"status": "running"})):
        manifest = (path / "manifest.json").read_text()
        (path / "manifest.json").write_text(json.dumps(json.loads(manifest) | change))
        with pytest.raises(InputError, match="expected a finished analysis of run .* got one of run"):
            load_run(run.path).interventions  # noqa: B018
        (path / "manifest.json").write_text(manifest)
    assert len(load_run(run.path).interventions) == len(frame)


def test_the_command_prints_what_it_found(swept, finished, capsys):
    assert main(["layers", str(swept.path)]) == 0
    out = capsys.readouterr().out
    for words in (
        "layer",
        "ln rank",
        "skip",
        "Agreement: none over 3 layers; fewer than 5",
        "Essential, lens and skip: by both",
    ):
        assert words in out
    assert "Early exit, lens lens: " in out and "restores the answer from layer" in out
    assert out.rstrip().endswith(MEANS + ", " + PARTS + ", patching.csv")
