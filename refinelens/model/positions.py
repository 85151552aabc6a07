"""Positions of contexts: how many a model has, rows of a batch that start at 0, and what else a length changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from .hooks import base_of, difference, keep_positions, probe_ids, run_base, takes, text_config

LIMITS = ("max_position_embeddings", "max_seq_len")  # names that configurations use
SHORT, LONG = 5, 12  # tokens of the contexts that are compared
FP32_ROUNDING = 1e-4  # of states of one context in batches of different sizes, as a share of the layer's largest


def position_limit(model: PreTrainedModel) -> int | None:
    """Longest context that the model's positions allow, or None if it states no limit.

    Rotary embeddings that are scaled by a factor reach that factor times their original length, which is more than
    some configurations (Qwen's with YaRN) state as their positions.
    """
    config = text_config(model)
    stated = next((getattr(config, name) for name in LIMITS if isinstance(getattr(config, name, None), int)), None)
    if stated is None:
        return None
    reached = [stated]
    for rope in _ropes(model):
        original = rope.get("original_max_position_embeddings")
        if original is None and "dynamic" in rope["rope_type"]:
            original = stated  # which such configurations leave as it was
        reached.append(int((rope.get("factor") or 0) * (original or 0)))
    return max(reached)


def _ropes(model: PreTrainedModel) -> list[dict]:
    """What the configuration says of its rotary embeddings, of each kind of layer where they differ."""
    ropes = getattr(text_config(model), "rope_parameters", None) or {}
    return [rope for rope in (ropes, *ropes.values()) if isinstance(rope, dict) and "rope_type" in rope]


@dataclass(frozen=True)
class Rows:
    """Contexts of one batch, padded on the right if at all."""

    input_ids: Tensor  # [batch, token] int64
    positions: Tensor  # [batch, n_positions] int64, of the tokens to read
    mask: Tensor | None  # [batch, token] int64, 1 for real tokens; None for all ones

    def alone(self, row: int) -> Rows:
        """One context by itself, without padding."""
        n_tokens = self.input_ids.shape[1] if self.mask is None else int(self.mask[row].sum())
        return Rows(self.input_ids[row : row + 1, :n_tokens], self.positions[row : row + 1], None)


def padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor | None]:
    """Numbers of several lengths as ``[row, length]``, padded on the right by their last one, and the mask of the rest.

    The mask, 1 where nothing is padded, is None where all are of one length. No row may be empty.
    """
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max())
    values = torch.tensor([[*row, *[row[-1]] * (longest - len(row))] for row in rows])
    return values, None if int(lengths.min()) == longest else (torch.arange(longest) < lengths[:, None]).long()


def checked_positions(input_ids: Tensor, positions: Tensor, n_vocab: int) -> Tensor:
    """Positions as ``[batch, n_positions]``.

    Raises:
        InputError: Ids that are none or that the model has no embedding for, or positions outside of them.
    """
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise InputError(
            f"input_ids: expected integer ids of shape [batch, token], got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < n_vocab:
        raise InputError(
            f"input_ids: expected ids from 0 to {n_vocab - 1}, got {int(input_ids.min())} to {int(input_ids.max())}"
        )
    positions = torch.as_tensor(positions)
    if positions.dim() == 1:
        positions = positions.expand(len(input_ids), -1)
    n_tokens = input_ids.shape[1]
    if positions.dim() != 2 or len(positions) != len(input_ids):
        raise InputError(
            f"positions: expected shape [n_positions] or [{len(input_ids)}, n_positions], got {list(positions.shape)}"
        )
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < n_tokens:
        raise InputError(
            f"positions: expected 0 to {n_tokens - 1}, got {int(positions.min())} to {int(positions.max())}"
        )
    return positions


def aligned(input_ids: Tensor, positions: Tensor, mask: Tensor | None) -> Rows:
    """Move the real tokens of every row to its start, where models count positions from.

    Args:
        input_ids: ``[batch, token]`` int64.
        positions: ``[batch, n_positions]`` int64, as the rows were given.
        mask: ``[batch, token]``, 1 for real tokens, which stand side by side, padded on the left or on the right.

    Raises:
        InputError: A mask that is none, or a position of padding, which has no state.
    """
    if mask is None:
        return Rows(input_ids, positions, None)
    if mask.shape != input_ids.shape or not ((mask == 0) | (mask == 1)).all():
        raise InputError(
            f"attention_mask: expected ones and zeros of shape {list(input_ids.shape)}, got "
            f"{'other values' if mask.shape == input_ids.shape else list(mask.shape)}"
        )
    mask, positions = mask.to("cpu", torch.int64), positions.to("cpu")
    lengths, starts = mask.sum(1), mask.argmax(1)
    places = torch.arange(mask.shape[1])
    inside = (places >= starts[:, None]) & (places < (starts + lengths)[:, None])
    for row in range(len(mask)):
        if not lengths[row] or not torch.equal(inside[row], mask[row].bool()):
            raise InputError(
                f"attention_mask: expected the real tokens of row {row} side by side, got "
                f"{'gaps between them' if lengths[row] else 'none'}"
            )
    first, last = starts[:, None], (starts + lengths)[:, None] - 1
    outside = (positions < first) | (positions > last)
    if outside.any():
        row, place = outside.nonzero()[0].tolist()
        raise InputError(
            f"positions: expected {int(first[row])} to {int(last[row])}, the real tokens of row {row}, got "
            f"{int(positions[row, place])}, which is padding"
        )
    if not starts.any():
        return Rows(input_ids, positions, mask)
    index = (places + first).clamp(max=last)  # behind the last token it is repeated, as padding
    ids = input_ids.gather(1, index.to(input_ids.device))
    return Rows(ids, positions - first, (places < lengths[:, None]).long())


@dataclass(frozen=True)
class Independence:
    """What the states of a context depend on besides the context itself, if anything."""

    one_at_a_time: str | None  # why contexts run one by one, None where they may run together
    remembers: bool  # a longer context that ran before changes them, until a short one has run


def check_independence(model: PreTrainedModel, blocks: nn.ModuleList) -> Independence:
    """Find out whether a context's states depend on the longest one of its batch, or on those that ran before.

    Rotary embeddings that switch by length (LongRoPE, dynamic NTK) look at the largest position of a whole batch, and
    some keep what the longest context so far has set. A few tokens at far positions tell, whatever the reason; in half
    precision rounding may hide it, so that these kinds count by their names too.

    Raises:
        UnsupportedModelError: States depend on what ran before, and a short context does not put that right.
    """
    kinds = [str(rope["rope_type"]) for rope in _ropes(model)]
    named = next((kind for kind in kinds if "dynamic" in kind or kind == "longrope"), None)
    probe = _Probe(model, blocks)
    alone = probe.states(SHORT)
    remembers = named is not None and "dynamic" in named
    before = probe.states(SHORT, probe.far // 2)
    together = probe.states(LONG, probe.far, beside=SHORT)
    if probe.differ(probe.states(SHORT, probe.far // 2), before):
        remembers = True
        probe.states(1)
        if probe.differ(probe.states(SHORT, probe.far // 2), before):
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected states that are a function of the context, got others after a "
                "longer context had run"
            )
    why = None
    if named is not None:
        why = f"with rope_type {named} states depend on the longest context of a batch"
    elif probe.differ(together, alone) or remembers:
        why = "states depend on what else is in a batch"
    return Independence(why, remembers)


class _Probe:
    """Runs a few tokens at chosen positions."""

    def __init__(self, model: PreTrainedModel, blocks: nn.ModuleList):
        self._model, self._blocks = model, blocks
        self._ids = probe_ids(model, LONG)
        self._takes_positions = takes(base_of(model), "position_ids")
        limit = position_limit(model) or 0
        dtype = model.dtype
        self._allowed = FP32_ROUNDING if dtype == torch.float32 else len(blocks) * torch.finfo(dtype).eps
        # A learned embedding has no rows beyond its limit; what is rotated may mostly go as far as it likes.
        self.far = 4 * limit if _ropes(model) and self._runs_at(4 * limit) else max(0, limit - LONG)

    def _runs_at(self, position: int) -> bool:
        try:
            return self.states(1, position) is not None
        except (IndexError, RuntimeError):  # a table of rotations
            return False

    def states(self, n_tokens: int, start: int = 0, beside: int = 0) -> Tensor:
        """``[n_layers + 1, 1, SHORT or fewer, d_model]`` of the first tokens, or of ``beside`` tokens in one batch."""
        ids, shown = self._ids[:, :n_tokens], min(beside or n_tokens, SHORT)
        places = torch.arange(n_tokens, device=ids.device)[None] + start
        mask = None
        if beside:
            ids, places = ids.repeat(2, 1), torch.cat([places - start, places])
            mask = torch.ones_like(ids)
            mask[0, beside:] = 0
        positions = torch.arange(shown)[None].expand(len(ids), -1)
        options = {"position_ids": places} if self._takes_positions and places.any() else {}
        with keep_positions(self._model, self._blocks, positions, n_tokens) as kept:
            run_base(self._model, ids, mask, **options)
        return torch.stack(kept)[:, :1]

    def differ(self, states: Tensor, others: Tensor) -> bool:
        """Whether they do, by more than rounding."""
        return difference(states, others) > self._allowed
