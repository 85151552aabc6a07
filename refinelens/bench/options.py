"""The options of a benchmark, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..errors import InputError

SIZES = {"rows": "--rows", "d_model": "--d-model", "vocab": "--vocab", "rounds": "--rounds", "threads": "--threads"}
MOST_THREADS = 4096


@dataclass(frozen=True)
class BenchOptions:
    """What is measured; None means the device's default, or what the model has."""

    device: str = "auto"
    rows: int | None = None  # layers x positions
    d_model: int | None = None
    vocab: int | None = None
    model: str | None = None  # whose states, norm and unembedding; None for random ones
    dtype: str = "auto"
    peers: str = "all"  # all, none, or names separated by commas
    rounds: int = 7
    threads: int = 1  # on a CPU; more than one is measured by wall clock
    trust_remote_code: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SIZES and value is not None and value < 1:
                raise InputError(f"{SIZES[field.name]}: expected at least 1, got {value}")
        if self.threads > MOST_THREADS:
            raise InputError(f"--threads: expected 1 to {MOST_THREADS}, got {self.threads}")
        given = [SIZES[name] for name in ("d_model", "vocab") if getattr(self, name) is not None]
        if self.model is not None and given:
            raise InputError(f"{given[0]}: expected none beside --model, whose own sizes are used; leave it out")
