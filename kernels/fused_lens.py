"""The fused lens on a GPU: every statistic of every row in one pass over the vocabulary.

A chunk of rows goes through four kernels: the final norm, the targets' own logits, the main product with its running
reductions, and the merge of the vocabulary's splits. The main kernel is that of `kernel_tma` where it can run, and a
fifth counts the rare ties that it left open; else it is that of `kernel`, launched once more for the last, partial
tiles. Logits only ever exist as tiles in registers.
"""

from __future__ import annotations

from contextvars import Context
from functools import partial

import torch
import triton
from torch import Tensor

from .config import LensConfig, LensOptions, ShapeClass, chunk_blocks, config_for, processor_count, tile_ranges
from .kernel import TARGET_ROWS, LensRows, PartialStats, RowStats, launch_targets, launch_tiles, merge_splits
from .kernel_tma import add_ties, launch_tma
from .launches import POINTER_BYTES, run_planned, stop_recording
from .norm_kernel import normed_rows, padded_width
from .reference import LensHead, LensStats, soft_cap

_PROBE_WIDTH = 1024
_same_bits: dict[tuple, bool] = {}  # by device, dtype and configuration


def fused_lens_triton(
    hidden: Tensor,
    head: LensHead,
    targets: Tensor | None = None,
    *,
    config: LensConfig | None = None,
    same_bits: bool | None = None,
) -> LensStats:
    """Lens statistics of ``hidden`` ``[R, d_model]`` in one pass over the vocabulary per chunk of rows.

    The normed states are rounded once, to the operands' dtype; everything after is fp32.

    Args:
        hidden: ``[R, d_model]`` bfloat16, float16 or float32, any strides.
        head: Norm and unembedding ``[V, d_model]`` of the dtype of ``hidden``, any strides; without a projection.
        targets: ``[R]`` int64 in ``[0, V)``, or None. Ids outside are not read: their logit is NaN, their rank
            without meaning.
        config: How the main kernel is launched; None takes what `search.search_config` kept for such calls, else the
            pinned configuration.
        same_bits: Whether a target's own product has the bits of its column of the main product, on which ranks are
            counted; None asks `target_matches_main_product`.

    Raises:
        ValueError: The dtype is none of the three.

    An infinite weight, or a product that overflows, may make a logit -inf; without a bias the entropy of its row
    is then NaN.

    Memory: at most 25 MiB of normed states and 22 MiB of partials, whatever ``R`` and ``V``.

    Source of the running sums: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3.
    """
    ids, floats = packed_lens(hidden, head, targets, config=config, same_bits=same_bits)
    argmax, *rank = ids.unbind()
    logsumexp, entropy, best, *target_logit = floats.unbind()
    return LensStats(argmax, best, logsumexp, entropy, *target_logit, *rank)


