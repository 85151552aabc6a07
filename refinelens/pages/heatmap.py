"""The heat map of one text: layers by tokens, the best token of each cell, through one or several lenses."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ..store.trajectory import NONE, Trajectories, trajectories
from .html import framed, millinats, smallest, write_page

SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥"}
FRAME = 760  # pixels of a notebook's output
PREDICTION, NEXT = "prediction", "next"  # whose rank is shown, where it is no token of one's own


@dataclass(frozen=True, eq=False)
class LensMap:
    """What one lens says, ``[n_layers + 1, token]``; layers are counted as everywhere."""

    name: str
    argmax: np.ndarray  # int64, the best token
    max_logprob: np.ndarray  # fp32 nats, of it
    entropy: np.ndarray  # fp32 nats
    kl: np.ndarray | None = None  # fp32 nats, KL(final || layer)
    rank: np.ndarray | None = None  # int64, 0-based, of the target
    logprob: np.ndarray | None = None  # fp32 nats, of the target
    top_ids: np.ndarray | None = None  # int64 [n_layers + 1, token, k], best first
    top_logprobs: np.ndarray | None = None  # fp32 nats
    # What attention and feed-forward part of the layer's block add to the target's logit, fp32, NaN where there is
    # none; beside the embedding output ``attn`` is what the embedding adds.
    attn: np.ndarray | None = None
    mlp: np.ndarray | None = None
    note: str = ""  # what its layers are, where they are not those behind whole blocks

    @property
    def trajectory(self) -> Trajectories:
        """First-correct and settle of the target, or else of the model's own prediction, of each token."""
        wrong = self.argmax != self.argmax[-1]
        return trajectories(self.rank if self.rank is not None else wrong.astype(np.int64))

    def cut(self, places: slice) -> LensMap:
        """Some of the tokens."""
        cut: dict[str, Any] = {k: v[:, places] if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}
        return LensMap(**cut)


@dataclass(frozen=True)
class Segment:
    """Tokens that belong together, such as a document."""

    start: int  # among the columns
    end: int  # exclusive
    label: str
    kind: str  # document, gold, decoy, answer, generated


@dataclass(frozen=True, eq=False)
class HeatMap:
    """All that a map shows of one text."""

    title: str
    tokens: list[int]  # ids of the columns
    texts: dict[int, str]  # of every id in it
    lenses: list[LensMap]
    vocab_size: int
    positions: list[int]  # places in the text of the columns, from 0
    targets: list[int] | None = None  # of each column
    target_is: str = PREDICTION  # what the target is, in a word or two
    every: int = 1  # one layer of so many is shown, counted from the output
    segments: list[Segment] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # model, checks, command

    @property
    def n_layers(self) -> int:
        """The layer of the output."""
        return len(self.lenses[0].argmax) - 1

    @property
    def layers(self) -> list[int]:
        """The layers that are shown, the output last."""
        return list(range(self.n_layers, -1, -self.every))[::-1]

    def last(self, n: int) -> HeatMap:
        """The last ``n`` tokens."""
        cut = max(0, len(self.tokens) - n)
        segments = [replace(s, start=max(0, s.start - cut), end=s.end - cut) for s in self.segments if s.end > cut]
        targets = None if self.targets is None else self.targets[cut:]
        lenses = [lens.cut(slice(cut, None)) for lens in self.lenses]
        tokens, positions = self.tokens[cut:], self.positions[cut:]
        return replace(
            self, tokens=tokens, positions=positions, lenses=lenses, targets=targets, segments=segments
        )

    def to_html(self) -> str:
        """The interactive page: one file, which needs no network."""
        head, arrays = self.packed()
        return write_page("heatmap", self.title, head, arrays)

    def _repr_html_(self) -> str:
        return framed(self.to_html(), FRAME)

    def packed(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """JSON and arrays of the page. Ids are places in its own list of texts."""
        layers = self.layers
        ids = [np.asarray(self.tokens), np.asarray(self.targets or [], np.int64)]
        for lens in self.lenses:
            ids += [lens.argmax[layers].ravel(), *([] if lens.top_ids is None else [lens.top_ids[layers].ravel()])]
        known = np.unique(np.concatenate(ids))
        arrays = {"tokens": smallest(np.searchsorted(known, self.tokens))}
        if self.targets is not None:
            arrays["targets"] = smallest(np.searchsorted(known, self.targets))
        for number, lens in enumerate(self.lenses):
            found = lens.trajectory
            own: dict[str, np.ndarray] = {
                "argmax": smallest(np.searchsorted(known, lens.argmax[layers])),
                "max_logprob": lens.max_logprob[layers].astype(np.float32),
                "entropy": lens.entropy[layers].astype(np.float32),
                "first": found.first_correct.astype(np.int32),
                "settle": found.settle.astype(np.int32),
            }
            for name in ("kl", "logprob", "attn", "mlp"):
                if (value := getattr(lens, name)) is not None:
                    own[name] = value[layers].astype(np.float32)
            if lens.rank is not None:
                own["rank"] = smallest(lens.rank[layers])
            if lens.top_ids is not None and lens.top_logprobs is not None:
                own["top"] = smallest(np.searchsorted(known, lens.top_ids[layers]))
                own["top_logprob"] = millinats(lens.top_logprobs[layers])
            arrays |= {f"{number}.{name}": value for name, value in own.items()}
        head = {
            "title": self.title,
            "texts": [self.texts[int(id)] for id in known],
            "ids": known.tolist(),
            "positions": self.positions,
            "layers": layers,
            "vocab_size": self.vocab_size,
            "target_is": self.target_is,
            "lenses": [lens.name for lens in self.lenses],
            "segments": [vars(segment) for segment in self.segments],
            "facts": self.facts,
        }
        return head, arrays

    def to_json(self) -> str:
        """Every number by its name, a list a layer, for other programs; null where one is not finite."""

        def rows(values: np.ndarray | None, digits: int | None = None) -> Any:
            if values is None:
                return None
            shown = values[self.layers]
            if digits is None:
                return shown.tolist()
            exact = np.round(shown.astype(float), digits)
            whole = exact.astype(object)
            whole[~np.isfinite(exact)] = None
            return whole.tolist()

        lenses = []
        for lens in self.lenses:
            found = lens.trajectory
            lenses.append(
                {
                    "name": lens.name,
                    **{name: rows(getattr(lens, name)) for name in ("argmax", "rank", "top_ids")},
                    **{
                        name: rows(getattr(lens, name), 6)
                        for name in ("max_logprob", "entropy", "kl", "logprob", "top_logprobs", "attn", "mlp")
                    },
                    "first_correct": _or_null(found.first_correct),
                    "settle": _or_null(found.settle),
                }
            )
        head = {
            "title": self.title,
            "layers": self.layers,
            "positions": self.positions,
            "tokens": self.tokens,
            "targets": self.targets,
            "target_is": self.target_is,
            "texts": {str(id): text for id, text in sorted(self.texts.items())},
            "lenses": lenses,
            "segments": [vars(segment) for segment in self.segments],
            "facts": self.facts,
        }
        return json.dumps(head, ensure_ascii=False, allow_nan=False) + "\n"


def _or_null(layers: np.ndarray) -> list[int | None]:
    return [None if layer == NONE else layer for layer in layers.tolist()]


def visible(text: str) -> str:
    """The text of a token on one line, as maps show it: what cannot be printed has a sign, and mere spaces have.

    A terminal would take control characters of a stranger's text as commands.
    """
    if text and not text.replace(" ", ""):
        return text.replace(" ", "␣")
    return "".join(c if c.isprintable() else SIGNS.get(c, "·") for c in text) or "∅"
