"""What the parts of every block add, for whole sweeps: against one text read by itself and the model's own modules."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from browser import opened
from transformers import DynamicCache

import refinelens
from families import build, save
from refinelens import LogitLens
from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.lens.blocks import sublayers_of
from refinelens.run_page import report_page
from refinelens.store.process import Interrupted
from refinelens.store.results import EXTRAS, open_run
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.sweep import RunSpec, resume_sweep, run_sweep
from sweeps import stop_after

COLUMNS = [name for name, _ in EXTRAS["sublayers"]]
IDS = torch.randint(3, 101, (2, 9), generator=torch.Generator().manual_seed(3))
FAMILIES = ("gpt_neox", "gemma2")  # parallel, and normed behind its parts
TINY = SweepConfig("tiny", documents=(3,), examples=6, device="cpu", measures=("sublayers", "top5"), generate=3)


def template(folder):
    (folder / "template").write_text("{documents}\n{question}\n")
    return str(folder / "template")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_sweep(TINY, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def of_families(tmp_path_factory, question_file):
    """Runs of small random models, by family."""
    runs = {}
    for name in FAMILIES:
        folder = tmp_path_factory.mktemp(name)
        given = {"documents": (3,), "examples": 2, "device": "cpu", "measures": ("sublayers",)}
        options = SweepConfig(save(name, folder / "model"), str(question_file), template=template(folder), **given)
        runs[name] = run_sweep(options, folder / "run")
    return runs


def rows_of(run):
    return [row for part in run.parts() for row in part.to_pylist()]


def added_by_modules(name, block, made):
    """What the parts of a block add, of what its modules put out."""
    names = {
        "gpt_neox": ("attention", "mlp"),
        "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "llama": ("self_attn", "mlp"),
    }[name]
    return [made[getattr(block, part)] for part in names]


@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_streams_within_blocks_are_the_models_own(name):
    """At some positions of a padded batch, and of contexts that go on from a cache."""
    model, made = build(name), {}
    lens = LogitLens(model)
    sublayers = sublayers_of(lens)

    def keep(module, _args, output):
        made[module] = output[0] if isinstance(output, tuple) else output

    modules = [module for block in lens.blocks for module in block.modules()]
    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        before = lens.hidden(IDS[:1], torch.arange(9))[:, 0]
        added = [added_by_modules(name, block, made) for block in lens.blocks]
    finally:
        for handle in handles:
            handle.remove()
    wanted = torch.stack([before[i] + attn[0] for i, (attn, _) in enumerate(added)])
    for i, (_, mlp) in enumerate(added):
        torch.testing.assert_close(wanted[i] + mlp[0], before[i + 1], rtol=1e-4, atol=1e-4)

    n = lens.n_layers
    positions, mask = torch.tensor([[2, 8], [1, 5]]), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    found = lens.hidden(IDS, positions, mask, None, sublayers)
    assert found.shape == (2 * n + 1, 2, 2, 32) and torch.equal(found[: n + 1], lens.hidden(IDS, positions, mask))
    torch.testing.assert_close(found[n + 1 :, 0], wanted[:, [2, 8]], rtol=1e-4, atol=1e-4)
    alone = lens.hidden(IDS[1:, :6], positions[1:], None, None, sublayers)
    torch.testing.assert_close(found[:, 1], alone[:, 0], rtol=1e-4, atol=1e-4)

    cache = DynamicCache()
    lens.hidden(IDS[:1, :5], torch.tensor([4]), None, cache, sublayers)
    rest = lens.hidden(IDS[:1, 5:], torch.tensor([3]), None, cache, sublayers)
    assert cache.get_seq_length() == 9, "no key stands there twice"
    torch.testing.assert_close(rest[n + 1 :, 0, 0], wanted[:, 8], rtol=1e-4, atol=1e-4)
    assert all("forward" not in vars(module) and not module._forward_hooks for module in model.modules())


def test_threads_do_not_see_each_others_blocks():
    """Some keep the streams within blocks, others run the same model as it is."""
    lens = LogitLens(build("llama"))
    sublayers, positions = sublayers_of(lens), torch.arange(9)
    texts = torch.randint(3, 101, (40, 1, 9), generator=torch.Generator().manual_seed(4))
    given = [(ids, sublayers if number % 2 else None) for number, ids in enumerate(texts)]

    def run(ids, own):
        return lens.hidden(ids, positions, None, None, own)

    wanted = [run(*one) for one in given]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda one: run(*one), given))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.medium
@pytest.mark.parametrize("name", ["tiny", *FAMILIES])
def test_they_are_those_of_the_text_read_by_itself(name, run, of_families):
    own = run if name == "tiny" else of_families[name]
    inputs = SweepInputs.load(RunSpec(own.path, own.manifest, "run").options)
    lens, n, seen = inputs.logit_lens, inputs.logit_lens.n_layers, 0
    assert own.manifest["prefix_reuse"]["used"] and own.manifest["counts"]["tokens_saved"] > 0
    for row in rows_of(own)[:9]:
        context = inputs.context(row["question_id"], 3, row["gold_position"])
        ids = list(context.input_ids[: row["position"] + 1])
        found = refinelens.read_sublayers(lens, ids, row["target_id"], positions=-1)
        logit = {"attn_logit": found.attn, "mlp_logit": found.mlp, "mid_logprob": found.mid.logprob[:-1]}
        names = ("attn_cosine", "mlp_cosine", "block_cosine", "attn_size", "mlp_size")
        for column, value in (logit | {column: getattr(found, column) for column in names}).items():
            np.testing.assert_allclose(row[column][1:], value[:, 0], rtol=1e-4, atol=1e-4, err_msg=column)
        assert row["mid_rank"][1:] == found.mid.rank[:-1, 0].tolist()
        assert row["attn_logit"][0] == pytest.approx(float(found.embedding[0]), abs=1e-4)
        assert {row[column][0] for column in COLUMNS[1:]} == {None}
        assert all(len(row[column]) == n + 1 for column in COLUMNS)
        total = sum(row["attn_logit"]) + sum(row["mlp_logit"][1:]) + float(found.constant[0])
        assert total == pytest.approx(float(found.logit[0]), abs=1e-3)
        seen += 1
    assert seen >= 3


@pytest.mark.medium
def test_nothing_else_changes_and_the_table_is_that_of_means(run, tmp_path):
    other = run_sweep(replace(TINY, measures=("top5",)), tmp_path / "run")
    names = list(rows_of(other)[0])
    assert [{name: row[name] for name in names} for row in rows_of(run)] == rows_of(other) and "generated" in names
    assert set(rows_of(run)[0]) - set(names) == set(COLUMNS)
    tables = {}
    for one in (run, other):
        with (one.path / "measures.csv").open() as file:
            tables[one] = list(csv.DictReader(file))
    ends = ("", "_low", "_high")
    of_layers = [f"{name}{end}" for name in ("entropy", "kl", "jsd", "top5") for end in ends]
    assert list(tables[other][0]) == ["lens", "documents", "gold_position", "layer", "questions", *of_layers]
    assert [{name: row[name] for name in tables[other][0]} for row in tables[run]] == tables[other]
    assert "mid_rank" not in tables[run][0], "of ranks there are no means"
    first = [row for row in rows_of(run) if row["gold_position"] == 1 and row["answer_token"] == 0]
    shown = [row for row in tables[run] if row["gold_position"] == "1"]
    for name in COLUMNS[:-1]:
        assert (shown[0][name] == "") == (name != "attn_logit")
        means = np.mean([row[name][1:] for row in first], axis=0)
        np.testing.assert_allclose([float(row[name]) for row in shown[1:]], means, rtol=1e-4, atol=1e-6)
    with (run.path / "effective_depth.csv").open() as file:
        depths = list(csv.DictReader(file))
    assert [(row["gold_position"], row["method"]) for row in depths[:4]] == [
        ("", "cosine"), ("", "kl"), ("", "top5"), ("0", "cosine")
    ]  # fmt: skip
    assert not (other.path / "effective_depth.csv").read_text().count("cosine")


@pytest.mark.medium
@pytest.mark.parametrize("name", ["gemma2", "bloom"])
def test_batches_and_one_by_one_are_the_same(name, question_file, tmp_path):
    given = {"documents": (1, 3), "examples": 3, "device": "cpu", "measures": ("sublayers",), "answer_tokens": "all"}
    options = SweepConfig(save(name, tmp_path / "model"), str(question_file), template=template(tmp_path), **given)
    ways = {"batch": {"batch_size": "5"}, "alone": {"reuse_prefix": "off"}, "branched": {"reuse_prefix": "on"}}
    rows = {way: rows_of(run_sweep(replace(options, **how), tmp_path / way)) for way, how in ways.items()}
    for way in ("batch", "branched"):
        for ours, single in zip(rows[way], rows["alone"], strict=True):
            assert ours["mid_rank"] == single["mid_rank"]
            for column in COLUMNS[:-1]:
                values = [np.array(row[column], dtype=float) for row in (ours, single)]
                np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-4, err_msg=f"{way} {column}")


@pytest.mark.medium
def test_a_run_that_was_stopped_has_the_same_bytes(run, tmp_path):
    with pytest.raises(Interrupted):
        run_sweep(TINY, tmp_path / "run", progress=stop_after(2))
    resume_sweep(str(tmp_path / "run"))
    for name in ("measures.csv", "effective_depth.csv", "predictions/part-00000.parquet"):
        assert (tmp_path / "run" / name).read_bytes() == (run.path / name).read_bytes()
    assert open_run(tmp_path / "run").manifest["resumed"]


@pytest.mark.medium
def test_exports_frames_and_pages_have_them(run, tmp_path):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    for kind in ("jsonl", "csv", "parquet"):
        assert main(["export", str(run.path), "--format", kind, "--out", str(tmp_path / kind)]) == 0
    lines = [json.loads(line, parse_constant=refuse) for line in (tmp_path / "jsonl").read_text().splitlines()]
    assert {name: lines[0][name] for name in COLUMNS[1:]} == dict.fromkeys(COLUMNS[1:]) and lines[1]["mid_rank"] >= 0
    with (tmp_path / "csv").open() as file:
        row = next(csv.DictReader(file))
    assert row["mlp_logit"] == row["mid_rank"] == "" != row["attn_logit"]
    assert pq.read_table(tmp_path / "parquet")["attn_size"].null_count == len(lines) // 9
    frame = refinelens.load_run(run.path).layers
    assert frame["mid_rank"].isna().equals(frame["layer"] == 0) and not frame["attn_logit"].isna().any()
    text, _ = report_page([run])
    found = json.loads(re.search(r'id="head">(.*?)</script>', text, re.DOTALL)[1], parse_constant=refuse)
    (head,) = found["runs"]
    assert head["measures"] == ["top5", *COLUMNS[:-1]] and head["profiles"][0]["mlp_size"][0] is None
    assert [row["method"] for row in head["effective"][:3]] == ["cosine", "kl", "top5"]
    assert any(line.startswith("Effective depth, lens plain") for line in head["notes"])


@pytest.mark.medium
def test_the_page_draws_them(run, tmp_path, chromium):
    (tmp_path / "page.html").write_text(report_page([run])[0])
    with opened(chromium, tmp_path / "page.html") as page:
        titles = page.locator("#layers figcaption").all_inner_texts()
        assert [title for title in titles if "adds" in title and "logit" in title and "attention" in title]
        assert len(titles) == 3 + 1 + 8, "rank, KL, entropy; top5; what the parts add"
        assert page.locator("#layers h3", has_text="Effective depth").count() == 1
        assert "NaN" not in page.locator("#layers").inner_html()


def test_models_without_such_parts_are_refused_before_anything_is_written(question_file, tmp_path, capsys):
    model, out = save("opt-350m", tmp_path / "model"), tmp_path / "run"
    given = ["--task", str(question_file), "--template", template(tmp_path), "--documents", "2", "--device", "cpu"]
    assert main(["sweep", "--model", model, *given, "--measures", "sublayers", "--out", str(out)]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("refinelens: ")]
    assert "OPTForCausalLM: expected attention and feed-forward part in every block, found none" in line
    assert line.endswith("leave sublayers out of --measures") and not out.exists()
