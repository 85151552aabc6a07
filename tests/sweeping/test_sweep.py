"""The sweep on a tiny model: every output, pairing, teacher forcing, batching, interrupts and full disks."""

import csv
import errno
import json
import shutil
import weakref
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from faults import at_pass, faulty_disk, largest_file
from refinelens.config import LayersConfig, SweepConfig
from refinelens.data.prompts import DEFAULT_TEMPLATE, build_context
from refinelens.data.tasks import DistractorSource, load_task
from refinelens.errors import FaultError, InputError
from refinelens.layers.analysis import run_layers
from refinelens.lens.logit_lens import LogitLens
from refinelens.lens.prefix import PROBE_TOKENS
from refinelens.report.summary import read_cells, summarise
from refinelens.store import results
from refinelens.store.process import LOCK, Interrupted, RunLock
from refinelens.store.results import PREDICTIONS, open_run
from refinelens.store.trajectory import choose_tokens, read_trajectories
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.predict import Predictor
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions, stop_after
from tiny import save_tiny_lens, save_tiny_model, word_tokenizer

TABLES = {"trajectories.parquet", "summary.csv", "paired.csv", "inverted_u.csv"}
OUTPUTS = {"manifest.json", "predictions", *TABLES, "depth.png", "accuracy.png", "layers.png"}
KEYS = [name for name, _ in results.KEYS]


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    return SweepConfig(model=str(tiny_model), task=str(question_file), documents=(2, 4), device="cpu")