def packed_lens(
    hidden: Tensor,
    head: LensHead,
    targets: Tensor | None = None,
    *,
    config: LensConfig | None = None,
    same_bits: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """`fused_lens_triton` in two buffers, as a torch operator may return them.

    Returns:
        argmax and, of targets, rank, int64 ``[1 or 2, R]``; logsumexp, entropy, max_logit and, of targets,
        target_logit, fp32 ``[3 or 4, R]``.
    """
    n_rows, with_targets = hidden.shape[0], targets is not None
    ids = torch.empty((1 + with_targets, n_rows), dtype=torch.int64, device=hidden.device)
    floats = torch.empty((3 + with_targets, n_rows), dtype=torch.float32, device=hidden.device)
    norm = head.norm
    vectors = (None, None) if norm is None else (norm.weight, norm.bias)
    operands = (hidden, head.weight, head.bias, targets, *vectors)
    numbers = (type(norm), norm and (norm.eps, norm.offset), head.softcap, head.scale)
    kind = (hidden.device, config, same_bits, *numbers, *map(_layout, operands))
    with torch.cuda.device_of(hidden):
        run = partial(_reduce, hidden, head, targets, ids, floats, config, same_bits)
        run_planned(kind, operands, (ids, floats), run)
    if head.softcap is not None:
        floats[2:] = soft_cap(floats[2:], head.softcap)
    return ids, floats


def _layout(tensor: Tensor | None) -> tuple | None:
    """All of an operand that a kernel's arguments and the choice of a kernel depend on, but for its address."""
    if tensor is None:
        return None
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.data_ptr() % POINTER_BYTES


def _reduce(
    hidden: Tensor,
    head: LensHead,
    targets: Tensor | None,
    ids: Tensor,
    floats: Tensor,
    config: LensConfig | None,
    same_bits: bool | None,
) -> None:
    """Write the results of `packed_lens`, a chunk of rows at a time, before the softcap."""
    n_rows, device = len(hidden), hidden.device
    config = config or config_for(ShapeClass.of(hidden, head, targets), n_rows)
    row_multiple = max(config.block_m, TARGET_ROWS)
    row_bytes = padded_width(hidden.shape[1]) * hidden.element_size()
    step = row_multiple * chunk_blocks(n_rows, row_bytes, row_multiple, processor_count(device))
    if step < n_rows:  # a plan would hold the buffers of all chunks at once, for launches that are few beside the work
        stop_recording()
    if same_bits is None:
        same_bits = targets is not None and target_matches_main_product(head, config)
    options = LensOptions(head, config, targets is not None, same_bits)
    logsumexp, entropy, best, *target_z = floats.unbind()
    # Without targets no rank is written.
    stats = RowStats(best, ids[0], ids[-1], logsumexp, entropy)
    x_hat = None
    for start in range(0, n_rows, step):
        chunk = slice(start, start + step)
        x_hat = normed_rows(_part(hidden, chunk), head.norm, row_multiple, out=x_hat)
        own = (None, None) if targets is None else (_part(targets, chunk), target_z[0][chunk])
        rows = LensRows(x_hat, *own, min(step, n_rows - start))
        if targets is not None:
            launch_targets(rows, options)
        reduce_rows(rows, _slice(stats, chunk), options)


def _part(operand: Tensor, rows: slice) -> Tensor:
    """Some rows; all of them as the operand itself, by which a plan knows it."""
    return operand if rows.start == 0 and rows.stop >= len(operand) else operand[rows]


def reduce_rows(rows: LensRows, stats: RowStats, options: LensOptions) -> None:
    """Write the statistics of ``rows``, whose targets' logits are there, into ``stats``.

    Rank is 0 exactly where the argmax is the target; there ``rows.target_z`` becomes the largest logit.
    """
    config, device = options.config, rows.x_hat.device
    row_blocks = triton.cdiv(rows.count, config.block_m)
    row_bytes = rows.x_hat.shape[1] * rows.x_hat.element_size()
    processors = processor_count(device)
    ranges = tile_ranges(options.head.vocab_size, row_blocks, row_bytes, config, processors, options.by_tma)
    parts = PartialStats.empty(sum(tiles.splits for tiles in ranges), rows.count, device)
    launch, first = launch_tma if options.by_tma else launch_tiles, 0
    for tiles in ranges:
        launch(rows, _slice(parts, slice(first, first + tiles.splits)), options, tiles)
        first += tiles.splits
    merge_splits(parts, stats, rows, options)
    if options.by_tma and options.has_targets:
        add_ties(rows, stats.rank, options)


def _slice(stats: PartialStats | RowStats, part: slice) -> PartialStats | RowStats:
    return type(stats)(*(field[part] for field in stats))


def target_matches_main_product(head: LensHead, config: LensConfig) -> bool:
    """Whether a target's own product has the bits of its column of the main one on this device.

    Where it has, targets need not be kept from beating themselves, which saves some instructions a logit. With a bias,
    a scale or a softcap the answer is no: those kernels lack the registers to gain from it. Else it is tried, once per
    device, dtype and configuration; not while a CUDA graph is captured, where it is no unless known.
    """
    weight = head.weight
    if not LensOptions(head, config).is_plain or weight.device.type != "cuda":
        return False
    key = (weight.device, weight.dtype, config)
    if key not in _same_bits:
        if torch.cuda.is_current_stream_capturing():
            return False
        # In a context of its own: what is tried is no part of the plan that may be being recorded.
        _same_bits[key] = Context().run(_try_same_bits, weight.device, weight.dtype, config)
    return _same_bits[key]


def _try_same_bits(device: torch.device, dtype: torch.dtype, config: LensConfig) -> bool:
    """Whether the largest logits of random rows are those of the same tokens as targets."""
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    n_rows = max(TARGET_ROWS, config.block_m)
    options = LensOptions(LensHead(randn(2 * config.block_v - 1, _PROBE_WIDTH)), config)
    x_hat, stats = randn(n_rows, _PROBE_WIDTH), RowStats.empty(n_rows, device)
    reduce_rows(LensRows(x_hat, None, None, n_rows), stats, options)
    target_z = torch.empty(n_rows, dtype=torch.float32, device=device)
    launch_targets(LensRows(x_hat, stats.argmax, target_z, n_rows), options)
    return torch.equal(stats.best, target_z)
