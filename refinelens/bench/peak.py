"""The most arithmetic this machine does, measured beside the competitors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from .race import Race

MILLISECONDS = 50.0
SQUARE = 8192  # rows and columns of the matrices whose product is a GPU's peak


def peak_meter(device: str, dtype: torch.dtype, threads: int) -> tuple[str, Callable[[], float]] | None:
    """What the peak is, in words, and a function that measures it in FLOP/s; None without the extension.

    On a CPU the peak of fp32 fused multiply-adds in registers, whatever the dtype: the op multiplies in
    fp32. On a GPU a square matrix product in ``dtype``.
    """
    if device == "cuda":
        left, right = (torch.randn(SQUARE, SQUARE, device=device, dtype=dtype) for _ in range(2))
        return f"{SQUARE}^3 matrix product in {dtype}".replace("torch.", ""), partial(_product_rate, left, right)
    try:
        from .. import _C
    except ImportError:
        return None
    return f"fp32 FMA in registers x {threads}", lambda: threads * _C.fma_peak(MILLISECONDS)


def _product_rate(left: torch.Tensor, right: torch.Tensor) -> float:
    return 2 * SQUARE**3 / Race("cuda", threads=1).time(lambda: left @ right)
