"""Memory: what is available, and what a call needs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch

CLEAR_REFS = Path("/proc/self/clear_refs")


def available_memory(device: str) -> int | None:
    """Bytes that can be allocated on ``cpu`` or ``cuda``; None where the system does not say."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + cached
    try:
        there = _bytes("/proc/meminfo", "MemAvailable")
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
        if limit.exists() and limit.read_text().strip() != "max":
            there = min(there, int(limit.read_text()) - int(used.read_text()))
        return there
    except OSError:
        return None


def can_measure_growth() -> bool:
    """Whether the system tells a process its peak memory and lets it start anew; Linux does."""
    return CLEAR_REFS.exists()


def peak_growth(run: Callable[[], object]) -> int:
    """Growth of this process's peak resident set while ``run()`` runs, bytes."""
    ctypes.CDLL(None).malloc_trim(0)  # else pages that were freed before are used again unseen
    CLEAR_REFS.write_text("5")  # resets the peak
    before = _bytes("/proc/self/status", "VmRSS")
    run()
    return _bytes("/proc/self/status", "VmHWM") - before


def peak_growth_cuda(run: Callable[[], object]) -> int:
    """Growth of the peak of allocated GPU memory while ``run()`` runs, bytes."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _bytes(file: str, field: str) -> int:
    lines = Path(file).read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
