"""The fused lens on a CPU by C++: the plain one, and the certified one for half precision.

The certified lens gives argmax and rank of exact logits; csrc/screen/screen_kernels.hpp has the proof.
"""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .. import _C
from ..errors import InputError
from ..kernels.reference import (
    LensHead,
    LensStats,
    apply_norm,
    fused_lens_reference,
    in_row_blocks,
    kind_of,
    lens_stats,
)

ROW_BLOCK = 1024


def fused_lens_cpu(hidden: Tensor, head: LensHead, targets: Tensor | None = None) -> LensStats:
    """Same signature, definition and result as the reference, for CPU tensors; products and logits are fp32.

    fp16 and bf16 are widened on the way, any strides are read in place. A row's result has the same bits
    for any number of threads and whatever rows are beside it. Extra memory: at most 12 MiB of packed
    rows, 2 KiB a row of them, and half a MiB a thread (more in proportion to ``d_model`` beyond 1024).
    """
    columns = None if targets is None else targets[:, None]
    stats, logit, rank, _, _ = fused_lens_and_more(hidden, head, columns, 0)
    return stats if targets is None else replace(stats, target_logit=logit[:, 0], target_rank=rank[:, 0])


def fused_lens_and_more(
    hidden: Tensor, head: LensHead, targets: Tensor | None, k: int
) -> tuple[LensStats, Tensor, Tensor, Tensor, Tensor]:
    """`fused_lens_cpu` without a target, and from the same product what several targets and lists ask for.

    Args:
        targets: ``[R, T]`` int64, or None for none.
        k: Tokens of a list, 0 for none.

    Returns:
        The statistics; logit fp32 and rank int64 of the targets, ``[R, T]``, the same bits as of each alone; z fp32
        (the logit before the softcap) and ids int64 of the ``k`` tokens with the largest z, ``[R, k]``, best first,
        equal ones in the order of ids. A list has the argmax first.

    Extra memory beside the lens's: 256 bytes a packed row for every target after the first, and 8 bytes an entry of the
    lists of all packed rows, for every thread.
    """
    norm, weight, norm_bias = head.norm, None, None
    if norm is not None and norm.weight is not None:
        weight = _floats(norm.weight.float() + norm.offset)
    if norm is not None and norm.bias is not None:
        norm_bias = _floats(norm.bias)
    out = _C.fused_lens(
        _matrix(hidden),
        _matrix(head.weight),
        kind_of(norm),
        weight,
        norm_bias,
        0.0 if norm is None else norm.eps,
        None if targets is None else targets.contiguous().numpy(),
        None if head.bias is None else _floats(head.bias),
        head.scale,
        head.softcap or 0.0,
        torch.get_num_threads(),
        k,
    )
    argmax, max_logit, logsumexp, entropy, logit, rank, top_z, top_id = map(torch.from_numpy, out)
    return LensStats(argmax, max_logit, logsumexp, entropy), logit, rank, top_z, top_id


