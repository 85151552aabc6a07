"""The front door of a lens: what `read` takes, what it gives back, and the states that others return."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import refinelens
from families import build
from refinelens import InputError, LogitLens
from refinelens.lens.reading import LayerReading
from refinelens.lens.translators import Translators
from refinelens.model.loading import load_model
from tiny import tiny_gpt2

TEXT = "The password of Alena Ashbury is acorn.\nWhat is the password of Alena Ashbury?\nAnswer:"
LAST = (-1, slice(-1, None), range(17, 18), [17], torch.tensor([-1]), np.array([17]))


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny", "cpu")


@pytest.fixture(scope="module")
def lens(loaded):
    return LogitLens(loaded.model, loaded.tokenizer)


@pytest.fixture(scope="module")
def ids(loaded):
    return loaded.tokenizer(TEXT)["input_ids"]


@pytest.fixture(scope="module")
def reading(lens):
    return lens.read(TEXT, targets="acorn")


def test_text_is_read_at_every_token(lens, loaded, reading, ids):
    logits = loaded.model(torch.tensor([ids])).logits[0]
    log_p = logits.log_softmax(-1)
    target = loaded.tokenizer.convert_tokens_to_ids("acorn")
    assert reading.shape == (lens.n_layers + 1, len(ids))
    assert torch.equal(reading.argmax[-1], logits.argmax(-1))
    torch.testing.assert_close(reading.logprob[-1], log_p[:, target], rtol=0, atol=1e-4)
    torch.testing.assert_close(reading.entropy[-1], -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-4)
    assert torch.equal(reading.rank[-1], (logits > logits[:, target, None]).sum(-1))
    assert torch.equal(reading.top_ids[-1], logits.topk(5).indices)
    torch.testing.assert_close(reading.top_logprobs[-1], log_p.topk(5).values, rtol=0, atol=1e-4)
    assert (reading.kl[-1] == 0).all() and (reading.kl[0] > 0).all()


@pytest.mark.parametrize("given", ["list", "tensor", "array", "encoding", "batch encoding", "batch", "texts"])
def test_input_as_people_hold_it(lens, loaded, reading, ids, given):
    forms = {
        "list": ids,
        "tensor": torch.tensor(ids),
        "array": np.array(ids, np.int32),
        "encoding": loaded.tokenizer(TEXT),
        "batch encoding": loaded.tokenizer([TEXT, TEXT], return_tensors="pt"),
        "batch": [ids, ids],
        "texts": [TEXT, TEXT],
    }
    found = lens.read(forms[given], targets="acorn")
    rows = [found] if found.argmax.dim() == 2 else [found.map(lambda value, row=row: value[:, row]) for row in (0, 1)]
    assert len(rows) == (1 if given in ("list", "tensor", "array", "encoding") else 2)
    for row in rows:
        for name in ("argmax", "rank", "top_ids"):
            assert torch.equal(getattr(row, name), getattr(reading, name)), name
        torch.testing.assert_close(row.logprob, reading.logprob, rtol=0, atol=1e-4)


@pytest.mark.parametrize("positions", LAST, ids=repr)
def test_positions_as_people_write_them(lens, reading, positions):
    found = lens.read(TEXT, targets="acorn", positions=positions)
    assert found.shape == (lens.n_layers + 1, 1)
    assert torch.equal(found.rank[:, 0], reading.rank[:, -1])


def test_texts_of_several_lengths(lens, loaded, reading, ids):
    """Padded on the right here, or on the left by a tokenizer: the last token of each is the last real one."""
    short = "What is the password of Alena Ashbury?"
    both = lens.read([TEXT, short], positions=-1, targets="acorn")
    assert both.shape == (lens.n_layers + 1, 2, 1)
    assert torch.equal(both.rank[:, 0, 0], reading.rank[:, -1])
    assert torch.equal(both.rank[:, 1, 0], lens.read(short, "acorn", -1).rank[:, 0])
    own = loaded.tokenizer(short)["input_ids"]
    padding = len(ids) - len(own)
    left = torch.tensor([ids, [0] * padding + own])
    mask = torch.tensor([[1] * len(ids), [0] * padding + [1] * len(own)])
    assert torch.equal(lens.read({"input_ids": left, "attention_mask": mask}, "acorn", -1).rank, both.rank)
    assert torch.equal(lens.read(left, "acorn", [[-1], [-1]], attention_mask=mask).rank, both.rank)


def test_targets_are_ids_or_strings(lens, loaded):
    acorn, amber = loaded.tokenizer.convert_tokens_to_ids(["acorn", "amber"])
    by_id = lens.read(TEXT, [acorn, amber], [-1, -2])
    assert lens.read(TEXT, ["acorn", "amber"], [-1, -2]) == by_id
    assert lens.read(TEXT, torch.tensor([acorn, amber]), [-1, -2]) == by_id
    pair = lens.read([TEXT, TEXT], [["acorn"], ["amber"]], -1)
    assert torch.equal(pair.rank[:, 0, 0], by_id.rank[:, 0]) and not torch.equal(pair.rank[:, 1], pair.rank[:, 0])


WORDS = ["acorn", "amber", "acorn"]


@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("translated", [False, True])
def test_alternatives_are_targets_beside_the_target(lens, loaded, reading, translated, top_k, monkeypatch):
    acorn, amber = loaded.tokenizer.convert_tokens_to_ids(["acorn", "amber"])
    if translated:
        held = 40 * lens.d_model * 4  # blocks of 4 positions, and a rest
        monkeypatch.setattr("refinelens.lens.translators.TRANSLATED_BYTES", held)
        weight = torch.randn(8, lens.d_model, lens.d_model, generator=torch.Generator().manual_seed(0))
        lens = lens.with_lens(Translators(0.3 * weight, torch.zeros(8, lens.d_model)))
    found = lens.read(TEXT, "amber", alternatives=WORDS, top_k=top_k)
    assert found.alternatives.ids.unique().tolist() == sorted([acorn, amber])
    assert found.alternatives.rank.shape == found.alternatives.logprob.shape == (*reading.shape, 3)
    for i, word in enumerate(WORDS):
        alone = lens.read(TEXT, word, top_k=top_k)
        assert torch.equal(found.alternatives.rank[..., i], alone.rank)
        assert torch.equal(found.alternatives.logprob[..., i], alone.logprob)
    assert torch.equal(found.rank, lens.read(TEXT, "amber", top_k=top_k).rank)
    each = torch.tensor([[acorn, amber, acorn]]).expand(18, 3)
    assert lens.read(TEXT, "amber", alternatives=each, top_k=top_k) == found
    without = lens.read(TEXT, alternatives=each.tolist(), top_k=top_k)
    assert without.rank is None and torch.equal(without.alternatives.rank, found.alternatives.rank)


def test_alternatives_of_a_batch_and_of_states(lens, loaded):
    acorn, amber = loaded.tokenizer.convert_tokens_to_ids(["acorn", "amber"])
    pair = lens.read([TEXT, TEXT], positions=[3, -1], alternatives=[[["acorn"], ["amber"]], [["amber"], ["acorn"]]])
    assert pair.alternatives.ids[0, :, :, 0].tolist() == [[acorn, amber], [amber, acorn]]
    assert torch.equal(pair.of(0, 2).alternatives.rank, pair.alternatives.rank[:, 0])
    assert LayerReading.cat([pair, pair], 1).alternatives.rank.shape == (9, 4, 2, 1)
    frame = pair.to_frame()
    assert frame.alternative_0_text.tolist()[:4] == ["acorn", "amber", "amber", "acorn"]
    assert frame.alternative_0_rank.tolist() == pair.alternatives.rank.flatten().tolist()
    last = lens.read(TEXT, positions=-1, alternatives="acorn")[-1]
    assert last.alternatives.rank.shape == (1, 1)
    assert last.to_frame().alternative_0_logprob[0] == last.alternatives.logprob
    other = lens.read(TEXT, positions=-1, alternatives="amber")[-1]
    assert other != last != replace(last, alternatives=None) and "alternatives" in repr(last)
    ids = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        returned = loaded.model(ids, output_hidden_states=True).hidden_states
    states = lens.read_states(returned, alternatives=["acorn"])
    assert torch.equal(states.alternatives.rank, lens.read(ids, alternatives=["acorn"]).alternatives.rank)
    for wrong, message in (
        (range(9), "alternatives: expected 1 to 8 ids on the last axis, got"),
        (["acorn amber"], "alternatives: expected the text of one token"),
        ([[1], [2]], r"alternatives: expected a shape that broadcasts to \[18, 1\], got \[2, 1\]"),
        ([99999], "alternatives: expected ids from 0 to .*, got 99999 at row 0"),
    ):
        with pytest.raises(InputError, match=message):
            lens.read(TEXT, alternatives=wrong)


def test_a_reading_is_handled_like_numbers(reading, lens):
    assert reading[-1] == reading[lens.n_layers] and reading[-1].layer == lens.n_layers
    assert torch.equal(reading[2].rank, reading.rank[2]) and reading[2].top_ids.shape == (18, 5)
    assert pickle.loads(pickle.dumps(reading)) == reading and reading != reading[0] and reading != 3
    with pytest.raises(IndexError, match=r"layer: expected a layer from 0 to 8, got 9"):
        reading[9]
    with pytest.raises(IndexError, match="expected a reading of several layers"):
        reading[1][0]
    text = repr(reading)
    assert text.startswith("LayerReading: plain lens, [layer, position] = [9, 18]; argmax, entropy, rank, logprob, kl")
    assert len(text.splitlines()) < 12 and "acorn" in text and "tensor(" not in text
    assert "tensor(" not in repr(lens) and "\n" not in repr(lens) and "8 layers, plain lens" in repr(lens)


def test_frames(lens, reading):
    frame = reading.to_frame()
    assert len(frame) == 9 * 18 and list(frame.columns[:5]) == ["layer", "position", "token", "argmax", "argmax_text"]
    last = frame[(frame.layer == 8) & (frame.position == 17)].iloc[0]
    assert (last.token, last.argmax_text, last.target_text) == (":", "acorn", "acorn")
    assert last["rank"] == reading.rank[8, 17] and last.kl == 0.0
    assert reading[3].to_frame().equals(frame[frame.layer == 3].reset_index(drop=True))
    pair = lens.read([TEXT, TEXT], positions=[3, -1]).to_frame()
    assert list(pair.columns[:3]) == ["layer", "batch", "position"] and len(pair) == 9 * 2 * 2
    assert pair.position.tolist()[:4] == [3, 17, 3, 17]


def test_without_extras(lens):
    plain = lens.read(TEXT, kl=False, top_k=0)
    assert plain.kl is plain.top_ids is plain.rank is plain.logprob is plain.top_logprobs is None


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt-350m", "phi"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_that_transformers_returns(name, dtype):
    """Its last state is normed already: read as it is, and nothing is normed twice; a stack of them alike."""
    model = build(name).to(dtype)
    lens, ids = LogitLens(model), torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
    wanted = lens.read(ids, targets=5)
    if lens.head.projection is not None:
        with pytest.raises(InputError, match="states: expected"):
            lens.read_states(out.hidden_states)
        return
    for states in (out.hidden_states, list(out.hidden_states)):
        found = lens.read_states(states, 5, top_k=5, logits=out.logits)
        slack = 1e-4 if dtype == torch.float32 else 0.1
        for field in ("logprob", "entropy", "kl"):
            torch.testing.assert_close(getattr(found, field), getattr(wanted, field), rtol=slack, atol=slack, msg=field)
        if dtype == torch.float32:
            assert torch.equal(found.argmax, wanted.argmax) and torch.equal(found.top_ids, wanted.top_ids)
    with pytest.raises(InputError, match="got a last layer that looks normed already"):
        lens.read_states(torch.stack(out.hidden_states))
    own = lens.hidden(ids, torch.arange(7))
    assert lens.read_states(own, 5, top_k=5) == wanted
    with pytest.raises(InputError, match="expected hidden_states as this model returns them, the last one normed"):
        lens.read_states(tuple(30 * own))
    with pytest.raises(InputError, match="logits: expected those of the last of these states, got others"):
        lens.read_states(own, logits=out.logits.flip(1))


def test_states_that_are_none(lens):
    states = lens.hidden(torch.tensor([[1, 2, 3]]), torch.arange(3))
    for wrong in (states[:-1], states[0], [states[0], states[1][:, :1]], [], "states"):
        with pytest.raises(InputError, match="states: expected"):
            lens.read_states(wrong)


def test_with_lens_is_this_model_through_another(lens, tmp_path):
    from refinelens.lens.files import save_lens

    zeros = Translators(torch.zeros(8, lens.d_model, lens.d_model), torch.zeros(8, lens.d_model))
    assert lens.with_lens(zeros).read(TEXT, "acorn") == lens.read(TEXT, "acorn") and lens.translators is None
    halved = Translators(zeros.weight - 0.5 * torch.eye(lens.d_model), zeros.bias + 0.1)
    save_lens(tmp_path / "mine", halved, {"format_version": 1, "kind": "linear", "model": lens.entry})
    found = lens.with_lens(tmp_path / "mine").read(TEXT, "acorn")
    assert found.lens == "mine" and found == lens.with_lens(halved).read(TEXT, "acorn") != lens.read(TEXT, "acorn")
    assert found == lens.with_lens(refinelens.load_lens(str(tmp_path / "mine"))).read(TEXT, "acorn")
    assert "mine lens" in repr(lens.with_lens(tmp_path / "mine"))


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(text=""), "text: expected a token or more in every text, got an empty one"),
        (dict(text=[]), "text: expected"),
        (dict(text=3.5), "text: expected a string, strings, or integer token ids"),
        (dict(text={"ids": 1}), "text: expected a mapping with input_ids, got one with ids"),
        (dict(text=[[1, 2], [3]]), "positions: expected places that all texts have, got none"),
        (dict(text=[1, 2], positions=2), "positions: expected -2 to 1 of 2 tokens, got 2"),
        (dict(text=[1, 2], positions="last"), "positions: expected integers, a slice or a range, got str"),
        (dict(text=[1, 2], positions=1.0), "positions: expected integers, a slice or a range, got torch.float32"),
        (dict(text=[1, 2], positions=[True, False]), "positions: expected integers, .* got torch.bool"),
        (dict(text=[1, 2], targets=[True]), "targets: expected token ids or strings, got torch.bool"),
        (dict(text=[True, False]), "text: expected a string, .* got torch.bool"),
        (dict(text=[[1, 2]], positions=[[0], [1]]), r"positions: expected shape \[n_positions\] or \[1, n_positions\]"),
        (dict(text=[1, 99999]), "input_ids: expected ids from 0 to"),
        (dict(text="acorn", targets="acorn amber"), "targets: expected the text of one token, got 'acorn amber'"),
        (dict(text="acorn", targets="xyzzy"), "targets: expected a token that the tokenizer knows, got 'xyzzy'"),
        (dict(text="acorn amber", targets=[1, 2, 3]), "targets: expected"),
        (dict(text="acorn", attention_mask=[1]), "attention_mask: expected none beside text"),
        (dict(text=[1, 2], attention_mask=[1]), "attention_mask: expected shape"),
        (dict(text=[1, 2], attention_mask=[1, 2], positions=0), "attention_mask: expected ones and zeros"),
    ],
)
def test_what_cannot_be_read_is_said(lens, call, message):
    with pytest.raises(InputError, match=message):
        lens.read(**call)


def test_without_a_tokenizer(loaded):
    lens = LogitLens(loaded.model)
    with pytest.raises(InputError, match="tokenizer: expected one for text, got none"):
        lens.read("acorn")
    with pytest.raises(InputError, match="tokenizer: expected one for targets that are text"):
        lens.read([1, 2], targets="acorn")
    assert "<id " in repr(lens.read([1, 2]))
    with pytest.raises(InputError, match="model: expected a causal LM of Transformers, got str"):
        LogitLens("gpt2")


@pytest.mark.medium
def test_by_triton_as_by_plain_torch():
    """Divergence, lists and several targets by kernels of their own; in the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    model = tiny_gpt2(61).to("cuda" if torch.cuda.is_available() else "cpu")
    ours, plain = (
        LogitLens(model, backend=backend).read(torch.tensor([[3, 5, 8]]), [7], alternatives=[1, 2], top_k=3)
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(ours.kl, plain.kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.top.logits, plain.top.logits, rtol=1e-4, atol=1e-5)
    assert torch.equal(ours.top.ids, plain.top.ids)
    assert torch.equal(ours.alternatives.rank, plain.alternatives.rank)
    assert torch.equal(ours.stats.target_rank, plain.stats.target_rank)
