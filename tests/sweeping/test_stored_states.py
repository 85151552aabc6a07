"""States that another engine wrote: the same numbers as a model that runs, and a refusal of everything else.

The files are written by Transformers, from nothing but a file of contexts.
"""

import gzip
import json
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import refinelens
from refinelens.cli import main
from refinelens.config import EngineConfig, LayersConfig, SweepConfig
from refinelens.errors import InputError
from refinelens.layers.analysis import run_layers
from refinelens.lens.stored_states import context_id
from refinelens.model.head import find_blocks
from refinelens.model.loading import HEAD, OUTLINE, TINY, load_model
from refinelens.store.process import Interrupted
from refinelens.sweeping.prompt_file import write_prompts
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions, stop_after
from tiny import save_tiny_lens, shake, word_tokenizer

CONTEXT = ("question_id", "documents", "gold_position")
EXACT = ("argmax", "target_rank", "target_id", "answer_id", "position", "alias", "documents", "gold_position")
FLOATS = ("target_logprob", "max_logprob", "entropy", "kl")
LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
GEMMA = {**LLAMA, "head_dim": 8, "sliding_window": 16, "final_logit_softcapping": 2.0}


def contexts_of(options, folder):
    """The lines that `write_prompts` writes."""
    path = folder / "prompts.jsonl"
    path.unlink(missing_ok=True)
    write_prompts(options, path)
    return [json.loads(line) for line in path.read_text().splitlines()]


@cache
def model_of(folder):
    return tf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def engine(model_folder, lines, folder, dtype=torch.float32, logprobs=False, layers=slice(None), normed=False):
    """Write the states of every context as an engine would."""
    model, streams = model_of(model_folder), []
    folder.mkdir(exist_ok=True)
    hooks = [b.register_forward_hook(lambda *call: streams.append(first_of(call[-1]))) for b in find_blocks(model)]
    for line in lines:
        ids = torch.tensor([line["token_ids"]])
        with torch.no_grad():
            output = model(ids, output_hidden_states=True)
        hidden = [output.hidden_states[0], *streams]
        hidden[-1] = output.hidden_states[-1] if normed else hidden[-1]
        states = torch.stack(hidden, 2)[0, :, layers].to(dtype).contiguous()
        tensors = {"token_ids": ids[0], "hidden_states": states}
        if logprobs:
            own = output.logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            tensors["token_logprobs"] = torch.cat([torch.tensor([torch.nan]), own])
        save_file(tensors, folder / f"{line['id']}.safetensors")
        streams.clear()
    for hook in hooks:
        hook.remove()
    return folder


def first_of(output):
    return output[0] if isinstance(output, tuple) else output


def changed(path, **tensors):
    """Write a file again with other tensors; None takes one away."""
    whole = load_file(path) | tensors
    save_file({name: tensor for name, tensor in whole.items() if tensor is not None}, path)


def assert_same(run, own):
    """The same rows, floats but for what another product of the same numbers rounds."""
    ours, theirs = predictions(run), predictions(own)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        assert [one[name] for name in EXACT] == [other[name] for name in EXACT]
        for name in FLOATS:
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    return SweepConfig(model=str(tiny_model), task=str(question_file), documents=("oracle", 2, 3), device="cpu")


