"""How far two models are from each other, layer by layer: nothing for one and itself, and what softmax says else."""

import csv
import json

import numpy as np
import pytest
import torch

import refinelens
from refinelens import InputError, LayerNorm, LensHead, RMSNorm, fused_lens
from refinelens.cli import main
from refinelens.model.loading import load_model
from refinelens.model_drift import BY_LAYER, ONCE, kl_between, run_drift
from refinelens.view_config import DriftConfig
from tiny import save_tiny_model


def random_head(seed, vocab, width, kind):
    draw = torch.Generator().manual_seed(seed)
    weight, gain = torch.randn(vocab, width, generator=draw), torch.randn(width, generator=draw)
    if kind == "capped":
        return LensHead(weight, RMSNorm(gain, offset=1.0), softcap=3.0, scale=0.5)
    if kind == "bias":
        bias = torch.randn(vocab, generator=draw)
        bias[7] = -torch.inf  # a token that cannot occur
        return LensHead(weight, LayerNorm(gain, gain), bias)
    if kind == "projected":
        return LensHead(weight, RMSNorm(None), projection=torch.randn(width, 2 * width, generator=draw))
    return LensHead(weight, None)


@pytest.mark.parametrize("kinds", [("capped", "bias"), ("bias", "bias"), ("bias", "plain"), ("plain", "projected")])
def test_kl_of_two_readouts(kinds):
    """Heads of other widths and kinds; 5003 tokens are more than one chunk of so many rows, and a prime."""
    heads = [random_head(seed, 5003, width, kind) for seed, width, kind in zip((0, 1), (24, 40), kinds, strict=True)]
    states = [torch.randn(3, 101, head.d_model, generator=torch.Generator().manual_seed(5)) for head in heads]
    stats = [fused_lens(state, head) for state, head in zip(states, heads, strict=True)]
    found = kl_between(states[0], heads[0], stats[0], states[1], heads[1], stats[1])
    logs = [head.logits(state).double().log_softmax(-1) for state, head in zip(states, heads, strict=True)]
    wanted = torch.where(logs[0] == -torch.inf, 0.0, logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert wanted.isinf().all() == (kinds[1] == "bias" != kinds[0])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert (kl_between(states[0], heads[0], stats[0], states[0], heads[0], stats[0]) < 1e-5).all()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A model, and the same with its last block changed."""
    folder = save_tiny_model(tmp_path_factory.mktemp("drift") / "own", n_layer=3)
    loaded = load_model(str(folder), "cpu")
    other = folder.with_name("other")
    with torch.no_grad():
        loaded.model.transformer.h[2].mlp.c_proj.weight.mul_(50)
    loaded.model.save_pretrained(other)
    loaded.tokenizer.save_pretrained(other)
    text = folder.with_name("text.txt")
    text.write_text("the door of arven is red . the roof of brosk is blue stone . " * 60)
    return str(folder), str(other), str(text)


def test_what_did_not_change_has_not_drifted(pair):
    own, other, text = pair
    found = run_drift(DriftConfig(other, against=own, text=text, tokens=400, device="cpu"))
    assert len(found.layers) == 4 and found.sequences == 5 and found.tokens == 5 * 79
    for layer in found.layers[:3]:
        assert [layer[name].value for name in BY_LAYER] == [0, 1, 0, 0, 0]
    last = found.layers[3]
    assert last["kl"].value > 1e-4 and last["kl"].low > 0 and last["state_change"].value > 1e-2
    change = found.once["logprob_other"].value - found.once["logprob_original"].value
    assert np.isclose(last["logprob_change"].value, change, atol=1e-6)
    settles = [found.once[name].value for name in ("settle_original", "settle_other", "settle_change")]
    assert np.isclose(settles[1] - settles[0], settles[2])


def test_the_rows_are_those_of_the_models(pair):
    """Means over the tokens of each sequence, then over sequences, from the models' own logits."""
    own, other, text = pair
    found = refinelens.drift(other, against=own, text=text, tokens=400, device="cpu")
    models = [load_model(name, "cpu") for name in (own, other)]
    ids = torch.tensor(models[0].tokenizer(open(text).read())["input_ids"][:400]).view(5, 80)
    with torch.no_grad():
        logs = [loaded.model(ids).logits[:, :-1].double().log_softmax(-1) for loaded in models]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1)
    assert np.isclose(found.layers[3]["kl"].value, float(kl.mean()), rtol=1e-3)
    assert found.layers[3]["same_best"].value == float((logs[0].argmax(-1) == logs[1].argmax(-1)).double().mean())
    targets = ids[:, 1:, None]
    ranks = [(log > log.gather(-1, targets)).sum(-1) + 1.0 for log in logs]
    wanted = float((ranks[1].log2() - ranks[0].log2()).double().mean())
    assert np.isclose(found.layers[3]["rank_change"].value, wanted, atol=1e-5)


