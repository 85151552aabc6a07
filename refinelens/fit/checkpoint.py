"""A fit that was stopped and goes on: its statistics on disk, with what they are of."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import InputError
from ..runs.durable import write_whole
from .statistics import Statistics

NAME = "statistics.safetensors"


def save(folder: Path, identity: dict, done: int, fit: Statistics, choose: Statistics) -> None:
    """Write the statistics of the first ``done`` sequences."""
    tensors = fit.tensors("fit") | choose.tensors("choose")
    metadata = {"identity": json.dumps(identity), "done": str(done)}
    write_whole(folder / NAME, lambda path: save_file(tensors, path, metadata))


def load(
    folder: Path, identity: dict, device: torch.device, overwrite: bool = False
) -> tuple[int, Statistics, Statistics] | None:
    """(sequences done, statistics to fit, statistics to choose), or None if there is nothing to go on from.

    Raises:
        InputError: The file is of another fit (the first difference is named), or damaged, and must not be
            overwritten.
    """
    if not (folder / NAME).exists():
        return None
    try:
        return _read(folder, identity, device)
    except InputError:
        if overwrite:
            return None
        raise


def _read(folder: Path, identity: dict, device: torch.device) -> tuple[int, Statistics, Statistics]:
    path = folder / NAME
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        there = json.loads(metadata["identity"])
        state = [Statistics.from_tensors(tensors, prefix, device) for prefix in ("fit", "choose")]
        done = int(metadata["done"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--out {folder}: expected a whole {NAME}, got: {error}; pass --overwrite to begin again"
        ) from None
    for key, value in identity.items():
        if there.get(key) != value:
            raise InputError(
                f"--out {folder}: expected to go on with {key} {there.get(key)}, got {value}; pass --overwrite to "
                "begin again"
            )
    return done, *state
