"""The training of the model in the package: where it begins, what it minimises, and that a stopped one goes on."""

import json

import pytest
import torch

import train_tiny
from train_tiny import Progress


def test_contexts_grow_by_two_where_they_are_answered():
    progress = Progress()
    progress.grow(0.8)
    assert progress.documents == 4, "passing means above 0.8"
    for documents in (*range(6, 21, 2), 20):
        progress.grow(0.9)
        assert progress.documents == documents


def test_rates_rise_and_fall():
    assert Progress(step=0).rate() == pytest.approx(1 / train_tiny.WARM_UP)
    assert Progress(step=train_tiny.STEPS - train_tiny.COOL_DOWN).rate() == 1.0
    assert Progress(step=train_tiny.STEPS - train_tiny.COOL_DOWN // 4).rate() == pytest.approx(0.25)


@pytest.mark.parametrize("head", range(4))
def test_heads_of_the_first_block_begin_by_looking_back(head):
    torch.manual_seed(0)
    model = train_tiny.new_model(vocab_size=300).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(300, (2, 200))
    with torch.no_grad():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][:, head]
    back = attention.diagonal(offset=-head - 1, dim1=1, dim2=2)[:, 8:]
    assert back.min() > 0.9


def test_the_loss_weighs_answers_and_skips_padding():
    torch.manual_seed(0)
    tokenizer = train_tiny.word_tokenizer()
    model = train_tiny.new_model(len(tokenizer))
    asked = tokenizer.convert_tokens_to_ids(":")
    encoded = train_tiny.batch(tokenizer, 0, Progress())
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    assert mask.min() == 0, "contexts of one batch differ in length"
    with torch.no_grad():
        log_p = model(input_ids=ids).logits.log_softmax(-1)
        total, count = 0.0, 0
        for row, length in enumerate(mask.sum(1).tolist()):
            for place in range(1, length):
                weight = 2.5 if ids[row, place - 1] == asked else 0.2
                total -= weight * float(log_p[row, place - 1, ids[row, place]])
                count += 1
        assert float(train_tiny.weighted_loss(model, ids, mask, asked)) == pytest.approx(total / count, rel=1e-4)


@pytest.mark.medium
@pytest.mark.parametrize("steps", [4, pytest.param(6, marks=pytest.mark.slow)])
def test_a_stopped_training_goes_on_to_the_same_model(tmp_path, monkeypatch, steps):
    for name, value in {"TOKENS": 64, "QUESTIONS": 2, "EVERY": 2, "CONTEXTS": 50, "PASS": -1.0, "STEPS": steps}.items():
        monkeypatch.setattr(train_tiny, name, value)
    whole, tokenizer, progress = train_tiny.train(_folder(tmp_path / "whole"), seed=1)
    assert progress.step == steps and len(tokenizer) == whole.config.vocab_size

    measure, looks = train_tiny.measure, []

    def stop_at_the_second_look(*arguments):
        looks.append(arguments)
        if len(looks) == 2:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_tiny, "measure", stop_at_the_second_look)
        train_tiny.train(_folder(tmp_path / "stopped"), seed=1)
    resumed, _, progress = train_tiny.train(tmp_path / "stopped", seed=1)
    assert progress.step == steps
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    lines = [json.loads(line) for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["documents"]) for line in lines] == [(2, 4), (4, 6), (6, 8)][: steps // 2]


def _folder(path):
    path.mkdir()
    return path
