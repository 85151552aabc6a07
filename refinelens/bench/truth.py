"""Whether a competitor is right: its statistics against fp64, before anything is timed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..kernels.lens_twin import fused_lens_twin
from ..kernels.norms import apply_norm
from .peers import Statistics
from .problem import Problem
from .report import Verdict

CHECKED_ROWS = 4096  # at most, spread over the problem
EXPLAINED_ROWS = 64  # rows of another rank whose near ties are counted
IDS = ("argmax", "target_rank")


class Truth:
    """The statistics of a problem in fp64, on at most `CHECKED_ROWS` of its rows.

    What counts as rounding, in units of the largest possible logit |x| |w| (Cauchy-Schwarz): two epsilon in
    half precision, where the operands and the logit are rounded and sums are kept in fp32; in fp32
    sqrt(d_model) epsilon, the spread of d_model rounding errors. On top, the error of fp32 sums over the
    vocabulary.
    """

    def __init__(self, problem: Problem):
        n_rows = len(problem.hidden)
        self._problem = problem
        index = torch.linspace(0, n_rows - 1, min(n_rows, CHECKED_ROWS), dtype=torch.float64)
        self._index = index.long().to(problem.hidden.device)
        hidden, self._targets = problem.hidden[self._index], problem.targets[self._index]
        exact = fused_lens_twin(hidden, problem.unembedding, problem.norm, self._targets, dtype=torch.float64)
        self._exact = exact._asdict() | {"target_logprob": exact.target_logit - exact.logsumexp}
        self._x_hat = apply_norm(hidden, problem.norm, torch.float64)
        largest = float(self._x_hat.norm(dim=-1).max() * problem.unembedding.norm(dim=-1).max())
        eps = torch.finfo(hidden.dtype).eps
        growth = math.sqrt(hidden.shape[1]) if hidden.dtype == torch.float32 else 2.0
        sums = 32 * torch.finfo(torch.float32).eps * math.log(len(problem.unembedding) + 1)
        self.tolerance = growth * eps * largest + sums

    def judge(self, found: Statistics, n_rows: int) -> Verdict | None:
        """Compare the statistics of the problem's first ``n_rows`` rows; None where there are none."""
        if not found:
            return None
        rows = int((self._index < n_rows).sum())
        index = self._index[:rows]
        found = {name: value[index] for name, value in found.items()}
        # A bound that came with the logsumexp is part of the answer; entropy and log-probability inherit it.
        bound = found.pop("logsumexp_bound", torch.zeros(rows, dtype=torch.float32, device=index.device)).double()
        error, wrong = 0.0, []
        for name, value in found.items():
            if name in self._exact and name not in IDS:
                off = (value.double() - self._exact[name][:rows]).abs()
                error = max(error, float(off.max()))
                if not (off <= self.tolerance + bound).all():
                    wrong.append(f"{name} differs by {float(off.max()):.2g}, rounding explains {self.tolerance:.2g}")
        off = {name: found[name] != self._exact[name][:rows] for name in IDS if name in found}
        wrong += self._unexplained_argmax(found, off) + self._unexplained_rank(found, off)
        counts = {name: int(mask.sum()) for name, mask in off.items()}
        return Verdict(
            rows=rows,
            argmax_off=counts.get("argmax"),
            rank_off=counts.get("target_rank"),
            error=error,
            fell_back=int(found["fell_back"].sum()) if "fell_back" in found else None,
            wrong="; ".join(wrong) or None,
        )

    def _unexplained_argmax(self, found: Statistics, off: dict[str, Tensor]) -> list[str]:
        rows = off["argmax"].nonzero()[:, 0] if "argmax" in off else []
        if len(rows) == 0:
            return []
        ids = found["argmax"][rows]
        if not ((ids >= 0) & (ids < len(self._problem.unembedding))).all():
            return ["argmax lies outside the vocabulary"]
        own = (self._x_hat[rows] * self._problem.unembedding[ids].double()).sum(-1)
        gap = float((self._exact["max_logit"][rows] - own).max())
        if gap <= 2 * self.tolerance:
            return []
        return [f"an argmax lies {gap:.2g} below the maximum, rounding explains {2 * self.tolerance:.2g}"]

    def _unexplained_rank(self, found: Statistics, off: dict[str, Tensor]) -> list[str]:
        rows = off["target_rank"].nonzero()[:EXPLAINED_ROWS, 0] if "target_rank" in off else []
        if len(rows) == 0:
            return []
        logits = self._x_hat[rows] @ self._problem.unembedding.double().T
        own = self._exact["target_logit"][rows, None]
        near = ((logits - own).abs() <= 2 * self.tolerance).sum(-1) - 1  # the target itself is no rival
        differs = (found["target_rank"][rows] - self._exact["target_rank"][rows]).abs()
        worst = int((differs - near).argmax())
        if differs[worst] <= near[worst]:
            return []
        return [f"a rank differs by {int(differs[worst])}, near ties explain {int(near[worst])}"]
