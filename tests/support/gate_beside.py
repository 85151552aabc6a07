"""The kernels beside the lens for the compile-only gate: how each is launched, and what its arguments are."""

from __future__ import annotations

from refinelens.kernels import divergences, kernel_more, lists
from refinelens.kernels import mean_unembedding as mean
from refinelens.kernels.config import LensConfig, LensOptions, tile_ranges
from refinelens.kernels.lists_reference import MOST_LISTED
from refinelens.kernels.tiles import masked_tiles, pointer_tiles

N_GROUPS = {"choose": 6283, "choose-many": 32000}  # of GPT-2's vocabulary and of Gemma's
LISTED = {"list": 10, "list-most": MOST_LISTED}
# The kernel of several targets and maxima: whether targets, statistics, maxima.
MORE = {
    "maxima": (False, False, True),
    "stats": (False, True, False),
    "stats-maxima": (False, True, True),
    "several": (True, True, False),
    "several-maxima": (True, True, True),
}
DIVERGENCES = {"expected-capped": False, "jensen-shannon": True}
PROBABILITIES = {"probabilities": False, "log-probabilities": True}
# The last, partial tiles have maxima in a launch of their own.
TAILS = tuple(f"{name}-tail" for name in ("maxima", "stats", "several"))
PRODUCTS = (*PROBABILITIES, "average", *DIVERGENCES, *LISTED, *MORE, *TAILS)
KERNELS = (*PRODUCTS, "expected", *N_GROUPS)
# What the launchers allocate, or pad, in multiples of 16.
VECTORS = {"p_ptr", "sums_ptr", "stride_p", "second", "log_q_ptr", "stride_q", "mean_ptr", "stride_g"}
_TYPES = {"argmax_ptr": "*i32", "ranks_ptr": "*i32", "chosen_ptr": "*i32", "ids_ptr": "*i64"}


def launched(kernel: str, sized: LensConfig) -> LensConfig:
    """Tiles of a kernel where the lens, without its limits, has those of ``sized``."""
    whole = kernel in LISTED or kernel.removesuffix("-tail") in MORE
    return pointer_tiles(sized) if whole else masked_tiles(sized)


def specialisation(kernel: str, options: LensOptions) -> tuple:
    """The kernel and its compile-time arguments."""
    flags = {} if options.head.bias is not None else dict(bias_ptr=None)
    if kernel in PROBABILITIES:
        as_logs = PROBABILITIES[kernel]
        flags |= dict(mass_ptr=None, mean_bias_ptr=None) if as_logs else {}
        return mean._probability_kernel, flags | mean.probability_flags(options, as_logs)
    if kernel == "average":
        return mean._average_kernel, mean.average_flags(options)
    if kernel in DIVERGENCES:
        options = divergences.jensen_shannon_options(options) if DIVERGENCES[kernel] else options
        flags |= dict(mass_ptr=None) if DIVERGENCES[kernel] else {}
        return divergences._divergence_kernel, flags | divergences.divergence_flags(options, DIVERGENCES[kernel])
    if kernel == "expected":
        return divergences._expected_kernel, divergences.expected_flags(options.head.d_model)
    if kernel in N_GROUPS:
        return lists._choose_kernel, lists.choose_flags(N_GROUPS[kernel])
    if kernel in LISTED:
        return lists._list_kernel, flags | lists.list_flags(options, LISTED[kernel])
    return kernel_more._more_kernel, flags | _more_flags(kernel, options)


def _more_flags(kernel: str, options: LensOptions) -> dict:
    config = options.config
    is_tail = kernel.endswith("-tail")
    has_targets, has_stats, has_maxima = MORE[kernel.removesuffix("-tail")]
    tiles = tile_ranges(2 * config.block_v - is_tail, 2, 2, config, processors=1, by_tma=False)[-1]
    flags = kernel_more.more_flags(options, tiles, has_targets, has_stats, has_maxima)
    absent = dict(rank_ptr=None) if has_stats else dict.fromkeys(
        ("best_ptr", "argmax_ptr", "rank_ptr", "total_ptr", "weighted_ptr")
    )  # fmt: skip
    absent |= {} if has_maxima else dict(maxima_ptr=None)
    return flags | absent | ({} if has_targets else dict(targets_ptr=None, target_z_ptr=None, ranks_ptr=None))


def type_of(kernel: str, name: str, dtype: str) -> str | None:
    """Of an argument whose type is not what its name says in the kernels of the lens."""
    if name == "p_ptr":
        return "*fp32" if kernel == "log-probabilities" else f"*{dtype}"
    return _TYPES.get(name) if kernel in KERNELS else None
