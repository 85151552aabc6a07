"""Cautions: where a lens cannot resolve refinement depth, and what would."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa

from .summary import reading_cells


@dataclass(frozen=True)
class Caution:
    """A lens and threshold with which more than half of the settled examples settle at the output."""

    lens: str
    top: int
    at_output: int  # examples
    settled: int  # examples


def find_cautions(table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...], n_layers: int) -> list[Caution]:
    """Every lens and threshold whose small depths speak of the lens, not of the model."""
    found = []
    for (lens, top), cells in groupby(reading_cells(table, lenses, tops), key=lambda item: item[:2]):
        settle = np.concatenate([cell["settle"][cell["final_correct"]] for *_, cell in cells])
        at_output = int((settle == n_layers).sum())
        if 2 * at_output > len(settle):
            found.append(Caution(lens, top, at_output, len(settle)))
    return found


def caution_lines(cautions: list[Caution], manifest: dict) -> list[str]:
    """One line per lens: what is so, what it means, and the remedy."""
    lines = []
    for lens, group in groupby(cautions, key=lambda caution: caution.lens):
        found = ", ".join(f"{c.at_output} of {c.settled} (rank <= {c.top})" for c in group)
        lines.append(
            f"Caution, lens {lens}: {found} settled examples settle only at the output: this lens cannot resolve "
            f"refinement depth on this model, and depth speaks of the lens. Remedy: {_remedy(lens, manifest)}."
        )
    return lines


def _remedy(lens: str, manifest: dict) -> str:
    kinds = {entry["name"]: entry["kind"] for entry in manifest["lenses"]}
    if kinds[lens] != "plain":
        return "a larger --top, or more tokens in the fit of the lens"
    model = manifest["arguments"]["model"]
    return f"refinelens fit --model {model} --out LENS, then sweep with --lens plain,LENS"
