"""The fused lens on a CPU: torch's matrix product into one reused tile, reduced in one pass by C++."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C
from .kernels.lens_common import LensOutput, in_row_blocks, lens_output, target_z
from .kernels.norms import Norm, apply_norm

# A tile is read back by the reduction while it is still in cache; below 512 columns the matrix product
# itself slows down, and with many rows those columns are what fits.
TILE_LOGITS = 1 << 19
MIN_COLUMNS = 512
ROW_BLOCK = 4096


def fused_lens_cpu(
    hidden: Tensor,
    unembedding: Tensor,
    norm: Norm = None,
    targets: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> LensOutput:
    """Same signature, definition and result as the twin, for CPU tensors; products and logits are fp32.

    fp16 and bf16 unembeddings are widened one tile at a time. Extra memory: the normed rows and one tile
    of logits of at most ``ROW_BLOCK`` rows (8 MiB plus ``ROW_BLOCK * d_model * 4`` bytes).
    """

    def reduce(rows: Tensor, row_targets: Tensor | None) -> LensOutput:
        return _reduce_block(apply_norm(rows, norm), unembedding, row_targets, bias, softcap, logit_scale)

    return in_row_blocks(reduce, hidden, None if targets is None else targets.contiguous(), ROW_BLOCK)


def _reduce_block(x_hat, unembedding, targets, bias, softcap, logit_scale) -> LensOutput:
    n_rows = x_hat.shape[0]
    best = torch.full((n_rows,), float("-inf"))
    argmax = torch.zeros(n_rows, dtype=torch.int64)
    peak = best.clone()
    total = torch.zeros(n_rows, dtype=torch.float64)
    weighted = torch.zeros_like(total)
    bias = None if bias is None else bias.float().contiguous()
    t_z = rank = None
    if targets is not None:
        t_z = target_z(x_hat, unembedding, targets, bias, logit_scale)
        rank = torch.zeros_like(argmax)
    state = [None if a is None else a.numpy() for a in (best, argmax, peak, total, weighted, t_z, targets, rank)]
    for columns, dots in _tiles(x_hat, unembedding):
        tile_bias = None if bias is None else bias[columns].numpy()
        width = columns.stop - columns.start
        _C.reduce_tile(
            dots, width, columns.start, tile_bias, logit_scale, softcap or 0.0, *state, torch.get_num_threads()
        )
    logsumexp = (peak + total.log()).float()
    entropy = (total.log() - weighted / total).float()
    return lens_output(argmax, best, logsumexp, entropy, targets, t_z, rank, softcap)


def _tiles(x_hat: Tensor, unembedding: Tensor):
    """Yield (token ids as a slice, products as an array [rows, tile width]); the array is reused."""
    n_rows, n_vocab = x_hat.shape[0], unembedding.shape[0]
    width = min(max(MIN_COLUMNS, TILE_LOGITS // max(n_rows, 1) // 64 * 64), 8192, n_vocab)
    dots = torch.empty(n_rows, width)
    wide = None if unembedding.dtype == torch.float32 else torch.empty(width, unembedding.shape[1])
    for first in range(0, n_vocab, width):
        columns = slice(first, min(first + width, n_vocab))
        weights = unembedding[columns]
        if wide is not None:
            weights = wide[: len(weights)].copy_(weights)
        torch.mm(x_hat, weights.T, out=dots[:, : len(weights)])
        yield columns, dots.numpy()
