"""What the C++ extension offers (``csrc/bindings.cpp``); matrices of bf16 travel as uint16."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ids = NDArray[np.int64]

def instruction_set() -> str: ...
def fused_lens(
    hidden: NDArray[Any],
    unembedding: NDArray[Any],
    norm: str,
    norm_weight: Floats | None,
    norm_bias: Floats | None,
    norm_eps: float,
    targets: Ids | None,
    bias: Floats | None,
    scale: float,
    softcap: float,
    n_threads: int,
    top_k: int = 0,
) -> tuple[Ids, Floats, Floats, Floats, Floats, Ids, Floats, Ids]: ...
def product_only(x_hat: NDArray[Any], unembedding: NDArray[Any], n_threads: int) -> None: ...
def mean_unembedding(
    x_hat: NDArray[Any], unembedding: NDArray[Any], bias: Floats | None, scale: float, n_threads: int
) -> tuple[Floats, Floats, Floats]: ...
def divergence_from_first(
    x_hat: NDArray[Any],
    unembedding: NDArray[Any],
    bias: Floats | None,
    scale: float,
    softcap: float,
    logsumexp: Floats,
    group: int,
    kind: str,
    n_threads: int,
) -> Floats: ...
def fma_peak(milliseconds: float) -> float: ...

class ScreenIndex:
    def __init__(self, unembedding: NDArray[Any], n_threads: int) -> None: ...
    @property
    def finite(self) -> bool: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def kernels(self) -> str: ...
    def lens(
        self,
        x: Doubles,
        unembedding: NDArray[Any],
        targets: Ids | None,
        bias: Doubles | None,
        scale: float,
        softcap: float,
        exhaustive: bool,
        n_threads: int,
    ) -> tuple[Ids, Doubles, Doubles, Doubles, Doubles, Ids, Floats, NDArray[np.bool_]]: ...

def checksum(unembedding: NDArray[Any], n_threads: int) -> int: ...
def screen_kernels(depth: int) -> tuple[str, int]: ...
def spearman(a: NDArray[Any], a_index: Ids, b: NDArray[Any], b_index: Ids) -> Doubles: ...
def kendall_tau_b(a: NDArray[Any], a_index: Ids, b: NDArray[Any], b_index: Ids) -> Doubles: ...
def top_k_overlap(a: NDArray[Any], a_index: Ids, b: NDArray[Any], b_index: Ids, k: int) -> Doubles: ...
def summarise_trajectories(ranks: Ids, k: int) -> tuple[Ids, Ids, Ids, Ids]: ...
