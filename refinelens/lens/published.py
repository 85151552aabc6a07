"""Lenses as others publish them, from a disk or from the hub.

Tuned lenses, by the package tuned-lens (0.2.0, ``tuned_lens/nn/lenses.py``): ``config.json`` and ``params.pt`` in a
folder, the state dict of one linear layer for each hidden layer, ``0.weight``, ``0.bias`` and so on, added residually
to the layer's states, the embedding output first.

Jacobian lenses, by the code of their authors (Anthropic 2026, ``jlens/lens.py``): one file of torch with ``J``, a
matrix ``[d_model, d_model]`` for each of ``source_layers``, ``n_prompts`` and ``d_model``. Their layer l is the output
of block l, so our l + 1; a state ``h`` becomes ``J h``.
"""

from __future__ import annotations

import pickle
import re
import reprlib
import textwrap
import warnings
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..store.files import check_entries, read_json_object
from .translators import DTYPES, Translators

HUB = "hub:"
SPACES = "spaces"
JACOBIAN = "jacobian"
MOST_LAYERS = 1000  # of a model; a few bytes can name any layer
JACOBIAN_FILE = "lens.pt"  # of a folder, by default
JACOBIAN_ENTRIES = {"J": dict, "n_prompts": int, "source_layers": list, "d_model": int}
TUNED = "tuned"
CONFIG = "config.json"
PARAMS = "params.pt"
LENS_TYPE = "linear_tuned_lens"
REQUIRED = {"base_model_name_or_path": str, "d_model": int, "num_hidden_layers": int}
OPTIONAL = {"bias": bool, "base_model_revision": str, "unembed_hash": str, "lens_type": str}
WIDEST = 8  # bytes of a number
SLACK = 2**16  # bytes of a file beside its numbers, for each layer and once more


