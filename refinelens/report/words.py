"""Numbers in words."""

from __future__ import annotations

import math

from .bootstrap import Estimate


def format_estimate(estimate: Estimate, digits: int, interval: bool = False, sign: bool = False) -> str:
    """``0.83`` or ``0.83 [0.67,1.00]``; a dash where it does not exist, and no brackets without an interval."""
    if math.isnan(estimate.value):
        return "-"
    text = f"{estimate.value:{'+' if sign else ''}z.{digits}f}"
    with_interval = interval and not math.isnan(estimate.low)
    return f"{text} [{estimate.low:z.{digits}f},{estimate.high:z.{digits}f}]" if with_interval else text


def counted(n: int, noun: str) -> str:
    """``1 question``, ``12 questions``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"
