"""The certified lens on a CPU: argmax and rank of exact logits, by C++ (proof: csrc/screen/screen_kernels.hpp)."""

from __future__ import annotations

import os
import threading
import weakref
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..kernels.lens_common import LensOutput, in_row_blocks, lens_output
from ..kernels.lens_twin import fused_lens_twin
from ..kernels.norms import Norm, apply_norm
from .lens_cpu import fused_lens_cpu

ROW_BLOCK = 1024


class CertifiedOutput(NamedTuple):
    """A `LensOutput`, and what is known of its logsumexp and its making."""

    argmax: Tensor  # [R] int64
    max_logit: Tensor  # [R] fp32
    logsumexp: Tensor  # [R] fp32
    entropy: Tensor  # [R] fp32
    target_logit: Tensor | None  # [R] fp32
    target_rank: Tensor | None  # [R] int64
    logsumexp_bound: Tensor  # [R] fp32, nats
    fell_back: Tensor  # [R] bool


def fused_lens_certified(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> CertifiedOutput:
    """Same signature and definition as the twin, for CPU tensors, with argmax and rank decided without rounding.

    The norm is applied in fp64, and its result is what the logits are products of: argmax and rank are those of the
    exact real numbers ``x_hat . w_v + bias_v``, equal ones in the order of ids. Integer products of the quantised rows
    and weights give all logits with a proven bound on their error; only tokens that the bound leaves open are computed
    in fp64, and compared by exact sums where fp64 is in doubt. ``max_logit`` and ``target_logit`` come from fp64 too.
    ``logsumexp`` and ``entropy`` are sums over the screened logits, with fp64 in place of the tokens computed there, to
    which the heaviest belong; ``logsumexp_bound`` bounds the distance to the logsumexp of exact logits.

    Rows that the screen cannot decide (nearly equal logits, norms beyond 1e30 or of subnormal size, logits so large
    that the bound would exceed a nat) fall back: all their logits are computed in fp64, which takes tens of times
    longer; ``fell_back`` tells which.

    Memory: the index (2 bytes a weight, 3 with AMX), which lives as long as the unembedding;
    ``ROW_BLOCK * d_model * 32`` bytes; ``vocab_size * (30 + 20 * threads)`` bytes; and 16 bytes for each token that the
    bound leaves open. A row has a few of those, and no more than 256 among 3072 tokens, or it falls back and needs
    none: at the very most they take ``ROW_BLOCK * (vocab_size + 10_000 * threads) * 4 / 3`` bytes.
    """
    weights, options = _rows_in_memory(unembedding), (bias, softcap, logit_scale)
    index = screen_index(unembedding, weights)

    def run(rows: Tensor, row_targets: Tensor | None) -> CertifiedOutput:
        if not index.finite:
            return _exact_twin(rows, unembedding, norm, row_targets, *options)
        return _run_block(index, weights, rows, norm, row_targets, *options, exhaustive=True)

    return in_row_blocks(run, hidden, targets, ROW_BLOCK)


def fused_lens_screened(
    hidden: Tensor, unembedding: Tensor, norm: Norm, targets: Tensor | None, *options
) -> LensOutput:
    """What ``precision="auto"`` runs: certified, but rows that would fall back to fp64 are left to the fp32 kernel."""
    weights = _rows_in_memory(unembedding)
    index = screen_index(unembedding, weights)
    if not index.finite:
        return fused_lens_cpu(hidden, unembedding, norm, targets, *options)

    def run(rows: Tensor, row_targets: Tensor | None) -> CertifiedOutput:
        return _run_block(index, weights, rows, norm, row_targets, *options, exhaustive=False)

    out = in_row_blocks(run, hidden, targets, ROW_BLOCK)
    (rows,) = out.fell_back.nonzero(as_tuple=True)
    if len(rows):
        again = fused_lens_cpu(hidden[rows], unembedding, norm, None if targets is None else targets[rows], *options)
        for name, value in again._asdict().items():
            if value is not None:
                getattr(out, name)[rows] = value
    return LensOutput(*out[: len(LensOutput._fields)])


def _run_block(
    index, weights, hidden, norm, targets, bias=None, softcap=None, logit_scale=1.0, *, exhaustive
) -> CertifiedOutput:
    arrays = index.lens(
        apply_norm(hidden, norm, torch.float64).contiguous().numpy(),
        weights,
        None if targets is None else targets.contiguous().numpy(),
        None if bias is None else bias.double().contiguous().numpy(),
        logit_scale,
        softcap or 0.0,
        exhaustive,
        torch.get_num_threads(),
    )
    argmax, best, logsumexp, entropy, target_z, rank, bound, fell_back = map(torch.from_numpy, arrays)
    out = lens_output(argmax, best, logsumexp, entropy, targets, target_z, rank, softcap)
    return _as_fp32(out, bound, fell_back)


def _exact_twin(rows, unembedding, norm, targets, bias, softcap, logit_scale) -> CertifiedOutput:
    """For weights that are not finite, whose sums have no bound."""
    out = fused_lens_twin(rows, unembedding, norm, targets, bias, softcap, logit_scale, dtype=torch.float64)
    return _as_fp32(out, torch.full_like(out.logsumexp, torch.inf), torch.ones(len(rows), dtype=torch.bool))


def _as_fp32(out, bound: Tensor, fell_back: Tensor) -> CertifiedOutput:
    values = [v.float() if v is not None and v.is_floating_point() else v for v in (*out, bound)]
    return CertifiedOutput(*values, fell_back)


def _rows_in_memory(unembedding: Tensor) -> np.ndarray:
    """As an array, copied where a row has gaps; numpy has no bf16, so its bits travel as uint16."""
    weights = unembedding.detach()
    if weights.stride(1) != 1:
        weights = weights.contiguous()
    return (weights.view(torch.uint16) if weights.dtype == torch.bfloat16 else weights).numpy()


_indexes: dict[int, tuple[weakref.ref, tuple, _C.ScreenIndex]] = {}
_lock = threading.Lock()


def _renew_lock() -> None:
    """In a forked child: the thread that held the lock is not there to release it."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


def screen_index(unembedding: Tensor, weights: np.ndarray | None = None) -> _C.ScreenIndex:
    """The index of an unembedding, built when it is first asked for and whenever its values have changed.

    It is released with the tensor. Changes are told by a checksum of all values, since torch does not record those
    through ``.data``, by fused optimizers or in inference mode; on one thread it takes about a tenth of the time of 416
    rows, and nearly half of that of one. ``weights`` are its `_rows_in_memory`, where the caller has them.
    """
    key, weights = id(unembedding), _rows_in_memory(unembedding) if weights is None else weights
    checksum = _C.checksum(weights, torch.get_num_threads())
    state = (weights.shape, weights.dtype, checksum, _C.screen_kernels(weights.shape[1]))
    with _lock:
        if key in _indexes:
            owner, built_from, index = _indexes[key]
            if owner() is unembedding and built_from == state:
                return index
        index = _C.ScreenIndex(weights, torch.get_num_threads())
        _indexes[key] = (weakref.ref(unembedding, lambda _: _indexes.pop(key, None)), state, index)
    return index
