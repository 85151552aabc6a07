"""The statistics of one chunk of rows: the launches over the vocabulary and the merge of their parts."""

from __future__ import annotations

import torch
import triton

from .launch import LensOptions, LensRows
from .lens_kernel import launch_tiles
from .lens_tma import launch_tma
from .running_sums import Merged, Parts, merge_splits
from .schedule import processor_count, tile_ranges
from .ties import add_ties


def reduce_rows(rows: LensRows, merged: Merged, options: LensOptions, same_bits: bool) -> None:
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
    parts = Parts(best, argmax, rank, total, weighted)
    first = 0
    for tiles in ranges:
        own_parts = Parts(*(part[first : first + tiles.splits] for part in parts))
        if by_tma:
            launch_tma(rows, own_parts, options, tiles)
        else:
            launch_tiles(rows, own_parts, options, tiles, same_bits)
        first += tiles.splits
    merge_splits(parts, merged, rows, options.cap, options.row_flags(rows.targets is not None))
    if by_tma and rows.targets is not None:
        add_ties(rows, merged.rank, options)
