"""The interventions: what comes out of a block that is skipped, averaged, halved or left as it is.

What each block adds on average is measured at each place of a context.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..lens.blocks import ActivationCache
from ..model.resid_mid import Sublayers, zero_ablated
from ..store.layers import CONTROL

LAST = slice(-1, None)
EVERY = slice(None)


@dataclass
class MeanContributions:
    """Mean over contexts of what each block adds to the residual stream, place by place.

    Contexts differ in length. A token in the first half of its context has its place from the start, where the
    instruction stands, one in the second half from the end, where question and answer stand; so that of a single
    context every token has a place of its own.
    """

    mean: Tensor  # [n_layers, 2, places, d_model] fp32, from the start and from the end
    count: Tensor  # [2, places] int64

    @classmethod
    def of_nothing(cls, n_layers: int, n_tokens: int, d_model: int, device: torch.device | str) -> MeanContributions:
        """For contexts of up to ``n_tokens``."""
        places = n_tokens - n_tokens // 2
        mean = torch.zeros(n_layers, 2, places, d_model, dtype=torch.float32, device=device)
        return cls(mean, torch.zeros(2, places, dtype=torch.int64, device=device))

    @classmethod
    def load(cls, path: Path, device: torch.device | str) -> MeanContributions:
        """What `save` wrote."""
        return cls(**load_file(path, str(device)))

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"mean": self.mean.contiguous(), "count": self.count}, path)

    def add(self, run: ActivationCache, tokens: slice) -> None:
        """Take these tokens of a context into the mean."""
        side, place = _places(run, tokens)
        self.count[side, place] += 1
        share = 1.0 / self.count[side, place].to(torch.float32)[:, None]
        for index in range(run.n_layers):
            mean = self.mean[index, side, place]
            self.mean[index, side, place] = mean + (contribution(run, index, tokens).float() - mean) * share

    def of(self, run: ActivationCache, index: int, tokens: slice) -> Tensor:
        """``[token, d_model]`` in the dtype of the run: what block ``index`` adds on average in their places."""
        side, place = _places(run, tokens)
        return self.mean[index, side, place].to(run.states[0].dtype)


def contribution(run: ActivationCache, index: int, tokens: slice) -> Tensor:
    """``[token, d_model]``: what a block adds to the residual stream."""
    return run.states[index + 1][0, tokens] - run.states[index][0, tokens]


def _places(run: ActivationCache, tokens: slice) -> tuple[Tensor, Tensor]:
    """Side (0 from the start, 1 from the end) and distance from it, ``[token]`` int64 each."""
    n = run.states[0].shape[1]
    positions = torch.arange(n, device=run.states[0].device)[tokens]
    late = positions >= (n // 2 if tokens.start is None else 0)  # the last token alone counts from the end
    return late.long(), torch.where(late, n - 1 - positions, positions)


@dataclass(frozen=True)
class Intervention:
    """One way to ablate any block of a model, at all tokens or at the last.

    - ``skip``: the block is the identity;
    - ``mean``: what it adds is replaced by what it adds on average;
    - ``attn``, ``mlp``: this part of it adds nothing;
    - ``control``: what it adds is taken away and added again, which leaves rounding alone.
    """

    name: str
    tokens: slice
    sublayers: list[Sublayers | None]
    means: MeanContributions | None

    def output(self, run: ActivationCache, index: int) -> Tensor:
        """Output ``[1, token, d_model]`` of block ``index`` (0-based) under the intervention."""
        out = run.states[index + 1].clone()
        out[:, self.tokens] = WAYS[self.name](self, run, index)
        return out

    def of_context(self, run: ActivationCache) -> Callable[[int], Tensor]:
        """`output` of one context."""
        return lambda index: self.output(run, index)

    def _skip(self, run: ActivationCache, index: int) -> Tensor:
        return run.states[index][:, self.tokens]

    def _mean(self, run: ActivationCache, index: int) -> Tensor:
        # As a change of the output: where the mean is the block's own contribution nothing changes, not a bit.
        change = self.means.of(run, index, self.tokens) - contribution(run, index, self.tokens)
        return run.states[index + 1][:, self.tokens] + change

    def _without_sublayer(self, run: ActivationCache, index: int) -> Tensor:
        with zero_ablated(self.sublayers[index][self.name], self.tokens):
            return run.block(index, run.states[index])[:, self.tokens]

    def _control(self, run: ActivationCache, index: int) -> Tensor:
        return run.states[index][:, self.tokens] + contribution(run, index, self.tokens)


WAYS = {
    "skip": Intervention._skip,
    "mean": Intervention._mean,
    "attn": Intervention._without_sublayer,
    "mlp": Intervention._without_sublayer,
    CONTROL: Intervention._control,
}


def patched(run: ActivationCache, states: Tensor) -> Callable[[int], Tensor]:
    """A patch: at the last token, what another run has there at the same layer.

    Args:
        run: The context that is patched.
        states: ``[n_layers + 1, d_model]``, `ActivationCache.answer_states` of the other.
    """

    def output(index: int) -> Tensor:
        out = run.states[index + 1].clone()
        out[:, -1] = states[index + 1]
        return out

    return output
