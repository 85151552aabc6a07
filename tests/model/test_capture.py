"""Hooks that keep chosen positions, and what may be asked of a lens; every family is in test_families.py."""

import pytest
import torch

from families import VOCAB, build
from refinelens import LogitLens
from refinelens.errors import InputError
from refinelens.model.head import find_blocks
from refinelens.model.hooks import keep_positions, run_base


def test_padding_on_the_right_changes_nothing():
    lens = LogitLens(build("llama"))
    ids = torch.randint(1, VOCAB, (1, 9), generator=torch.Generator().manual_seed(4))
    padded = torch.cat([ids, torch.zeros(1, 5, dtype=torch.int64)], dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 5])
    alone = lens.read(ids, torch.tensor(3), torch.tensor([8]))
    batch = lens.read(padded, torch.tensor(3), torch.tensor([8]), attention_mask=mask)
    torch.testing.assert_close(alone.logprob, batch.logprob, rtol=1e-5, atol=1e-5)


def test_hooks_are_removed_also_after_an_exception():
    model = build("gpt2")
    blocks = find_blocks(model)
    with pytest.raises(RuntimeError), keep_positions(model, blocks, torch.tensor([[0]]), 2) as kept:
        run_base(model, torch.tensor([[1, 2]]))
        raise RuntimeError
    assert len(kept) == 4
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_only_chosen_positions_are_kept():
    lens = LogitLens(build("gpt2"))
    hidden = lens.hidden(torch.ones(1, 60, dtype=torch.int64), torch.tensor([59]))
    assert hidden.shape == (4, 1, 1, 32)
    assert hidden.untyped_storage().nbytes() == 4 * 32 * 4


@pytest.mark.parametrize(
    "ids, positions, message",
    [
        (torch.tensor([1, 2]), torch.tensor([0]), r"input_ids: .* got torch.int64 \[2\]"),
        (torch.tensor([[1, VOCAB]]), torch.tensor([0]), f"expected ids from 0 to {VOCAB - 1}, got 1 to {VOCAB}"),
        (torch.tensor([[1, 2]]), torch.tensor([2]), "positions: expected 0 to 1, got 2 to 2"),
        (torch.tensor([[1, 2]]), torch.tensor([[0], [1]]), r"positions: .* got \[2, 1\]"),
    ],
)
def test_bad_input(ids, positions, message):
    lens = LogitLens(build("gpt2"))
    with pytest.raises(InputError, match=message):
        lens.hidden(ids, positions)
