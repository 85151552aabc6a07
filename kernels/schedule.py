"""How the work of a lens is divided over programs: chunks of rows, vocabulary splits, the order of programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .configs import LensConfig

X_HAT_BYTES = 25 * 2**20
MAX_CHUNK_ROWS = 2**16  # bounds the partials: 2**16 rows * 17 splits * 20 bytes = 21 MiB
MAX_SPLITS = 16
MAX_GROUP = 12


def chunk_blocks(n_rows: int, row_bytes: int, block_m: int) -> int:
    """Row blocks per chunk: equal chunks whose normed states fit in ``X_HAT_BYTES``."""
    blocks = max(1, -(-n_rows // block_m))
    most = max(1, min(X_HAT_BYTES // (block_m * row_bytes), MAX_CHUNK_ROWS // block_m))
    return -(-blocks // -(-blocks // most))


def choose_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """The vocabulary splits that finish soonest if a program takes its tiles plus one to start."""
    most = max(1, min(tiles, max(MAX_SPLITS, processors // row_blocks)))

    def time(splits: int) -> int:
        waves = -(-row_blocks * splits // processors)
        return waves * (-(-tiles // splits) + 1)

    return min(range(1, most + 1), key=time)


def choose_group(splits: int, processors: int) -> int:
    """Row blocks that run at one time together with all splits, 12 at most."""
    return max(1, min(MAX_GROUP, processors // splits))


@dataclass(frozen=True)
class TileRange:
    """Tiles of ``width`` tokens from tile ``first`` on, divided into ``splits`` consecutive parts."""

    width: int
    first: int
    count: int
    splits: int
    group: int  # row blocks that are neighbours
    num_warps: int
    masked: bool = False  # whether the last tile reaches past the vocabulary


def tile_ranges(n_vocab: int, row_blocks: int, config: LensConfig, processors: int) -> list[TileRange]:
    """The whole tiles of a vocabulary, then the rest in smaller tiles; either may be missing.

    Two launches: a kernel without masks takes fewer instructions a logit and no branch. But one row block is over so
    soon that a second launch would cost more than masks, where tiles of one width can do both.
    """
    ranges = []
    whole, rest = divmod(n_vocab, config.block_v)
    with_masks = bool(rest) and row_blocks == 1 and config.tail_v == config.block_v
    count = whole + with_masks
    if count:
        splits = config.splits or choose_splits(row_blocks, count, processors)
        group = config.group or choose_group(splits, processors)
        ranges.append(TileRange(config.block_v, 0, count, splits, group, config.num_warps, masked=with_masks))
    begin = count * config.block_v
    if begin < n_vocab:
        count = -(-(n_vocab - begin) // config.tail_v)
        # A specialised program's warps come in three groups, of which two reduce: the plain one has both.
        warps = config.num_warps * (2 if config.kind == "specialized" else 1)
        first = begin // config.tail_v
        ranges.append(TileRange(config.tail_v, first, count, 1, 1, warps, masked=True))
    return ranges


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


def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; 1 where there are none to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
