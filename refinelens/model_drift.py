"""How far the layers of one model, a quantised one say, are from those of another, its original: `drift`.

Both read the same text. Of every layer the readouts are compared, each through the head of its own model: divergence,
best token, rank of the token that follows; and where a model's prediction settles.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .data.texts import load_text
from .errors import InputError
from .fitting.text import sequences
from .kernels.reference import LensHead, LensStats, apply_norm, row_chunk, soft_cap, z_chunks
from .lens.logit_lens import LogitLens
from .model.loading import LoadedModel, load_model
from .model.quantize import method_of
from .pages.html import write_page
from .progress import Progress, unseen
from .report.rows import counted
from .report.tables import print_lines
from .stats import FEW_QUESTIONS, Estimate, mean_estimates
from .store.files import write_cells, write_output
from .store.trajectory import trajectories
from .view_config import DriftConfig

LENGTH = 256  # tokens of a sequence, at most
# Of every layer, means over tokens.
BY_LAYER = {
    "kl": "KL(original || other), nats",
    "same_best": "share of tokens whose best token is the same",
    "rank_change": "log2 of the next token's rank, other less original",
    "logprob_change": "log-probability of the next token, other less original, nats",
    "state_change": "distance of the states, as a share of the original's size",
}
ONCE = {
    "settle_original": "layer from which its own prediction stays, original",
    "settle_other": "the same, other",
    "settle_change": "other less original",
    "settle_moved": "share of tokens where it is another layer",
    "logprob_original": "log-probability of the next token, original, nats",
    "logprob_other": "the same, other",
}


@dataclass(frozen=True)
class Drift:
    """What `drift` found; estimates are means over tokens with 95 % intervals over sequences."""

    model: str
    against: str
    text: str
    sequences: int
    tokens: int
    layers: list[dict[str, Estimate]]  # of layers 0 .. n_layers, by the names of `BY_LAYER`
    once: dict[str, Estimate]  # by the names of `ONCE`

    def rows(self) -> Iterator[list]:
        """Names, then a row for every layer and measure, then one for each of `ONCE`; the layer of these is empty."""
        yield ["measure", "layer", "value", "low", "high"]
        for layer, found in enumerate(self.layers):
            yield from ([name, layer, one.value, one.low, one.high] for name, one in found.items())
        yield from ([name, "", one.value, one.low, one.high] for name, one in self.once.items())

    def lines(self) -> list[str]:
        """In sentences."""
        last, words = self.layers[-1], {name: _words(one) for name, one in self.once.items()}
        worst = max(range(len(self.layers)), key=lambda layer: self.layers[layer]["kl"].value)
        return [
            f"{self.model} against {self.against}: {counted(self.tokens, 'token')} of {self.text}, in "
            f"{counted(self.sequences, 'sequence')}.",
            f"At the output KL is {_words(last['kl'])} nats and the best token the same for "
            f"{_words(last['same_best'])} of the tokens; KL is largest at layer {worst}: "
            f"{_words(self.layers[worst]['kl'])} nats.",
            f"Predictions settle at layer {words['settle_original']} in the original and {words['settle_other']} here "
            f"({words['settle_change']}; another layer for {words['settle_moved']} of the tokens).",
            f"Log-probability of the next token: {words['logprob_original']} nats in the original, "
            f"{words['logprob_other']} here.",
        ]

    def to_frame(self) -> Any:
        """A pandas data frame of `rows`."""
        import pandas

        names, *rows = self.rows()
        return pandas.DataFrame(rows, columns=names)

    def to_csv(self, path: str | Path) -> None:
        """Write `rows`."""
        write_cells(Path(path), ([_or_none(cell) for cell in row] for row in self.rows()))

    def to_html(self, path: str | Path, argv: Sequence[str] | None = None) -> None:
        """Write the page: curves by layer, and the numbers."""
        head = {
            "title": f"{self.model} against {self.against}",
            "lines": self.lines(),
            "measures": BY_LAYER,
            "layers": {name: [_triple(found[name]) for found in self.layers] for name in BY_LAYER},
            "facts": {"command": shlex.join(argv) if argv else "refinelens.drift, from Python"},
        }
        page = write_page("drift", f"{self.model} against {self.against}", head, {})
        write_output(Path(path), lambda temporary: temporary.write_text(page, encoding="utf-8"))


def _or_none(cell: object) -> object:
    return None if cell != cell else cell


def _triple(one: Estimate) -> list[float | None]:
    return [None if value != value else round(value, 6) for value in (one.value, one.low, one.high)]


def _words(one: Estimate) -> str:
    interval = "" if one.low != one.low else f" [{one.low:.3g}, {one.high:.3g}]"
    return f"{one.value:.3g}{interval}"


def print_drift(drift: Drift, console: Console) -> None:
    """The table of all layers, and what it comes to."""
    table = Table("layer", *(name.replace("_", " ") for name in BY_LAYER), box=SIMPLE_HEAD)
    for layer, found in enumerate(drift.layers):
        table.add_row(str(layer), *map(_words, found.values()))
    console.print(table)
    print_lines(console, [f"{name.replace('_', ' ')}: {what}." for name, what in BY_LAYER.items()])
    print_lines(console, ["", *drift.lines(), "Brackets: 95 % intervals over sequences."])


def run_drift(options: DriftConfig, progress: Progress = unseen) -> Drift:
    """Read a text with both models and compare them, layer by layer.

    Args:
        options: Both models and the text.
        progress: Called after every sequence.

    Raises:
        InputError: Nothing that would make the two differ, models of other layers or vocabularies, tokenizers that
            differ, or too short a text.
        FaultError: No memory for both.
    """
    if options.against is None and options.quantize is None:
        raise InputError("``against``: expected the original to compare with, or ``quantize``, got neither")
    text = load_text(options.text)
    loaded = load_model(options.model, **options.loading)
    plain = {"quantize": None, "device_map": None, "max_memory": None}
    if options.against is not None:
        plain |= {"revision": None, "subfolder": None}
    original = load_model(options.against or options.model, **options.loading | plain)
    lens, own = LogitLens(loaded.model), LogitLens(original.model)
    _check_alike(loaded, original, lens, own)
    length = min(LENGTH, options.tokens // FEW_QUESTIONS, *filter(None, (loaded.max_tokens, original.max_tokens)))
    wanted = options.tokens // max(length, 1)
    texts = list(sequences(text, loaded.tokenizer, length, wanted)) if length >= 2 else []
    if len(texts) < FEW_QUESTIONS:
        raise InputError(
            f"``text`` {text.name}: expected {FEW_QUESTIONS} sequences of {max(length, 2)} tokens or more, got "
            f"{len(texts)}; give more text or a smaller ``tokens``"
        )
    by_layer, once = [], []
    for number, ids in enumerate(texts):
        loaded.check_ids(ids, f"``text`` {text.name}")
        layers, single = _compared(own, lens, ids)
        by_layer.append(layers)
        once.append(single)
        progress("sequences", number + 1, len(texts))
    values = np.stack(by_layer)  # [sequence, layer, measure]
    found = mean_estimates(values.reshape(len(values), -1), np.ones((len(values), values[0].size)), 0)
    singles = mean_estimates(np.stack(once), np.ones((len(once), len(ONCE))), 0)
    rows = [found[start : start + len(BY_LAYER)] for start in range(0, len(found), len(BY_LAYER))]
    how = method_of(loaded.model.config)
    return Drift(
        model=options.model + (f" ({options.quantize or how})" if how else ""),
        against=options.against or options.model,
        text=text.name,
        sequences=len(texts),
        tokens=len(texts) * (length - 1),
        layers=[dict(zip(BY_LAYER, row, strict=True)) for row in rows],
        once=dict(zip(ONCE, singles, strict=True)),
    )


def _check_alike(loaded: LoadedModel, original: LoadedModel, lens: LogitLens, own: LogitLens) -> None:
    """Refuse two models that cannot be compared layer by layer and token by token."""
    pairs = {
        "layers": (own.n_layers, lens.n_layers),
        "vocabulary size": (own.head.vocab_size, lens.head.vocab_size),
        "tokenizer": (original.tokenizer_sha256[:12], loaded.tokenizer_sha256[:12]),
    }
    for name, (wanted, got) in pairs.items():
        if wanted != got:
            raise InputError(f"``model`` {loaded.name}: expected {name} {wanted}, as {original.name} has, got {got}")


def _compared(own: LogitLens, lens: LogitLens, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Means over the tokens of one sequence: ``[n_layers + 1, measure]``, and those of `ONCE`."""
    tokens, positions, following = torch.tensor([ids]), torch.arange(len(ids) - 1), torch.tensor(ids[1:])
    states = [one.hidden(tokens, positions)[:, 0] for one in (own, lens)]
    states[1] = states[1].to(states[0].device)
    stats = [
        one.stats(state, following.to(state.device)).to(states[0].device)
        for one, state in zip((own, lens), states, strict=True)
    ]
    a, b = stats
    changes = torch.stack(
        [
            kl_between(states[0], own.head, a, states[1], lens.head, b),
            (a.argmax == b.argmax).float(),
            torch.log2(b.target_rank + 1.0) - torch.log2(a.target_rank + 1.0),
            b.target_logprob - a.target_logprob,
            _distances(*states),
        ]
    )
    settles = [trajectories((one.argmax != one.argmax[-1]).long().cpu().numpy()).settle for one in stats]
    change = settles[1] - settles[0]
    logprobs = [float(one.target_logprob[-1].double().mean()) for one in stats]
    single = [settles[0].mean(), settles[1].mean(), change.mean(), (change != 0).mean(), *logprobs]
    return changes.double().mean(-1).T.cpu().numpy(), np.array(single, dtype=np.float64)


