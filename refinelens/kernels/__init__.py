"""Source-tree shim: makes the repository's top-level `kernels/` importable as `refinelens.kernels`.

It is not installed: in a wheel the modules of `kernels/` lie in this package themselves.
"""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