def mean_unembedding_cpu(
    x_hat: Tensor, head: LensHead, logsumexp: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the unembedding, and biases, averaged under every row's own prediction: attention with ``K = V = W``.

    ``mean_weights[r] = sum_v p_rv w_v`` and ``mean_bias[r] = sum_v p_rv b_v`` with ``p_r = softmax(l_r)`` and
    ``l = scale * (x_hat @ W.T + b)``: the gradient of the logsumexp by ``scale * x_hat``, and what the expected logits
    of any other row follow from. A token that cannot occur (bias -inf) adds nothing.

    Args:
        x_hat: ``[R, d_model]`` normed rows, fp32, any strides.
        head: Its weight (fp32, fp16 or bf16, any strides), bias and scale; its norm is not applied. Without softcap.
        logsumexp: Not read; here for one signature on every device.

    Returns:
        ``mean_weights [R, d_model]``, ``mean_bias [R]`` (zeros without a bias), ``logsumexp [R]``, in fp32. The same
        bits for any number of threads and whatever rows are beside a row.

    Raises:
        InputError: A head with a softcap.

    Extra memory: at most 18 MiB (more in proportion to ``d_model`` beyond 8192 with AVX-512), half a MiB a thread.

    Source of the running sums: Dao et al. 2022, FlashAttention, arXiv 2205.14135, algorithm 1.
    """
    if head.softcap is not None:
        raise InputError(f"softcap: expected None, with which logits are linear in the weights, got {head.softcap}")
    bias = None if head.bias is None else _floats(head.bias)
    out = _C.mean_unembedding(_matrix(x_hat), _matrix(head.weight), bias, head.scale, torch.get_num_threads())
    mean_weights, mean_bias, found = map(torch.from_numpy, out)
    return mean_weights, mean_bias, found


def divergence_cpu(x_hat: Tensor, logsumexp: Tensor, head: LensHead, kind: str) -> Tensor:
    """Divergence of every layer's prediction from the last layer's, from the logits of both side by side.

    Args:
        x_hat: ``[n_layers + 1, N, d_model]`` normed rows, fp32, the last layer last.
        logsumexp: ``[n_layers + 1, N]`` fp32, of their logits.
        head: Its weight (fp32, fp16 or bf16, any strides), bias, scale and softcap; its norm is not applied.
        kind: ``"kl"`` for ``KL(p_final || p_layer)``, divided by the sum of the rounded ``p_final``; ``"jsd"`` for the
            Jensen-Shannon divergence.

    Returns:
        ``[n_layers + 1, N]`` fp32, in nats; the last layer's is 0. The same bits for any number of threads and whatever
        positions are beside one.

    Extra memory: a copy of ``x_hat``; beside it as `fused_lens_cpu`.
    """
    n_layers, n_rows, d_model = x_hat.shape

    def by_position(values: Tensor) -> Tensor:
        """The last layer first, so that what all layers of a position are compared with leads them."""
        return torch.cat([values[-1:], values[:-1]]).transpose(0, 1).reshape(n_layers * n_rows, *values.shape[2:])

    found = _C.divergence_from_first(
        _matrix(by_position(x_hat)),
        _matrix(head.weight),
        None if head.bias is None else _floats(head.bias),
        head.scale,
        head.softcap or 0.0,
        _floats(by_position(logsumexp)),
        n_layers,
        kind,
        torch.get_num_threads(),
    )
    out = torch.from_numpy(found).view(n_rows, n_layers).T
    return torch.cat([out[1:], out[:1]])


def product_only(x_hat: Tensor, unembedding: Tensor) -> None:
    """The matrix product of `fused_lens_cpu` alone, its results thrown away: a floor to compare times with."""
    _C.product_only(_matrix(x_hat), _matrix(unembedding), torch.get_num_threads())


def _matrix(tensor: Tensor):
    """The tensor's memory as an array; numpy has no bf16, so its bits travel as uint16."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _floats(vector: Tensor):
    return vector.detach().float().contiguous().numpy()


def fused_lens_certified(hidden: Tensor, head: LensHead, targets: Tensor | None = None) -> LensStats:
    """Same signature and definition as the reference, for CPU tensors, with argmax and rank decided without rounding.

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
    weights = _rows_in_memory(head.weight)
    index = screen_index(head.weight, weights)

    def run(rows: Tensor, row_targets: Tensor | None) -> LensStats:
        if not index.finite:
            return _exact_reference(rows, head, row_targets)
        return _run_block(index, weights, rows, head, row_targets, exhaustive=True)

    return in_row_blocks(run, hidden, targets, ROW_BLOCK)


def fused_lens_screened(hidden: Tensor, head: LensHead, targets: Tensor | None) -> LensStats:
    """What ``precision="auto"`` runs: certified, but rows that would fall back to fp64 are left to the fp32 kernel."""
    weights = _rows_in_memory(head.weight)
    index = screen_index(head.weight, weights)
    if not index.finite:
        return fused_lens_cpu(hidden, head, targets)

    def run(rows: Tensor, row_targets: Tensor | None) -> LensStats:
        return _run_block(index, weights, rows, head, row_targets, exhaustive=False)

    out = in_row_blocks(run, hidden, targets, ROW_BLOCK)
    (rows,) = out.fell_back.nonzero(as_tuple=True)
    if len(rows):
        again = fused_lens_cpu(hidden[rows], head, None if targets is None else targets[rows])
        for name, value in again.items():
            getattr(out, name)[rows] = value
    return replace(out, logsumexp_bound=None, fell_back=None)


def _run_block(index, weights, hidden: Tensor, head: LensHead, targets: Tensor | None, *, exhaustive) -> LensStats:
    arrays = index.lens(
        apply_norm(hidden, head.norm, torch.float64).contiguous().numpy(),
        weights,
        None if targets is None else targets.contiguous().numpy(),
        None if head.bias is None else head.bias.double().contiguous().numpy(),
        head.scale,
        head.softcap or 0.0,
        exhaustive,
        torch.get_num_threads(),
    )
    argmax, best, logsumexp, entropy, target_z, rank, bound, fell_back = map(torch.from_numpy, arrays)
    out = lens_stats(head, argmax, best, logsumexp, entropy, targets, target_z, rank)
    return _as_fp32(replace(out, logsumexp_bound=bound, fell_back=fell_back))


def _exact_reference(rows: Tensor, head: LensHead, targets: Tensor | None) -> LensStats:
    """For weights that are not finite, whose sums have no bound."""
    out = fused_lens_reference(rows, head, targets, dtype=torch.float64)
    bound, fell_back = torch.full_like(out.logsumexp, torch.inf), torch.ones(len(rows), dtype=torch.bool)
    return _as_fp32(replace(out, logsumexp_bound=bound, fell_back=fell_back))


def _as_fp32(out: LensStats) -> LensStats:
    return out.map(lambda value: value.float() if value.is_floating_point() else value)


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
