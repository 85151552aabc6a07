"""Lenses on disk: translators with the manifest that says which model they were made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import InputError
from .logit_lens import LogitLens
from .models import LoadedModel
from .results import write_whole
from .translators import Translators

PLAIN = "plain"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TENSORS = "lens.safetensors"
MODEL_KEYS = ("name", "class", "config_sha256", "weights_sample_sha256", "n_layers", "d_model")


@dataclass(frozen=True)
class Lens:
    """What a sweep reads the layers with."""

    name: str  # plain, or the name of the lens's folder
    translators: Translators | None = None  # None for the plain logit lens
    manifest: dict = field(default_factory=dict)  # of the lens's folder
    sha256: str | None = None  # of its tensors

    @property
    def kind(self) -> str:
        """``plain``, or how the translators were made, such as ``linear``."""
        return self.manifest.get("kind", PLAIN)

    def entry(self) -> dict:
        """The lens as the manifest of a run holds it."""
        return {"name": self.name, "kind": self.kind, "sha256": self.sha256}


def load_lenses(names: tuple[str, ...]) -> list[Lens]:
    """The lenses that ``--lens`` names, checked as far as is possible without their model.

    Raises:
        InputError: A folder that does not hold a whole lens, or two of one name.
    """
    lenses = [Lens(PLAIN) if name == PLAIN else load_lens(name) for name in names]
    found = [lens.name for lens in lenses]
    if len(set(found)) < len(found):
        raise InputError(f"--lens: expected folders of different names, got {', '.join(found)}; rename one")
    return lenses


def load_lens(path: str | Path) -> Lens:
    """Read a lens that `save_lens` wrote.

    Raises:
        InputError: No lens there, a manifest or tensors of another format, wrong shapes, NaN or infinity.
    """
    path = Path(path)
    manifest = _read_manifest(path)
    try:
        tensors = load_file(path / TENSORS)
    except FileNotFoundError:
        raise InputError(
            f"--lens {path}: expected {TENSORS} beside the manifest, got none; fit the lens again"
        ) from None
    except (OSError, SafetensorError) as error:
        raise InputError(f"--lens {path}: expected a whole {TENSORS}, got: {error}") from None
    if set(tensors) != {"weight", "bias"}:
        raise InputError(
            f"--lens {path}: expected the tensors weight and bias, got {', '.join(sorted(tensors)) or 'none'}"
        )
    try:
        translators = Translators(tensors["weight"], tensors["bias"])
    except InputError as error:
        raise InputError(f"--lens {path}: {error}") from None
    wanted, got = (
        (manifest["model"]["n_layers"], manifest["model"]["d_model"]),
        (translators.n_layers, translators.d_model),
    )
    if wanted != got:
        raise InputError(
            f"--lens {path}: expected translators for the {wanted[0]} layers of width {wanted[1]} that its manifest "
            f"names, got {got[0]} of width {got[1]}"
        )
    sha256 = hashlib.sha256((path / TENSORS).read_bytes()).hexdigest()
    return Lens(path.resolve().name, translators, manifest, sha256)


def save_lens(path: Path, translators: Translators, manifest: dict) -> None:
    """Write a lens: tensors first, then the manifest, each whole or not at all."""
    path.mkdir(parents=True, exist_ok=True)
    tensors = {"weight": translators.weight.contiguous(), "bias": translators.bias.contiguous()}
    write_whole(path / TENSORS, lambda temporary: save_file(tensors, temporary))
    text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
    write_whole(path / MANIFEST, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def model_entry(loaded: LoadedModel, logit_lens: LogitLens) -> dict:
    """What the manifest of a lens says of its model."""
    values = (loaded.name, type(loaded.model).__name__, loaded.config_sha256, loaded.weights_sample_sha256)
    return dict(zip(MODEL_KEYS, (*values, logit_lens.n_layers, logit_lens.d_model), strict=True))


def fit_to_model(lens: Lens, loaded: LoadedModel, logit_lens: LogitLens) -> Lens:
    """The lens with its translators on the model's device and in its dtype.

    Raises:
        InputError: It was made for another model, or another revision of this one.
    """
    if lens.translators is None:
        return lens
    made_for, here = lens.manifest["model"], model_entry(loaded, logit_lens)
    for key in ("class", "n_layers", "d_model", "config_sha256", "weights_sample_sha256"):
        if made_for[key] != here[key]:
            what = "another revision of it" if key == "weights_sample_sha256" else "another model"
            raise InputError(
                f"--lens {lens.name}: expected a lens made for {here['name']}, got one for {made_for['name']}, {what} "
                f"({key} {str(made_for[key])[:12]} there, {str(here[key])[:12]} here); fit one with refinelens fit"
            )
    translators = lens.translators.to(loaded.model.device, loaded.model.dtype)
    return Lens(lens.name, translators, lens.manifest, lens.sha256)


def _read_manifest(path: Path) -> dict:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        whole = (
            isinstance(manifest["model"], dict) and set(MODEL_KEYS) <= manifest["model"].keys() and "kind" in manifest
        )
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"--lens: expected plain or the folder of a lens, got no {MANIFEST} in {path}") from None
    except OSError as error:
        raise InputError(f"--lens {path}: expected a readable {MANIFEST}, got: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise InputError(f"--lens {path}: expected the manifest of a lens, got something else")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"--lens {path}: expected format version {FORMAT_VERSION}, got {manifest.get('format_version')}"
        )
    return manifest
