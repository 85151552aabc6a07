"""What a lens reads: statistics of every layer at chosen positions, as numbers, as a frame and as a map to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..kernels.reference import LensStats
from ..model.identity import decode, text_of
from ..op.vocabulary import TargetStats, TopK
from ..pages.heatmap import HeatMap, LensMap, Segment
from .inputs import Tokens

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

SHOWN_LAYERS, SHOWN_POSITIONS = 8, 6  # of a reading that is printed
TITLE_TOKENS = 12  # of a text, the last ones, that name its map
SHOWN_TEXT = 12  # characters of a token


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
    alternatives: TargetStats | None = None  # [..., T], ids, rank and logprob of further targets; None without
    tokens: Tokens | None = None  # None for states of one's own
    targets: Tensor | None = None  # int64, as fields without the layers
    lens: str = "plain"
    tokenizer: PreTrainedTokenizerBase | None = None  # for texts of tokens
    layer: int | None = None  # of a reading of one layer
    vocab_size: int = 0  # of the model; 0 where it is not known

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
        """Of every field but those with a last axis of k or T."""
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
        values = dict(self.stats.items()) | {"kl": self.kl}
        for part in ("top", "alternatives"):
            if (own := getattr(self, part)) is not None:
                values |= {f"{part}.{name}": value for name, value in vars(own).items()}
        return {name: value for name, value in values.items() if value is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> LayerReading:
        """``function`` of every number that is there; it must leave a last axis of k or T alone."""
        top = None if self.top is None else TopK(function(self.top.ids), function(self.top.logits))
        alternatives = None if self.alternatives is None else self.alternatives.map(function)
        kl = None if self.kl is None else function(self.kl)
        return replace(self, stats=self.stats.map(function), kl=kl, top=top, alternatives=alternatives)

    def of(self, start: int, end: int) -> LayerReading:
        """Positions ``start`` to ``end`` of the first context of a batch, fields ``[n_layers + 1, end - start]``."""
        cut = self.map(lambda value: value[:, 0, start:end])
        targets, tokens = self.targets, self.tokens
        if targets is not None:
            targets = targets.expand(self.shape[1:])[0, start:end]
        if tokens is not None:
            first = tokens.mask if tokens.mask is None else tokens.mask[:1]
            tokens = Tokens(tokens.input_ids[:1], first, tokens.positions[:1, start:end], is_batch=False)
        return replace(cut, targets=targets, tokens=tokens)

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
        several = [block.alternatives for block in blocks if block.alternatives is not None]
        alternatives = TargetStats.cat(several, dim) if several else None
        return replace(blocks[0], stats=stats, kl=kl, top=top, alternatives=alternatives)

    def text(self, token_id: int) -> str:
        """The text of a token; its id where the lens was made without a tokenizer."""
        return f"<id {token_id}>" if self.tokenizer is None else text_of(self.tokenizer, int(token_id))

    def to_frame(self) -> pd.DataFrame:
        """A row per layer (and text of a batch) and position, with the texts of the tokens.

        Alternatives have columns ``alternative_0``, ``alternative_0_text``, ``_rank``, ``_logprob``, and so on.

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
        if whole.alternatives is not None:
            several = whole.alternatives.map(lambda value: value.flatten(0, -2).cpu())
            for i in range(several.ids.shape[-1]):
                ids = several.ids[:, i].tolist()
                frame[f"alternative_{i}"], frame[f"alternative_{i}_text"] = ids, [self.text(id) for id in ids]
                frame[f"alternative_{i}_rank"] = several.rank[:, i].numpy()
                frame[f"alternative_{i}_logprob"] = several.logprob[:, i].numpy()
        return frame

    def heat_map(self, **words: Any) -> HeatMap:
        """What `to_html` and `plot` show; ``words`` are those of `heat_map`."""
        return heat_map([self], **words)

    def to_html(self) -> str:
        """The interactive map as one HTML file, which needs no network: layers by tokens, of a batch its first text."""
        return self.heat_map().to_html()

    def plot(self, measure: str = "probability", tokens: int = 24) -> Figure:
        """A matplotlib figure of the last tokens, coloured by ``probability``, ``rank``, ``entropy`` or ``kl``."""
        from ..pages.figure import draw_heatmap

        return draw_heatmap(self.heat_map(), measure, tokens)

    def _repr_html_(self) -> str | None:
        """What a notebook shows; None, so that it shows the text, where there is no map of all layers of one text."""
        has_map = self.layer is None and self.argmax.dim() in (2, 3) and self.argmax.numel()
        return self.heat_map()._repr_html_() if has_map else None

    def __repr__(self) -> str:
        axes = [name for name in ("layer", "batch", "position") if name != "layer" or self.layer is None]
        axes = axes if len(axes) == len(self.shape) else [name for name in axes if name != "batch"]
        names = ["argmax", "entropy", "rank", "logprob", "kl", "top_ids", "alternatives"]
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


