"""What numbers depend on besides the options: the machine, the versions of packages, the time."""

from __future__ import annotations

import os
import platform
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy", "scipy", "pyarrow", "matplotlib", "gguf")


def now() -> str:
    """Current time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def working_folder() -> str | None:
    """The folder that relative paths start from; None where it is gone, or has a name that no manifest can hold."""
    try:
        folder = os.getcwd()
        folder.encode()
    except (OSError, UnicodeEncodeError):
        return None
    return folder


def device_name(device_type: str) -> str:
    """The name of the GPU or of the processor."""
    if device_type == "cuda":
        import torch  # the rooms without it want the time alone

        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@cache
def packages() -> dict[str, str | None]:
    """Versions of Python and of what the numbers of a run depend on."""
    return {"python": sys.version.split()[0]} | {package: package_version(package) for package in PACKAGES}


def package_version(package: str) -> str | None:
    """Of an installed package; None if there is none of that name, also where another one brings the module."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
