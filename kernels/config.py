"""How the fused lens is launched: pinned tile sizes, and how its work is divided over programs.

One configuration per dtype, layout, row count and GPU generation; chunks of rows, splits of the vocabulary and the
order of programs follow from it and from the shapes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH_MULTIPLE = 64  # of the padded columns of the normed states; every BLOCK_K divides it
KINDS = ("plain", "few_rows", "tma")
HOPPER = 9  # the generation with warp group products; what a CPU emulates
X_HAT_BYTES = 25 * 2**20
MAX_CHUNK_ROWS = 2**15  # bounds the partials: 2**15 rows * 33 splits * 20 bytes = 21 MiB
MAX_SPLITS = 32
GROUP_BYTES = 12 * 2**20  # of normed states, a part of L2
MAX_GROUP = 24
START = 0.25  # what a program takes to begin, in tiles


@dataclass(frozen=True)
class LensConfig:
    """How the main kernel is launched.

    Args:
        block_m: Rows of a tile.
        block_v: Tokens of a tile, a power of two.
        tail_v: Tokens of a tile past the last whole one, a divisor of ``block_v``; masks need registers.
        block_k: Columns multiplied at a time, a divisor of ``WIDTH_MULTIPLE``.
        num_warps: Warps of a program.
        num_stages: Tiles of operands in flight.
        kind: ``"plain"``, ``"few_rows"`` (operands swapped, tokens as the rows of the product) or
            ``"tma"`` (the kernel of ``kernel_tma`` wherever it can run, else as ``"plain"``).
        splits: PartialStats of the vocabulary; None lets the launcher divide it.
        group: Row blocks whose programs are neighbours; None lets the launcher choose.
    """

    block_m: int
    block_v: int
    tail_v: int
    block_k: int
    num_warps: int
    num_stages: int
    kind: str = "plain"
    splits: int | None = None
    group: int | None = None

    def __post_init__(self):
        if WIDTH_MULTIPLE % self.block_k:
            raise ValueError(f"block_k: expected a divisor of {WIDTH_MULTIPLE}, got {self.block_k}")
        if self.block_v % self.tail_v:
            raise ValueError(f"tail_v: expected a divisor of block_v {self.block_v}, got {self.tail_v}")
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")


# Registers decide: 128 x 256 fp32 accumulators take 128 of the 255 of a thread at 8 warps. Only Hopper's
# products leave the others free; tf32x3 keeps two parts of each operand as well, so fp32 gets half the columns.
_HALF = LensConfig(128, 128, 128, 64, num_warps=8, num_stages=3)
_SINGLE = LensConfig(128, 64, 64, 32, num_warps=8, num_stages=3)
_SINGLE_BLACKWELL = LensConfig(64, 128, 64, 32, num_warps=8, num_stages=3)
_HALF_HOPPER = LensConfig(128, 256, 128, 64, num_warps=8, num_stages=3, kind="tma")
_SINGLE_HOPPER = LensConfig(128, 128, 64, 32, num_warps=8, num_stages=3)
# One warp group's 64 rows would stand mostly empty: the tokens take their place.
_FEW_HALF = LensConfig(16, 128, 128, 64, num_warps=4, num_stages=6, kind="few_rows")
_FEW_SINGLE = LensConfig(16, 128, 128, 32, num_warps=4, num_stages=3, kind="few_rows")
_SOME_HALF = LensConfig(64, 128, 128, 64, num_warps=4, num_stages=8, kind="tma")
_SOME_SINGLE = LensConfig(64, 128, 64, 32, num_warps=8, num_stages=4, kind="few_rows")
# One row block: narrower tiles, so that the processors end at about the same time.
_ONE_BLOCK_HALF = LensConfig(128, 128, 128, 64, num_warps=8, num_stages=6, kind="tma")
# Few row blocks, of which half a one would be padding.
_HALF_BLOCKS_HALF = LensConfig(64, 256, 128, 64, num_warps=4, num_stages=5, kind="tma")
_FEW_BLOCKS = 4 * 128
# Element-wise loads need an address register per element: only a small tile stays free of spills, but on Hopper.
_UNALIGNED_HALF = LensConfig(64, 64, 64, 32, num_warps=8, num_stages=2)
_UNALIGNED_SINGLE = LensConfig(64, 32, 32, 32, num_warps=4, num_stages=1)


def is_aligned(unembedding: Tensor) -> bool:
    """Whether every 16-element run of the rows of ``[V, d_model]`` can be loaded as 16-byte vectors."""
    stride_v, stride_d = unembedding.stride()
    sizes_fit = unembedding.shape[1] % 16 == 0 and stride_v % 16 == 0
    return stride_d == 1 and sizes_fit and unembedding.data_ptr() % 16 == 0


def pinned_config(dtype: torch.dtype, aligned: bool, n_rows: int, generation: int = HOPPER) -> LensConfig:
    """The configuration for operands of ``dtype``, by default on Hopper.

    Args:
        dtype: Of both operands.
        aligned: Whether ``is_aligned`` holds for the unembedding.
        n_rows: Rows of the call.
        generation: Major compute capability of the device.

    Raises:
        ValueError: No kernel for ``dtype``.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"expected bfloat16, float16 or float32 operands, got {dtype}")
    single = dtype == torch.float32
    if not aligned and generation == HOPPER:
        return _SINGLE if single else _HALF
    if not aligned:
        return _UNALIGNED_SINGLE if single else _UNALIGNED_HALF
    if n_rows <= _FEW_HALF.block_m and generation <= HOPPER:
        return _FEW_SINGLE if single else _FEW_HALF
    if generation != HOPPER:
        return _HALF if not single else _SINGLE if generation < HOPPER else _SINGLE_BLACKWELL
    if n_rows <= _SOME_HALF.block_m:
        return _SOME_SINGLE if single else _SOME_HALF
    if n_rows <= _ONE_BLOCK_HALF.block_m and not single:
        return _ONE_BLOCK_HALF
    if n_rows <= _FEW_BLOCKS and -(-n_rows // _HALF_BLOCKS_HALF.block_m) % 2 and not single:
        return _HALF_BLOCKS_HALF
    return _SINGLE_HOPPER if single else _HALF_HOPPER


@lru_cache
def generation_of(device: torch.device) -> int:
    """Major compute capability of ``device``; without a GPU that of the kernels' first target."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


@dataclass(frozen=True)
class ShapeClass:
    """Calls that share a configuration found by search: row counts within a power of two."""

    device: torch.device
    dtype: torch.dtype
    aligned: bool
    vocab_size: int
    d_model: int
    options: tuple[bool, bool, bool]  # bias, softcap, targets
    row_bits: int

    @classmethod
    def of(cls, hidden: Tensor, unembedding: Tensor, bias, softcap, targets) -> ShapeClass:
        """The class of a call of ``fused_lens_triton``."""
        options = (bias is not None, softcap is not None, targets is not None)
        row_bits = hidden.shape[0].bit_length()
        return cls(hidden.device, hidden.dtype, is_aligned(unembedding), *unembedding.shape, options, row_bits)


KEPT: dict[ShapeClass, LensConfig] = {}  # written by ``search.search_config`` on request


def config_for(shape: ShapeClass, n_rows: int) -> LensConfig:
    """The configuration kept for ``shape``, or the pinned one."""
    return KEPT.get(shape) or pinned_config(shape.dtype, shape.aligned, n_rows, generation_of(shape.device))


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

    Two launches: a kernel without masks takes fewer instructions a logit and no branch. But that of ``kernel_tma``
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