def heat_map(
    readings: Sequence[LayerReading],
    *,
    title: str = "",
    target_is: str = "as given",
    every: int = 1,
    segments: Sequence[Segment] = (),
    facts: dict[str, str] | None = None,
) -> HeatMap:
    """The map of one text, read through one or several lenses; of a batch that of its first text.

    Args:
        readings: Of the same tokens with the same targets, a lens each.
        title: Of the page; by default the text's last tokens.
        target_is: What the target is, in words.
        every: One layer of so many is shown, counted from the output.
        segments: What belongs together, such as documents.
        facts: That stand under the map.

    Raises:
        InputError: A reading of one layer, or of states that have more than one axis of positions.
    """
    first = readings[0]
    if first.layer is not None or first.argmax.dim() not in (2, 3):
        raise InputError(
            f"reading: expected all layers of one text or several, got shape {list(first.shape)}; read a text again"
        )
    lenses = [_lens_map(reading) for reading in readings]
    n = lenses[0].argmax.shape[1]
    texts: dict[int, str] = {}
    targets: list[int] | None = None
    if first.targets is not None:
        each = first.targets.cpu().expand(first.shape[1:])
        targets = (each[0] if each.dim() == 2 else each).tolist()
    ids = {int(id) for lens in lenses for id in np.unique(lens.argmax)} | set(targets or ())
    ids |= {int(id) for lens in lenses if lens.top_ids is not None for id in np.unique(lens.top_ids)}
    if first.tokens is not None:
        places = first.tokens.positions[0]
        tokens, positions = first.tokens.input_ids[0, places].tolist(), places.tolist()
        ids |= set(tokens)
        texts = {id: first.text(id) for id in ids}
    else:  # states of one's own: a column has no token, but for its number
        texts = {id: first.text(id) for id in ids}
        tokens, positions = [-1 - place for place in range(n)], list(range(n))
        texts |= {-1 - place: str(place) for place in range(n)}
    if not title and first.tokens is not None:
        last = tokens[-TITLE_TOKENS:]
        title = decode(first.tokenizer, last) if first.tokenizer is not None else "".join(map(first.text, last))
    return HeatMap(
        *(title.strip() or "a reading", tokens, texts, lenses, first.vocab_size, positions),
        *(targets, target_is, every, list(segments), facts or {}),
    )


def _lens_map(reading: LayerReading) -> LensMap:
    """Numbers of the first text, on the CPU."""

    def numbers(value: Tensor | None) -> np.ndarray | None:
        if value is None:
            return None
        return (value[:, 0] if reading.argmax.dim() == 3 else value).cpu().numpy()

    names = ("argmax", "max_logprob", "entropy", "kl", "rank", "logprob", "top_ids")
    values = {name: numbers(getattr(reading, name)) for name in names}
    return LensMap(reading.lens, **values, top_logprobs=numbers(reading.top_logprobs))  # type: ignore[arg-type]
