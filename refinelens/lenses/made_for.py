"""Which model a lens was made for, held against the model that it is to read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .tuned_lens import compare_unembedding

MODEL_KEYS = {
    "name": str,
    "class": str,
    "config_sha256": str,
    "weights_sample_sha256": str,
    "n_layers": int,
    "d_model": int,
}


def check_made_for(made_for: dict, here: dict, unembedding: Tensor) -> str | None:
    """Hold what a lens says of its model, which of a tuned lens is less, against the model's own entry.

    The name of the model is not compared: the same model may lie in another folder.

    Args:
        made_for: The ``model`` of the lens's manifest.
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
        what = "another model"
        if key == "weights_sample_sha256":  # of numbers rounded to bf16, so that fp32 and bf16 agree but not fp16
            half = " or one in another dtype" if unembedding.dtype == torch.float16 else ""
            what = f"another revision of it{half}"
        there, own = (str(entry[key])[:12] if "sha256" in key else entry[key] for entry in (made_for, here))
        raise _another(made_for, here, f"{what} ({key} {there} there, {own} here)")
    if "unembed_hash" not in made_for:
        return None
    try:
        return compare_unembedding(made_for, unembedding)
    except InputError as error:
        raise _another(made_for, here, f"another model or revision ({error})") from None


def _another(made_for: dict, here: dict, difference: str) -> InputError:
    name = made_for["name"] + (f" at {made_for['revision']}" if made_for.get("revision") else "")
    return InputError(
        f"expected a lens made for {here['name']}, got one for {name}, {difference}; fit one with refinelens fit"
    )
