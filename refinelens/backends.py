"""Which backend of the fused lens runs on a device, and why."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache

from .errors import InputError
from .kernels.lens_common import LensOutput
from .kernels.lens_twin import fused_lens_twin

BACKENDS = ("auto", "triton", "cpp", "twin")


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def choose_backend(device_type: str, backend: str = "auto") -> tuple[str, str]:
    """The backend for a device, and the reason in words.

    Raises:
        InputError: An unknown backend, or one that cannot run on this device.
    """
    if backend not in BACKENDS:
        raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    has_cpp, has_triton = _is_installed("refinelens._C"), _is_installed("triton")
    if backend == "triton" or (backend == "auto" and device_type == "cuda" and has_triton):
        if not has_triton:
            raise InputError("backend: expected Triton to be installed for 'triton', got none; pip install triton")
        if device_type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError(f"backend: expected CUDA tensors for 'triton', got device {device_type!r}; use auto")
        return "triton", "asked for" if backend == "triton" else "CUDA device and Triton are present"
    if backend == "cpp" and (device_type != "cpu" or not has_cpp):
        raise InputError(
            f"backend: expected CPU tensors and the C++ extension for 'cpp', got device {device_type!r} and "
            f"{'an' if has_cpp else 'no'} extension"
        )
    if backend == "cpp" or (backend == "auto" and device_type == "cpu" and has_cpp):
        return "cpp", "asked for" if backend == "cpp" else "CPU device and the C++ extension are present"
    if backend == "twin":
        return "twin", "asked for"
    missing = {"cuda": "Triton is not installed", "cpu": "the C++ extension was not built"}
    return "twin", missing.get(device_type, f"no kernel for device {device_type!r}") + ": plain torch"


def backend_function(name: str) -> Callable[..., LensOutput]:
    """The function behind the name of a backend, imported when it is first used."""
    if name == "triton":
        from .kernels.lens_triton import fused_lens_triton

        return fused_lens_triton
    if name == "cpp":
        from .lens_cpu import fused_lens_cpu

        return fused_lens_cpu
    return fused_lens_twin
