"""What one tile of logits is and what it adds to the statistics of its rows, in Triton.

The instructions that every logit costs decide the speed at small widths, so the reductions hold no branch
and compare once where once is enough.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .running_sums import NO_ID, log2_logits, peak_of, rescale

_LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def add_product(
    acc, x_ptrs, w_ptrs, d_model, stride_wd,
    SWAPPED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the products; one order over K for the targets and for the whole vocabulary.

    ``x_ptrs`` is ``[rows, BLOCK_K]``, ``w_ptrs`` ``[BLOCK_K, tokens]``, ``acc`` ``[rows, tokens]``, or all
    three transposed with ``SWAPPED``.
    """
    offs_k = tl.arange(0, BLOCK_K)
    # Known to run at least once, the loop needs only one set of zeroed accumulators.
    tl.assume(d_model > 0)
    for k in range(0, d_model, BLOCK_K):
        x = tl.load(x_ptrs + k)  # zeros past d_model and past the last row: nothing to mask
        k_ok = offs_k < d_model - k
        mask = k_ok[None, :] if SWAPPED else k_ok[:, None]
        w = tl.load(w_ptrs + tl.cast(k, tl.int64) * stride_wd, mask=mask, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        if SWAPPED:
            acc = tl.dot(w, x, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _next_up(t):
    """The float above ``t``: ``z >= _next_up(t)`` is ``z > t``, also at infinities and either zero."""
    bits = t.to(tl.int32, bitcast=True)
    return tl.where(t == 0, 1, tl.where(t > 0, bits + 1, bits - 1)).to(tl.float32, bitcast=True)


@triton.jit
def _add_best(best, argmax, z, ids, first_id):
    """The largest logit of each row and its lowest id, with those of ``z``, whose first column is ``first_id``."""
    tile_best = tl.max(z, 1)
    tile_argmax = tl.min(tl.where(z == tile_best[:, None], ids, NO_ID), 1) + first_id
    return tl.maximum(best, tile_best), tl.where(tile_best > best, tile_argmax, argmax)


@triton.jit
def _count_better(z, ids, own, t, SAME_BITS: tl.constexpr):
    """Tokens of each row of ``z`` that beat its target, which has the column ``own`` and the logit ``t``.

    An equal logit beats the target from a lower id only: ``t`` is the bar before the target's column and the
    float above it from there on. The target's own column may differ from ``t`` by rounding unless ``SAME_BITS``;
    it never counts.
    """
    better = z >= tl.where(ids < own[:, None], t[:, None], _next_up(t)[:, None])
    if SAME_BITS:
        counted = tl.where(better, 1.0, 0.0)
    else:
        # Two selects, not one conjunction: it needs fewer registers at a time and does not spill.
        counted = tl.where(better, tl.where(ids != own[:, None], 1.0, 0.0), 0.0)
    return tl.sum(counted, 1)  # exact: a tile has far fewer than 2**24 columns


@triton.jit
def _add_exponentials(
    total, weighted, old_best, best, z, col_ok, softcap,
    HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MAY_LACK: tl.constexpr,
):  # fmt: skip
    """The running sums, measured from ``old_best``, with those of ``z``, then measured from ``best``.

    ``col_ok`` is read with ``MASKED`` only; ``MAY_LACK`` says that a logit may be -inf.
    """
    logits = log2_logits(z, softcap, HAS_SOFTCAP)
    if HAS_SOFTCAP and MASKED:
        logits = tl.where(col_ok, logits, float("-inf"))
    peak = peak_of(best, softcap, HAS_SOFTCAP)
    total, weighted = rescale(total, weighted, peak_of(old_best, softcap, HAS_SOFTCAP) - peak)
    shifted = logits - peak[:, None]
    p = tl.exp2(shifted)
    if MAY_LACK:
        # A logit of -inf has to add 0 to the entropy: keep it finite, 0 * -inf is NaN.
        shifted = tl.maximum(shifted, _LOWEST)
    return total + tl.sum(p, 1), weighted + tl.sum(p * shifted, 1)


@triton.jit
def add_tile(
    best, argmax, rank, total, weighted, z, ids, first_id, n_vocab, target, t, softcap,
    HAS_TARGETS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, MASKED: tl.constexpr, MAY_LACK: tl.constexpr,
    SAME_BITS: tl.constexpr,
):  # fmt: skip
    """The statistics of rows with those of a tile ``z`` ``[rows, tokens]``, whose columns are ``first_id + ids``.

    With ``MASKED`` columns past the vocabulary are struck out; ``MAY_LACK`` says that a logit may be -inf. ``target``
    and ``t``, its logit, are read with ``HAS_TARGETS``.
    """
    col_ok = (ids < n_vocab - first_id)[None, :]
    if MASKED:
        z = tl.where(col_ok, z, float("-inf"))
    old_best = best
    best, argmax = _add_best(best, argmax, z, ids[None, :], first_id)
    if HAS_TARGETS:
        rank += _count_better(z, ids[None, :], target - first_id, t, SAME_BITS).to(tl.int32)
    total, weighted = _add_exponentials(
        total, weighted, old_best, best, z, col_ok, softcap, HAS_SOFTCAP, MASKED, MAY_LACK
    )
    return best, argmax, rank, total, weighted
