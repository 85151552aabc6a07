"""Lenses on disk: our own, with the manifest that says which model they were made for, and those of others by name."""

from __future__ import annotations

import reprlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..config import PLAIN
from ..errors import FaultError, InputError
from ..machine import other_packages
from ..options import check_utf8
from ..store.files import check_entries, read_json_object, sha256_of, write_whole
from ..store.folder import MANIFEST, Folder
from .published import (
    CONFIG,
    HUB,
    PARAMS,
    TUNED,
    from_hub,
    jacobian_file,
    read_jacobian_lens,
    read_tuned_lens,
)
from .translators import MODEL_KEYS, Translators

FORMAT_VERSION = 1
TENSORS = "lens.safetensors"


@dataclass(frozen=True)
class Lens:
    """What a sweep reads the layers with."""

    name: str  # plain, or the name of the lens's folder or file
    translators: Translators | None = None  # None for the plain logit lens
    manifest: dict = field(default_factory=dict)  # of the lens's folder
    sha256: str | None = None  # of the file with its tensors
    note: str | None = None  # what could not be checked of it

    @property
    def kind(self) -> str:
        """``plain``, or how the translators were made, such as ``linear``."""
        return self.manifest.get("kind", PLAIN)

    def made_otherwise(self) -> str | None:
        """Whether it was fitted under another major version of what runs the model, in words."""
        return other_packages(self.manifest.get("packages") or {})

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
    """Read a lens that `save_lens` wrote, a tuned lens of the package tuned-lens, or the file of a Jacobian lens.

    Args:
        path: A folder, for a Jacobian lens also its file; or ``hub:`` and its place there, see `from_hub`.

    Raises:
        InputError: No lens there, a manifest or tensors of another format, wrong shapes, NaN or infinity.
    """
    try:
        path = from_hub(str(path)) if str(path).startswith(HUB) else Path(path)
        if (path / MANIFEST).exists():
            (translators, manifest), tensors = _read_lens(path), path / TENSORS
        elif (path / CONFIG).exists() or (path / PARAMS).exists():
            (translators, manifest), tensors = read_tuned_lens(path), path / PARAMS
        elif (tensors := jacobian_file(path)) is not None:
            translators, manifest = read_jacobian_lens(tensors)
        else:
            got = "a file" if path.is_file() else "neither" if path.is_dir() else "no folder"
            raise InputError(
                f"expected plain or the folder of a lens ({MANIFEST}, or {CONFIG} and {PARAMS}), or the .pt file of a "
                f"Jacobian lens, got {got} there"
            )
        name = path.resolve().name
        if path == tensors:  # a file is named as its folder is where its own name says nothing
            name = path.absolute().parent.name if path.stem == "lens" else path.stem
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
    try:
        write_whole(path / TENSORS, lambda temporary: save_file(tensors, temporary))
    except SafetensorError as error:  # as it calls a disk that takes no more
        raise FaultError(f"``out`` {path}: expected {TENSORS} to be written, got: {error}; free some disk") from None
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
    if manifest["kind"] in (PLAIN, TUNED):
        raise InputError(f"expected the kind of a fitted lens in {path.name}, got {manifest['kind']}")
    return manifest