@pytest.fixture(scope="module")
def finished(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


def test_all_outputs_are_there(finished):
    assert {p.name for p in finished.path.iterdir()} == OUTPUTS
    assert not any(b"\r" in path.read_bytes() for path in finished.path.glob("*.csv"))
    table = pq.read_table(finished.path / "predictions" / "part-00000.parquet")
    assert table.schema.equals(PREDICTIONS)
    tokens = {0: 1, 1: 2, 2: 1, 3: 3, 4: 1, 5: 1}  # answers of one, two and three words
    assert table.num_rows == sum(tokens.values()) * (2 + 4)
    keys = {tuple(row[k] for k in KEYS) for row in table.to_pylist()}
    contexts = [(n, p) for n in (2, 4) for p in range(n)]
    assert keys == {(q, n, p, t, "plain") for q, count in tokens.items() for n, p in contexts for t in range(count)}


def test_a_token_for_unknown_words_may_begin_every_text(options, tmp_path):
    """As OPT's does: it says nothing of the words of the questions."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer()
    unknown = tokenizer.unk_token_id
    begin = TemplateProcessing(single="<unk> $A", special_tokens=[("<unk>", unknown)])
    tokenizer.backend_tokenizer.post_processor = begin
    folder = save_tiny_model(tmp_path / "model", tokenizer=tokenizer)
    inputs = SweepInputs.load(replace(options, model=str(folder)))
    ids = inputs.builder().build(inputs.questions[0]).contexts[0].input_ids
    assert ids[0] == unknown and inputs.loaded.tokenizer("red")["input_ids"][0] == unknown


@pytest.mark.medium
def test_replaced_passages_are_counted(options, finished, question_file, tmp_path):
    """Once a question, those of its largest context."""
    record, *others = map(json.loads, question_file.read_text().splitlines())
    texts = ("a red door .", "a white door .", "the gate is red .")
    record["ctxs"] += [{"title": "own", "text": text, "isgold": False} for text in texts]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in (record, *others)))
    run = run_sweep(replace(options, task=str(path)), tmp_path / "run")
    assert run.manifest["counts"]["passages_replaced"] == 2
    assert finished.manifest["counts"]["passages_replaced"] == 0


def test_predictions_are_the_models_own(finished, tiny_model, question_file):
    """Rows are recomputed from a plain forward pass over the teacher-forced context."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    task = load_task(str(question_file))
    question = task.questions[3]
    distractors = DistractorSource(task, seed=0).choose(question, 3)
    context = build_context(tokenizer, DEFAULT_TEMPLATE, question, distractors, 2)
    rows = [r for r in predictions(finished) if (r["question_id"], r["documents"], r["gold_position"]) == (3, 4, 2)]
    assert [r["answer_text"] for r in rows] == ["black", "iron", "gate"]
    with torch.no_grad():
        logits = model(torch.tensor([context.input_ids])).logits[0, list(context.answer_span.positions)]
    log_p = logits.log_softmax(-1)
    for token, row in enumerate(rows):
        answer = context.answer_ids[token]
        assert row["target_id"] == row["answer_id"] == answer
        assert row["argmax"][-1] == int(logits[token].argmax())
        assert row["argmax_text"][-1] == tokenizer.decode([row["argmax"][-1]])
        assert row["target_rank"][-1] == int((logits[token] > logits[token, answer]).sum())
        assert row["target_logprob"][-1] == pytest.approx(float(log_p[token, answer]), abs=1e-4)
        assert row["max_logprob"][-1] == pytest.approx(float(log_p[token].max()), abs=1e-4)
        entropy = float(-(log_p[token].exp() * log_p[token]).sum())
        assert row["entropy"][-1] == pytest.approx(entropy, abs=1e-4)
        assert all(len(row[name]) == 4 for name in ("argmax", "target_rank", "entropy", "kl", "argmax_text"))


def test_trajectories_and_summary_follow_from_predictions(finished):
    rows = {tuple(r[k] for k in KEYS): r for r in predictions(finished)}
    table = pq.read_table(finished.path / "trajectories.parquet").to_pylist()
    assert len(table) == len(rows)
    for row in table:
        correct = [rank == 0 for rank in rows[tuple(row[k] for k in KEYS)]["target_rank"]]
        assert row["first_correct"] == (correct.index(True) if any(correct) else None)
        assert (row["settle"] is None) == (row["depth"] is None) == (not correct[-1]) == (not row["final_correct"])
        assert row["answer_correct"] == correct[-1] and row["top"] == 1
        logprobs = rows[tuple(row[k] for k in KEYS)]["target_logprob"]
        assert len(row["logprob_gain"]) == 3
        assert sum(row["logprob_gain"]) == pytest.approx(logprobs[-1] - logprobs[0], abs=1e-4)
    with (finished.path / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(int(r["documents"]), int(r["gold_position"])) for r in lines] == [(n, p) for n in (2, 4) for p in range(n)]
    for line in lines:
        cell = [
            r
            for r in table
            if r["answer_token"] == 0
            and (r["documents"], r["gold_position"]) == (int(line["documents"]), int(line["gold_position"]))
        ]
        assert int(line["n"]) == len(cell) == 6
        assert float(line["accuracy"]) == pytest.approx(np.mean([r["answer_correct"] for r in cell]), rel=1e-5)
        depths = [r["depth"] for r in cell if r["depth"] is not None]
        if depths:
            assert float(line["mean_depth"]) == pytest.approx(np.mean(depths), rel=1e-5)
        else:
            assert line["mean_depth"] == ""


@pytest.mark.medium
def test_manifest_repeats_the_run(finished, options, tmp_path):
    manifest = finished.manifest
    assert manifest["status"] == "finished" and manifest["counts"]["done"] == 6
    assert manifest["started"] <= manifest["finished"]
    assert manifest["model"]["parity"]["argmax_equal"] and len(manifest["task"]["sha256"]) == 64
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in manifest["arguments"].items()}
    again = run_sweep(SweepConfig(**arguments), tmp_path / "again")
    assert predictions(again) == predictions(finished)
    for name in ("config_sha256", "weights_sha256"):
        assert again.manifest["model"][name] == manifest["model"][name]


