"""What a lens reads: statistics of every layer at chosen positions, and what may be asked for in whose words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.reference import LensStats
from ..model.identity import text_of
from ..model.positions import padded
from ..op.vocabulary import TopK

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

SHOWN_LAYERS, SHOWN_POSITIONS = 8, 6  # of a reading that is printed
SHOWN_TEXT = 12  # characters of a token


@dataclass(frozen=True)
class Tokens:
    """What was read: texts with the places that a reading is about."""

    input_ids: Tensor  # [batch, token] int64, shorter texts padded on the right
    mask: Tensor | None  # [batch, token] int64, 1 for real tokens; None for all ones
    positions: Tensor  # [batch, n_positions] int64, counted from 0
    is_batch: bool  # whether a batch was given, and not one text


@dataclass(frozen=True, eq=False, repr=False)
class LayerReading:
    """What a lens reads at every layer: fields ``[n_layers + 1, position]``, or ``[n_layers + 1, batch, position]``.

    Layer 0 is the embedding output, layer i the output of block i, layer ``n_layers`` the model's own prediction. What
    is read at position p predicts token p + 1. ``reading[layer]`` is the reading of one layer, also counted from the
    end; ``==`` holds where all numbers are equal; `to_frame` gives a row per layer and position.
    """

    stats: LensStats
    kl: Tensor | None = None  # fp32, nats, KL(p_final || p_layer); None if it was not asked for
    top: TopK | None = None  # [..., k], None if it was not asked for
    tokens: Tokens | None = None  # None for states of one's own
    targets: Tensor | None = None  # int64, as fields without the layers
    lens: str = "plain"
    tokenizer: PreTrainedTokenizerBase | None = None  # for texts of tokens
    layer: int | None = None  # of a reading of one layer

    @property
    def argmax(self) -> Tensor:
        """The most likely token, int64; the lowest id among equals."""
        return self.stats.argmax

    @property
    def rank(self) -> Tensor | None:
        """Number of tokens that beat the target, int64, 0 where it is the argmax; None without targets."""
        return self.stats.target_rank

    @property
    def logprob(self) -> Tensor | None:
        """Log-probability of the target, fp32 nats; None without targets."""
        return self.stats.target_logprob

    @property
    def max_logprob(self) -> Tensor:
        """Log-probability of the argmax, fp32 nats."""
        return self.stats.max_logprob

    @property
    def entropy(self) -> Tensor:
        """Entropy of the prediction, fp32 nats."""
        return self.stats.entropy

    @property
    def top_ids(self) -> Tensor | None:
        """The likeliest tokens, best first, int64 ``[..., k]``; None if they were not asked for."""
        return None if self.top is None else self.top.ids

    @property
    def top_logprobs(self) -> Tensor | None:
        """Their log-probabilities, fp32 nats ``[..., k]``."""
        return None if self.top is None else (self.top.logits - self.stats.logsumexp[..., None]).clamp(max=0.0)

    @property
    def shape(self) -> torch.Size:
        """Of every field but those with a last axis of k."""
        return self.argmax.shape

    def __len__(self) -> int:
        return len(self.argmax)

    def __getitem__(self, layer: int) -> LayerReading:
        if self.layer is not None or not isinstance(layer, int) or not -len(self) <= layer < len(self):
            wanted = f"a layer from 0 to {len(self) - 1}" if self.layer is None else "a reading of several layers"
            raise IndexError(f"layer: expected {wanted}, got {layer!r}")
        return replace(self.map(lambda value: value[layer]), layer=layer % len(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LayerReading):
            return NotImplemented
        mine, theirs = self._values(), other._values()
        return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)

    def _values(self) -> dict[str, Tensor]:
        values = dict(self.stats.items()) | {"kl": self.kl, "top_ids": self.top_ids}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerReading:
        """``function`` of every number that is there; it must leave a last axis of k alone."""
        top = None if self.top is None else TopK(function(self.top.ids), function(self.top.logits))
        return replace(self, stats=self.stats.map(function), kl=None if self.kl is None else function(self.kl), top=top)

    def of(self, start: int, end: int) -> LayerReading:
        """Positions ``start`` to ``end`` of the first context of a batch, fields ``[n_layers + 1, end - start]``."""
        return self.map(lambda value: value[:, 0, start:end])

    def to(self, device: torch.device | str) -> LayerReading:
        """The same reading on another device."""
        return self.map(lambda value: value.to(device))

    @staticmethod
    def cat(blocks: Sequence[LayerReading], dim: int) -> LayerReading:
        """Readings of neighbours along an axis as one."""
        if len(blocks) == 1:
            return blocks[0]
        stats = LensStats.cat([block.stats for block in blocks], dim)
        kls = [block.kl for block in blocks if block.kl is not None]
        kl = torch.cat(kls, dim) if kls else None
        tops = [(block.top.ids, block.top.logits) for block in blocks if block.top is not None]
        top = TopK(*(torch.cat(values, dim) for values in zip(*tops, strict=True))) if tops else None
        return replace(blocks[0], stats=stats, kl=kl, top=top)

    def text(self, token_id: int) -> str:
        """The text of a token; its id where the lens was made without a tokenizer."""
        return f"<id {token_id}>" if self.tokenizer is None else text_of(self.tokenizer, int(token_id))

    def to_frame(self) -> pd.DataFrame:
        """A row per layer (and text of a batch) and position, with the texts of the tokens.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise InputError(
                "to_frame: expected the package pandas, which is not installed; pip install 'refinelens[frames]'"
            ) from None
        whole = self.map(lambda value: value[None]) if self.layer is not None else self
        names = ["layer", *(["batch"] if whole.argmax.dim() == 3 else []), "position"]
        index = torch.cartesian_prod(*map(torch.arange, whole.shape)).reshape(-1, len(names))
        frame = pd.DataFrame(dict(zip(names, index.T.numpy(), strict=True)))
        if self.layer is not None:
            frame["layer"] = self.layer
        columns = {"argmax": whole.argmax, "max_logprob": whole.max_logprob, "entropy": whole.entropy, "kl": whole.kl}
        columns |= {"rank": whole.rank, "logprob": whole.logprob}
        for name, value in columns.items():
            if value is not None:
                frame[name] = value.flatten().cpu().numpy()
        frame.insert(len(names) + 1, "argmax_text", [self.text(id) for id in frame["argmax"]])
        if self.tokens is not None:
            rows = index[:, 1] if len(names) == 3 else torch.zeros(len(index), dtype=torch.int64)
            places = self.tokens.positions[rows, index[:, -1]]
            frame["position"] = places.numpy()
            frame.insert(len(names), "token", [self.text(id) for id in self.tokens.input_ids[rows, places].tolist()])
        if self.targets is not None:
            targets = self.targets.cpu().expand(whole.shape).flatten().tolist()
            frame["target"], frame["target_text"] = targets, [self.text(id) for id in targets]
        return frame

    def __repr__(self) -> str:
        axes = [name for name in ("layer", "batch", "position") if name != "layer" or self.layer is None]
        axes = axes if len(axes) == len(self.shape) else [name for name in axes if name != "batch"]
        names = ["argmax", "entropy", "rank", "logprob", "kl", "top_ids"]
        there = ", ".join(name for name in names if getattr(self, name) is not None)
        what = f"LayerReading: {self.lens} lens, [{', '.join(axes)}] = {list(self.shape)}; {there}"
        return "\n".join([what, *self._table()])

    def _table(self) -> list[str]:
        """The most likely token of some layers at the last positions of the first text."""
        argmax = (self.argmax if self.layer is None else self.argmax[None]).cpu()
        argmax = argmax[:, 0] if argmax.dim() == 3 else argmax
        n_layers, n = argmax.shape[0], argmax.shape[-1]
        if argmax.dim() != 2 or not n_layers or not n:
            return []
        layers = list(range(n_layers))
        if n_layers > SHOWN_LAYERS:
            layers = sorted({round(i * (n_layers - 1) / (SHOWN_LAYERS - 1)) for i in range(SHOWN_LAYERS)})
        columns = range(max(0, n - SHOWN_POSITIONS), n)
        cells = [[_cell(self.text(int(argmax[layer, column]))) for column in columns] for layer in layers]
        names = [str(layer if self.layer is None else self.layer) for layer in layers]
        if self.tokens is not None:
            ids = self.tokens.input_ids[0, self.tokens.positions[0]]
            cells, names = [[_cell(self.text(int(ids[column]))) for column in columns], *cells], ["", *names]
        widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
        left = max(map(len, names))
        padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
        return [f"  {name:>{left}}  {'  '.join(row)}".rstrip() for name, row in zip(names, padded, strict=True)]


