"""The options of a fit, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import InputError

OBJECTIVES = ("linear", "kl")
TRAINING = ("steps", "seed")  # options of the objective kl alone
SHORTEST = 16  # tokens of a sequence
SEQUENCES = 10  # at least: eight to fit, one to choose the ridge strength, one to report on


@dataclass(frozen=True)
class FitOptions:
    """Everything that decides the numbers of a lens, except what the machine decides."""

    model: str = "smollm2"
    text: str = "builtin"
    tokens: int = 200_000
    objective: str = "linear"
    steps: int = 150  # of training, for the objective kl
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0  # of training
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.tokens < SEQUENCES * SHORTEST:
            raise InputError(f"--tokens: expected at least {SEQUENCES * SHORTEST}, got {self.tokens}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"--objective: expected {' or '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.steps < 1:
            raise InputError(f"--steps: expected at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed: expected 0 to 2**63 - 1, got {self.seed}")

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return asdict(self)
