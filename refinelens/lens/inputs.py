"""What a lens is asked to read, in whose words ever: texts, ids, positions, states and targets as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..model.identity import text_of
from ..model.positions import padded
from ..op.fused_lens import broadcast_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """What was read: texts with the places that a reading is about."""

    input_ids: Tensor  # [batch, token] int64, shorter texts padded on the right
    mask: Tensor | None  # [batch, token] int64, 1 for real tokens; None for all ones
    positions: Tensor  # [batch, n_positions] int64, counted from 0
    is_batch: bool  # whether a batch was given, and not one text


def tokens_of(
    text: object,
    positions: object,
    attention_mask: object,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Tokens:
    """What `LogitLens.read` was given, as ids with the places to read.

    Args:
        text: A string, several, token ids ``[token]`` or ``[batch, token]`` as lists, arrays or tensors, or what a
            tokenizer returns, a mapping with ``input_ids``.
        positions: None for all, an integer, integers (``[n_positions]``, or of a batch ``[batch, n_positions]``), a
            slice or a range; negative ones count from the last token of each text.
        attention_mask: ``[batch, token]`` as the ids, or None.
        tokenizer: For strings.

    Raises:
        InputError: None of these, strings without a tokenizer, or a position that a text does not have.
    """
    ids, mask, is_batch = _ids_of(text, attention_mask, tokenizer)
    if mask is None:
        ends = torch.full((len(ids),), ids.shape[1])
    else:
        ends = mask.argmax(1) + mask.sum(1)
    return Tokens(ids, mask, _positions_of(positions, ids.shape[1], ends, mask is not None), is_batch)


def _ids_of(text: Any, mask: object, tokenizer: PreTrainedTokenizerBase | None) -> tuple[Tensor, Tensor | None, bool]:
    if isinstance(text, str) or (isinstance(text, list | tuple) and text and all(isinstance(t, str) for t in text)):
        if tokenizer is None:
            raise InputError("tokenizer: expected one for text, got none; LogitLens(model, tokenizer), or pass ids")
        if mask is not None:
            raise InputError("attention_mask: expected none beside text, which is padded here")
        rows = [list(tokenizer(t)["input_ids"]) for t in ([text] if isinstance(text, str) else text)]
        return *_padded(rows), not isinstance(text, str)
    if hasattr(text, "keys"):
        if "input_ids" not in text:
            raise InputError(f"text: expected a mapping with input_ids, got one with {', '.join(map(str, text))}")
        mask = text.get("attention_mask") if mask is None else mask
        text = text["input_ids"]
    if isinstance(text, list | tuple) and text and all(isinstance(row, list | tuple) for row in text) and mask is None:
        return *_padded([list(row) for row in text]), True
    ids = _integers("text", text, "a string, strings, or integer token ids [token] or [batch, token]")
    if ids.dim() not in (1, 2) or not ids.shape[-1]:
        raise InputError(f"text: expected ids [token] or [batch, token] with a token or more, got {list(ids.shape)}")
    is_batch, ids = ids.dim() == 2, ids.reshape(-1, ids.shape[-1])
    if mask is not None:
        mask = mask.long() if isinstance(mask, Tensor) else mask  # True and False do in a mask
        mask = _integers("attention_mask", mask, "ones and zeros")
        if mask.numel() != ids.numel():
            raise InputError(f"attention_mask: expected shape {list(ids.shape)}, got {list(mask.shape)}")
        mask = mask.reshape(ids.shape)
        mask = None if bool((mask == 1).all()) else mask
    return ids, mask, is_batch


def _padded(rows: list[list[int]]) -> tuple[Tensor, Tensor | None]:
    if not all(rows):
        raise InputError("text: expected a token or more in every text, got an empty one")
    return padded([_integers("text", row, "integer token ids").tolist() for row in rows])


def _integers(name: str, value: object, expected: str) -> Tensor:
    """As int64 on the CPU. A truth value is none: a mask of places would be read as the places 0 and 1."""
    try:
        found = torch.as_tensor(value).cpu()
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise InputError(f"{name}: expected {expected}, got {type(value).__name__}") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"{name}: expected {expected}, got {found.dtype}")
    return found.long()


def _positions_of(positions: object, n_tokens: int, ends: Tensor, is_padded: bool) -> Tensor:
    """Columns of the ids, ``[batch, n_positions]``; negative places count from the end of each row's real tokens."""
    if positions is None or isinstance(positions, slice):
        if is_padded:
            raise InputError(
                f"positions: expected places that all texts have, got {'none' if positions is None else 'a slice'} for "
                "texts of several lengths; pass such as -1, or read one text at a time"
            )
        positions = range(n_tokens) if positions is None else range(n_tokens)[positions]
    if isinstance(positions, range):
        positions = list(positions)
    places = _integers("positions", positions, "integers, a slice or a range")
    places = places.reshape(1) if places.dim() == 0 else places
    places = places.expand(len(ends), -1) if places.dim() == 1 else places
    if places.dim() != 2 or len(places) != len(ends):
        raise InputError(
            f"positions: expected shape [n_positions] or [{len(ends)}, n_positions], got {list(places.shape)}"
        )
    found = torch.where(places < 0, places + ends[:, None], places)
    outside = (found < 0) | (found >= n_tokens)
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise InputError(
            f"positions: expected {-int(ends[row])} to {n_tokens - 1} of {n_tokens} tokens, got "
            f"{int(places[row, column])}"
        )
    return found


