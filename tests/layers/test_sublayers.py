"""Inside the blocks: the stream behind attention against the model's own modules, attributions against the logit."""

import pytest
import torch
import transformers as tf
from browser import opened

import refinelens
from lens_folders import tiny
from refinelens.cli import main
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.layers.sublayers import read_sublayers
from refinelens.lens.attribution import check_sum, logit_direction
from tiny import shake

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = torch.randint(1, 97, (11,), generator=torch.Generator().manual_seed(0)).tolist()


def llama():
    torch.manual_seed(0)
    return shake(tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2))).eval()


def bloom():
    torch.manual_seed(0)
    config = tf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=3, n_head=4)
    return shake(tf.BloomForCausalLM(config)).eval()


def opt():
    """With a projection between norm and unembedding, and a bias in the norm."""
    torch.manual_seed(0)
    config = tf.OPTConfig(
        vocab_size=97, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=16,
        max_position_embeddings=64,
    )  # fmt: skip
    return shake(tf.OPTForCausalLM(config)).eval()


MODELS = {"llama": llama, "bloom": bloom, "opt": opt}
MODELS |= {"gemma2": lambda: tiny("gemma2"), "gpt_neox": lambda: tiny("gpt_neox")}


@pytest.mark.parametrize("name", MODELS)
def test_parts_sum_up_to_the_logit_and_to_the_stream(name):
    """Sequential, parallel (GPT-NeoX), post-normed (Gemma 2), with the stream passed to the part (BLOOM)."""
    model = MODELS[name]()
    lens = refinelens.LogitLens(model)
    reading = read_sublayers(lens, IDS)
    hidden = lens.hidden(torch.tensor([IDS]), torch.arange(len(IDS)))[:, 0]
    with torch.no_grad():
        logits = model(torch.tensor([IDS])).logits[0]
    assert torch.equal(reading.targets, logits.argmax(-1))
    total = reading.embedding + reading.attn.sum(0) + reading.mlp.sum(0) + reading.constant
    torch.testing.assert_close(total, reading.logit, rtol=1e-4, atol=1e-4)
    wanted = logits.gather(-1, reading.targets[:, None])[:, 0]
    if lens.head.softcap is not None:
        wanted = lens.head.softcap * torch.atanh(wanted / lens.head.softcap)
    torch.testing.assert_close(reading.logit, wanted, rtol=1e-3, atol=1e-3)
    assert torch.equal(reading.mid.argmax[-1], logits.argmax(-1)) and len(reading.mid) == 4
    assert float(reading.attn.abs().max()) > 1e-3 < float(reading.mlp.abs().max())
    for half, sizes in (("attn", reading.attn_size), ("mlp", reading.mlp_size)):
        assert (sizes > 0).all() and (getattr(reading, f"{half}_cosine").abs() <= 1).all()
    grown = hidden[1:].norm(dim=-1) / hidden[:-1].norm(dim=-1)
    assert (grown <= (1 + reading.attn_size) * (1 + reading.mlp_size) + 1e-4).all()  # triangle inequality, twice


def test_the_stream_behind_attention_is_the_models_own():
    """Of Llama it is what goes into the norm before the feed-forward part."""
    model, seen = llama(), []
    lens = refinelens.LogitLens(model)
    norms = [block.post_attention_layernorm for block in model.model.layers]
    handles = [norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach())) for norm in norms]
    try:
        with torch.no_grad():
            model(torch.tensor([IDS]))
    finally:
        for handle in handles:
            handle.remove()
    own = [states[0] for states in seen[:3]]
    reading = read_sublayers(lens, IDS, 5)
    final = lens.hidden(torch.tensor([IDS]), torch.arange(len(IDS)))[-1, 0]
    wanted = lens.read_states(torch.stack([*own, final]), 5, check_last=False)
    assert torch.equal(reading.mid.rank, wanted.rank) and torch.equal(reading.mid.argmax, wanted.argmax)
    torch.testing.assert_close(reading.mid.logprob, wanted.logprob, rtol=1e-5, atol=1e-5)
    size = (own[1] - lens.hidden(torch.tensor([IDS]), torch.arange(len(IDS)))[1, 0]).norm(dim=-1)
    stream = lens.hidden(torch.tensor([IDS]), torch.arange(len(IDS)))[1, 0].norm(dim=-1)
    torch.testing.assert_close(reading.attn_size[1], size / stream, rtol=1e-4, atol=1e-5)


