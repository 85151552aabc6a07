"""The fused lens on a GPU: every statistic of every row in one pass over the vocabulary.

A chunk of rows goes through four kernels: the final norm, the targets' own logits, the main product with
its running reductions (where the kernel of `lens_tma` cannot run, a second launch takes the last, partial tiles), and
the merge over vocabulary splits. On Hopper a fifth counts the rare ties that the main one left open.
Logits only ever exist as tiles in registers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .configs import LensConfig, ShapeClass, config_for
from .launch import LensOptions, LensRows
from .lens_common import LensOutput, soft_cap
from .lens_rows import reduce_rows
from .norms import Norm
from .norms_triton import normed_rows, padded_width
from .running_sums import Merged
from .schedule import chunk_blocks, processor_count
from .target_bits import has_same_bits
from .target_logits import TARGET_ROWS, launch_targets


def fused_lens_triton(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    config: LensConfig | None = None,
) -> LensOutput:
    """Lens statistics of ``hidden`` ``[R, d_model]`` in one pass over the vocabulary per chunk of rows.

    The normed states are rounded once, to the operands' dtype; everything after is fp32.

    Args:
        hidden: ``[R, d_model]`` bfloat16, float16 or float32, any strides.
        unembedding: ``[V, d_model]`` of the dtype of ``hidden``, any strides.
        norm: Final norm, or None.
        targets: ``[R]`` int64 in ``[0, V)``, or None. Ids outside are not read, their rows are meaningless.
        bias: ``[V]`` floating, or None.
        softcap: Positive cap of the logits, or None.
        logit_scale: Positive factor of the logits, applied before the cap.
        config: How the main kernel is launched; None takes what ``search.search_config`` kept for such calls,
            else the pinned configuration.

    Raises:
        ValueError: The dtype is none of the three.

    An infinite weight, or a product that overflows, may make a logit -inf; without a bias the entropy of its row
    is then NaN.

    Memory: at most 25 MiB of normed states and 22 MiB of partials, whatever ``R`` and ``V``.

    Source of the running sums: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """
    shape = ShapeClass.of(hidden, unembedding, bias, softcap, targets)
    config = config or config_for(shape, len(hidden))
    options = LensOptions(unembedding, bias, softcap, float(logit_scale), config)
    n_rows = hidden.shape[0]
    # Separate allocations: a torch operator may not return tensors that share memory.
    best, target_z, logsumexp, entropy = (_empty(hidden, n_rows, torch.float32) for _ in range(4))
    argmax, rank = (_empty(hidden, n_rows, torch.int64) for _ in range(2))
    row_multiple = max(config.block_m, TARGET_ROWS)
    row_bytes = padded_width(hidden.shape[1]) * hidden.element_size()
    step = row_multiple * chunk_blocks(n_rows, row_bytes, row_multiple, processor_count(hidden.device))
    with torch.cuda.device_of(hidden):
        same_bits = targets is not None and has_same_bits(options)
        x_hat = None
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            x_hat = normed_rows(hidden[part], norm, row_multiple, out=x_hat)
            part_targets, part_z = (None, None) if targets is None else (targets[part], target_z[part])
            rows = LensRows(x_hat, part_targets, part_z, len(best[part]))
            if targets is not None:
                launch_targets(rows, options)
            merged = Merged(best, argmax, rank, logsumexp, entropy)
            reduce_rows(rows, Merged(*(field[part] for field in merged)), options, same_bits)
    max_logit = soft_cap(best, softcap)
    if targets is None:
        return LensOutput(argmax, max_logit, logsumexp, entropy, None, None)
    return LensOutput(argmax, max_logit, logsumexp, entropy, soft_cap(target_z, softcap), rank)


def _empty(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)
