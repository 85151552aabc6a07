"""Whether a device forms a target's own logit and its column of the main product with the same bits."""

from __future__ import annotations

import torch

from .configs import LensConfig
from .launch import LensOptions, LensRows
from .lens_rows import reduce_rows
from .running_sums import Merged
from .target_logits import TARGET_ROWS, launch_targets

_known: dict[tuple, bool] = {}
_D_MODEL = 1024


def has_same_bits(options: LensOptions) -> bool:
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
    reduce_rows(LensRows(x_hat, None, None, n_rows), Merged(best, argmax, rank, logsumexp, entropy), options, False)
    launch_targets(LensRows(x_hat, argmax, t, n_rows), options)
    return torch.equal(best, t)
