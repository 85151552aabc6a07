"""How the fused lens is launched: tile sizes, the options of a call, and how its work is divided over programs.

Tile sizes are pinned per dtype, layout, row count and GPU generation; chunks of rows, splits of the vocabulary and
groups of row blocks follow from them and from the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .reference import LensHead

WIDTH_MULTIPLE = 64  # of the padded columns of the normed states; every BLOCK_K divides it
KINDS = ("plain", "few_rows", "tma")
FAMILIES = ("lens", "several", "masked")  # of kernels that share tiles: see `tiles` for the last two
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
            ``"tma"`` (the kernel of `kernel_tma` wherever it can run, else as ``"plain"``, see `by_pointers`).
        splits: Parts of the vocabulary that programs reduce apart; None takes `choose_splits`.
        group: Row blocks whose programs are neighbours; None takes `choose_group`.
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


# Registers decide: 128 x 256 fp32 accumulators take 128 of the 255 of a thread at 8 warps. Only Hopper's products leave
# the others free; tf32x3 keeps two parts of each operand as well, so that fp32 gets half the columns.
_HALF = LensConfig(128, 128, 128, 64, num_warps=8, num_stages=3)
_SINGLE = LensConfig(128, 64, 64, 32, num_warps=8, num_stages=3)
_HALF_BLACKWELL = LensConfig(128, 64, 64, 64, num_warps=8, num_stages=3)
_HALF_HOPPER = LensConfig(128, 256, 128, 64, num_warps=8, num_stages=3, kind="tma")
_SINGLE_HOPPER = LensConfig(128, 128, 64, 32, num_warps=8, num_stages=3)
# Up to 16 rows (64 in fp32): one warp group's 64 rows would stand mostly empty, tokens take their place.
_HALF_16_ROWS = LensConfig(16, 128, 128, 64, num_warps=4, num_stages=6, kind="few_rows")
_SINGLE_16_ROWS = LensConfig(16, 128, 128, 32, num_warps=4, num_stages=3, kind="few_rows")
_HALF_64_ROWS = LensConfig(64, 128, 128, 64, num_warps=4, num_stages=8, kind="tma")
_SINGLE_64_ROWS = LensConfig(64, 128, 64, 32, num_warps=8, num_stages=4, kind="few_rows")
# One row block: narrower tiles, so that the processors end at about the same time.
_HALF_128_ROWS = LensConfig(128, 128, 128, 64, num_warps=8, num_stages=6, kind="tma")
# An odd number of half row blocks, up to 8: of whole ones, half the last would be padding.
_HALF_ODD_BLOCKS = LensConfig(64, 256, 128, 64, num_warps=4, num_stages=5, kind="tma")
_MOST_ODD_BLOCKS = 8
# Element-wise loads need an address register per element: only a small tile stays free of spills, but on Hopper.
_HALF_UNALIGNED = LensConfig(64, 64, 64, 32, num_warps=8, num_stages=2)
_SINGLE_UNALIGNED = LensConfig(64, 32, 32, 32, num_warps=8, num_stages=1)


@dataclass(frozen=True)
class Limits:
    """What compiles without spills, as one version of Triton allots registers; at least that of the pinned sizes."""

    # Of configurations by TMA where the kernel by pointers has to do, which needs registers for addresses too.
    columns: int = 256
    tail: int = 128
    stages: int = 8
    # What else becomes of a pinned configuration, for one of `FAMILIES`.
    changes: Mapping[tuple[str, LensConfig], dict] = field(default_factory=dict)


# The versions that the compile-only gate was passed with (`make test-triton`), and what it read from the machine code:
# at the sizes that a GPU was measured with 3.8 spills up to 16 bytes a thread, 3.9 up to 232, and at 8 stages or a tail
# of 128 columns still 8; at 3 stages in fp32 3.9 spills 8, at 4 none. With a softcap 3.8 spills 8 for several targets
# in fp32 at 128 columns, at any number of stages. On Ampere a tail of 128 columns spills 88 in both with a softcap, one
# of 64 still 8 with a bias, and several targets 32 at 3 stages. On Blackwell all spill up to 32 in some forms in half
# precision at 3 or 4 stages, or with a tail of 32 or 64 columns, 3.7 those with a tail of 64 alone, and averages 8 at a
# depth of 64 in 3.6 and 3.9; of unaligned weights several targets spill 8 to 16 in all but 3.8.
_CHANGES = (
    ((8, 9), "lens", _HALF, dict(tail_v=32)),
    ((8, 9), "lens", _HALF_BLACKWELL, dict(tail_v=16, num_stages=2)),
    ((7,), "lens", _HALF_BLACKWELL, dict(tail_v=32)),
    ((9,), "lens", _SINGLE_HOPPER, dict(num_stages=4)),
    ((8, 9), "several", _HALF, dict(tail_v=32, num_stages=2)),
    ((6, 8, 9), "several", _HALF_BLACKWELL, dict(block_v=32, tail_v=16, num_stages=2)),
    ((6,), "several", _HALF_UNALIGNED, dict(tail_v=32)),
    ((6,), "several", _SINGLE_UNALIGNED, dict(num_stages=4)),
    ((7, 9), "several", _SINGLE_UNALIGNED, dict(num_stages=2)),
    ((8,), "several", _SINGLE_HOPPER, dict(block_v=64)),
    ((9,), "several", _SINGLE_HOPPER, dict(num_stages=4)),
    ((6, 9), "masked", _HALF_BLACKWELL, dict(block_k=32)),
    ((9,), "masked", _SINGLE_HOPPER, dict(num_stages=4)),
)  # in which minor versions of Triton 3, for which kernels, of which configuration


def _limits(minor: int, **own: int) -> Limits:
    changes = {(family, pinned): change for minors, family, pinned, change in _CHANGES if minor in minors}
    return Limits(**own, changes=changes)


BY_TRITON = {
    (3, 6): _limits(6),
    (3, 7): _limits(7),
    (3, 8): _limits(8, columns=128, tail=64, stages=5),
    (3, 9): _limits(9, columns=128, tail=64, stages=5),
}


def is_proven(version: str) -> bool:
    """Whether a version of Triton, such as ``"3.7.1"``, is one of `BY_TRITON`."""
    return _minor(version) in BY_TRITON


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


LIMITS = BY_TRITON.get(_minor(triton.__version__), BY_TRITON[max(BY_TRITON)])


def limited(family: str, pinned: LensConfig) -> LensConfig:
    """A pinned configuration as far as the kernels of one of `FAMILIES` compile with it, see `Limits`."""
    return replace(pinned, **LIMITS.changes.get((family, pinned), {}))


def is_aligned(unembedding: Tensor) -> bool:
    """Whether every 16-element run of the rows of ``[V, d_model]`` can be loaded as 16-byte vectors."""
    stride_v, stride_d = unembedding.stride()
    sizes_fit = unembedding.shape[1] % 16 == 0 and stride_v % 16 == 0
    return stride_d == 1 and sizes_fit and unembedding.data_ptr() % 16 == 0


def pinned_config(dtype: torch.dtype, aligned: bool, n_rows: int, generation: int = HOPPER) -> LensConfig:
    """`sized_config` of the lens, as far as it compiles without spills."""
    return limited("lens", sized_config(dtype, aligned, n_rows, generation))


def sized_config(dtype: torch.dtype, aligned: bool, n_rows: int, generation: int = HOPPER) -> LensConfig:
    """The tiles for operands of ``dtype``, by default on Hopper.

    Args:
        dtype: Of both operands.
        aligned: Whether `is_aligned` holds for the unembedding.
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
        return _SINGLE_UNALIGNED if single else _HALF_UNALIGNED
    if n_rows <= 16 and generation <= HOPPER:
        return _SINGLE_16_ROWS if single else _HALF_16_ROWS
    if generation < HOPPER:
        return _SINGLE if single else _HALF
    if generation > HOPPER:
        return _SINGLE if single else _HALF_BLACKWELL
    if n_rows <= 64:
        return _SINGLE_64_ROWS if single else _HALF_64_ROWS
    if single:
        return _SINGLE_HOPPER
    if n_rows <= 128:
        return _HALF_128_ROWS
    half_blocks = -(-n_rows // _HALF_ODD_BLOCKS.block_m)
    return _HALF_ODD_BLOCKS if half_blocks <= _MOST_ODD_BLOCKS and half_blocks % 2 else _HALF_HOPPER


def by_pointers(config: LensConfig) -> LensConfig:
    """What becomes of a configuration by TMA where the main kernel is that of `kernel`."""
    if config.kind != "tma":
        return config
    columns, tail = min(config.block_v, LIMITS.columns), min(config.tail_v, LIMITS.tail)
    return replace(config, block_v=columns, tail_v=tail, num_stages=min(config.num_stages, LIMITS.stages))


@lru_cache
def generation_of(device: torch.device) -> int:
    """Major compute capability of ``device``; without a GPU that of the kernels' first target."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else HOPPER


@dataclass(frozen=True)
class LensOptions:
    """What all launches of a call share, and the compile-time arguments that follow from it.

    Args:
        head: Unembedding, bias, softcap and scale. Its norm is not used: rows are normed already.
        config: Tile sizes of the main kernel; those of `by_pointers` where it is that of `kernel`.
        has_targets: Whether ranks are counted.
        same_bits: Whether a target's own product has the bits of its column of the main product; what
            `fused_lens.target_matches_main_product` says.
    """

    head: LensHead
    config: LensConfig
    has_targets: bool = False
    same_bits: bool = False

    def __post_init__(self):
        if not self.by_tma:
            object.__setattr__(self, "config", by_pointers(self.config))

    @property
    def is_plain(self) -> bool:
        """Whether a logit is nothing but its product."""
        return self.head.bias is None and self.head.softcap is None and self.head.scale == 1.0

    @property
    def by_tma(self) -> bool:
        """Whether the main kernel is that of `kernel_tma`, which takes plain logits, rows that do not overlap and, with
        targets, their logits with the bits of the main product.
        """
        can_read = self.is_plain and self.head.weight.stride(0) >= self.head.weight.shape[1]
        return self.config.kind == "tma" and can_read and (self.same_bits or not self.has_targets)

    @property
    def scale(self) -> float:
        """The factor of the logits as a kernel's argument: of one type, whatever was given."""
        return float(self.head.scale)

    @property
    def softcap(self) -> float:
        """The softcap as a kernel's argument; not read without ``HAS_SOFTCAP``."""
        return float(self.head.softcap or 0.0)

    def product_flags(self) -> dict:
        """Compile-time arguments of every kernel that multiplies."""
        return dict(
            # The interpreter multiplies bfloat16 wrongly; products of fp32 copies are the same numbers.
            INTERPRETED=triton.knobs.runtime.interpret,
            # "ieee" has no tensor core instruction; three tf32 products keep fp32's accuracy.
            PRECISION="tf32x3" if self.head.weight.dtype == torch.float32 else "tf32",
            BLOCK_K=self.config.block_k,
        )

    def logit_flags(self) -> dict:
        """Compile-time arguments of the kernels that make logits of products."""
        return dict(HAS_BIAS=self.head.bias is not None, HAS_SCALE=self.head.scale != 1.0)

    def row_flags(self) -> dict:
        """Compile-time arguments of the kernels that reduce logits."""
        return dict(HAS_TARGETS=self.has_targets, HAS_SOFTCAP=self.head.softcap is not None)


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
    def of(cls, hidden: Tensor, head: LensHead, targets: Tensor | None) -> ShapeClass:
        """The class of a call of `fused_lens.fused_lens_triton`."""
        options = (head.bias is not None, head.softcap is not None, targets is not None)
        row_bits = hidden.shape[0].bit_length()
        return cls(hidden.device, hidden.dtype, is_aligned(head.weight), *head.weight.shape, options, row_bits)


KEPT: dict[ShapeClass, LensConfig] = {}  # written by `search.search_config` on request


def config_for(shape: ShapeClass, n_rows: int) -> LensConfig:
    """The configuration kept for ``shape``, or the pinned one."""
    return KEPT.get(shape) or pinned_config(shape.dtype, shape.aligned, n_rows, generation_of(shape.device))


def chunk_blocks(n_rows: int, row_bytes: int, block_m: int, processors: int) -> int:
    """Row blocks per chunk, whose normed states fit in ``X_HAT_BYTES``: the same number for every processor where there
    are that many, else equal chunks.
    """
    blocks = max(1, -(-n_rows // block_m))
    most = max(1, min(X_HAT_BYTES // (block_m * row_bytes), MAX_CHUNK_ROWS // block_m))
    if blocks > most >= processors:
        return most // processors * processors
    return -(-blocks // -(-blocks // most))


def choose_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """The splits of the vocabulary that finish soonest, if all waves of programs but the last take the mean time."""
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
    """Tiles of ``width`` tokens from tile ``first`` on, divided into ``splits`` consecutive parts: one launch."""

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
    """The whole tiles of a vocabulary, then the rest in smaller, masked ones; either may be missing.

    Two launches, as a kernel without masks takes fewer instructions a logit. But the kernel of `kernel_tma` takes the
    rest in a loop of its own, and for one row block a second launch would cost more than masks, where tiles of one
    width can do both. ``row_bytes`` are those of a row of the normed states.
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


@lru_cache
def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; 1 where there are none to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
