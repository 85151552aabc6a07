"""The kernels beside the lens for the compile-only gate: how each is launched, and what its arguments are."""

from __future__ import annotations

from refinelens.kernels import divergences
from refinelens.kernels import mean_unembedding as mean
from refinelens.kernels.config import LensOptions
from refinelens.kernels.tiles import masked_tiles

# By the name of a variant: the kernel, what its launcher compiles it for, the operands that are absent.
KERNELS = {
    "probabilities": lambda options: (mean._probability_kernel, mean.probability_flags(options, as_logs=False), ()),
    "log-probabilities": lambda options: (
        mean._probability_kernel,
        mean.probability_flags(options, as_logs=True),
        ("mass_ptr", "mean_bias_ptr"),
    ),
    "average": lambda options: (mean._average_kernel, mean.average_flags(options), ()),
    "expected-capped": lambda options: (
        divergences._divergence_kernel,
        divergences.divergence_flags(options, jensen_shannon=False),
        (),
    ),
    "jensen-shannon": lambda options: (
        divergences._divergence_kernel,
        divergences.divergence_flags(options, jensen_shannon=True),
        ("mass_ptr",),
    ),
    "expected": lambda options: (
        divergences._expected_kernel,
        divergences.expected_flags(options.head.d_model),
        (),
    ),
}
PRODUCTS = ("probabilities", "log-probabilities", "average", "expected-capped", "jensen-shannon")
# What the launchers allocate, or pad, in multiples of 16.
VECTORS = {"p_ptr", "sums_ptr", "stride_p", "second", "log_q_ptr", "stride_q", "mean_ptr"}


def options_beside(options: LensOptions) -> LensOptions:
    """Options of a kernel beside the lens, with the tiles that it has where the lens has those of ``options``."""
    return LensOptions(options.head, masked_tiles(options.config))


def specialisation(kernel: str, options: LensOptions) -> tuple:
    """The kernel and its compile-time arguments."""
    jitted, flags, absent = KERNELS[kernel](options_beside(options))
    return jitted, flags | dict.fromkeys(absent) | ({} if options.head.bias is not None else dict(bias_ptr=None))


def type_of(kernel: str, name: str, dtype: str) -> str | None:
    """Of an argument whose type is not what its name says in the kernels of the lens."""
    if name == "p_ptr":
        return "*fp32" if kernel == "log-probabilities" else f"*{dtype}"
    return None
