"""Which backend of the fused lens runs on a device, and why; what may go into one."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.reference import LensHead, LensStats, Norm, fused_lens_reference

FP32 = torch.finfo(torch.float32)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "triton", "cpp", "reference")
PRECISIONS = ("auto", "fp32", "certified")
# Rows and width from which on "auto" is certified, by what screens: a call is then faster, the making of its index
# within it, and its logsumexp nearer to fp64. None for never: 16 bits leave it 30 times the error of fp32, for 0.7 to
# 0.8 of its time on 2048 real rows and 1.1 to 1.2 on random ones (python benchmarks/precision.py, RESULTS.md).
CERTIFIED_ROWS, CERTIFIED_WIDTH = 2048, 512
CERTIFIED_FROM: dict[str, tuple[int, int] | None] = {
    "AMX, 24-bit screen": (CERTIFIED_ROWS, CERTIFIED_WIDTH),
    "AVX-512 VNNI, 16-bit screen": None,
    "AVX2, 16-bit screen": None,
    "baseline, 16-bit screen": None,
}


def checked_operands(
    hidden: Tensor,
    unembedding: Tensor | nn.Linear | LensHead,
    norm: Norm | nn.Module = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, LensHead]:
    """States and head as backends take them, without a projection.

    Raises:
        InputError: They do not make logits together; both values are shown.
    """
    if not isinstance(hidden, Tensor):
        raise InputError(f"hidden: expected a tensor, got {type(hidden).__name__}")
    if isinstance(unembedding, LensHead):
        head = unembedding
        if norm is not None or bias is not None or softcap is not None or logit_scale != 1.0:
            raise InputError("norm, bias, softcap, logit_scale: expected none beside a LensHead, which has its own")
    else:
        weight = unembedding.weight if isinstance(unembedding, nn.Linear) else unembedding
        if not isinstance(weight, Tensor):
            raise InputError(f"unembedding: expected a tensor, got {type(weight).__name__}")
        _check_shapes(hidden, weight, weight.shape[1] if weight.dim() == 2 else -1)
        try:
            head = LensHead(unembedding, norm, bias, softcap, logit_scale)
        except ValueError as error:
            raise InputError(str(error)) from None
    _check_shapes(hidden, head.weight, head.d_model)
    _check_head(hidden, head)
    return head.projected(hidden)


def _check_shapes(hidden: Tensor, weight: Tensor, d_model: int) -> None:
    if hidden.dim() < 1 or hidden.shape[-1] != d_model:
        raise InputError(
            "hidden and unembedding: expected shapes [..., d_model] and [vocab_size, d_model], got "
            f"{list(hidden.shape)} and {list(weight.shape)}"
        )


def _check_head(hidden: Tensor, head: LensHead) -> None:
    weight = head.weight
    if 0 in weight.shape:
        raise InputError(f"unembedding: expected at least one token and one dimension, got {list(weight.shape)}")
    if hidden.dtype not in DTYPES or hidden.dtype != weight.dtype:
        raise InputError(
            "hidden and unembedding: expected one dtype of float32, float16, bfloat16, got "
            f"{hidden.dtype} and {weight.dtype}"
        )
    norm, device = head.norm, hidden.device
    vectors = [("bias", head.bias, head.vocab_size)]
    if norm is not None:
        vectors += [("norm.weight", norm.weight, head.d_model), ("norm.bias", norm.bias, head.d_model)]
    for name, vector, length in vectors:
        if vector is None:
            continue
        if vector.shape != (length,) or not vector.is_floating_point():
            raise InputError(
                f"{name}: expected a floating tensor of shape [{length}], got {vector.dtype} {list(vector.shape)}"
            )
    for name, tensor, _ in (*vectors, ("unembedding", weight, 0), ("projection", head.projection, 0)):
        if tensor is not None and tensor.device != device:
            raise InputError(f"{name}: expected device {device} of hidden, got {tensor.device}")
    if head.softcap is not None and not _is_positive(head.softcap):
        raise InputError(f"softcap: expected a positive number of float32 or None, got {head.softcap}")
    if not _is_positive(head.scale):
        raise InputError(f"logit_scale: expected a positive number of float32, got {head.scale}")


def _is_positive(number: float) -> bool:
    """Also once it is rounded to float32, in which the kernels have it."""
    return FP32.smallest_normal <= number <= FP32.max


@cache
def _no_triton() -> str | None:
    """Why the Triton kernels cannot run, in words, None where they can."""
    if torch.version.hip is not None:
        return "the Triton kernels are for NVIDIA, this torch is for AMD"
    return "Triton is not installed" if importlib.util.find_spec("triton") is None else None


@cache
def _no_extension() -> str | None:
    """Why the C++ extension cannot run, in words, None where it can."""
    if importlib.util.find_spec("refinelens._C") is None:
        return "the C++ extension was not built"
    try:
        importlib.import_module("refinelens._C")
    except ImportError as error:
        return f"the C++ extension cannot be loaded ({error})"
    return None


def choose_backend(device_type: str, backend: str = "auto") -> tuple[str, str]:
    """The backend for a device, and the reason in words.

    Raises:
        InputError: An unknown backend, or one that cannot run on this device.
    """
    backend = "reference" if backend == "twin" else backend  # its name until 0.1
    if backend not in BACKENDS:
        raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    no_cpp, no_triton = _no_extension(), _no_triton()
    if backend == "triton" or (backend == "auto" and device_type == "cuda" and no_triton is None):
        if no_triton is not None:
            raise InputError(f"backend: expected kernels that run for 'triton', got: {no_triton}; use auto")
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError(f"backend: expected CUDA tensors for 'triton', got device {device_type!r}; use auto")
        return "triton", "asked for" if backend == "triton" else "CUDA device and Triton are present"
    if backend == "cpp" and (device_type != "cpu" or no_cpp is not None):
        raise InputError(
            f"backend: expected CPU tensors and the C++ extension for 'cpp', got device {device_type!r} and "
            f"{no_cpp or 'an extension'}"
        )
    if backend == "cpp" or (backend == "auto" and device_type == "cpu" and no_cpp is None):
        instruction_set()
        return "cpp", "asked for" if backend == "cpp" else "CPU device and the C++ extension are present"
    if backend == "reference":
        return "reference", "asked for"
    missing = {"cuda": no_triton, "cpu": no_cpp}
    return "reference", (missing.get(device_type) or f"no kernel for device {device_type!r}") + ": plain torch"


def instruction_set() -> str:
    """What the C++ extension runs on, in words.

    Raises:
        ImportError: The extension was not built.
        InputError: The variable REFINELENS_ISA names something else than this processor has.
    """
    from .._C import instruction_set as picked

    try:
        return picked()
    except ValueError as error:
        raise InputError(str(error)) from None


def choose_precision(
    backend: str, device_type: str, precision: str = "auto", rows: int = CERTIFIED_ROWS, d_model: int = CERTIFIED_WIDTH
) -> tuple[str, str]:
    """``"fp32"`` or ``"certified"`` for a backend that was chosen, and the reason in words.

    Raises:
        InputError: An unknown precision, or ``"certified"`` where it cannot run.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "certified" and backend != "cpp":
        raise InputError(
            f"precision: expected CPU tensors, the C++ extension and backend 'cpp' or 'auto' for 'certified', got "
            f"backend {backend!r} on {device_type!r}"
        )
    if precision != "auto":
        return precision, "asked for"
    if backend != "cpp":
        return "fp32", f"the only one of backend {backend!r}"
    from .._C import screen_kernels

    kernels, _ = screen_kernels(d_model)
    repays_from = CERTIFIED_FROM[kernels]
    if repays_from is None:
        return "fp32", f"'certified' ({kernels}) is exact in argmax and rank, but less so in logsumexp"
    least = "{} rows and a width of {} on".format(*repays_from)
    if rows < repays_from[0] or d_model < repays_from[1]:
        return "fp32", f"'certified' ({kernels}) repays its index from {least}"
    return "certified", f"from {least} ({kernels}: faster, logsumexp nearer to fp64); below, fp32"


def backend_function(name: str, precision: str = "fp32", asked: bool = True) -> Callable[..., LensStats]:
    """The function behind the names of a backend and a precision, imported when it is first used.

    A certified precision that was not ``asked`` for leaves rows that would take long to the fp32 kernel.
    """
    if name == "triton":
        from ..kernels.fused_lens import fused_lens_triton

        return fused_lens_triton
    if precision == "certified":
        from .cpu import fused_lens_certified, fused_lens_screened

        return fused_lens_certified if asked else fused_lens_screened
    if name == "cpp":
        from .cpu import fused_lens_cpu

        return fused_lens_cpu
    return fused_lens_reference
