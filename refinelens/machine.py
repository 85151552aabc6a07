"""What numbers depend on besides the options: the machine, versions of packages, the time; and processes of our own.

A module of this package that runs in a process of its own is the same code as here, whatever the current folder holds.
"""

from __future__ import annotations

import logging
import os
import platform
import sys
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__version__ = "0.1.0"  # of refinelens; `pyproject.toml` reads it here
PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy", "scipy", "pyarrow", "matplotlib", "gguf")
PACKAGE_ROOT = str(Path(__file__).parents[1])


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
        import torch  # packages that need no torch want the time alone

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


def other_packages(made_with: dict[str, str | None]) -> str | None:
    """Whether a lens was fitted under another major version of what runs the model, in words.

    A new version can compute a model differently without a word, and then the lens is of another model.
    """
    here, other = packages(), []
    for name in ("torch", "transformers"):
        there, own = made_with.get(name), here[name]
        if there and own and there.split(".")[0] != own.split(".")[0]:
            other.append(f"{name} {there} (here {own})")
    return f"it was fitted under {' and '.join(other)}, which may compute the model otherwise" if other else None


def module_command(module: str, *arguments: object) -> list[str]:
    """The command that runs a module; ``-P``, or files in the current folder would shadow the standard library."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def module_path() -> dict[str, str]:
    """The variable under which `module_command` imports what is imported here, from the same places in their order."""
    places = [place for place in sys.path if place]  # the empty one is the current folder
    # Found by the current folder or an import hook this package is on none of them.
    return {"PYTHONPATH": os.pathsep.join(places if PACKAGE_ROOT in places else [PACKAGE_ROOT, *places])}


def calm_libraries() -> None:
    """Before torch and Transformers are imported: no spinning threads, no bars or retries between our lines."""
    # A spinning OpenMP thread costs milliseconds per parallel region as soon as another process wants its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("huggingface_hub", "accelerate", "torchao", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)