@pytest.fixture(scope="module")
def lines(options, tmp_path_factory):
    return contexts_of(options, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """The run of a model that runs."""
    return run_sweep(replace(options, reuse_prefix="off"), tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def written(options, lines, tmp_path_factory):
    """Files of every context; tests take copies."""
    return engine(options.model, lines, tmp_path_factory.mktemp("states") / "states", logprobs=True)


@pytest.fixture
def states(written, tmp_path):
    return shutil.copytree(written, tmp_path / "states")


def first_file(states, lines, place=0):
    return states / f"{lines[place]['id']}.safetensors"


def test_contexts_are_those_that_a_sweep_runs(lines, whole):
    """In its order, each at the positions that are read, the answer fed as it is."""
    asked = [tuple(row[key] for key in CONTEXT) for row in predictions(whole)]
    assert [tuple(line[key] for key in CONTEXT) for line in lines] == list(dict.fromkeys(asked))
    for line in lines:
        rows = [row for row in predictions(whole) if all(row[key] == line[key] for key in CONTEXT)]
        assert [r["position"] for r in rows] == line["positions"]
        assert {r["n_tokens"] for r in rows} == {len(line["token_ids"])}
        assert line["id"] == context_id(line["token_ids"])
        assert [r["answer_id"] for r in rows[:-1]] == line["token_ids"][line["positions"][0] + 1 :]


def test_prompts_take_no_weights(options, lines, tmp_path, tiny_model):
    """A folder without any will do; a file is packed by its name, and never written over."""
    folder = shutil.copytree(tiny_model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    bare = replace(options, model=str(folder))
    out = tmp_path / "prompts.jsonl.gz"
    told = str(write_prompts(bare, out))
    assert [json.loads(line) for line in gzip.open(out, "rt")] == lines
    n_tokens = [len(line["token_ids"]) for line in lines]
    assert told == f"{out}: {len(lines)} contexts, {sum(n_tokens)} tokens, the longest has {max(n_tokens)}"
    with pytest.raises(InputError, match="expected a new file, got one that is there"):
        write_prompts(bare, out)
    assert load_model(str(folder), part=OUTLINE).model.device.type == "meta"


def test_a_failed_write_leaves_nothing(options, tmp_path):
    with pytest.raises(InputError, match="expected a context or more, got none, and nothing was written"):
        write_prompts(replace(options, documents=(99,), gold_positions="0"), tmp_path / "prompts.jsonl")
    assert not list(tmp_path.iterdir())


def test_states_give_the_numbers_of_a_model_that_runs(options, states, whole, tmp_path):
    run = run_sweep(replace(options, states=str(states)), tmp_path / "run")
    assert_same(run, whole)
    model, own = run.manifest["model"], whole.manifest["model"]
    assert run.manifest["states"] == {"files": len(list(states.iterdir())), "with_logprobs": 36, "dtypes": ["float32"]}
    same = ("class", "n_layers", "d_model", "vocab_size", "config_sha256", "tokenizer_sha256", "max_tokens", "norm")
    assert {name: model[name] for name in same} == {name: own[name] for name in same}
    assert model["unused_weights"] == [] and "states" not in whole.manifest
    assert run.manifest["prefix_reuse"]["why"] == "states were read from files"


def test_other_names_and_rows_do(options, states, lines, whole, tmp_path):
    """A file is found by the tokens it holds; one that is named may go on; rows of the positions are enough."""
    for number, line in enumerate(lines):
        path = first_file(states, lines, number)
        if number % 3 == 0:
            path.rename(states / f"request-{number}.safetensors")
        elif number % 3 == 1:
            held = load_file(path)
            more = {name: torch.cat([held[name], held[name][:5]]) for name in held}
            changed(path, **more)
        else:
            rows = line["positions"]
            held = load_file(path)["hidden_states"][rows]
            changed(path, hidden_states=held, positions=torch.tensor(rows))
    assert_same(run_sweep(replace(options, states=str(states)), tmp_path / "run"), whole)


@pytest.mark.medium
@pytest.mark.parametrize("config", [tf.LlamaConfig(**LLAMA), tf.Gemma2Config(**GEMMA)], ids=["llama", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_families(config, dtype, question_file, tmp_path):
    """A softcap too; log-probabilities of an engine that rounds as states in half precision do."""
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    config.vocab_size, config.pad_token_id = len(tokenizer), 0
    shake(tf.AutoModelForCausalLM.from_config(config)).save_pretrained(tmp_path / "model")
    asked = SweepConfig(model=str(tmp_path / "model"), task=str(question_file), documents=(3,), device="cpu")
    folder = engine(asked.model, contexts_of(asked, tmp_path), tmp_path / "states", dtype, logprobs=True)
    run = run_sweep(replace(asked, states=str(folder)), tmp_path / "run")
    assert run.manifest["model"]["softcap"] == (2.0 if "Gemma" in type(config).__name__ else None)
    assert run.manifest["states"]["dtypes"] == [str(dtype).removeprefix("torch.")]
    if dtype == torch.bfloat16:  # a head in the dtype of the states
        halved = replace(asked, states=str(folder), dtype="bfloat16")
        assert_same(run_sweep(halved, tmp_path / "half"), run_sweep(halved, tmp_path / "again"))
    else:
        with pytest.raises(InputError, match="that fit torch.bfloat16, in which the head is, got torch.float32; use"):
            run_sweep(replace(asked, states=str(folder), dtype="bfloat16"), tmp_path / "half")
        assert_same(run, run_sweep(replace(asked, reuse_prefix="off"), tmp_path / "own"))
    model_of.cache_clear()


@pytest.mark.medium
def test_every_token_alias_keep_and_lens(options, question_file, tiny_model, tmp_path):
    """Contexts that decide on answers and questions are written too, and found."""
    records = [json.loads(line) for line in question_file.read_text().splitlines()]
    records[0]["answers"].append("white gate")
    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps(record) + "\n" for record in records))
    lens = save_tiny_lens(tmp_path / "lens", tiny_model, 0.1)
    asked = replace(options, task=str(task), documents=(2,), positions="all", reuse_prefix="off", measures="jsd,states")
    for number, more in enumerate(({"alias": "best"}, {"alias": "best", "keep": "answered"})):
        own = replace(asked, **more)
        folder = engine(options.model, contexts_of(own, tmp_path), tmp_path / f"states-{number}")
        given = replace(own, states=str(folder), lens=("plain", str(lens)))
        run = run_sweep(given, tmp_path / f"run-{number}")
        whole = run_sweep(replace(own, lens=given.lens), tmp_path / f"own-{number}")
        assert_same(run, whole)
        assert run.manifest["counts"]["left_out"] == whole.manifest["counts"]["left_out"]
        assert any("weights that the lens was made for were not compared" in r for r in run.manifest["remarks"])


@pytest.mark.medium
def test_workers_read_them(options, states, whole, tmp_path):
    assert_same(run_sweep(replace(options, states=str(states)), tmp_path / "run", engine=EngineConfig(2)), whole)


@pytest.mark.medium
def test_a_missing_file_stops_a_run_that_goes_on_once_it_is_there(options, states, lines, whole, tmp_path):
    """Before anything is asked; what was finished stays."""
    given = replace(options, states=str(states))
    path, out = first_file(states, lines, len(lines) - 2), tmp_path / "run"
    away = path.rename(tmp_path / path.name)
    message = (
        f"expected a file for each of 36 contexts, got 35; the first without one is question 5, 3 documents, "
        f"gold position 1 \\({path.stem}\\); ``prompts\\(states='{states}'\\)`` writes those"
    )
    with pytest.raises(InputError, match=message):
        run_sweep(given, out)
    assert not (out / "manifest.json").exists()
    away.rename(path)
    with pytest.raises(Interrupted):
        run_sweep(given, out, progress=stop_after(2), questions_per_part=1)
    path.rename(away)
    with pytest.raises(InputError, match="expected a file for each of 24 contexts, got 23"):
        resume_sweep(out)
    assert len({row["question_id"] for row in predictions(whole)}) == 6
    [rest] = contexts_of(given, tmp_path)
    assert rest == lines[-2]
    engine(options.model, [rest], states)
    assert_same(resume_sweep(out), whole)


def test_a_file_that_goes_while_a_run_reads_loses_nothing(options, states, lines, whole, tmp_path):
    path = first_file(states, lines, len(lines) - 2)
    away = tmp_path / path.name

    def remove(what, done, *rest):
        if done == 2 and path.exists():
            path.rename(away)

    given = replace(options, states=str(states))
    with pytest.raises(InputError, match="expected a whole safetensors file, got"):
        run_sweep(given, tmp_path / "run", progress=remove, questions_per_part=1)
    away.rename(path)
    assert_same(resume_sweep(tmp_path / "run"), whole)


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: {"token_ids": t["token_ids"].flip(0)}, "expected the .* token ids of .*, got others from token"),
        (lambda t: {n: t[n][:-1] for n in t}, "expected the .* token ids of question 0, oracle, .*, got"),
        (lambda t: {"hidden_states": t["hidden_states"][:, 1:].clone()}, "expected 4 layers in .*, got 3; extract"),
        (lambda t: {"hidden_states": t["hidden_states"][:-1].clone()}, r"expected hidden_states \[\d+, 4, 32\] in"),
        (lambda t: {"hidden_states": t["hidden_states"].half().int()}, "that fit torch.float32"),
        (lambda t: {"token_ids": None}, "expected token_ids and hidden_states in .*, got hidden_states, token_log"),
        (lambda t: {"hidden_states": t["hidden_states"].flip(1)}, "engine's log-probability within"),
        (lambda t: {"hidden_states": t["hidden_states"].flip(1), "token_logprobs": None}, "layer 0 of .* to be the"),
        (lambda t: {"positions": torch.arange(len(t["token_ids"])) - 1}, r"expected positions from 0 to \d+ in"),
        (lambda t: {"token_logprobs": t["token_logprobs"] + 0.1}, "log-probability within .* got a difference of 0.1;"),
        (lambda t: {"token_logprobs": t["token_logprobs"][1:]}, "a number a token"),
        (lambda t: {"token_ids": t["token_ids"].float()}, "expected token_ids in .* as a row of whole numbers"),
        (lambda t: {"positions": torch.arange(len(t["token_ids"])).float()}, "expected positions in .* as a row of"),
        (lambda t: {"positions": torch.arange(len(t["token_ids"]))[:, None]}, "expected positions in .* as a row of"),
        (lambda t: {"positions": torch.zeros(len(t["token_ids"]), dtype=torch.int64)}, "each of positions once in"),
        (
            lambda t: {"hidden_states": t["hidden_states"][:2], "positions": torch.arange(2), "token_logprobs": None},
            r"expected states at position \d+ of question 0, oracle, .*, got those at 2 others",
        ),
    ],
)
def test_another_file_is_refused(damage, message, options, states, lines, tmp_path):
    path = first_file(states, lines)
    changed(path, **damage(load_file(path)))
    with pytest.raises(InputError, match=message):
        run_sweep(replace(options, states=str(states)), tmp_path / "run")


