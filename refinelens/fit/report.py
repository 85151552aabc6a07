"""The quality report of a lens: table, CSV and figure, from its manifest alone."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ..report.table import WIDTH
from ..report.words import counted
from ..runs.durable import write_cells, write_whole

TABLE = "quality.csv"
FIGURE = "quality.png"
MEASURES = ("variance_explained", "kl", "top1")
COLUMNS = {"variance_explained": "var.", "kl": "KL", "top1": "top-1"}
DIGITS = {"variance_explained": "{:.2f}".format, "kl": "{:.3f}".format, "top1": "{:.2f}".format}


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
