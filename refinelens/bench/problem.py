"""What every competitor is given: hidden rows, an unembedding, a norm and targets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..kernels.norms import Norm


@dataclass(frozen=True)
class Problem:
    """One input of the lens, and where it comes from."""

    hidden: Tensor  # [rows, d_model]
    unembedding: Tensor  # [vocab_size, d_model]
    norm: Norm
    targets: Tensor  # [rows] int64
    states: str = "random"  # or the name of the model

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix product; the reductions are not counted."""
        return 2 * self.hidden.numel() * len(self.unembedding)

    def first(self, rows: int) -> Problem:
        """The same problem with fewer rows."""
        return Problem(self.hidden[:rows], self.unembedding, self.norm, self.targets[:rows], self.states)

    def tiny(self) -> Problem:
        """Two rows and a few tokens: enough to load what a competitor needs."""
        few = self.unembedding[:64].clone()
        return Problem(self.hidden[:2], few, self.norm, self.targets[:2] % len(few), self.states)
