"""Translators: affine maps that carry each layer's residual stream into the basis of the last one.

Which model they were made for is held against the model that they are to read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EDGE = 3  # rows and columns at either end that numpy prints of a large array
PRINTED_WHOLE = 1000  # numbers of an array that numpy prints whole
TRANSLATED_BYTES = 12 * 2**20  # of states held at a time, where those of one layer are fewer
TRANSLATED_BYTES_CUDA = 32 * 2**20  # a GPU needs more to be busy
MODEL_KEYS = {
    "name": str,
    "class": str,
    "config_sha256": str,
    "weights_sample_sha256": str,
    "n_layers": int,
    "d_model": int,
}


@dataclass(frozen=True)
class Translators:
    """One affine map per layer below the output, applied to the residual stream before the final norm.

    A state ``x`` of layer l in ``0 .. n_layers - 1`` becomes ``x + x @ weight[l].T + bias[l]`` (the residual
    form of Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens", section
    3). Layer ``n_layers`` stays as it is, so that there every lens is the model's own prediction.
    """

    weight: Tensor  # [n_layers, d_model, d_model] floating
    bias: Tensor  # [n_layers, d_model] floating
    made_for: dict[str, Any] | None = None  # what a lens on disk says of its model; None for maps of one's own

    def __post_init__(self) -> None:
        shape = tuple(self.weight.shape)
        if len(shape) != 3 or shape[1] != shape[2] or tuple(self.bias.shape) != shape[:2]:
            raise InputError(
                "translators: expected a weight [n_layers, d_model, d_model] and a bias [n_layers, d_model], got "
                f"{list(shape)} and {list(self.bias.shape)}"
            )
        if self.weight.dtype not in DTYPES or self.weight.dtype != self.bias.dtype:
            raise InputError(
                f"translators: expected weight and bias in one floating dtype, got {self.weight.dtype} and "
                f"{self.bias.dtype}"
            )
        for name, tensor in (("weight", self.weight), ("bias", self.bias)):
            bad = (~torch.isfinite(tensor).flatten(1).all(1)).nonzero()
            if len(bad):
                raise InputError(
                    f"translators: expected finite numbers, got NaN or infinity in the {name} of layer {int(bad[0])}"
                )

    @property
    def n_layers(self) -> int:
        """Layers that are translated; the output comes after them."""
        return len(self.weight)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[2]

    def plain_layers(self) -> str | None:
        """Which layers below the output stay as they are, in words; None where all have a map."""
        plain = (~(self.weight.flatten(1).any(1) | self.bias.any(1))).nonzero()[:, 0].tolist()
        if not plain:
            return None
        starts = [layer for layer in plain if layer - 1 not in plain]
        ends = [layer for layer in plain if layer + 1 not in plain]
        spans = [f"{a} to {b}" if b > a else str(a) for a, b in zip(starts, ends, strict=True)]
        return f"it has no map of layer {', '.join(spans)}, read there by the plain logit lens"

    def up_to(self, n_layers: int) -> Translators:
        """The same maps for a model of more layers, of which the highest stay as they are."""
        more = n_layers - self.n_layers
        weight, bias = (torch.cat([own, own.new_zeros(more, *own.shape[1:])]) for own in (self.weight, self.bias))
        return Translators(weight, bias, self.made_for)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> Translators:
        """The same maps on another device and in another dtype."""
        return Translators(self.weight.to(device, dtype), self.bias.to(device, dtype), self.made_for)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Translate all layers, ``[n_layers + 1, N, d_model]``, in the dtype of ``hidden``.

        Raises:
            InputError: Another shape, or another dtype or device than the maps'.
        """
        wanted = (self.n_layers + 1, self.d_model, self.weight.dtype, self.weight.device)
        if hidden.dim() != 3 or (len(hidden), hidden.shape[2], hidden.dtype, hidden.device) != wanted:
            raise InputError(
                f"hidden: expected shape [{wanted[0]}, N, {wanted[1]}] in {wanted[2]} on {wanted[3]} like the "
                f"translators, got {list(hidden.shape)} in {hidden.dtype} on {hidden.device}"
            )
        translated = torch.empty_like(hidden)
        torch.baddbmm(self.bias[:, None], hidden[:-1], self.weight.mT, out=translated[:-1])
        translated[:-1] += hidden[:-1]
        translated[-1] = hidden[-1]
        return translated

    def one(self, layer: int, states: Tensor) -> Tensor:
        """Translate the states ``[N, d_model]`` of one layer below the output."""
        return torch.addmm(self.bias[layer], states, self.weight[layer].mT) + states


def check_made_for(made_for: dict[str, Any], here: dict[str, Any], unembedding: Tensor) -> str | None:
    """Hold what a lens says of its model, which of a tuned lens is less, against the model's own entry.

    The name of the model is not compared: the same model may lie in another folder.

    Args:
        made_for: The ``model`` of the lens's manifest; of a Jacobian lens as published only width and layers.
        here: The same of the model that is here, by `MODEL_KEYS`.
        unembedding: Of that model.

    Returns:
        What could not be compared, or None where nothing was left.

    Raises:
        InputError: It was made for another model, or another revision of this one.
    """
    for key in ("class", "n_layers", "d_model", "config_sha256", "weights_sample_sha256"):
        if key not in made_for or made_for[key] == here[key]:
            continue
        if here[key] is None:
            return "of the model the head alone is here; the weights that the lens was made for were not compared"
        what = "another model"
        if key == "weights_sample_sha256":  # of numbers rounded to bf16, so that fp32 and bf16 agree but not fp16
            half = " or one in another dtype" if unembedding.dtype == torch.float16 else ""
            what = f"another revision of it{half}"
        there, own = (str(entry[key])[:12] if "sha256" in key else entry[key] for entry in (made_for, here))
        raise _another(made_for, here, f"{what} ({key} {there} there, {own} here)")
    if layers := made_for.get("source_layers"):
        if layers[-1] >= here["n_layers"]:
            got = f"another model (layers up to {layers[-1]} there, here below {here['n_layers']}, which is the output)"
            raise _another(made_for, here, got)
        return "its file names no model; only d_model and layers were compared"
    if "unembed_hash" not in made_for:
        return None
    try:
        return compare_unembedding(made_for, unembedding)
    except InputError as error:
        raise _another(made_for, here, f"another model or revision ({error})") from None


def _another(made_for: dict[str, Any], here: dict[str, Any], difference: str) -> InputError:
    name = made_for["name"] + (f" at {made_for['revision']}" if made_for.get("revision") else "")
    return InputError(
        f"expected a lens made for {here['name']}, got one for {name}, {difference}; fit one with refinelens fit"
    )


def compare_unembedding(made_for: dict[str, Any], unembedding: Tensor) -> str | None:
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
        return "its config.json holds no unembed_hash; only d_model and num_hidden_layers were compared"
    if wanted in (unembed_hash(unembedding, dtype) for dtype in DTYPES):
        return None
    if unembedding.dtype.itemsize < torch.float32.itemsize:
        name = str(unembedding.dtype).removeprefix("torch.")
        return f"its unembed_hash is not that of the model in {name}, which rounding may cause; float32 would tell"
    own = unembed_hash(unembedding, unembedding.dtype)
    raise InputError(f"unembed_hash {wanted[:12]} there, {own[:12]} here")


def rows_at_a_time(states: Tensor) -> int:
    """Positions whose translated states are held at a time."""
    n_layers, n, d_model = states.shape
    most = TRANSLATED_BYTES_CUDA if states.is_cuda else TRANSLATED_BYTES
    rows = max(n, most // (d_model * states.element_size()))
    return max(1, rows // n_layers)


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
