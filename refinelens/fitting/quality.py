"""How well a lens reads held-out text, layer by layer, beside the plain logit lens: measured, then table and figure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ..errors import InputError
from ..lens.logit_lens import LogitLens
from ..lens.translators import Translators
from ..report.findings import counted
from ..report.tables import WIDTH
from ..store.folder import write_cells, write_whole

NEGLIGIBLE = 1e-12  # variance as a share of the mean square: rounding
TABLE = "quality.csv"
FIGURE = "quality.png"
MEASURES = ("variance_explained", "kl", "top1")
COLUMNS = {"variance_explained": "var.", "kl": "KL", "top1": "top-1"}
DIGITS = {"variance_explained": "{:.2f}".format, "kl": "{:.3f}".format, "top1": "{:.2f}".format}


@dataclass(frozen=True)
class Quality:
    """Means over held-out tokens; every list ``[n_layers + 1]``, the output last."""

    tokens: int
    variance_explained: list[float]  # of the last layer's residual stream; below 0 where worse than its mean
    kl: list[float]  # nats, KL(p_final || p_layer)
    top1: list[float]  # share of tokens where the layer's argmax is the model's own prediction


def measure(
    logit_lens: LogitLens, states: Iterable[Tensor], lenses: dict[str, Translators | None]
) -> dict[str, Quality]:
    """The quality of every lens (None: the plain one) on ``states`` ``[n_layers + 1, tokens, d_model]``.

    Raises:
        InputError: The last layer's states do not vary.
    """
    tallies = {name: _Tally(lens) for name, lens in lenses.items()}
    for hidden in states:
        for tally in tallies.values():
            tally.add(logit_lens, hidden)
    return {name: tally.quality() for name, tally in tallies.items()}


class _Tally:
    """Sums of one lens over the tokens seen so far."""

    def __init__(self, translators: Translators | None):
        self._translators = translators
        self._tokens = 0
        self._sums: Tensor | None = None  # [3, n_layers + 1]: squared error, KL, agreement
        self._y: Tensor | float = 0.0  # [d_model] sum of the last layer's states
        self._yy: Tensor | float = 0.0  # and of their squares

    def add(self, logit_lens: LogitLens, hidden: Tensor) -> None:
        reading = logit_lens.read_states(hidden[:, None], None, self._translators, check_last=False)
        y = hidden[-1].double()
        error = torch.stack([self._squared_error(layer, x, y) for layer, x in enumerate(hidden)])
        agreement = (reading.stats.argmax == reading.stats.argmax[-1]).double().sum((1, 2))
        sums = torch.stack([error, reading.kl.double().sum((1, 2)), agreement]).cpu()
        self._sums = sums if self._sums is None else self._sums + sums
        self._tokens += len(y)
        self._y, self._yy = self._y + y.sum(0), self._yy + (y * y).sum(0)

    def _squared_error(self, layer: int, x: Tensor, y: Tensor) -> Tensor:
        if self._translators is not None and layer < self._translators.n_layers:
            x = self._translators.one(layer, x)
        return ((x.double() - y) ** 2).sum()

    def quality(self) -> Quality:
        error, kl, agreement = self._sums
        n = self._tokens
        variance = float((self._yy - self._y**2 / n).sum())
        if not variance > NEGLIGIBLE * float(self._yy.sum()):
            raise InputError("--text: expected held-out text whose tokens differ, got states that do not vary")
        return Quality(n, (1.0 - error / variance).tolist(), (kl / n).tolist(), (agreement / n).tolist())


def write_csv(folder: Path, manifest: dict) -> None:
    """Write ``quality.csv``: one line per layer, every measure of every lens."""
    quality = manifest["quality"]
    names = [f"{lens}_{measure}" for lens in quality for measure in MEASURES]
    lines: list[list] = [["layer", "ridge", *names]]
    for layer, strength in enumerate([*manifest["ridge"], ""]):
        cells = [f"{quality[lens][measure][layer]:.6g}" for lens in quality for measure in MEASURES]
        lines.append([layer, strength, *cells])
    write_cells(folder / TABLE, lines)


def print_quality(console: Console, manifest: dict) -> None:
    """Print the report and, under it, what the numbers are."""
    console.width = max(console.width, WIDTH)  # a pipe reports 80
    quality, tokens = manifest["quality"], manifest["tokens"]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    headings = [f"{lens}\n{COLUMNS[measure]}" for measure in MEASURES for lens in quality]
    for heading in ("layer", "ridge", *headings):
        table.add_column(heading, justify="right", no_wrap=True, vertical="bottom")
    for layer, strength in enumerate([*manifest["ridge"], None]):
        cells = [DIGITS[measure](quality[lens][measure][layer]) for measure in MEASURES for lens in quality]
        table.add_row(str(layer), "" if strength is None else f"{strength:.0e}", *cells)
    console.print(table)
    lines = [
        "ridge: strength as a share of the states' mean variance. var.: share explained of the output's residual "
        "stream. KL: KL(final || layer) in nats, final the model's own prediction. top-1: share of tokens with the "
        "model's own argmax.",
        f"Fitted on {counted(tokens['fit'], 'token')} of the text {manifest['text']['name']}, strength chosen on "
        f"{tokens['choose']}, all numbers from {tokens['report']} others, in {manifest['seconds']:.0f} s.",
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def draw_figure(folder: Path, manifest: dict) -> None:
    """Write ``quality.png``: KL(final || layer) and top-1 agreement over layers, one line per lens."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(8.0, 3.6), layout="constrained")
    labels = {"kl": "KL(final || layer)\n(mean nats; axis linear below 1)", "top1": "same argmax as the model (share)"}
    for axes, (measure, label) in zip(panels, labels.items(), strict=True):
        for lens, quality in manifest["quality"].items():
            axes.plot(quality[measure], marker=".", label=lens)
        axes.set(xlabel="layer (0: embedding; last: output)", ylabel=label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yscale("symlog", linthresh=1.0)  # 0 at the output, and perhaps a hundred at the embedding
    panels[0].yaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylim(0, None)
    panels[0].legend(frameon=False)
    panels[1].set_ylim(0, 1.02)
    model, text = (Path(manifest[what]["name"]).name for what in ("model", "text"))
    tokens = counted(manifest["tokens"]["report"], "held-out token")
    figure.suptitle(f"{model}: {tokens} of the text {text}", fontsize=10, parse_math=False)
    write_whole(folder / FIGURE, lambda path: figure.savefig(path, dpi=150, format="png"))
    plt.close(figure)
