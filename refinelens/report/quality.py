"""How well a lens that was fitted reads held-out text: its table in the terminal and its CSV file."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from ..store.files import write_cells
from .rows import counted
from .tables import WIDTH, new_table, print_lines

QUALITY_TABLE = "quality.csv"
MEASURES = {"variance_explained": ("var.", "{:.2f}"), "kl": ("KL", "{:.3f}"), "top1": ("top-1", "{:.2f}")}


def print_quality(console: Console, manifest: dict) -> None:
    """Print how well a lens that was fitted reads held-out text and, under it, what the numbers are."""
    console.width = max(console.width, WIDTH)  # a pipe reports 80
    quality, tokens = manifest["quality"], manifest["tokens"]
    headings = [f"{lens}\n{heading}" for heading, _ in MEASURES.values() for lens in quality]
    errors = _jacobian_errors(manifest)
    table = new_table(["layer", "ridge", *headings, *(["error"] if errors else [])], vertical="bottom")
    for layer, strength in enumerate([*manifest["ridge"], None]):
        cells = [form.format(quality[lens][name][layer]) for name, (_, form) in MEASURES.items() for lens in quality]
        cells += [] if not errors else ["" if errors[layer] is None else f"{errors[layer]:.2f}"]
        table.add_row(str(layer), "" if strength is None else f"{strength:.0e}", *cells)
    console.print(table)
    jacobian = manifest.get("jacobian")
    lines = [] if jacobian is None else [
        f"jacobian: the mean over {counted(jacobian['prompts'], 'prompt')} of {jacobian['prompt_tokens']} tokens, "
        f"less the first {jacobian['positions_skipped']} and the last; layers from {jacobian['from_layer']} on, those "
        "below are read plain. error: of that mean as a share of its size, by comparing every other prompt."
    ]  # fmt: skip
    lines += [
        "ridge: strength as a share of the states' mean variance. var.: share explained of the output's residual "
        "stream. KL: KL(final || layer) in nats, final the model's own prediction. top-1: share of tokens with the "
        "model's own argmax.",
        f"Fitted on {counted(tokens['fit'], 'token')} of the text {manifest['text']['name']}, strength chosen on "
        f"{tokens['choose']}, all numbers from {tokens['report']} others, in {manifest['seconds']:.0f} s.",
    ]
    print_lines(console, lines)


def _jacobian_errors(manifest: dict) -> list[float | None]:
    """By layer, the output included; None where a layer has no matrix, no list where there is no error."""
    found = manifest.get("jacobian") or {"errors": None}
    return [*[None] * found["from_layer"], *found["errors"], None] if found["errors"] else []


def write_quality(folder: Path, manifest: dict) -> None:
    """Write ``quality.csv``: one line per layer, every measure of every lens."""
    quality = manifest["quality"]
    both = [(lens, name) for lens in quality for name in MEASURES]
    errors = _jacobian_errors(manifest)
    own = ["jacobian_error"] if errors else []
    lines: list[list] = [["layer", "ridge", *(f"{lens}_{name}" for lens, name in both), *own]]
    for layer, strength in enumerate([*manifest["ridge"], ""]):
        error = [] if not errors else ["" if errors[layer] is None else f"{errors[layer]:.6g}"]
        lines.append([layer, strength, *(f"{quality[lens][name][layer]:.6g}" for lens, name in both), *error])
    write_cells(folder / QUALITY_TABLE, lines)
