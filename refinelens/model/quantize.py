"""Loading a model quantised, by the packages that Transformers knows for it."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from ..config import QUANTIZE
from ..errors import InputError

PACKAGES = dict(zip(QUANTIZE, ("torchao", "bitsandbytes", "bitsandbytes", "bitsandbytes"), strict=True))


def quantization(word: str, dtype: torch.dtype, config: Any) -> Any:
    """What Transformers takes as ``quantization_config``; the unembedding stays as it is, so that a lens can read it.

    Args:
        word: One of `config.QUANTIZE`.
        dtype: That it computes in.
        config: Of the model.

    Raises:
        InputError: The package is not installed, or the checkpoint is quantised already.
    """
    method = method_of(config)
    if method is not None:
        raise InputError(f"``quantize``: expected none beside a checkpoint that is quantised by {method}, got {word!r}")
    package = PACKAGES[word]
    missing = next((name for name in (package, "accelerate") if importlib.util.find_spec(name) is None), None)
    if missing is not None:
        raise InputError(
            f"``quantize={word!r}``: expected the package {missing}, which is not installed; pip install {missing}"
        )
    if word == "int8":
        from torchao.quantization import Int8WeightOnlyConfig
        from transformers import TorchAoConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    from transformers import BitsAndBytesConfig

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # a line for every product of fp32 states
    if word == "llm-int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=word, bnb_4bit_compute_dtype=dtype)


def check_quantised(model: nn.Module, word: str) -> None:
    """Refuse a model none of whose weights took the quantisation, such as one of layers that the package does not know.

    Raises:
        InputError: Says so.
    """
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    if not any(hasattr(weight, "__tensor_flatten__") or not weight.is_floating_point() for weight in weights):
        raise InputError(
            f"``quantize={word!r}``: expected linear layers, got none in {type(model).__name__} that {PACKAGES[word]} "
            "quantises; use another word"
        )


def method_of(config: Any) -> str | None:
    """How the weights of a model of this configuration are quantised, such as ``torchao`` or ``gptq``; None: not."""
    own = getattr(config, "quantization_config", None)
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))