def states_of(states: object, n_layers: int, d_model: int) -> Tensor:
    """States of all layers as one tensor ``[n_layers + 1, ..., d_model]``.

    Raises:
        InputError: Neither such a tensor nor its layers in a tuple or list.
    """
    if isinstance(states, tuple | list):
        if not states or not all(isinstance(layer, Tensor) and layer.shape == states[0].shape for layer in states):
            raise InputError("states: expected layers of one shape [..., d_model], got others")
        states = torch.stack([layer.detach() for layer in states])
    if not isinstance(states, Tensor) or states.dim() < 2 or len(states) != n_layers + 1:
        got = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise InputError(
            f"states: expected [{n_layers + 1}, ..., {d_model}], the embedding output and what each of {n_layers} "
            f"blocks puts out, got {got}"
        )
    return states


def targets_of(targets: object, tokenizer: PreTrainedTokenizerBase | None, name: str = "targets") -> Tensor | None:
    """Target ids from ids or strings; a string is the text of one token, with its space where it has one.

    Raises:
        InputError: A string that is not one token, or strings without a tokenizer.
    """

    def ids_of(given: object) -> object:
        if isinstance(given, list | tuple):
            return [ids_of(one) for one in given]
        return _id_of(given, tokenizer, name) if isinstance(given, str) else given

    if targets is None or isinstance(targets, Tensor):
        return targets
    return _integers(name, ids_of(targets), "token ids or strings")


def _id_of(text: str, tokenizer: PreTrainedTokenizerBase | None, name: str) -> int:
    if tokenizer is None:
        raise InputError(f"tokenizer: expected one for {name} that are text, got none; pass token ids")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        pieces = ", ".join(repr(text_of(tokenizer, id)) for id in ids)
        raise InputError(
            f"{name}: expected the text of one token, got {text!r}, which is {len(ids)} ({pieces}); pass one of them, "
            "often with its space, or an id"
        )
    if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise InputError(f"{name}: expected a token that the tokenizer knows, got {text!r}; pass another, or an id")
    return ids[0]


def spread_targets(
    targets: object, tokenizer: PreTrainedTokenizerBase | None, shape: torch.Size, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """Target ids as they were given, on a device, and broadcast to every position, ``[N]``; None for none.

    Raises:
        InputError: As `targets_of`, or ids that do not broadcast to ``shape``.
    """
    ids = targets_of(targets, tokenizer)
    if ids is None:
        return None, None
    ids = ids.to(device)
    return ids, broadcast_ids("targets", ids, shape).flatten()


def spread_alternatives(
    alternatives: object, tokenizer: PreTrainedTokenizerBase | None, shape: torch.Size, device: torch.device
) -> Tensor | None:
    """Several targets of every position, ``[N, T]``, from ids broadcastable to ``[*shape, T]``; None for none.

    Raises:
        InputError: As `spread_targets`.
    """
    ids = targets_of(alternatives, tokenizer, "alternatives")
    if ids is None:
        return None
    ids = torch.atleast_1d(ids.to(device))
    return broadcast_ids("alternatives", ids, (*shape, ids.shape[-1])).reshape(shape.numel(), ids.shape[-1])
