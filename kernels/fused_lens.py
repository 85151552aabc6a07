"""The fused lens on a GPU: every statistic of every row in one pass over the vocabulary.

A chunk of rows goes through four kernels: the final norm, the targets' own logits, the main product with its running
reductions (where the kernel of `kernel_tma` cannot run, a second launch takes the last, partial tiles), and the merge
over vocabulary splits. On Hopper a fifth counts the rare ties that the main one left open.
Logits only ever exist as tiles in registers.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .config import LensConfig, ShapeClass, chunk_blocks, config_for, processor_count, tile_ranges
from .kernel import (
    TARGET_ROWS,
    LensOptions,
    LensRows,
    PartialStats,
    RowStats,
    launch_targets,
    launch_tiles,
    merge_splits,
)
from .kernel_tma import add_ties, launch_tma
from .norm_kernel import normed_rows, padded_width
from .reference import LensHead, LensStats, soft_cap

_known: dict[tuple, bool] = {}
_D_MODEL = 1024


def reduce_rows(rows: LensRows, merged: RowStats, options: LensOptions, same_bits: bool) -> None:
    """Write the statistics of ``rows`` into ``merged``.

    ``same_bits`` says that ``rows.target_z`` has the bits of the main product. Rank is 0 exactly where the argmax is
    the target, whose logit then is the largest.
    """
    config, device = options.config, rows.x_hat.device
    row_blocks = triton.cdiv(rows.count, config.block_m)
    row_bytes = rows.x_hat.shape[1] * rows.x_hat.element_size()
    by_tma = options.by_tma(rows.targets is not None, same_bits)
    ranges = tile_ranges(len(options.unembedding), row_blocks, row_bytes, config, processor_count(device), by_tma)
    n_parts = sum(tiles.splits for tiles in ranges)
    best, total, weighted = torch.empty((3, n_parts, rows.count), dtype=torch.float32, device=device)
    argmax, rank = torch.empty((2, n_parts, rows.count), dtype=torch.int32, device=device)
    parts = PartialStats(best, argmax, rank, total, weighted)
    first = 0
    for tiles in ranges:
        own_parts = PartialStats(*(part[first : first + tiles.splits] for part in parts))
        if by_tma:
            launch_tma(rows, own_parts, options, tiles)
        else:
            launch_tiles(rows, own_parts, options, tiles, same_bits)
        first += tiles.splits
    merge_splits(parts, merged, rows, options.cap, options.row_flags(rows.targets is not None))
    if by_tma and rows.targets is not None:
        add_ties(rows, merged.rank, options)


def target_matches_main_product(options: LensOptions) -> bool:
    """Whether targets need not be kept from beating themselves, which costs some instructions a logit.

    Tried once per device, dtype and configuration, on 64 rows; not while a CUDA graph is captured, where the
    answer is no unless it is known. With a bias, a scale or a softcap it is always no: those kernels lack the
    registers to gain from it.
    """
    weight = options.unembedding
    if not options.is_plain or weight.device.type != "cuda":
        return False
    key = (weight.device, weight.dtype, options.config)
    if key not in _known:
        if torch.cuda.is_current_stream_capturing():
            return False
        _known[key] = _try(weight.device, weight.dtype, options.config)
    return _known[key]


def _try(device: torch.device, dtype: torch.dtype, config: LensConfig) -> bool:
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    n_rows = max(TARGET_ROWS, config.block_m)
    options = LensOptions(randn(2 * config.block_v - 1, _D_MODEL), None, None, 1.0, config)
    best, t, logsumexp, entropy = torch.empty((4, n_rows), dtype=torch.float32, device=device)
    argmax, rank = torch.empty((2, n_rows), dtype=torch.int64, device=device)
    x_hat = randn(n_rows, _D_MODEL)
    reduce_rows(LensRows(x_hat, None, None, n_rows), RowStats(best, argmax, rank, logsumexp, entropy), options, False)
    launch_targets(LensRows(x_hat, argmax, t, n_rows), options)
    return torch.equal(best, t)


def fused_lens_triton(
    hidden: Tensor, head: LensHead, targets: Tensor | None = None, *, config: LensConfig | None = None
) -> LensStats:
    """Lens statistics of ``hidden`` ``[R, d_model]`` in one pass over the vocabulary per chunk of rows.

    The normed states are rounded once, to the operands' dtype; everything after is fp32.

    Args:
        hidden: ``[R, d_model]`` bfloat16, float16 or float32, any strides.
        head: Norm and unembedding ``[V, d_model]`` of the dtype of ``hidden``, any strides; without a projection.
        targets: ``[R]`` int64 in ``[0, V)``, or None. Ids outside are not read, their rows are meaningless.
        config: How the main kernel is launched; None takes what ``search.search_config`` kept for such calls,
            else the pinned configuration.

    Raises:
        ValueError: The dtype is none of the three.

    An infinite weight, or a product that overflows, may make a logit -inf; without a bias the entropy of its row
    is then NaN.

    Memory: at most 25 MiB of normed states and 22 MiB of partials, whatever ``R`` and ``V``.

    Source of the running sums: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """
    shape = ShapeClass.of(hidden, head.weight, head.bias, head.softcap, targets)
    config = config or config_for(shape, len(hidden))
    options = LensOptions(head.weight, head.bias, head.softcap, float(head.scale), config)
    n_rows = hidden.shape[0]
    # Separate allocations: a torch operator may not return tensors that share memory.
    best, target_z, logsumexp, entropy = (_empty(hidden, n_rows, torch.float32) for _ in range(4))
    argmax, rank = (_empty(hidden, n_rows, torch.int64) for _ in range(2))
    row_multiple = max(config.block_m, TARGET_ROWS)
    row_bytes = padded_width(hidden.shape[1]) * hidden.element_size()
    step = row_multiple * chunk_blocks(n_rows, row_bytes, row_multiple, processor_count(hidden.device))
    with torch.cuda.device_of(hidden):
        same_bits = targets is not None and target_matches_main_product(options)
        x_hat = None
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            x_hat = normed_rows(hidden[part], head.norm, row_multiple, out=x_hat)
            part_targets, part_z = (None, None) if targets is None else (targets[part], target_z[part])
            rows = LensRows(x_hat, part_targets, part_z, len(best[part]))
            if targets is not None:
                launch_targets(rows, options)
            merged = RowStats(best, argmax, rank, logsumexp, entropy)
            reduce_rows(rows, RowStats(*(field[part] for field in merged)), options, same_bits)
    max_logit = soft_cap(best, head.softcap)
    if targets is None:
        return LensStats(argmax, max_logit, logsumexp, entropy)
    return LensStats(argmax, max_logit, logsumexp, entropy, soft_cap(target_z, head.softcap), rank)


def _empty(like: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device)
