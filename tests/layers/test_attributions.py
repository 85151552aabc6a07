"""What an analysis of layers says of the parts of blocks: against the text read by itself, beside their ablations."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from browser import opened
from scipy import stats

import refinelens
from refinelens.cli import main
from refinelens.config import LayersConfig, SweepConfig
from refinelens.layers.analysis import run_layers
from refinelens.report.rows import LayerStatistic
from refinelens.run_page import report_page
from refinelens.store.files import sha256_of
from refinelens.store.frames import load_run
from refinelens.store.layers import LAYER_ROWS, PARTS, ROWS, QuestionPart, rows_schema
from refinelens.sweeping.inputs import SweepInputs
from refinelens.sweeping.sweep import RunSpec, run_sweep

pytestmark = pytest.mark.medium
N_LAYERS = 8


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    options = SweepConfig("tiny", documents=(2,), examples=5, device="cpu")
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def analysis(swept):
    return run_layers(swept.path, LayersConfig(("attn", "mlp", "skip")))


@pytest.fixture(scope="module")
def at_answer(swept, tmp_path_factory):
    return run_layers(swept.path, LayersConfig(("mlp",), at="answer"), tmp_path_factory.mktemp("layers") / "answer")


def rows_of(folder):
    return pq.read_table(folder.path / ROWS).to_pandas()


def test_they_are_those_of_the_text_read_by_itself(swept, analysis, at_answer):
    inputs = SweepInputs.load(RunSpec(swept.path, swept.manifest, "run").options)
    rows, last = rows_of(analysis[0]), rows_of(at_answer[0])
    assert rows["attribution"].isna().equals(~rows["intervention"].isin(["attn", "mlp"]))
    assert not last.loc[last["intervention"] == "mlp", "attribution"].isna().any()
    for question, position in [(rows["question_id"][0], 0), (rows["question_id"].max(), 1)]:
        ids = list(inputs.context(int(question), 2, position).input_ids)
        of_context = rows[(rows["question_id"] == question) & (rows["gold_position"] == position)]
        n_prompt = inputs.context(int(question), 2, position).prompt_length
        target = int(of_context["target_id"].iloc[0])
        found = refinelens.read_sublayers(inputs.logit_lens, ids[:n_prompt], target, positions=-1)
        for part in ("attn", "mlp"):
            own = of_context.loc[of_context["intervention"] == part, "attribution"]
            np.testing.assert_allclose(own, getattr(found, part)[:, 0], rtol=1e-4, atol=1e-4)
        own = last[(last["question_id"] == question) & (last["gold_position"] == position)]
        own = own.loc[own["intervention"] == "mlp", "attribution"]
        np.testing.assert_allclose(own, found.mlp[:, 0], rtol=1e-4, atol=1e-4)


def test_means_and_their_correlation_with_the_cost(analysis):
    folder, report = analysis
    rows = rows_of(folder)
    table = pd.read_csv(folder.path / "layers.csv")
    agreement = pd.read_csv(folder.path / "agreement.csv")
    assert set(agreement.loc[agreement["lens_statistic"] == "attribution", "intervention"]) == {"attn", "mlp"}
    for part in ("attn", "mlp"):
        own = rows[rows["intervention"] == part]
        means = own.groupby("layer")[["attribution", "logprob_change"]].mean()
        shown = table[(table["of"] == part) & (table["statistic"] == "attribution") & table["gold_position"].isna()]
        np.testing.assert_allclose(shown["value"], means["attribution"], rtol=1e-4, atol=1e-6)
        assert (shown["value_low"] <= shown["value"]).all() and (shown["questions"] == 5).all()
        chosen = agreement[(agreement["intervention"] == part) & (agreement["lens_statistic"] == "attribution")]
        whole = chosen[chosen["gold_position"].isna()].set_index("coefficient")
        for name, compare in (("spearman", stats.spearmanr), ("kendall", stats.kendalltau)):
            wanted = compare(means["attribution"], -means["logprob_change"]).statistic
            found = whole.loc[name]
            assert found["value"] == pytest.approx(wanted, abs=1e-5)
            assert -1 <= found["value_low"] <= found["value"] <= found["value_high"] <= 1
        assert len(chosen) == 2 * (1 + 2), "both gold positions together, and each"
    assert all(isinstance(row, LayerStatistic) for row in report.statistics)


def test_a_line_in_the_terminal_and_on_the_page(swept, analysis, capsys, tmp_path, chromium):
    assert main(["layers", str(swept.path), "--interventions", "attn,mlp,skip"]) == 0
    out = capsys.readouterr().out
    for part in ("attn", "mlp"):
        assert f"Agreement of direct logit attribution and cost of {part} over 8 layers: Spearman" in out
    assert "attribution and cost of skip" not in out
    (tmp_path / "page.html").write_text(report_page([swept])[0])
    with opened(chromium, tmp_path / "page.html") as page:
        shown = page.locator("#layers").inner_text()
        assert (
            page.locator("#layers figcaption", has_text="Direct logit attribution by layer, 2 documents").count() == 1
        )
        assert page.locator("#layers figure", has_text="attribution of mlp").count() == 1
    for part in ("attn", "mlp"):
        line = f"Agreement over layers of direct logit attribution and cost of {part}, 2 documents: spearman "
        assert line in shown and f"{line}-," not in shown


def test_analyses_of_whole_blocks_are_as_they_were(swept, tmp_path):
    folder, report = run_layers(swept.path, LayersConfig(("skip",)), tmp_path / "layers")
    assert pq.read_table(folder.path / ROWS).schema.equals(LAYER_ROWS) and rows_schema(("skip",)) is LAYER_ROWS
    assert {row.statistic for row in report.statistics}.isdisjoint({"attribution"})
    assert {row.lens_statistic for row in report.agreements} == {"logprob_gain", "log_rank_gain", "entropy_drop"}


def without_attributions(folder, parts):
    """Make parts of an analysis what an older version wrote."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for number in parts:
        part = QuestionPart(**manifest["parts"][number])
        path = folder / PARTS / part.file
        pq.write_table(pq.read_table(path).select(LAYER_ROWS.names), path)
        manifest["parts"][number] = asdict(part) | {"sha256": sha256_of(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("old", [range(5), range(2)])
def test_older_analyses_are_read(swept, analysis, tmp_path, old):
    """All parts of one, or the first two, after which a newer version went on."""
    run = shutil.copytree(swept.path, tmp_path / "run")
    without_attributions(run / "layers", old)
    folder, report = run_layers(run, LayersConfig(("attn", "mlp", "skip")))
    found = load_run(run).interventions
    assert list(found.columns) == [*LAYER_ROWS.names, "attribution"]
    assert found["attribution"].notna().sum() == (5 - len(old)) * 2 * 2 * N_LAYERS
    own = [row for row in report.statistics if row.statistic == "attribution" and row.gold_position is None]
    assert {row.questions for row in own} == ({3} if len(old) < 5 else set())
    of_parts = [row for row in report.agreements if row.lens_statistic == "attribution"]
    assert len(of_parts) == (12 if len(old) < 5 else 0) and all(np.isnan(row.value.low) for row in of_parts)
    kept = [row for row in report.agreements if row.lens_statistic != "attribution"]
    assert kept == [row for row in analysis[1].agreements if row.lens_statistic != "attribution"]