def _distances(states: Tensor, others: Tensor) -> Tensor:
    """Of residual streams ``[n_layers + 1, n, d_model]``; NaN where the models' widths differ."""
    if states.shape != others.shape:
        return torch.full(states.shape[:-1], torch.nan, device=states.device)
    return (others.float() - states.float()).norm(dim=-1) / states.float().norm(dim=-1)


@torch.no_grad()
def kl_between(
    states: Tensor, head: LensHead, stats: LensStats, others: Tensor, other_head: LensHead, other_stats: LensStats
) -> Tensor:
    """``KL(p || q)`` of the readouts of two models, fp32 ``[...]`` in nats, not negative.

    Logits of both are formed a chunk of the vocabulary at a time, and never kept.

    Args:
        states: ``[..., d_model]`` of the one.
        head: Its head.
        stats: Of these states through that head.
        others: ``[..., d_model]`` of the other, of any width.
        other_head: Its head, of the same vocabulary.
        other_stats: Of these states through that head.
    """
    found = []
    rows = row_chunk(states.device)
    flat = [value.reshape(-1, value.shape[-1]).split(rows) for value in (states, others)]
    sums = [one.logsumexp.reshape(-1, 1).split(rows) for one in (stats, other_stats)]
    for state, other, logsumexp, other_logsumexp in zip(*flat, *sums, strict=True):
        own = _log_probabilities(state, head, logsumexp)
        theirs = _log_probabilities(other.to(state.device), other_head, other_logsumexp)
        # A token that the one cannot say adds nothing; one that only the other cannot makes it infinite.
        parts = [torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1) for p, q in zip(own, theirs, strict=True)]
        found.append(torch.stack(parts).sum(0))
    return torch.cat(found).view_as(stats.logsumexp).clamp(min=0.0)


def _log_probabilities(states: Tensor, head: LensHead, logsumexp: Tensor) -> Iterator[Tensor]:
    """``[n, chunk]`` of neighbouring chunks of the vocabulary, whose sizes depend on ``n`` and the vocabulary alone."""
    states, head = head.projected(states)
    with torch.autocast(states.device.type, enabled=False):
        for _, _, z in z_chunks(apply_norm(states, head.norm), head):
            yield soft_cap(z, head.softcap) - logsumexp