def test_a_normed_last_layer_is_refused(options, lines, tmp_path):
    folder = engine(options.model, lines[:3], tmp_path / "states", normed=True)
    with pytest.raises(InputError, match="as the last block puts it out, got one that is behind the final norm"):
        run_sweep(replace(options, states=str(folder)), tmp_path / "run")


def test_states_that_are_no_numbers_name_their_context(options, states, lines, tmp_path):
    path = first_file(states, lines)
    held = load_file(path)["hidden_states"]
    held[-1, 1] = torch.nan
    changed(path, hidden_states=held)
    with pytest.raises(InputError, match="expected finite states of question 0, oracle, .*, got NaN or infinity"):
        run_sweep(replace(options, states=str(states)), tmp_path / "run")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"generate": 4}, "``generate``: expected 0 beside ``states``, where no model runs, got 4"),
        ({"measures": "jsd,sublayers"}, "``measures``: expected others than sublayers beside ``states``"),
        ({"reuse_prefix": "on"}, "``reuse_prefix``: expected auto or off beside ``states``"),
    ],
)
def test_what_needs_a_model_that_runs_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        SweepConfig("tiny", states="states", **given)


def test_no_folder_is_refused(options, tmp_path):
    with pytest.raises(InputError, match="expected a folder of safetensors files, got no folder there"):
        run_sweep(replace(options, states=str(tmp_path / "none")), tmp_path / "run")


