"""What every competitor is given, random or from a model's states, and the memory that a call needs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..data.tasks import load_task
from ..errors import InputError
from ..kernels.reference import LayerNorm, Norm
from ..lens.logit_lens import LogitLens
from ..model.loading import DTYPES, load_model, resolve_device
from ..view_config import BenchConfig

CLEAR_REFS = Path("/proc/self/clear_refs")
# GPT-2's sizes; rows are 13 layers x 32 positions on a CPU and 13 x 1024 on a GPU.
ROWS = {"cpu": 13 * 32, "cuda": 13 * 1024}
D_MODEL, VOCAB = 768, 50257
CONTEXT = 128  # tokens that the model reads at once


@dataclass(frozen=True)
class Problem:
    """One input of the lens, and where it comes from."""

    hidden: Tensor  # [rows, d_model]
    unembedding: Tensor  # [vocab_size, d_model]
    norm: Norm
    targets: Tensor  # [rows] int64
    states: str = "random"  # or the name of the model

    @property
    def flops(self) -> int:
        """Floating-point operations of the matrix product; the reductions are not counted."""
        return 2 * self.hidden.numel() * len(self.unembedding)

    def first(self, rows: int) -> Problem:
        """The same problem with fewer rows."""
        return replace(self, hidden=self.hidden[:rows], targets=self.targets[:rows])

    def tiny(self) -> Problem:
        """Two rows and a few tokens: enough to load what a competitor needs."""
        few = self.unembedding[:64].clone()
        return replace(self.first(2), unembedding=few, targets=self.targets[:2] % len(few))


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


def make_problem(options: BenchConfig) -> Problem:
    """The problem that the options ask for.

    Raises:
        InputError: A device that is not there, a model that cannot be used, or sizes beyond the memory.
    """
    device = resolve_device(options.device)
    rows = options.rows or ROWS[device]
    if options.model is not None:
        return _model_problem(options, device, rows)
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device] if options.dtype == "auto" else DTYPES[options.dtype]
    return random_problem(rows, options.d_model or D_MODEL, options.vocab or VOCAB, dtype, device)


def random_problem(rows: int, d_model: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    """Gaussian states and weights; logits have unit variance."""
    needed = (rows + vocab) * d_model * dtype.itemsize
    there = available_memory(device)
    if there is not None and needed > there:
        raise InputError(
            f"``rows``, ``d_model``, ``vocab``: expected states and unembedding that fit into the {there / 1e9:.3g} GB "
            f"available on {device}, got {needed / 1e9:.3g} GB"
        )
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    norm = LayerNorm(torch.ones(d_model, device=device, dtype=dtype), randn(d_model) / 8)
    unembedding = randn(vocab, d_model).div_(d_model**0.5)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    return Problem(randn(rows, d_model), unembedding, norm, targets)


def _model_problem(options: BenchConfig, device: str, rows: int) -> Problem:
    """States of every layer on the built-in passages, position by position; targets are the next tokens."""
    name = options.model
    loaded = load_model(name, device, options.dtype, trust_remote_code=options.trust_remote_code)
    lens = LogitLens(loaded.model)
    head = lens.head
    if head.bias is not None or head.softcap is not None or head.scale != 1.0 or head.projection is not None:
        raise InputError(
            f"``model`` {name}: expected an unembedding without bias, projection, softcap or logit scale, which not "
            "every competitor knows; leave ``model`` out"
        )
    layers = lens.n_layers + 1
    text = "\n\n".join(question.gold.text for question in load_task("builtin").questions)
    tokens = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if rows > layers * (len(tokens) - 1):
        raise InputError(f"``rows``: expected at most {layers * (len(tokens) - 1)} with ``model`` {name}, got {rows}")
    positions = -(-rows // layers)
    states = []
    for start in range(0, positions, CONTEXT):
        ids = tokens[start : min(start + CONTEXT, positions)]
        kept = lens.hidden(ids[None], torch.arange(len(ids)))  # [layer, 1, position, d_model]
        states.append(kept[:, 0].transpose(0, 1).reshape(-1, kept.shape[-1]))
    targets = tokens[1 : positions + 1].repeat_interleave(layers)[:rows].to(device)
    return Problem(torch.cat(states)[:rows], head.weight, head.norm, targets, states=Path(name).name)
