"""The fused lens with several targets a row, lists of the likeliest tokens, or both, from one product.

A chunk of rows goes through the kernels of `fused_lens`, with that of `kernel_more` in the place of the main one, and,
for lists, through the two of `lists`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .config import LensConfig, LensOptions, TileRange, chunk_blocks, is_aligned, processor_count, tile_ranges
from .fused_lens import target_matches_main_product
from .kernel import TARGET_ROWS, LensRows, PartialStats, RowStats, launch_targets, merge_splits
from .kernel_more import GROUP, MoreOutputs, launch_more
from .kernel_tma import add_ties
from .lists import choose_groups, list_tokens
from .norm_kernel import normed_rows, padded_width
from .reference import LensHead, LensStats, soft_cap
from .tiles import SCRATCH_BYTES, many_rows_config, pointer_tiles


def more_config(weight: Tensor) -> LensConfig:
    """Tiles of the pinned configuration of many rows, by pointer loads."""
    return pointer_tiles(many_rows_config(weight))


def fused_lens_more_triton(
    hidden: Tensor,
    head: LensHead,
    targets: Tensor | None,
    k: int,
    *,
    with_stats: bool = True,
    config: LensConfig | None = None,
    same_bits: bool | None = None,
) -> tuple[LensStats | None, Tensor, Tensor, Tensor, Tensor]:
    """`fused_lens_triton` without a target, and from the same product what several targets and lists ask for.

    Args:
        hidden: ``[R, d_model]`` bfloat16, float16 or float32, any strides.
        head: Norm and unembedding ``[V, d_model]`` of the dtype of ``hidden``, any strides; without a projection.
        targets: ``[R, T]`` int64, or None for none; ids outside the vocabulary as in `fused_lens_triton`. Each is one
            more multiply-add and two sums a logit.
        k: Tokens of a list, up to `lists_reference.MOST_LISTED`; 0 for none.
        with_stats: False leaves the statistics out, where there are no targets.
        config: How the product is launched, by pointer loads; None takes `more_config`.
        same_bits: As in `fused_lens_triton`; None asks `targets_match`.

    Returns:
        The statistics, their argmax and largest logit with the bits of `fused_lens_triton`, sums within rounding; logit
        fp32 and rank int64 of the targets, ``[R, T]``, the bits of each alone; z fp32 (the logit before the softcap)
        and ids int64 of the ``k`` tokens with the largest z, ``[R, k]``, best first, equal ones in the order of ids.

    Memory: that of `fused_lens_triton`, and for lists 32 MiB of maxima, or V / 8 for each of 128 rows where that
    is more.
    """
    n_rows, device = len(hidden), hidden.device
    config = config or more_config(head.weight)
    n_targets = 0 if targets is None else targets.shape[1]
    stats = RowStats.empty(n_rows, device)
    target_z, rank = (torch.empty(n_rows, n_targets, dtype=dtype, device=device) for dtype in _OF_TARGETS)
    z, ids = (torch.empty(n_rows, k, dtype=dtype, device=device) for dtype in _OF_TARGETS)
    multiple = max(config.block_m, TARGET_ROWS)
    step = _rows_at_a_time(n_rows, hidden, head, multiple, k)
    with torch.cuda.device_of(hidden):
        if same_bits is None:
            same_bits = targets is not None and targets_match(head, config)
        options = LensOptions(head, config, same_bits=same_bits)
        x_hat = None
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            x_hat = normed_rows(hidden[part], head.norm, multiple, out=x_hat)
            rows = LensRows(x_hat, *_targets_of(x_hat, targets, part, options), min(step, n_rows - start))
            own = RowStats(*(value[part] for value in stats)) if with_stats else None
            ranks, maxima = reduce_more(rows, own, options, has_lists=k > 0)
            if own is not None and ranks is not None:
                target_z[part], rank[part] = _with_argmax(rows, ranks, own)
            if maxima is not None:
                n_groups = triton.cdiv(head.vocab_size, GROUP)
                chosen = choose_groups(maxima, rows.count, n_groups, min(k, n_groups))
                z[part], ids[part] = list_tokens(x_hat, chosen, k, options)
    found = None
    if with_stats:
        found = LensStats(stats.argmax, soft_cap(stats.best, head.softcap), stats.logsumexp, stats.entropy)
    return found, soft_cap(target_z, head.softcap), rank, z, ids


_OF_TARGETS = (torch.float32, torch.int64)


def _rows_at_a_time(n_rows: int, hidden: Tensor, head: LensHead, multiple: int, k: int) -> int:
    """Rows of a chunk, whose normed states and maxima are bounded."""
    row_bytes = padded_width(hidden.shape[1]) * hidden.element_size()
    if k:
        most = SCRATCH_BYTES // (4 * triton.cdiv(head.vocab_size, GROUP) * multiple)
        n_rows = min(n_rows, multiple * max(1, most))
    return multiple * chunk_blocks(n_rows, row_bytes, multiple, processor_count(hidden.device))


def _targets_of(
    x_hat: Tensor, targets: Tensor | None, part: slice, options: LensOptions
) -> tuple[Tensor | None, Tensor | None]:
    """Targets of a chunk and their own logits, ``[T, R]``."""
    if targets is None:
        return None, None
    ids = targets[part].T.contiguous()
    z = torch.empty(ids.shape, dtype=torch.float32, device=ids.device)
    for own, own_z in zip(ids, z, strict=True):
        launch_targets(LensRows(x_hat, own, own_z, ids.shape[1]), options)
    return ids, z


def reduce_more(
    rows: LensRows, stats: RowStats | None, options: LensOptions, has_lists: bool
) -> tuple[Tensor | None, Tensor | None]:
    """One product over the vocabulary: write the statistics of ``rows`` into ``stats``, if there.

    Targets and their logits are ``[T, R]``.

    Returns:
        How many tokens beat each target in the product, ``[T, R]`` int64; maxima ``[R, groups of all tiles]`` fp32.
    """
    device = rows.x_hat.device
    ranges = _ranges(rows, options)
    n_splits = sum(tiles.splits for tiles in ranges)
    parts = None if stats is None else PartialStats.empty(n_splits, rows.count, device)
    ranks = None if rows.targets is None else torch.zeros(rows.targets.shape, dtype=torch.int32, device=device)
    maxima = None
    if has_lists:
        tokens = max((tiles.first + tiles.count) * tiles.width for tiles in ranges)
        maxima = torch.empty(rows.count, tokens // GROUP, dtype=torch.float32, device=device)
    out, first = MoreOutputs(parts, ranks, maxima), 0
    for tiles in ranges:
        own = out.of_splits(slice(first, first + tiles.splits))
        for one in [own] if not tiles.masked and _fit_together(rows, options) else own.apart():
            launch_more(rows, one, options, tiles)
        first += tiles.splits
    if parts is not None and stats is not None:
        merge_splits(parts, stats, rows, options)
    if ranks is None or rows.targets is None or rows.target_z is None:
        return None, maxima
    beaten = ranks.to(torch.int64)
    if options.same_bits:
        for ids, z, rank in zip(rows.targets, rows.target_z, beaten, strict=True):
            add_ties(LensRows(rows.x_hat, ids, z, rows.count), rank, options)
    return beaten, maxima


def _fit_together(rows: LensRows, options: LensOptions) -> bool:
    """Whether statistics, maxima and targets, if there are any, have registers in one launch."""
    weight = options.head.weight
    return rows.targets is None or options.same_bits and is_aligned(weight) and weight.dtype != torch.float32


def _ranges(rows: LensRows, options: LensOptions) -> tuple[TileRange, ...]:
    config, row_bytes = options.config, rows.x_hat.shape[1] * rows.x_hat.element_size()
    row_blocks, processors = triton.cdiv(rows.count, config.block_m), processor_count(rows.x_hat.device)
    return tile_ranges(options.head.vocab_size, row_blocks, row_bytes, config, processors, by_tma=False)


def _with_argmax(rows: LensRows, ranks: Tensor, stats: RowStats) -> tuple[Tensor, Tensor]:
    """Logits before the softcap and ranks of targets, ``[R, T]``.

    As in `reference.lens_stats`, the product that decided the argmax decides here: rank 0 is the argmax.
    """
    assert rows.targets is not None and rows.target_z is not None
    is_top = rows.targets == stats.argmax
    return torch.where(is_top, stats.best, rows.target_z).T, torch.where(is_top, 0, ranks.clamp(min=1)).T


def targets_match(head: LensHead, config: LensConfig) -> bool:
    """Whether a target's own product has the bits of its column of the product of `kernel_more` on this device.

    With a bias or a scale the answer is no: the kernel that tells ties apart has neither.
    """
    if head.bias is not None or head.scale != 1.0:
        return False
    return target_matches_main_product(LensHead(head.weight), config)
