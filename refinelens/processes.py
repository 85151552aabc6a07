"""Modules of this package run in processes of their own: the same code as here, whatever the current folder holds."""

from __future__ import annotations

import os
import sys
from pathlib import Path

PACKAGE_ROOT = str(Path(__file__).parents[1])


def module_command(module: str, *arguments: object) -> list[str]:
    """The command that runs a module; ``-P``, or files in the current folder would shadow the standard library."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def module_path() -> dict[str, str]:
    """The variable under which `module_command` imports what is imported here, from the same places in their order."""
    places = [place for place in sys.path if place]  # the empty one is the current folder
    # Found by the current folder or an import hook this package is on none of them.
    return {"PYTHONPATH": os.pathsep.join(places if PACKAGE_ROOT in places else [PACKAGE_ROOT, *places])}
