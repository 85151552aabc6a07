"""How the work of a lens is divided over programs: chunks of rows, vocabulary splits, the order of programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .configs import LensConfig

X_HAT_BYTES = 25 * 2**20
MAX_CHUNK_ROWS = 2**15  # bounds the partials: 2**15 rows * 33 splits * 20 bytes = 21 MiB
MAX_SPLITS = 32
GROUP_BYTES = 12 * 2**20  # of normed states, a part of L2
MAX_GROUP = 24
START = 0.25  # what a program takes to begin, in tiles


def chunk_blocks(n_rows: int, row_bytes: int, block_m: int, processors: int) -> int:
    """Row blocks per chunk, whose normed states fit in ``X_HAT_BYTES``: a whole number for each processor, where there
    are that many, else equal chunks.
    """
    blocks = max(1, -(-n_rows // block_m))
    most = max(1, min(X_HAT_BYTES // (block_m * row_bytes), MAX_CHUNK_ROWS // block_m))
    if blocks > most >= processors:
        return most // processors * processors
    return -(-blocks // -(-blocks // most))


def choose_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """The vocabulary splits that finish soonest: all waves of programs but the last take the mean number of tiles."""
    most = max(1, min(tiles, max(MAX_SPLITS, processors // row_blocks)))

    def time(splits: int) -> float:
        waves = -(-row_blocks * splits // processors)
        return (waves - 1) * tiles / splits + -(-tiles // splits) + waves * START

    return min(range(1, most + 1), key=time)


def choose_group(block_bytes: int) -> int:
    """Row blocks that read the same tiles of the unembedding at about the same time, and stay in L2 meanwhile."""
    return max(1, min(MAX_GROUP, GROUP_BYTES // block_bytes))


@dataclass(frozen=True)
class TileRange:
    """Tiles of ``width`` tokens from tile ``first`` on, divided into ``splits`` consecutive parts."""

    width: int
    first: int
    count: int
    splits: int
    group: int  # row blocks that are neighbours
    masked: bool  # whether the last tile reaches past the vocabulary


@lru_cache
def tile_ranges(
    n_vocab: int, row_blocks: int, row_bytes: int, config: LensConfig, processors: int, by_tma: bool
) -> tuple[TileRange, ...]:
    """The whole tiles of a vocabulary, then the rest in smaller tiles; either may be missing.

    ``row_bytes`` are those of a row of the normed states.

    Two launches: a kernel without masks takes fewer instructions a logit and no branch. But the kernel of ``lens_tma``
    takes the rest in a loop of its own, and one row block is over so soon that a second launch would cost more than
    masks, where tiles of one width can do both.
    """
    ranges = []
    whole, rest = divmod(n_vocab, config.block_v)
    with_masks = bool(rest) and (by_tma or row_blocks == 1 and config.tail_v == config.block_v)
    count = whole + with_masks
    if count:
        splits = config.splits or choose_splits(row_blocks, count, processors)
        group = config.group or choose_group(config.block_m * row_bytes)
        ranges.append(TileRange(config.block_v, 0, count, splits, group, masked=with_masks))
    begin = count * config.block_v
    if begin < n_vocab:
        count = -(-(n_vocab - begin) // config.tail_v)
        ranges.append(TileRange(config.tail_v, begin // config.tail_v, count, splits=1, group=1, masked=True))
    return tuple(ranges)


@triton.jit
def block_and_split(program, row_blocks, n_splits, group):
    """The row block and the split of a program.

    Programs start in the order of their number, so what runs at one time is a run of numbers. A group of row
    blocks goes through all splits before the next group begins, and within a group the row blocks of one split
    are neighbours: the states of few row blocks stay in L2 while all of them read the same tiles of the
    unembedding at about the same time. The last group may be smaller.
    """
    first = program // (group * n_splits) * group
    size = tl.minimum(group, row_blocks - first)
    within = program - first * n_splits
    return first + within % size, within // size


@lru_cache
def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; 1 where there are none to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
