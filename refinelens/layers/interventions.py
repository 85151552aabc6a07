"""The interventions: what comes out of a block that is skipped, averaged, halved or left as it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..runs.layers_schema import CONTROL
from .clean_run import CleanRun
from .means import MeanContributions, contribution
from .sublayers import Sublayers, silenced

LAST = slice(-1, None)
EVERY = slice(None)


@dataclass(frozen=True)
class Intervention:
    """One way to strike any block of a model, at all tokens or at the last.

    - ``skip``: the block is the identity;
    - ``mean``: what it adds is replaced by what it adds on average;
    - ``attn``, ``mlp``: this part of it adds nothing;
    - ``control``: what it adds is taken away and added again, which leaves rounding alone.
    """

    name: str
    tokens: slice
    sublayers: list[Sublayers | None]
    means: MeanContributions | None

    def output(self, run: CleanRun, index: int) -> Tensor:
        """Output ``[1, token, d_model]`` of block ``index`` (0-based) under the intervention."""
        out = run.states[index + 1].clone()
        out[:, self.tokens] = WAYS[self.name](self, run, index)
        return out

    def of_context(self, run: CleanRun) -> Callable[[int], Tensor]:
        """`output` of one context."""
        return lambda index: self.output(run, index)

    def _skip(self, run: CleanRun, index: int) -> Tensor:
        return run.states[index][:, self.tokens]

    def _mean(self, run: CleanRun, index: int) -> Tensor:
        # As a change of the output: where the mean is the block's own contribution nothing changes, not a bit.
        change = self.means.of(run, index, self.tokens) - contribution(run, index, self.tokens)
        return run.states[index + 1][:, self.tokens] + change

    def _attn(self, run: CleanRun, index: int) -> Tensor:
        with silenced(self.sublayers[index].attention, self.tokens):
            return run.block(index, run.states[index])[:, self.tokens]

    def _mlp(self, run: CleanRun, index: int) -> Tensor:
        with silenced(self.sublayers[index].mlp, self.tokens):
            return run.block(index, run.states[index])[:, self.tokens]

    def _control(self, run: CleanRun, index: int) -> Tensor:
        return run.states[index][:, self.tokens] + contribution(run, index, self.tokens)


WAYS = {
    "skip": Intervention._skip,
    "mean": Intervention._mean,
    "attn": Intervention._attn,
    "mlp": Intervention._mlp,
    CONTROL: Intervention._control,
}


def carried(run: CleanRun, states: Tensor) -> Callable[[int], Tensor]:
    """A patch: at the last token, what another run has there at the same layer.

    Args:
        run: The context that is patched.
        states: ``[n_layers + 1, d_model]``, `CleanRun.answer_states` of the other.
    """

    def output(index: int) -> Tensor:
        out = run.states[index + 1].clone()
        out[:, -1] = states[index + 1]
        return out

    return output