@pytest.mark.medium
def test_the_command(pair, tmp_path, capsys):
    own, other, text = pair
    command = ["drift", "--model", other, "--against", own, "--text", text, "--tokens", "400", "--device", "cpu"]
    assert main([*command, "--html", str(tmp_path / "d.html"), "--csv", str(tmp_path / "d.csv")]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "395 tokens of" in out and "KL is largest at layer 3" in out
    with (tmp_path / "d.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * len(BY_LAYER) + len(ONCE) and {row["measure"] for row in rows} == {*BY_LAYER, *ONCE}
    page = (tmp_path / "d.html").read_text()
    head = json.loads(page.split('id="head">')[1].split("</script>")[0])
    assert len(head["layers"]["kl"]) == 4 and head["layers"]["kl"][0] == [0, 0, 0]
    assert main([*command, "--html", str(tmp_path / "d.html")]) == 2
    assert "expected a new file" in capsys.readouterr().err
    assert main([*command, "--html", str(tmp_path / "e"), "--csv", str(tmp_path / "e")]) == 2
    assert "--csv: expected another file than --html" in capsys.readouterr().err
    assert len(run_drift(DriftConfig(other, against=own, text=text, tokens=400)).to_frame()) == len(rows)


@pytest.mark.medium
def test_the_page(pair, tmp_path, chromium):
    own, other, text = pair
    run_drift(DriftConfig(other, against=own, text=text, tokens=400, device="cpu")).to_html(tmp_path / "d.html")
    page = chromium.new_page()
    page.goto((tmp_path / "d.html").as_uri())
    page.wait_for_selector("body[data-ready]")
    assert page.locator("svg").count() == len(BY_LAYER) and page.locator("table tbody tr").count() == 4
    page.close()


def test_what_cannot_be_compared(pair, tmp_path):
    own, other, text = pair
    with pytest.raises(InputError, match="``against``: expected the original to compare with, or ``quant"):
        run_drift(DriftConfig(own, text=text))
    deeper = save_tiny_model(tmp_path / "deeper", n_layer=4)
    with pytest.raises(InputError, match="deeper: expected layers 3, as .*own has, got 4"):
        run_drift(DriftConfig(str(deeper), against=own, text=text, device="cpu"))
    words = save_tiny_model(tmp_path / "words", n_layer=3, vocab_size=2000)
    with pytest.raises(InputError, match="expected vocabulary size .* got 2000"):
        run_drift(DriftConfig(str(words), against=own, text=text, device="cpu"))
    short = tmp_path / "short.txt"
    short.write_text("the door of arven is red .")
    with pytest.raises(InputError, match="expected 5 sequences of 80 tokens or more, got 0; give more text"):
        run_drift(DriftConfig(other, against=own, text=str(short), tokens=400, device="cpu"))
    with pytest.raises(InputError, match="expected 5 sequences of 2 tokens or more, got 0"):
        run_drift(DriftConfig(other, against=own, text=text, tokens=3, device="cpu"))