def test_some_positions_are_those_of_all():
    lens = refinelens.LogitLens(llama())
    whole, last = read_sublayers(lens, IDS, 7), read_sublayers(lens, IDS, 7, positions=[2, -1])
    assert torch.equal(last.attn, whole.attn[:, [2, 10]]) and torch.equal(last.mid.rank, whole.mid.rank[:, [2, 10]])
    frame = last.to_frame()
    assert len(frame) == 6 and sorted(set(frame["block"])) == [1, 2, 3] and list(frame["position"][:2]) == [2, 10]
    assert {"attn", "mlp", "attn_cosine", "mlp_size", "rank", "logprob"} <= set(frame.columns)


def test_what_does_not_sum_up_is_refused():
    lens = refinelens.LogitLens(llama())
    final = lens.hidden(torch.tensor([IDS]), torch.arange(len(IDS)))[-1, 0]
    targets = torch.arange(len(IDS))
    direction, constant = logit_direction(final, targets, lens.head)
    parts = (torch.stack([0.25 * final, 0.75 * final]).double() * direction).sum(-1)
    check_sum(lens, final, targets, parts.sum(0) + constant)
    with pytest.raises(UnsupportedModelError, match="sum up to the logit, got a difference"):
        check_sum(lens, final, targets, 1.1 * parts.sum(0) + constant)


def test_what_cannot_be_read_is_said():
    lens = refinelens.LogitLens(llama())
    with pytest.raises(InputError, match="expected one text, got 2"):
        read_sublayers(lens, [IDS, IDS])
    own = lens.with_lens(refinelens.Translators(torch.zeros(3, 32, 32), torch.zeros(3, 32)))
    with pytest.raises(InputError, match="expected the plain lens, got own"):
        read_sublayers(own, IDS)
    with pytest.raises(InputError, match="targets"):
        read_sublayers(lens, IDS, 97)


def page_of(text, points, folder):
    path = folder / "page.html"
    given = ["--model", "tiny", "--device", "cpu", "--points", points, "--html", str(path)]
    assert main(["read", text, *given]) == 0
    return path


@pytest.mark.medium
@pytest.mark.parametrize("points, lenses", [("mid", 1), ("all", 2)])
def test_the_command_shows_them(points, lenses, tmp_path, capsys, chromium):
    import json

    out = tmp_path / "numbers.json"
    text = "The password of Alena Ashbury is acorn. What is the password of Alena Ashbury? Answer:"
    assert main(["read", text, "--model", "tiny", "--device", "cpu", "--points", points, "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [one["name"] for one in found["lenses"]] == ["plain", "behind-attention"][-lenses:]
    loaded = refinelens.load_model("tiny", "cpu")
    lens = refinelens.LogitLens(loaded.model, loaded.tokenizer)
    reading = read_sublayers(lens, text)
    assert found["lenses"][-1]["argmax"] == reading.mid.argmax.tolist()
    with opened(chromium, page_of(text, points, tmp_path)) as page:
        assert page.locator(".added path").count() == 2
        assert "feed-forward adds" in page.locator(".detail").inner_text() or points == "mid"  # beside the output none
        page.focus(".map")
        page.keyboard.press("ArrowDown")
        shown = page.locator(".detail").inner_text()
        assert "attention adds" in shown and "feed-forward adds" in shown
    *plain, mid = found["lenses"]  # each state beside what its block adds
    assert mid["attn"][:-1] == pytest.approx(reading.attn.numpy(), abs=1e-5) and set(mid["attn"][-1]) == {None}
    assert mid["mlp"][:-1] == pytest.approx(reading.mlp.numpy(), abs=1e-5) and set(mid["mlp"][-1]) == {None}
    for one in plain:
        assert one["attn"][1:] == pytest.approx(reading.attn.numpy(), abs=1e-5)
        assert one["mlp"][1:] == pytest.approx(reading.mlp.numpy(), abs=1e-5)
        assert one["attn"][0] == pytest.approx(reading.embedding.numpy(), abs=1e-5) and set(one["mlp"][0]) == {None}
    assert ("layers" in found["facts"]) == (points == "all")
    assert main(["read", text, "--model", "tiny", "--device", "cpu", "--points", points]) == 0
    assert "layer l is the stream between the attention" in capsys.readouterr().out
    given = ["--points", points, "--lens", "plain"]
    assert main(["read", text, "--model", "tiny", "--device", "cpu", *given]) == (2 if points == "mid" else 0)
