"""The part of the vocabulary that a step of training takes, and the tokens that it takes."""

from dataclasses import replace

import pytest
import torch

from refinelens.fitting import objectives
from refinelens.fitting.objectives import ROWS, STEPS_PER_SEQUENCE, _endless, sampled_head
from refinelens.kernels.reference import LensHead, RMSNorm
from refinelens.op.lens_kl import lens_kl

VOCAB, WIDTH, LIKELIEST, OTHERS = 1009, 16, 5, 100


@pytest.fixture
def head(monkeypatch):
    monkeypatch.setattr(objectives, "LIKELIEST", LIKELIEST)
    monkeypatch.setattr(objectives, "OTHERS", OTHERS)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(VOCAB, WIDTH, generator=generator) / 2, torch.randn(VOCAB, generator=generator)
    return LensHead(weight, RMSNorm(torch.ones(WIDTH)), bias, scale=0.7)


@pytest.fixture
def final():
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))


def test_holds_the_likeliest_tokens_of_every_row_and_a_sample(head, final):
    part = sampled_head(head, final, torch.Generator().manual_seed(2))
    likeliest = head.logits(final).topk(LIKELIEST).indices.unique()
    assert torch.equal(part.weight[: len(likeliest)], head.weight[likeliest])
    assert torch.equal(part.bias[: len(likeliest)], head.bias[likeliest])
    assert part.vocab_size == len(likeliest) + OTHERS == len(part.weight.unique(dim=0))
    assert part.norm is head.norm and part.scale == head.scale


def test_sums_over_the_vocabulary_are_right_in_the_mean(head, final):
    whole = head.logits(final).exp().sum(-1)
    draws = [
        sampled_head(head, final, torch.Generator().manual_seed(seed)).logits(final).exp().sum(-1)
        for seed in range(200)
    ]
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert bool(((found.mean(0) - whole).abs() < 4 * error).all())
    assert bool((error < 0.02 * whole).all())


def test_gradient_is_near_that_of_the_whole_vocabulary(head, final):
    states = final + 0.5 * torch.randn(final.shape, generator=torch.Generator().manual_seed(3))

    def gradient(of):
        own = states.clone().requires_grad_()
        lens_kl(own, final, of).sum().backward()
        return own.grad

    whole = gradient(head)
    draws = torch.stack(
        [gradient(sampled_head(head, final, torch.Generator().manual_seed(seed))) for seed in range(100)]
    )
    assert float((draws.mean(0) - whole).norm() / whole.norm()) < 0.1


def test_small_vocabularies_and_softcaps_stay_whole(head, final):
    few = replace(head, weight=head.weight[:OTHERS], bias=None)
    assert sampled_head(few, final, torch.Generator()) is few
    capped = replace(head, softcap=5.0)
    assert sampled_head(capped, final, torch.Generator()) is capped


def test_a_sequence_gives_steps_of_different_tokens():
    hidden = torch.arange(3 * (2 * ROWS + 7)).view(3, -1, 1)
    steps = _endless(lambda: iter([hidden]), torch.Generator().manual_seed(0))
    first = [next(steps) for _ in range(STEPS_PER_SEQUENCE)]
    assert [step.shape[1] for step in first] == [ROWS] * STEPS_PER_SEQUENCE
    assert len(torch.cat(first, 1)[0].unique()) == STEPS_PER_SEQUENCE * ROWS
    assert not torch.equal(next(steps), first[0])
