"""The options of a sweep, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .errors import InputError
from .prompts import gold_positions


@dataclass(frozen=True)
class SweepOptions:
    """Everything that decides the numbers of a run, except what the machine decides."""

    model: str = "smollm2"
    task: str = "builtin"
    documents: tuple[int, ...] = (5, 10)  # context sizes, the gold document included
    gold_positions: str = "all"
    examples: int | None = None  # questions drawn; None for all
    target: str = "answer"
    answer_tokens: str = "first"
    top: int = 1
    template: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    batch_size: str = "auto"
    seed: int = 0

    def __post_init__(self):
        if not self.documents or min(self.documents) < 1:
            raise InputError(f"--documents: expected sizes of at least 1 such as 5,10, got {self.documents}")
        for size in self.documents:
            gold_positions(self.gold_positions, size)
        if self.seed < 0:
            raise InputError(f"--seed: expected 0 or more, got {self.seed}")
        if not 1 <= self.top < 2**31:
            raise InputError(f"--top: expected 1 to {2**31 - 1}, got {self.top}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size: expected auto or a positive number, got {self.batch_size!r}")

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return {**asdict(self), "documents": list(self.documents)}