def test_other_weights_have_another_hash(finished, options, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[17, 101] += 1e-3  # one of 4,096 values; 1,024 are sampled
    model.save_pretrained(folder)
    other = run_sweep(replace(options, model=str(folder), examples=1), tmp_path / "run").manifest["model"]
    assert other["weights_sha256"] != finished.manifest["model"]["weights_sha256"]
    assert other["config_sha256"] == finished.manifest["model"]["config_sha256"]


@pytest.mark.parametrize("batch_size", ["3", "64"])
def test_batch_size_does_not_change_results(finished, options, tmp_path, batch_size):
    batched = predictions(run_sweep(replace(options, batch_size=batch_size), tmp_path / "run"))
    for ours, single in zip(batched, predictions(finished), strict=True):
        assert ours["argmax"] == single["argmax"] and ours["target_rank"] == single["target_rank"]
        np.testing.assert_allclose(ours["target_logprob"], single["target_logprob"], atol=1e-4)


@pytest.mark.medium
def test_a_lens_reads_all_contexts_of_a_question_at_once(finished, options):
    """However many that are, the rows are the same; with few at a time a context is not divided."""
    calls = []

    class Spy(LogitLens):
        def read_states(self, hidden, *arguments, **keywords):
            calls.append(hidden.shape[2])
            return super().read_states(hidden, *arguments, **keywords)

    def ask(**how):
        predictor = Predictor(options, inputs.builder(), inputs.loaded, spy, inputs.lenses, **how)
        results = [predictor.ask(inputs.questions, [place])[0] for place in range(6)]
        return [row for result in results for row in result.rows.to_pylist()]

    inputs = SweepInputs.load(options)
    spy = Spy(inputs.loaded.model)
    tokens = [1, 2, 1, 3, 1, 1]  # answers of one, two and three words
    assert ask() == predictions(finished)
    assert calls == [n * (2 + 4) for n in tokens]
    calls.clear()
    single = ask(rows_at_a_time=1)
    assert calls == [n for n in tokens for _ in range(2 + 4)]
    for ours, theirs in zip(predictions(finished), single, strict=True):
        exact = {name: value for name, value in ours.items() if name not in ("kl", "target_logprob", "entropy")}
        assert exact == {name: theirs[name] for name in exact}
        np.testing.assert_allclose(ours["kl"], theirs["kl"], atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sweep_on_a_gpu(finished, options, tmp_path):
    run = run_sweep(replace(options, device="auto", dtype="float32"), tmp_path / "run")
    assert run.manifest["model"]["backend"] == "triton" and run.manifest["model"]["device"] == "cuda"
    for ours, on_cpu in zip(predictions(run), predictions(finished), strict=True):
        assert ours["argmax"][-1] == on_cpu["argmax"][-1]
        np.testing.assert_allclose(ours["target_logprob"], on_cpu["target_logprob"], atol=1e-2)


@pytest.mark.medium
def test_prediction_as_target(options, tmp_path):
    run = run_sweep(replace(options, target="prediction"), tmp_path / "run")
    for row in predictions(run):
        assert row["target_id"] == row["argmax"][-1] and row["target_rank"][-1] == 0
    table = pq.read_table(run.path / "trajectories.parquet").to_pylist()
    assert all(r["final_correct"] and r["settle"] is not None for r in table)
    by_key = {tuple(r[k] for k in KEYS): r for r in predictions(run)}
    for r in table:
        row = by_key[tuple(r[k] for k in KEYS)]
        assert r["answer_correct"] == (row["answer_id"] == row["target_id"])


@pytest.mark.medium
def test_an_identity_lens_is_the_plain_one(options, tiny_model, tmp_path):
    """Two lenses of one sweep, read from the same forward passes, in the order given."""
    folder = save_tiny_lens(tmp_path / "identity", tiny_model, scale=0)
    run = run_sweep(replace(options, lens=(str(folder), "plain"), top=(5, 1)), tmp_path / "run")
    assert [entry["name"] for entry in run.manifest["lenses"]] == ["identity", "plain"]
    by_lens = {}
    for row in predictions(run):
        by_lens.setdefault(row.pop("lens"), []).append(row)
    assert by_lens["identity"] == by_lens["plain"] and run.manifest["counts"]["rows"] == 2 * len(by_lens["plain"])
    with (run.path / "summary.csv").open() as file:
        lines = list(csv.DictReader(file))
    readings = [("identity", "5"), ("identity", "1"), ("plain", "5"), ("plain", "1")]
    assert [(line.pop("lens"), line["top"]) for line in lines] == [reading for reading in readings for _ in range(6)]
    assert lines[:12] == lines[12:]


@pytest.mark.medium
def test_a_random_lens_differs_below_the_output_only(finished, options, tiny_model, tmp_path):
    folder = save_tiny_lens(tmp_path / "random", tiny_model, scale=0.5)
    run = run_sweep(replace(options, lens=(str(folder),)), tmp_path / "run")
    pairs = list(zip(predictions(run), predictions(finished), strict=True))
    assert all(ours["target_rank"][-1] == plain["target_rank"][-1] for ours, plain in pairs)
    assert all(abs(ours["kl"][-1]) < 1e-4 for ours, _ in pairs)
    assert any(ours["target_rank"][:-1] != plain["target_rank"][:-1] for ours, plain in pairs)


@pytest.mark.medium
def test_several_thresholds_are_several_sweeps(options, tmp_path):
    """Each threshold of a run equals a run of its own, rows of one prediction side by side."""
    several = pq.read_table(run_sweep(replace(options, top=(1, 20, 9)), tmp_path / "run").path / "trajectories.parquet")
    assert several.schema.equals(results.TRAJECTORIES)
    rows = several.to_pylist()
    assert [row["top"] for row in rows] == [1, 20, 9] * (len(rows) // 3)
    for top in (1, 20, 9):
        own = run_sweep(replace(options, top=(top,)), tmp_path / f"top{top}").path / "trajectories.parquet"
        assert pq.read_table(own).to_pylist() == [row for row in rows if row["top"] == top]


def test_all_answer_tokens_in_tables(finished):
    table = read_trajectories(finished, (1,))
    tables = (choose_tokens(table, tokens) for tokens in ("first", "all"))
    first, every = (summarise(read_cells(chosen, ("plain",), (1,)), 3) for chosen in tables)
    assert [r.n for r in first] == [r.n for r in every] == [6] * 6
    tokens = [r for r in table.to_pylist() if (r["documents"], r["gold_position"]) == (2, 0)]
    assert len(tokens) == 9
    assert every[0].share_censored.value == pytest.approx(1 - np.mean([r["final_correct"] for r in tokens]))


@pytest.mark.medium
def test_too_long_at_one_size_is_left_out_at_all_its_positions(finished, tmp_path, question_file):
    """Room for the shortest contexts of four documents only: nothing is truncated, pairs stay whole."""
    limit = min(r["n_tokens"] for r in predictions(finished) if r["documents"] == 4)
    model = save_tiny_model(tmp_path / "model", n_positions=limit)
    options = SweepConfig(model=str(model), task=str(question_file), documents=(2, 4), device="cpu")
    run = run_sweep(options, tmp_path / "run")
    rows = predictions(run)
    left_out = run.manifest["counts"]["left_out"]
    asked = {n: {r["question_id"] for r in rows if r["documents"] == n} for n in (2, 4)}
    assert len(asked[2]) == 6 and 0 < len(asked[4]) < 6
    assert left_out == {"4 documents: a context longer than the model's positions": sorted(set(range(6)) - asked[4])}
    for n, questions in asked.items():
        for question in questions:
            positions = {r["gold_position"] for r in rows if (r["question_id"], r["documents"]) == (question, n)}
            assert positions == set(range(n))
    assert max(r["n_tokens"] for r in rows) <= limit


def test_too_few_distractors_are_counted(options, tmp_path):
    run = run_sweep(replace(options, documents=(2, 9)), tmp_path / "run")
    assert run.manifest["counts"]["left_out"] == {"9 documents: too few passages without an answer": list(range(6))}
    assert {r["documents"] for r in predictions(run)} == {2}


@pytest.mark.medium
def test_no_question_can_be_asked_and_the_old_run_stays(options, tmp_path):
    old = run_sweep(replace(options, examples=1), tmp_path / "run")
    before = predictions(old)
    with pytest.raises(InputError, match="got none .6 at 9 documents: too few passages without an answer."):
        run_sweep(replace(options, documents=(9,)), tmp_path / "run", overwrite=True)
    assert predictions(old) == before


def test_interrupt_keeps_finished_questions(options, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_sweep(options, tmp_path / "run", progress=stop_after(2))
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "interrupted" and run.manifest["counts"]["done"] == 2
    assert len({r["question_id"] for r in predictions(run)}) == 2
    assert {p.name for p in run.path.iterdir()} == OUTPUTS


def test_interrupt_before_anything_is_finished(options, tmp_path):
    def stop(stage, done, total, *so_far):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as interrupt:
        run_sweep(options, tmp_path / "run", progress=stop)
    assert interrupt.value.folder is None and not (tmp_path / "run").exists()


@pytest.mark.medium
def test_a_broken_state_names_its_context(options, tmp_path):
    calls = []

    def broken(ids, states):
        calls.append(ids)
        if len([ids for ids in calls if ids.shape[1] > PROBE_TOKENS]) == 8:
            states.fill_(float("nan"))

    options = replace(options, reuse_prefix="off")  # one pass per context, in order
    named = "question 1, 2 documents, gold position 1: hidden: .* got NaN in row 0"
    with at_pass(broken), pytest.raises(FaultError, match=named):
        run_sweep(options, tmp_path / "run")
    assert open_run(tmp_path / "run").manifest["counts"]["done"] == 1
    good = predictions(run_sweep(options, tmp_path / "good"))
    calls.clear()
    with at_pass(broken), pytest.raises(FaultError, match="question 1"):
        run_sweep(options, tmp_path / "good", overwrite=True)
    assert predictions(open_run(tmp_path / "good")) == good, "a failed run does not replace a good one"


@pytest.mark.parametrize("generate", [0, 3])
def test_of_a_batch_the_broken_context_is_named(options, tmp_path, generate):
    """Whether the lens finds it, which reads all contexts of a question at once, or generation before."""
    inputs = SweepInputs.load(options)
    (question,) = (question for question in inputs.questions if question.id == 0)
    broken = inputs.builder().build(question).contexts[4].input_ids

    def break_one(ids, states):
        for row, own in enumerate(ids.tolist()):
            if own[: len(broken)] == list(broken):  # but for padding
                states[row] = float("nan")

    named = "^question 0, 4 documents, gold position 2: hidden: .* got NaN"
    with at_pass(break_one), pytest.raises(FaultError, match=named):
        run_sweep(replace(options, batch_size="6", generate=generate, dtype="float32"), tmp_path / "run")


@pytest.mark.medium
def test_disk_full_while_writing(options, tmp_path):
    def full(number, path):
        if path and path.endswith("part-00001.parquet"):
            raise OSError(errno.ENOSPC, "No space left on device")

    said = "no free disk left; what was written stays readable; .* ``sweep.resume="
    with faulty_disk(full), pytest.raises(FaultError, match=said):
        run_sweep(options, tmp_path / "run", questions_per_part=2)
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "failed" and run.manifest["counts"]["done"] == 2
    assert len({r["question_id"] for r in predictions(run)}) == 2
    assert not list((tmp_path / "run").rglob("*.tmp"))


@pytest.mark.medium
def test_disk_full_at_the_first_part_keeps_the_old_run(options, tmp_path):
    old = run_sweep(replace(options, examples=2), tmp_path / "run")
    before = {path: path.read_bytes() for path in old.path.rglob("*.*")}
    for out in (old.path, tmp_path / "new"):
        with largest_file(6000), pytest.raises(FaultError, match="no free disk left"):  # a manifest fits, no part does
            run_sweep(options, out, overwrite=True)
    assert {path: path.read_bytes() for path in old.path.rglob("*.*")} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.medium
def test_two_sweeps_in_one_folder_do_not_mix(options, tmp_path):
    """The second is refused while the first holds the folder; where the lock was removed, the first stops."""
    other = replace(options, seed=7, examples=1)

    def start_another(stage, done, total, *so_far):
        if done == 3:
            with pytest.raises(InputError, match="expected a folder that no other process writes, got one held by"):
                run_sweep(other, tmp_path / "run", overwrite=True)

    run_sweep(options, tmp_path / "run", progress=start_another, questions_per_part=2)

    def remove_the_lock(stage, done, total, *so_far):
        if done == 3:
            (tmp_path / "run" / LOCK).unlink()
            run_sweep(other, tmp_path / "run", overwrite=True)

    with pytest.raises(FaultError, match="expected this process's own, got another that replaced it$"):
        run_sweep(options, tmp_path / "run", overwrite=True, progress=remove_the_lock, questions_per_part=2)
    run = open_run(tmp_path / "run")
    assert run.manifest["arguments"]["seed"] == 7 and run.manifest["status"] == "finished"
    assert predictions(run) == predictions(run_sweep(other, tmp_path / "alone"))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_batch_and_then_says_so(options, tmp_path, error):
    most, sizes, said = 1, [], []

    def small_machine(ids, states):
        if ids.shape[1] > PROBE_TOKENS:
            sizes.append(len(ids))
            if len(ids) > most:
                raise error

    with at_pass(small_machine):
        run = run_sweep(replace(options, batch_size="6", examples=2), tmp_path / "run", warn=said.append)
    assert sizes[:3] == [6, 3, 1] and run.manifest["status"] == "finished"
    assert set(sizes[3:]) == {1}, "what was found to fit is kept"
    assert "out of memory with 6 contexts of" in said[0] and "from here on at most 3 at a time" in said[0]
    assert "from here on at most 1 at a time" in said[1] and len(said) == 2
    assert run.manifest["contexts_at_a_time_at_most"] == 1
    most = 0
    with at_pass(small_machine), pytest.raises(FaultError, match="expected memory for one context of"):
        run_sweep(options, tmp_path / "none")


@pytest.mark.medium
def test_equal_questions_are_said(options, question_file, tmp_path):
    """A line for all of them, and none where questions differ in their answers alone."""
    line, *others = question_file.read_text().splitlines()
    path = tmp_path / "equal.jsonl"
    for text, words in (
        ([line] * 3, "3 questions, 1 of them distinct;"),
        ([line, *others[:2], line], "4 questions, 3 of them distinct;"),
        ([line, line.replace('"answers": ["red"]', '"answers": ["red", "door"]')], None),
    ):
        path.write_text("\n".join(text))
        said = []
        run_sweep(replace(options, task=str(path), documents=(1,)), tmp_path / "run", overwrite=True, warn=said.append)
        assert len(said) == (words is not None) and all(f"``task`` {path}: {words}" in one for one in said)


def test_what_did_not_fit_is_let_go_before_the_next_try(options, tmp_path):
    """Else a GPU would try the smaller batch beside the tensors of the larger one."""
    held = []

    def small_machine(ids, states):
        assert all(tensor() is None for tensor in held)
        own = torch.zeros(4)
        held.append(weakref.ref(own))
        if len(ids) > 1 and ids.shape[1] > PROBE_TOKENS:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with at_pass(small_machine):
        run_sweep(replace(options, batch_size="4", examples=1), tmp_path / "run")
    assert len(held) > 2


def test_any_other_fault_keeps_finished_questions(options, tmp_path):
    def fault(stage, done, total, *so_far):
        if done == 4:
            raise RuntimeError("a fault in a driver")

    with pytest.raises(RuntimeError, match="driver"):
        run_sweep(options, tmp_path / "run", progress=fault)
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "failed" and len({r["question_id"] for r in predictions(run)}) == 4


def test_no_room_is_said_before_anything_is_written(options, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(InputError, match=r"MB of free disk, got \d+.\d MB; free some"):
        run_sweep(replace(options, generate=free), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_output_folder_is_protected(finished, options, tmp_path):
    before = json.dumps(finished.manifest)
    with pytest.raises(InputError, match="arguments that is finished; see it with refinelens show .*, choose another"):
        run_sweep(options, finished.path)
    with pytest.raises(InputError, match=r"other arguments \(seed 0 there, 1 here\)"):
        run_sweep(replace(options, seed=1), finished.path)
    assert json.dumps(finished.manifest) == before
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="expected a new folder or a run, got other files"):
        run_sweep(options, mine, overwrite=True)
    (mine / "manifest.json").write_text('{"name": "an app"}')
    with pytest.raises(InputError, match="got other files, such as thesis.txt"):
        run_sweep(options, mine, overwrite=True)
    (mine / "thesis.txt").rename(tmp_path / "thesis.txt")
    with pytest.raises(InputError, match="expected the manifest of a run, got something else"):
        run_sweep(options, mine, overwrite=True)
    assert (tmp_path / "thesis.txt").read_text() == "precious" and len(list(mine.iterdir())) == 1


def test_a_run_of_an_older_schema_is_refused_but_may_be_overwritten(options, tmp_path):
    run = run_sweep(replace(options, examples=1), tmp_path / "run")
    run.write_manifest(run.manifest | {"schema_version": 1, "refinelens_version": "0.0.9"})
    with pytest.raises(InputError, match="make the run again with a sweep, or read it with the refinelens .* .0.0.9."):
        open_run(run.path)
    again = run_sweep(replace(options, examples=1), run.path, overwrite=True)
    assert again.manifest["schema_version"] == results.SCHEMA_VERSION


@pytest.mark.medium
def test_overwrite_replaces_a_run(options, tmp_path):
    run_sweep(replace(options, examples=3), tmp_path / "run")
    run = run_sweep(replace(options, examples=1), tmp_path / "run", overwrite=True)
    assert len({r["question_id"] for r in predictions(run)}) == 1


@pytest.mark.medium
def test_overwrite_takes_the_analysis_of_the_old_run_along(options, tmp_path):
    """And nothing else: no file that an analysis does not have, none of another program, none that somebody writes."""
    run = run_sweep(replace(options, examples=2), tmp_path / "run")
    layers = run.path / "layers"

    def overwritten():
        return run_sweep(replace(options, examples=2), run.path, overwrite=True)

    run_layers(run.path, LayersConfig(()))
    (layers / "notes.txt").write_text("precious")
    before = {file.name for file in layers.iterdir()}
    run = overwritten()
    assert {file.name for file in layers.iterdir()} == before
    (layers / "notes.txt").unlink()
    with RunLock(layers):
        run = overwritten()
    assert {file.name for file in layers.iterdir()} == before - {"notes.txt"}
    run = overwritten()
    assert not layers.exists()
    layers.mkdir()
    (layers / "manifest.json").write_text('{"name": "an app"}')
    run = overwritten()
    assert (layers / "manifest.json").exists()
    (layers / "manifest.json").unlink()
    run_layers(run.path, LayersConfig(()))
    (layers / "parts").mkdir()
    (layers / "parts" / "notes.txt").write_text("precious")
    run = overwritten()
    assert [file.name for file in layers.iterdir()] == ["parts"], "the analysis goes, the notes stay"
    assert (layers / "parts" / "notes.txt").read_text() == "precious"


@pytest.mark.medium
def test_a_resume_keeps_the_analysis(options, tmp_path):
    """Also where all of the run's parts were damaged."""
    run = run_sweep(replace(options, examples=2), tmp_path / "run")
    run_layers(run.path, LayersConfig(()))
    before = {file: file.read_bytes() for file in (run.path / "layers").iterdir()}
    run.part_path(0).unlink()
    assert resume_sweep(run.path).manifest["status"] == "finished"
    assert {file: file.read_bytes() for file in (run.path / "layers").iterdir()} == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"documents": (-1,)}, "``documents``: expected closed-book, oracle or sizes such as 5,10, got '-1'"),
        ({"gold_positions": "3"}, "``gold_positions``: expected 0 to 1 with 2 documents, got 3"),
        ({"seed": -1}, "``seed``: expected 0 or more, got -1"),
        ({"top": (0,)}, "``top``: expected numbers from 1 to 2147483647 such as 1,5,10, each once, got '0'"),
        ({"top": (5, 5)}, "each once, got '5,5'"),
        ({"lens": ("plain", "plain")}, "``lens``: expected plain or folders, each once"),
        ({"batch_size": "0"}, "``batch_size``: expected auto or a positive number"),
        ({"target": "gold"}, "``target``: expected answer, prediction, got 'gold'"),
        ({"positions": "last"}, "``positions``: expected answer, all, got 'last'"),
        ({"answer_tokens": "last"}, "``answer_tokens``: expected first, all, got 'last'"),
        ({"dtype": "float64"}, "``dtype``: expected auto, float32, float16, bfloat16, got 'float64'"),
    ],
)
def test_bad_options(options, change, message):
    with pytest.raises(InputError, match=message):
        replace(options, **change)