def _cell(text: str) -> str:
    shown = repr(text)[1:-1]
    return shown if len(shown) <= SHOWN_TEXT else shown[: SHOWN_TEXT - 1] + "…"


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


def targets_of(targets: object, tokenizer: PreTrainedTokenizerBase | None) -> Tensor | None:
    """Target ids from ids or strings; a string is the text of one token, with its space where it has one.

    Raises:
        InputError: A string that is not one token, or strings without a tokenizer.
    """
    if targets is None or isinstance(targets, Tensor):
        return targets
    if isinstance(targets, str):
        return torch.tensor(_id_of(targets, tokenizer))
    if isinstance(targets, list | tuple):
        rows = [row if isinstance(row, list | tuple) else [row] for row in targets]
        ids = [[_id_of(t, tokenizer) if isinstance(t, str) else t for t in row] for row in rows]
        nested = any(isinstance(row, list | tuple) for row in targets)
        return _integers("targets", ids if nested else [id for (id,) in ids], "token ids or strings")
    return _integers("targets", targets, "token ids or strings")


def _id_of(text: str, tokenizer: PreTrainedTokenizerBase | None) -> int:
    if tokenizer is None:
        raise InputError("tokenizer: expected one for targets that are text, got none; pass token ids")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        pieces = ", ".join(repr(text_of(tokenizer, id)) for id in ids)
        raise InputError(
            f"targets: expected the text of one token, got {text!r}, which is {len(ids)} ({pieces}); pass one of them, "
            "often with its space, or an id"
        )
    if ids[0] == tokenizer.unk_token_id and text != tokenizer.unk_token:
        raise InputError(f"targets: expected a token that the tokenizer knows, got {text!r}; pass another, or an id")
    return ids[0]


def spread(targets: Tensor, shape: torch.Size) -> Tensor:
    """Targets broadcast to every position, ``[N]``."""
    try:
        return targets.expand(shape).flatten()
    except RuntimeError:
        raise InputError(f"targets: expected ids broadcastable to {list(shape)}, got {list(targets.shape)}") from None