def from_hub(name: str) -> Path:
    """Where a lens of the hub lies on this machine; what is not in its cache yet is fetched.

    Args:
        name: ``hub:OWNER/NAME/PATH``, the path of a Jacobian lens's ``.pt`` file, or of a tuned lens's folder, within a
            repository of models; of a space, as tuned lenses are published in, ``hub:spaces/OWNER/NAME/PATH``.

    Raises:
        InputError: Another name, or nothing of it there and no network.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars

    parts = name.removeprefix(HUB).strip("/").split("/")
    kind, parts = ("space", parts[1:]) if parts[0] == SPACES else ("model", parts)
    if len(parts) < 3 or not all(parts):
        raise InputError(f"expected {HUB}OWNER/NAME/PATH or {HUB}{SPACES}/OWNER/NAME/PATH, got {name}")
    repository, path = "/".join(parts[:2]), "/".join(parts[2:])
    files = [path] if path.endswith(".pt") else [f"{path}/{CONFIG}", f"{path}/{PARAMS}"]
    disable_progress_bars()
    places = []
    for file in files:
        try:
            places.append(huggingface_hub.hf_hub_download(repository, file, repo_type=kind))
        except Exception as error:  # of its own, of the network, of the disk
            why = textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
            raise InputError(
                f"expected {file} of {repository} from the hub or its cache, got {why}; where there is a network: "
                f"hf download {repository} {file} --repo-type {kind}"
            ) from None
    return Path(places[0]) if len(places) == 1 else Path(places[0]).parent


def jacobian_file(path: Path) -> Path | None:
    """The file of a Jacobian lens that a path names: itself, or of a folder ``lens.pt`` or its only ``.pt`` file."""
    if path.is_file():
        return path if path.suffix == ".pt" else None
    found = sorted(path.glob("*.pt"))
    named = [file for file in found if file.name == JACOBIAN_FILE]
    return (named or found)[0] if named or len(found) == 1 else None


def read_jacobian_lens(path: Path) -> tuple[Translators, dict]:
    """The translators of a Jacobian lens, up to its highest layer, and its manifest as `files.Lens` holds it.

    Raises:
        InputError: Entries that do not fit, NaN or infinity, anything pickled but tensors.
        OSError: The file cannot be read.
    """
    saved = _load_state(path)
    if "jacobian_sum" in saved:
        raise InputError(f"expected a Jacobian lens in {path.name}, got a checkpoint of its fit; save the lens itself")
    check_entries(saved, JACOBIAN_ENTRIES, path.name, least=1)
    jacobians, d_model = saved["J"], saved["d_model"]
    layers = sorted(layer for layer in jacobians if type(layer) is int)
    named = [layer for layer in saved["source_layers"] if type(layer) is int]
    if not layers or layers[0] < 0 or len(layers) < len(jacobians) or layers != sorted(named):
        raise InputError(
            f"expected a matrix in J for each of source_layers in {path.name}, got {reprlib.repr(list(jacobians))} for "
            f"{reprlib.repr(saved['source_layers'])}"
        )
    for layer, matrix in jacobians.items():
        if not _is_plain(matrix) or tuple(matrix.shape) != (d_model, d_model):
            got = f"{list(matrix.shape)} {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise InputError(
                f"expected J[{layer}] as a floating tensor {[d_model, d_model]} in {path.name}, got {got}"
            )
    if layers[-1] >= MOST_LAYERS:
        raise InputError(f"expected layers below {MOST_LAYERS} in {path.name}, got {layers[-1]}")
    _check_bytes(jacobians, path)
    weight = torch.zeros(layers[-1] + 2, d_model, d_model)
    for layer, matrix in jacobians.items():
        weight[layer + 1] = matrix.detach().float() - torch.eye(d_model)
    ours = [layer + 1 for layer in layers]
    model = {"name": "a model that its file does not name", "d_model": d_model, "source_layers": ours}
    manifest = {"kind": JACOBIAN, "model": model, JACOBIAN: {"prompts": saved["n_prompts"]}}
    return Translators(weight, torch.zeros(weight.shape[:2]), made_for=model), manifest


def read_tuned_lens(folder: Path) -> tuple[Translators, dict]:
    """The translators of a tuned lens, and its manifest as `files.Lens` holds it.

    Raises:
        InputError: A config or parameters that do not fit, NaN or infinity, anything pickled but tensors.
        OSError: A file cannot be read.
    """
    config = _read_config(folder / CONFIG)
    n_layers, d_model, bias = config["num_hidden_layers"], config["d_model"], config.get("bias", True)
    shapes = {"weight": (d_model, d_model)} | ({"bias": (d_model,)} if bias else {})
    state = _load_state(folder / PARAMS, most=WIDEST * n_layers * d_model * (d_model + 1) + SLACK * (n_layers + 1))
    _check_state(state, n_layers, shapes)
    _check_bytes(state, folder / PARAMS)
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
    return Translators(**tensors, made_for=model), {"kind": TUNED, "model": model}


def _read_config(path: Path) -> dict:
    # Entries that nobody knows are left alone, as the package does.
    config = {key: value for key, value in read_json_object(path).items() if value is not None}
    check_entries(config, REQUIRED | {key: OPTIONAL[key] for key in OPTIONAL if key in config}, path.name, least=1)
    if config.get("lens_type", LENS_TYPE) != LENS_TYPE:
        raise InputError(f"expected the lens_type {LENS_TYPE} in {path.name}, got {config['lens_type']!r}")
    return config


def _load_state(path: Path, most: int | None = None) -> dict:
    if not path.is_file():
        raise InputError(f"expected the file {path.name}, got none")
    size = path.stat().st_size
    if most is not None and size > most:
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
    for layer, name in ((layer, name) for layer in range(n_layers) for name in shapes):  # n_layers may be any number
        key = f"{layer}.{name}"
        if state.get(key) is None:
            raise InputError(f"expected a {name} of each of {n_layers} layers in {PARAMS}, got none of layer {layer}")
        if not _is_plain(state[key]):
            raise InputError(f"expected {key} in {PARAMS} to be a floating tensor, got another value")
        if tuple(state[key].shape) != shapes[name]:
            raise InputError(f"expected {key} of shape {list(shapes[name])} in {PARAMS}, got {list(state[key].shape)}")
    if len(state) > n_layers * len(shapes):
        wanted = {f"{layer}.{name}" for layer in range(n_layers) for name in shapes}
        other = reprlib.repr(next(key for key in state if key not in wanted))
        raise InputError(f"expected the {' and '.join(shapes)} of {n_layers} layers in {PARAMS}, got {other} too")


def _is_plain(value: object) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dtype in DTYPES
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )


def _check_bytes(tensors: dict, path: Path) -> None:
    """A few bytes can be pickled as tensors of any size."""
    claimed, size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()), path.stat().st_size
    if claimed > size:
        raise InputError(f"expected tensors with numbers of their own in {path.name}, got {claimed} bytes of {size}")
