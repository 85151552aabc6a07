"""Tuned lenses in the format of the package tuned-lens: ``config.json`` and ``params.pt`` in a folder.

The format is that of tuned-lens 0.2.0 (``tuned_lens/nn/lenses.py``): the state dict of one linear layer for each
hidden layer, ``0.weight``, ``0.bias`` and so on, added residually to the layer's states, the embedding output first.
"""

from __future__ import annotations

import hashlib
import pickle
import re
import reprlib
import textwrap
import warnings
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..runs.files import check_entries, read_json_object
from .translators import DTYPES, Translators

KIND = "tuned"
CONFIG = "config.json"
PARAMS = "params.pt"
LENS_TYPE = "linear_tuned_lens"
REQUIRED = {"base_model_name_or_path": str, "d_model": int, "num_hidden_layers": int}
OPTIONAL = {"bias": bool, "base_model_revision": str, "unembed_hash": str, "lens_type": str}
WIDEST = 8  # bytes of a number
SLACK = 2**16  # bytes of a file beside its numbers, for each layer and once more
EDGE = 3  # rows and columns at either end that numpy prints of a large array
PRINTED_WHOLE = 1000  # numbers of an array that numpy prints whole


def read_tuned_lens(folder: Path) -> tuple[Translators, dict]:
    """The translators of a tuned lens, and its manifest as `refinelens.lenses.lens_files.Lens` holds it.

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


def compare_unembedding(made_for: dict, unembedding: Tensor) -> str | None:
    """Hold the unembedding that a tuned lens was made for against the model's own.

    The package hashes numbers printed with one digit, and the same numbers print differently once they are
    rounded to another dtype. From an unembedding in fp32 every rounding can be made again; from one in half
    precision not, so that there a different hash proves nothing.

    Args:
        made_for: The ``model`` of a tuned lens's manifest.
        unembedding: ``[vocab_size, d_model]``, the model's own, in its dtype.

    Returns:
        Why they could not be compared, or None where they are the same.

    Raises:
        InputError: They differ.
    """
    wanted = made_for["unembed_hash"]
    if not wanted:
        return f"its {CONFIG} holds no unembed_hash; only d_model and num_hidden_layers were compared"
    if wanted in (unembed_hash(unembedding, dtype) for dtype in DTYPES):
        return None
    if unembedding.dtype.itemsize < torch.float32.itemsize:
        name = str(unembedding.dtype).removeprefix("torch.")
        return f"its unembed_hash is not that of the model in {name}, which rounding may cause; float32 would tell"
    own = unembed_hash(unembedding, unembedding.dtype)
    raise InputError(f"unembed_hash {wanted[:12]} there, {own[:12]} here")


def unembed_hash(unembedding: Tensor, dtype: torch.dtype) -> str:
    """The package's hash of an unembedding ``[vocab_size, d_model]`` that was loaded in ``dtype``.

    SHA-256 of the matrix in fp32 as ``numpy.array_str`` prints it with one digit (``tensor_hash`` in
    ``tuned_lens/utils.py``); of a large matrix that is the first and last three rows and columns, so that only
    those are brought here.
    """
    whole = unembedding.numel() <= PRINTED_WHOLE
    if not whole:
        rows, columns = (_printed(n).to(unembedding.device) for n in unembedding.shape)
        unembedding = unembedding[rows][:, columns]
    numbers = unembedding.detach().to("cpu", dtype).float().numpy()
    threshold = PRINTED_WHOLE if whole else 0
    with np.printoptions(
        threshold=threshold, edgeitems=EDGE, linewidth=75, suppress=False, sign="-", floatmode="maxprec", legacy=False
    ):
        text = np.array_str(numbers, precision=1)
    return hashlib.sha256(text.encode()).hexdigest()


def _printed(n: int) -> Tensor:
    """Indices that numpy prints of ``n``, and one between them for its dots."""
    ends = torch.cat([torch.arange(EDGE + 1), torch.arange(n - EDGE, n)])
    return torch.arange(n) if n <= len(ends) else ends


def _read_config(path: Path) -> dict:
    # Entries that nobody knows are left alone, as the package does.
    config = {key: value for key, value in read_json_object(path).items() if value is not None}
    check_entries(config, REQUIRED, path.name)
    check_entries(config, {key: kind for key, kind in OPTIONAL.items() if key in config}, path.name)
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
    for layer in range(n_layers):
        for name, shape in shapes.items():
            tensor = state.get(f"{layer}.{name}")
            if tensor is None:
                raise InputError(
                    f"expected a {name} of each of {n_layers} layers in {PARAMS}, got none of layer {layer}"
                )
            if not _is_plain(tensor):
                raise InputError(f"expected {layer}.{name} in {PARAMS} to be a floating tensor, got another value")
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"expected {layer}.{name} of shape {list(shape)} in {PARAMS}, got {list(tensor.shape)}"
                )
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


def _check_bytes(state: dict, size: int) -> None:
    """A few bytes can be pickled as tensors of any size."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if claimed > size:
        raise InputError(f"expected tensors with numbers of their own in {PARAMS}, got {claimed} bytes of {size}")
