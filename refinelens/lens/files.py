"""Lenses on disk: our own, with the manifest that says which model they were made for, and those of tuned-lens.

The format of the package tuned-lens (0.2.0, ``tuned_lens/nn/lenses.py``) is ``config.json`` and ``params.pt`` in a
folder: the state dict of one linear layer for each hidden layer, ``0.weight``, ``0.bias`` and so on, added residually
to the layer's states, the embedding output first.
"""

from __future__ import annotations

import pickle
import re
import reprlib
import textwrap
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import check_utf8
from ..errors import InputError
from ..store.files import check_entries, read_json_object, sha256_of, write_whole
from ..store.folder import MANIFEST, Folder
from .translators import DTYPES, MODEL_KEYS, Translators

KIND = "tuned"
CONFIG = "config.json"
PARAMS = "params.pt"
LENS_TYPE = "linear_tuned_lens"
REQUIRED = {"base_model_name_or_path": str, "d_model": int, "num_hidden_layers": int}
OPTIONAL = {"bias": bool, "base_model_revision": str, "unembed_hash": str, "lens_type": str}
WIDEST = 8  # bytes of a number
SLACK = 2**16  # bytes of a file beside its numbers, for each layer and once more
PLAIN = "plain"
FORMAT_VERSION = 1
TENSORS = "lens.safetensors"


def read_tuned_lens(folder: Path) -> tuple[Translators, dict]:
    """The translators of a tuned lens, and its manifest as `refinelens.lens.files.Lens` holds it.

    Raises:
        InputError: A config or parameters that do not fit, NaN or infinity, anything pickled but tensors.
        OSError: A file cannot be read.
    """
    config = _read_config(folder / CONFIG)
    n_layers, d_model, bias = config["num_hidden_layers"], config["d_model"], config.get("bias", True)
    shapes = {"weight": (d_model, d_model)} | ({"bias": (d_model,)} if bias else {})
    state = _load_state(folder / PARAMS, most=WIDEST * n_layers * d_model * (d_model + 1) + SLACK * (n_layers + 1))
    _check_state(state, n_layers, shapes)
    _check_bytes(state, (folder / PARAMS).stat().st_size)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in state.values()))
    tensors = {name: torch.stack([state[f"{i}.{name}"].detach().to(dtype) for i in range(n_layers)]) for name in shapes}
    tensors.setdefault("bias", torch.zeros(n_layers, d_model, dtype=dtype))
    model = {
        "name": config["base_model_name_or_path"],
        "revision": config.get("base_model_revision"),
        "n_layers": n_layers,
        "d_model": d_model,
        "unembed_hash": config.get("unembed_hash"),
    }
    return Translators(**tensors, made_for=model), {"kind": KIND, "model": model}


def _read_config(path: Path) -> dict:
    # Entries that nobody knows are left alone, as the package does.
    config = {key: value for key, value in read_json_object(path).items() if value is not None}
    check_entries(config, REQUIRED | {key: OPTIONAL[key] for key in OPTIONAL if key in config}, path.name, least=1)
    if config.get("lens_type", LENS_TYPE) != LENS_TYPE:
        raise InputError(f"expected the lens_type {LENS_TYPE} in {path.name}, got {config['lens_type']!r}")
    return config


def _load_state(path: Path, most: int) -> dict:
    if not path.is_file():
        raise InputError(f"expected the file {path.name}, got none")
    size = path.stat().st_size
    if size > most:
        raise InputError(f"expected at most {most} bytes in {path.name} for the layers of {CONFIG}, got {size}")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Torch's own text tells how to load it all the same, which nobody should.
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"pickled code ({name[1]})" if name else "pickled code or a damaged file"
        raise InputError(f"expected tensors alone in {path.name}, got {what}; nothing of it was run") from None
    except Exception as error:  # a damaged file can raise anything
        got = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
        raise InputError(f"expected a whole {path.name}, got {got}") from None
    if not isinstance(state, dict):
        raise InputError(f"expected a state dict in {path.name}, got {type(state).__name__}")
    return state


