"""``--positions all``: every token of a context is read, and what is said of the answer does not change."""

import numpy as np
import pytest
import torch

from refinelens.cli import main
from refinelens.config import SweepConfig
from refinelens.model.loading import load_model
from refinelens.report.agreement import paired_ranks
from refinelens.store.results import DERIVED, open_run
from refinelens.sweeping.sweep import run_sweep
from tiny import save_tiny_lens

pytestmark = pytest.mark.medium

LISTS = ("target_rank", "argmax", "target_logprob", "max_logprob", "entropy", "kl")


@pytest.fixture(scope="module")
def options(tiny_model, question_file, tmp_path_factory):
    lens = save_tiny_lens(tmp_path_factory.mktemp("lens") / "mine", tiny_model, scale=0.1)
    given = {"documents": (0, 2, 3), "device": "cpu", "lens": ("plain", str(lens)), "answer_tokens": "all"}
    return SweepConfig(str(tiny_model), str(question_file), **given, generate=3)


@pytest.fixture(scope="module")
def runs(options, tmp_path_factory):
    """Read at the answer, and everywhere."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        run_sweep(SweepConfig(**options.arguments() | {"positions": p} | tuples(options)), str(folder / p))
        for p in ("answer", "all")
    ]


def tuples(options):
    return {"documents": options.documents, "top": options.top, "lens": options.lens}


def rows_of(run):
    return [row for part in run.parts() for row in part.to_pylist()]


def test_every_token_of_every_context_has_a_row(runs, tiny_model):
    """Its target is the token that follows; of the last one the last of the answer."""
    rows, contexts = rows_of(runs[1]), {}
    for row in rows:
        contexts.setdefault((row["question_id"], row["documents"], row["gold_position"], row["lens"]), []).append(row)
    assert len(contexts) == 6 * (1 + 2 + 3) * 2
    tokenizer = load_model(str(tiny_model), "cpu").tokenizer
    for (question, documents, *_), own in contexts.items():
        assert [row["position"] for row in own] == list(range(own[0]["n_tokens"])), "in order, none twice"
        n_answers = sum(row["answer_token"] >= 0 for row in own)
        assert [row["answer_token"] for row in own] == [-1] * (len(own) - n_answers) + list(range(n_answers))
        assert all(row["target_id"] == row["answer_id"] for row in own)
        assert [row["answer_text"] for row in own] == [tokenizer.decode([row["answer_id"]]) for row in own]
        if documents:
            inside = [own[p - 1]["answer_text"] for p in range(own[0]["gold_start"], own[0]["gold_end"])]
            place = ["arven", "brosk", "calmi", "dorra", "elska", "fenta"][question]
            assert inside[:2] == ["Document", "["] and inside.count(place) == 2, "the gold document, token by token"


def test_statistics_are_those_of_the_model(runs, tiny_model):
    rows, keys = rows_of(runs[1]), ("question_id", "documents", "gold_position", "lens")
    own = [row for row in rows if all(row[key] == rows[0][key] for key in keys)]
    loaded = load_model(str(tiny_model), "cpu")
    prompt = loaded.tokenizer("Question: what is the door of arven ?\nAnswer:")["input_ids"]
    ids = torch.tensor([prompt])
    assert [r["answer_id"] for r in own][:-1] == prompt[1:], "closed-book comes first"
    with torch.no_grad():
        logits = loaded.model(ids).logits[0]
    assert [r["argmax"][-1] for r in own] == logits.argmax(-1).tolist()
    logprob = logits.log_softmax(-1)[range(len(own)), [r["answer_id"] for r in own]]
    np.testing.assert_allclose([r["target_logprob"][-1] for r in own], logprob, atol=1e-4)


def test_the_answer_reads_the_same(runs):
    """Rows, generated texts, tables; only rounding may differ, because contexts of the one share prefixes."""
    answer, everywhere = (rows_of(run) for run in runs)
    inside = [row for row in everywhere if row["answer_token"] >= 0]
    assert len(inside) == len(answer) < len(everywhere)
    for one, other in zip(answer, inside, strict=True):
        for name in one.keys() - set(LISTS):
            assert one[name] == other[name], name
        assert one["argmax"] == other["argmax"] and one["target_rank"] == other["target_rank"]
        for name in LISTS:
            np.testing.assert_allclose(one[name], other[name], atol=1e-4)
    for name in ("summary.csv", "paired.csv", "inverted_u.csv"):
        assert len({(run.path / name).read_text() for run in runs}) == 1, name
    assert all((run.path / name).exists() for run in runs for name in DERIVED)
    assert len({len(ranks) for ranks in paired_ranks(*runs)}) == 1


def test_batches_and_the_prediction_as_target(options, runs, tmp_path):
    """Contexts of several lengths side by side; targets of their own at every token."""
    changed = {"positions": "all", "batch_size": "3", "target": "prediction", "generate": 0}
    run = run_sweep(SweepConfig(**options.arguments() | tuples(options) | changed), str(tmp_path / "run"))
    for row, other in zip(rows_of(run), rows_of(runs[1]), strict=True):
        assert row["target_id"] == row["argmax"][-1] == other["argmax"][-1] and row["target_rank"][-1] == 0
        assert row["position"] == other["position"] and row["argmax"] == other["argmax"]


def test_tokens_per_second_are_said(runs, capsys):
    assert main(["show", str(runs[1].path)]) == 0
    out = capsys.readouterr().out
    n_tokens = len(rows_of(runs[1])) // 2
    assert f"{n_tokens} tokens read, " in out and " a second; tables and figures are about the answers." in out
    assert "contexts ran whole: every token is read" in out
    assert open_run(runs[1].path).manifest["questions_per_part"] == 1


def test_with_shared_prefixes_it_is_refused(options, tmp_path, capsys):
    command = ["sweep", "--model", options.model, "--task", options.task, "--positions", "all", "--reuse-prefix", "on"]
    assert main([*command, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "--reuse-prefix on: expected --positions answer, got all" in error and error.count("\n") == 1
