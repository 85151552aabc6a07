"""The options of an analysis of layers, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..errors import InputError

ABLATIONS = ("skip", "mean", "attn", "mlp")
PATCH = "patch"
CHOICES = (*ABLATIONS, PATCH)
AT = ("all", "answer")


@dataclass(frozen=True)
class LayerOptions:
    """What is done to the layers of a run."""

    interventions: tuple[str, ...] = CHOICES  # none: the lens alone, without the model
    at: str = "all"  # positions that an ablation strikes; patches are at the answer always
    examples: int | None = None  # questions drawn among those of the run; None for all
    lens: str | None = None  # name of one of the run's; None for the last, a fitted one where there is one

    def __post_init__(self):
        if not set(self.interventions) <= set(CHOICES) or len(set(self.interventions)) < len(self.interventions):
            raise InputError(
                f"--interventions: expected none or some of {','.join(CHOICES)}, each once, got "
                f"{','.join(self.interventions)!r}"
            )
        if self.at not in AT:
            raise InputError(f"--at: expected {' or '.join(AT)}, got {self.at!r}")
        if self.examples is not None and self.examples < 1:
            raise InputError(f"--examples: expected 1 or more, got {self.examples}")

    @property
    def ablations(self) -> tuple[str, ...]:
        """The interventions that strike every block in turn."""
        return tuple(name for name in self.interventions if name != PATCH)

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return {**asdict(self), "interventions": list(self.interventions)}


def parse_interventions(text: str) -> tuple[str, ...]:
    """``skip,mean`` as words; ``none`` is no word."""
    return () if text == "none" else tuple(text.split(","))
