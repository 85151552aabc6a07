"""Pinned tile sizes of the fused lens and the split of its work over programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH_MULTIPLE = 64  # of the padded columns of the normed states; every BLOCK_K divides it
X_HAT_BYTES = 25 * 2**20
MAX_CHUNK_ROWS = 2**16  # bounds the partials: 2**16 rows * 16 splits * 20 bytes = 20 MiB
MAX_SPLITS = 16


@dataclass(frozen=True)
class LensConfig:
    """Tile sizes of the main kernel; ``splits`` None lets the launcher divide the vocabulary."""

    block_m: int
    block_v: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int | None = None

    def __post_init__(self):
        if WIDTH_MULTIPLE % self.block_k:
            raise ValueError(f"block_k: expected a divisor of {WIDTH_MULTIPLE}, got {self.block_k}")


# Registers decide: 128 x 256 fp32 accumulators take 128 of the 255 of a thread at 8 warps. tf32x3 keeps
# two parts of each operand as well, so fp32 gets half the columns.
_ALIGNED = {
    torch.bfloat16: LensConfig(128, 256, 64, num_warps=8, num_stages=3),
    torch.float16: LensConfig(128, 256, 64, num_warps=8, num_stages=3),
    torch.float32: LensConfig(128, 128, 32, num_warps=8, num_stages=3),
}
# The bias needs registers of its own: at BLOCK_K 64, with its eight addresses of weights, it spills.
_ALIGNED_BIASED = {
    torch.bfloat16: LensConfig(128, 256, 32, num_warps=8, num_stages=5),
    torch.float16: LensConfig(128, 256, 32, num_warps=8, num_stages=5),
    torch.float32: _ALIGNED[torch.float32],
}
# Element-wise loads need an address register per element: only a small tile stays free of spills.
_UNALIGNED = LensConfig(64, 64, 32, num_warps=4, num_stages=1)


def is_aligned(unembedding: Tensor) -> bool:
    """Whether every 16-element run of the rows of ``[V, d_model]`` can be loaded as 16-byte vectors."""
    stride_v, stride_d = unembedding.stride()
    sizes_fit = unembedding.shape[1] % 16 == 0 and stride_v % 16 == 0
    return stride_d == 1 and sizes_fit and unembedding.data_ptr() % 16 == 0


def pinned_config(dtype: torch.dtype, aligned: bool, bias: bool) -> LensConfig:
    """The configuration for operands of ``dtype``; raises ``ValueError`` for other dtypes."""
    if dtype not in _ALIGNED:
        raise ValueError(f"expected bfloat16, float16 or float32 operands, got {dtype}")
    if not aligned:
        return _UNALIGNED
    return (_ALIGNED_BIASED if bias else _ALIGNED)[dtype]


def chunk_blocks(n_rows: int, row_bytes: int, block_m: int) -> int:
    """Row blocks per chunk: equal chunks whose normed states fit in ``X_HAT_BYTES``."""
    blocks = max(1, -(-n_rows // block_m))
    most = max(1, min(X_HAT_BYTES // (block_m * row_bytes), MAX_CHUNK_ROWS // block_m))
    return -(-blocks // -(-blocks // most))


def choose_splits(row_blocks: int, tiles: int, processors: int) -> int:
    """The vocabulary splits that finish soonest if a program takes its tiles plus one to start."""
    most = min(tiles, max(MAX_SPLITS, processors // row_blocks))

    def time(splits: int) -> int:
        waves = -(-row_blocks * splits // processors)
        return waves * (-(-tiles // splits) + 1)

    return min(range(1, most + 1), key=time)


def processor_count(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; 1 where there are none to fill."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