@pytest.mark.medium
def test_layers_and_reads_of_such_a_run_say_why_not(options, states, tmp_path):
    run = run_sweep(replace(options, documents=(2,), states=str(states)), tmp_path / "run")
    with pytest.raises(InputError, match="expected one that can run, got its head alone"):
        run_layers(run.path, LayersConfig(interventions="skip"))
    assert run_layers(run.path, LayersConfig(interventions="none"), tmp_path / "layers")


def test_only_embedding_first_block_and_head_are_loaded(tiny_model):
    whole, head = load_model(str(tiny_model)), load_model(str(tiny_model), part=HEAD)
    assert head.config_sha256 == whole.config_sha256 and head.unused_weights == ()
    assert len(find_blocks(head.model)) == 1 and head.whole.n_layer == 3
    names = dict(whole.model.state_dict())
    assert all(torch.equal(tensor, names[name]) for name, tensor in head.model.state_dict().items())


@pytest.mark.medium
def test_command_line(tmp_path, capsys, monkeypatch):
    """The model of the package, from its contexts to a page that says what was not checked."""
    monkeypatch.chdir(tmp_path)
    asked = ["--model", "tiny", "--documents", "5", "--gold-positions", "ends-middle", "--examples", "3"]
    assert main(["prompts", *asked, "--out", "prompts.jsonl"]) == 0
    assert "prompts.jsonl: 9 contexts, 429 tokens, the longest has " in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    engine(str(TINY), lines, tmp_path / "states")
    assert main(["sweep", *asked, "--states", "states", "--out", "run"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "Parity: behind the first block the head gives the model's own logits" in told
    assert "States: of another engine, float32, 9 files in states when the run began; they hold none of its" in told
    assert "held against the engine" in (tmp_path / "run" / "report.html").read_text()
    (tmp_path / "states" / f"{lines[0]['id']}.safetensors").unlink()
    assert main(["sweep", *asked, "--states", "states", "--out", "other"]) == 2
    assert "refinelens prompts --states states writes those that are missing" in capsys.readouterr().err
    own = refinelens.sweep("tiny", documents=5, gold_positions="ends-middle", examples=3, out="own")
    assert_same(refinelens.load_run("run").run, own.run)
