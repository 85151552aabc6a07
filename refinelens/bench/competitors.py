"""Who takes part in a benchmark: the op's own paths, what people use instead, and the bare products."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from ..errors import InputError
from ..op import backends
from ..op.lens import LensStats, fused_lens
from . import peers
from .peers import Statistics
from .problem import Problem

NAIVE = "naive"  # what every other is compared with


@dataclass(frozen=True)
class Competitor:
    """One way to compute the statistics, or a bare matrix product, which computes none."""

    name: str
    title: str  # as the table calls it
    run: Callable[[Problem], Statistics]
    group: str  # ours, peer or product
    logit_bytes: int = 0  # bytes held at once for every logit of the problem
    compiles: bool = False  # the first call with a shape takes seconds
    keeps: str | None = None  # what the first call with an unembedding makes for later ones
    obstacle: Callable[[Problem], str | None] = lambda problem: None  # why it cannot run on a problem


def _fused(**options) -> Callable[[Problem], Statistics]:
    def run(problem: Problem) -> Statistics:
        stats = fused_lens(problem.hidden, problem.unembedding, problem.norm, problem.targets, **options)
        values = {field.name: getattr(stats, field.name) for field in fields(LensStats)}
        return {name: value for name, value in values.items() if value is not None}

    return run


def _torch_product(problem: Problem) -> Statistics:
    torch.mm(problem.hidden, problem.unembedding.T)
    return {}


def _own_product(problem: Problem) -> Statistics:
    from ..op.lens_cpu import product_only

    product_only(problem.hidden, problem.unembedding)
    return {}


def _needs_cpp(problem: Problem) -> str | None:
    if backends.choose_backend(problem.hidden.device.type)[0] == "cpp":
        return None
    return "needs a CPU and the C++ extension"


def _needs(module: str, package: str, dtypes: tuple[torch.dtype, ...]) -> Callable[[Problem], str | None]:
    def obstacle(problem: Problem) -> str | None:
        if not problem.hidden.is_cuda:
            return "needs a CUDA device"
        if problem.hidden.dtype not in dtypes:
            return f"does not take {str(problem.hidden.dtype).removeprefix('torch.')}"
        return None if importlib.util.find_spec(module) else f"not installed; pip install {package}"

    return obstacle


def _needs_kernel(problem: Problem) -> str | None:
    backend, why = backends.choose_backend(problem.hidden.device.type)
    return f"no kernel here ({why})" if backend == "twin" else None


HALF = (torch.bfloat16, torch.float16)
ALL = [
    Competitor("fp32", "refinelens, fused kernel", _fused(precision="fp32"), "ours", obstacle=_needs_kernel),
    Competitor(
        "certified",
        "refinelens, certified",
        _fused(precision="certified"),
        "ours",
        keeps="its index of the unembedding",
        obstacle=_needs_cpp,
    ),
    Competitor("twin", "refinelens, plain torch", _fused(backend="twin"), "ours"),
    Competitor(NAIVE, "torch, all logits (naive)", peers.naive, "peer", logit_bytes=18),
    Competitor("compiled", "torch.compile of naive", peers.compiled, "peer", logit_bytes=16, compiles=True),
    Competitor("row-chunks", f"torch, {peers.ROW_CHUNK} rows at a time", peers.row_chunks, "peer"),
    Competitor("vocab-chunks", f"torch, {peers.VOCAB_CHUNK} tokens at a time", peers.vocab_chunks, "peer"),
    Competitor("argsort", "log_softmax, two argsorts", peers.two_argsorts, "peer", logit_bytes=34),
    Competitor(
        "liger",
        "Liger linear cross-entropy",
        peers.liger,
        "peer",
        obstacle=_needs("liger_kernel", "liger-kernel", (*HALF, torch.float32)),
    ),
    Competitor(
        "cce",
        "Apple cut cross-entropy",
        peers.cut_cross_entropy,
        "peer",
        obstacle=_needs("cut_cross_entropy", "cut-cross-entropy", HALF),
    ),
    Competitor("mm", "matrix product: torch.mm", _torch_product, "product", logit_bytes=4),
    Competitor("product", "matrix product: refinelens", _own_product, "product", obstacle=_needs_cpp),
]
COMPETITORS = {competitor.name: competitor for competitor in ALL}


def choose(peers_wanted: str) -> list[Competitor]:
    """Our own paths, the naive expression, the products, and of the peers those that were asked for.

    Args:
        peers_wanted: ``all``, ``none`` or names separated by commas.

    Raises:
        InputError: A name that no peer has.
    """
    known = [c.name for c in ALL if c.group == "peer"]
    names = {"all": known, "none": []}.get(peers_wanted, peers_wanted.split(","))
    for name in names:
        if name not in known:
            raise InputError(f"--peers: expected all, none or some of {','.join(known)}, got {name!r}")
    return [c for c in ALL if c.group != "peer" or c.name in (NAIVE, *names)]
