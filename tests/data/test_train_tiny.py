"""The training of the model in the package: where it begins, what it minimises, and that a stopped one goes on."""

import json
import random
import re

import pytest
import torch

import tiny_card
import train_tiny
from refinelens.data.generated import HELD_OUT
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


def test_rates_rise_and_fall_again_for_two_hops():
    first = train_tiny.STEPS
    assert not Progress(step=first - 1).two_hops and Progress(step=first).two_hops
    assert Progress(step=first).rate() == pytest.approx(train_tiny.HOP_RATE / train_tiny.HOP_WARM_UP)
    end = first + train_tiny.HOP_STEPS
    assert Progress(step=end - train_tiny.HOP_COOL_DOWN).rate() == train_tiny.HOP_RATE
    assert Progress(step=end - train_tiny.HOP_COOL_DOWN // 4).rate() == pytest.approx(train_tiny.HOP_RATE / 4)


def test_a_quarter_of_the_second_stage_is_of_one_hop():
    tokenizer = train_tiny.word_tokenizer()
    friend = tokenizer.convert_tokens_to_ids("friend")

    def of_friends(start):
        for step in range(start, start + 80):
            ids = train_tiny.batch(tokenizer, 0, Progress(step=step, documents=20))["input_ids"]
            assert ids.shape[1] <= train_tiny.N_POSITIONS and tokenizer.unk_token_id not in ids
            yield bool((ids == friend).any())

    assert not any(of_friends(0))
    assert 0.6 < sum(of_friends(train_tiny.STEPS)) / 80 < 0.9


@pytest.mark.parametrize("draw", [train_tiny.one_question, tiny_card.friend_question, train_tiny.two_hop_question])
def test_questions_that_are_measured_have_one_answer(draw):
    source = random.Random(0)
    places = set()
    for _ in range(40):
        text, gold = draw(source, 5, HELD_OUT)
        *documents, question, answer = text.split("\n")
        answer = answer.removeprefix("Answer: ")
        assert len(documents) == 5 and question.endswith("?")
        assert [answer in re.findall(r"\w+", document) for document in documents] == [i == gold for i in range(5)]
        places.add(gold)
    assert places == set(range(5))


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
@pytest.mark.parametrize(
    "first, second, documents",
    [
        (4, 0, [4, 6]),
        (2, 4, [4, 4, 6]),
        pytest.param(6, 0, [4, 6, 8], marks=pytest.mark.slow),
        pytest.param(4, 4, [4, 6, 4, 6], marks=pytest.mark.slow),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_model(tmp_path, monkeypatch, first, second, documents):
    for name, value in {"TOKENS": 64, "QUESTIONS": 2, "EVERY": 2, "CONTEXTS": 50, "PASS": -1.0}.items():
        monkeypatch.setattr(train_tiny, name, value)
    monkeypatch.setattr(train_tiny, "STEPS", first)
    monkeypatch.setattr(train_tiny, "HOP_STEPS", second)
    steps = first + second
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
    assert [line["step"] for line in lines] == list(range(2, steps + 1, 2))
    assert [line["documents"] for line in lines] == documents


def _folder(path):
    path.mkdir()
    return path
