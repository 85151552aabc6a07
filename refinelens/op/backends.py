"""Which backend of the fused lens runs on a device, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

import torch

from ..errors import InputError
from ..kernels.lens_common import LensOutput
from ..kernels.lens_twin import fused_lens_twin

BACKENDS = ("auto", "triton", "cpp", "twin")
PRECISIONS = ("auto", "fp32", "certified")
# From so many rows and such a width on, a call of the certified lens with AMX repays the making of the index within
# itself.
CERTIFIED_ROWS, CERTIFIED_WIDTH = 2048, 512


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
    if backend == "twin":
        return "twin", "asked for"
    missing = {"cuda": no_triton, "cpu": no_cpp}
    return "twin", (missing.get(device_type) or f"no kernel for device {device_type!r}") + ": plain torch"


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

    kernels, digits = screen_kernels(d_model)
    if digits == 1:
        return "fp32", f"'certified' ({kernels}) is exact in argmax and rank, but less so in logsumexp"
    least = f"{CERTIFIED_ROWS} rows and a width of {CERTIFIED_WIDTH} on"
    if rows < CERTIFIED_ROWS or d_model < CERTIFIED_WIDTH:
        return "fp32", f"'certified' ({kernels}) repays its index from {least}"
    return "certified", f"from {least} ({kernels}: faster, logsumexp nearer to fp64); below, fp32"


def backend_function(name: str, precision: str = "fp32", asked: bool = True) -> Callable[..., LensOutput]:
    """The function behind the names of a backend and a precision, imported when it is first used.

    A certified precision that was not ``asked`` for leaves rows that would take long to the fp32 kernel.
    """
    if name == "triton":
        from ..kernels.lens_triton import fused_lens_triton

        return fused_lens_triton
    if precision == "certified":
        from .certified import fused_lens_certified, fused_lens_screened

        return fused_lens_certified if asked else fused_lens_screened
    if name == "cpp":
        from .lens_cpu import fused_lens_cpu

        return fused_lens_cpu
    return fused_lens_twin