def _check_state(state: dict, n_layers: int, shapes: dict[str, tuple[int, ...]]) -> None:
    """Every tensor of every layer is there, of its shape, and nothing else."""
    wanted = {f"{layer}.{name}": (layer, name) for layer in range(n_layers) for name in shapes}
    for key, (layer, name) in wanted.items():
        if state.get(key) is None:
            raise InputError(f"expected a {name} of each of {n_layers} layers in {PARAMS}, got none of layer {layer}")
        if not _is_plain(state[key]):
            raise InputError(f"expected {key} in {PARAMS} to be a floating tensor, got another value")
        if tuple(state[key].shape) != shapes[name]:
            raise InputError(f"expected {key} of shape {list(shapes[name])} in {PARAMS}, got {list(state[key].shape)}")
    if len(state) > len(wanted):
        other = reprlib.repr(next(key for key in state if key not in wanted))
        raise InputError(f"expected the {' and '.join(shapes)} of {n_layers} layers in {PARAMS}, got {other} too")


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype in DTYPES
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _check_bytes(state: dict, size: int) -> None:
    """A few bytes can be pickled as tensors of any size."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > size:
        raise InputError(f"expected tensors with numbers of their own in {PARAMS}, got {claimed} bytes of {size}")


@dataclass(frozen=True)
class Lens:
    """What a sweep reads the layers with."""

    name: str  # plain, or the name of the lens's folder
    translators: Translators | None = None  # None for the plain logit lens
    manifest: dict = field(default_factory=dict)  # of the lens's folder
    sha256: str | None = None  # of the file with its tensors
    note: str | None = None  # what could not be checked of it

    @property
    def kind(self) -> str:
        """``plain``, or how the translators were made, such as ``linear``."""
        return self.manifest.get("kind", PLAIN)

    def entry(self) -> dict:
        """The lens as the manifest of a run holds it."""
        return {"name": self.name, "kind": self.kind, "sha256": self.sha256, "note": self.note}


def load_lenses(names: tuple[str, ...]) -> list[Lens]:
    """The lenses that ``lens`` names, checked as far as is possible without their model.

    Raises:
        InputError: A folder that does not hold a whole lens, or two of one name.
    """
    lenses = [Lens(PLAIN) if name == PLAIN else load_lens(name) for name in names]
    for name, count in Counter(lens.name for lens in lenses).items():
        if count > 1:
            raise InputError(f"``lens``: expected folders of different names, got {count} called {name}; rename one")
    return lenses


def load_lens(path: str | Path) -> Lens:
    """Read a lens that `save_lens` wrote, or a tuned lens of the package tuned-lens.

    Raises:
        InputError: No lens there, a manifest or tensors of another format, wrong shapes, NaN or infinity.
    """
    path = Path(path)
    try:
        if (path / MANIFEST).exists():
            (translators, manifest), tensors = _read_lens(path), path / TENSORS
        elif (path / CONFIG).exists() or (path / PARAMS).exists():
            (translators, manifest), tensors = read_tuned_lens(path), path / PARAMS
        else:
            got = "a file" if path.is_file() else "neither" if path.is_dir() else "no folder"
            raise InputError(
                f"expected plain or the folder of a lens ({MANIFEST}, or {CONFIG} and {PARAMS}), got {got} there"
            )
        name = path.resolve().name
        check_utf8("name of the folder", name)
        if name == PLAIN:
            raise InputError(f"expected another name than {PLAIN}, which means the plain logit lens; rename the folder")
        sha256 = sha256_of(tensors)
        if manifest.get("tensors_sha256", sha256) != sha256:
            raise InputError("expected the tensors that its manifest was written for, got others; fit the lens again")
        return Lens(name, translators, manifest, sha256)
    except InputError as error:
        raise InputError(f"``lens`` {path}: {error}") from None
    except OSError as error:
        raise InputError(f"``lens`` {path}: expected files that can be read, got: {error.strerror or error}") from None


def save_lens(path: Path, translators: Translators, manifest: dict) -> dict:
    """Write a lens: tensors first, then the manifest with their hash, which is returned; each whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": translators.weight.contiguous(), "bias": translators.bias.contiguous()}
    write_whole(path / TENSORS, lambda temporary: save_file(tensors, temporary))
    manifest = manifest | {"tensors_sha256": sha256_of(path / TENSORS)}
    Folder(path).write_manifest(manifest)
    return manifest


def _read_lens(path: Path) -> tuple[Translators, dict]:
    manifest = _read_manifest(path / MANIFEST)
    n_layers, d_model = manifest["model"]["n_layers"], manifest["model"]["d_model"]
    wanted = {"weight": [n_layers, d_model, d_model], "bias": [n_layers, d_model]}
    try:
        with safe_open(path / TENSORS, framework="pt") as file:
            found = {key: file.get_slice(key).get_shape() for key in file.keys()}
            if found != wanted:
                raise InputError(
                    f"expected the tensors {_shapes(wanted)} that its manifest names, got {_shapes(found) or 'none'}"
                )
            tensors = {key: file.get_tensor(key) for key in wanted}
            return Translators(**tensors, made_for=manifest["model"]), manifest
    except FileNotFoundError:
        raise InputError(f"expected {TENSORS} beside the manifest, got none; fit the lens again") from None
    except SafetensorError as error:
        raise InputError(f"expected a whole {TENSORS}, got: {error}") from None


def _shapes(shapes: dict[str, list[int]]) -> str:
    names = sorted(shapes, reverse=True)[:4]  # of a foreign file perhaps hundreds
    return ", ".join(f"{name} {shapes[name]}" for name in names) + (" ..." if len(shapes) > len(names) else "")


def _read_manifest(path: Path) -> dict:
    manifest = read_json_object(path)
    version = manifest.get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise InputError(f"expected format version {FORMAT_VERSION}, got {reprlib.repr(version)}")
    check_entries(manifest, {"format_version": int, "kind": str, "model": MODEL_KEYS}, path.name, least=1)
    if manifest["kind"] in (PLAIN, KIND):
        raise InputError(f"expected the kind of a fitted lens in {path.name}, got {manifest['kind']}")
    return manifest
