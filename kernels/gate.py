"""Compiles every kernel of the lens as it is launched, without a GPU, and says what makes one unfit to ship."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import lens_kernel, lens_tma, norms_triton, running_sums, target_logits, ties
from .configs import HOPPER, LensConfig, pinned_config
from .launch import LensOptions
from .machine_code import KernelReport, read_kernel
from .norms_triton import norm_launch, padded_width
from .schedule import tile_ranges

# Per generation: PTX target, the product its tensor cores take, bytes of shared memory of a block.
GENERATIONS = {
    8: (80, "sm_80", "HMMA", 166_912),
    9: (90, "sm_90a", "HGMMA", 232_448),
    10: (100, "sm_100a", "UTCHMMA", 232_448),
}
MERGED_SPLITS = 200  # more than processors, so that a program holds the most rows times splits
PRODUCTS = ("main", "tail", "targets", "ties")  # the kernels that multiply
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLOATS = {"zero", "logit_scale", "softcap", "eps", "offset"}
_INTS = {"targets_ptr": "*i64", "parts_argmax_ptr": "*i32", "parts_rank_ptr": "*i32"}


@dataclass(frozen=True)
class LensVariant:
    """One launchable specialisation of a kernel.

    Args:
        kernel: ``"main"`` (whole tiles), ``"tail"`` (the rest of the vocabulary; by TMA both), ``"targets"``,
            ``"ties"``, ``"norm"`` or ``"merge"``.
        n_rows: Rows of the call, which decide the pinned configuration.
        aligned: ``configs.is_aligned`` of the unembedding.
        same_bits: ``target_bits.has_same_bits`` of the call.
        config: Instead of the pinned configuration.
    """

    kernel: str = "main"
    dtype: torch.dtype = torch.bfloat16
    generation: int = HOPPER
    n_rows: int = 1024
    d_model: int = 768
    aligned: bool = True
    targets: bool = True
    bias: bool = False
    scale: bool = False
    softcap: bool = False
    same_bits: bool = False
    config: LensConfig | None = None

    @property
    def options(self) -> LensOptions:
        """The launcher's options, with empty operands, that lead to this specialisation."""
        return LensOptions(
            unembedding=torch.empty(0, self.d_model, dtype=self.dtype),
            bias=torch.empty(0) if self.bias else None,
            softcap=30.0 if self.softcap else None,
            logit_scale=2.0 if self.scale else 1.0,
            config=self.config or pinned_config(self.dtype, self.aligned, self.n_rows, self.generation),
        )

    @property
    def by_tma(self) -> bool:
        """Whether the kernel is that of ``lens_tma``."""
        return self.kernel in ("main", "tail") and self.options.by_tma(self.targets, self.same_bits)


def inspect_variant(variant: LensVariant) -> KernelReport:
    """Compile ``variant`` and report on it; not possible under ``TRITON_INTERPRET=1``."""
    config = variant.options.config
    kernel, constants, num_warps, num_stages = _specialisation(variant)
    vectors = {"width"} if variant.kernel == "norm" else {"x_ptr", "width"}
    if variant.aligned and variant.kernel in PRODUCTS:
        vectors |= {"w_ptr", "d_model", "stride_wv"}
    signature, attrs = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type_of(name, variant)
        if name in vectors and name not in constants:
            attrs[(position,)] = [["tt.divisibility", 16]]
    is_tma = kernel is lens_tma._tma_kernel
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", GENERATIONS[variant.generation][0], 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, maxnreg=lens_tma.MAX_REGISTERS if is_tma else None),
    )
    has_tiles = variant.kernel in ("main", "tail")
    logits = config.block_m * constants["BLOCK_V"] // (32 * num_warps) if has_tiles else None
    return read_kernel(compiled, logits)


def violations(variant: LensVariant, report: KernelReport, ceiling: float | None = None) -> list[str]:
    """What makes the kernel of ``report`` unfit to ship, in words; empty if nothing does.

    ``ceiling`` bounds ``outside_per_logit``.
    """
    _, target, product, shared = GENERATIONS[variant.generation]
    expected = {product} if variant.kernel in PRODUCTS else set()
    found = list(report.box_errors)
    if report.target != target:
        found.append(f"compiled for {report.target}, not {target}")
    if report.stack_bytes or report.local_accesses:
        found.append(f"spills: {report.stack_bytes} bytes of stack, {report.local_accesses} local accesses")
    if set(report.products) != expected:
        found.append(f"products {sorted(report.products)}, expected {sorted(expected)}")
    if report.shared_bytes > shared:
        found.append(f"{report.shared_bytes} bytes of shared memory, at most {shared}")
    if bool(report.tma_loads) != variant.by_tma:
        found.append(f"{report.tma_loads} TMA loads in a kernel {'by' if variant.by_tma else 'without'} TMA")
    if ceiling is not None and (report.outside_per_logit is None or report.outside_per_logit > ceiling):
        found.append(f"{report.outside_per_logit} instructions a logit outside the K loop, at most {ceiling}")
    return found


def _specialisation(variant: LensVariant) -> tuple[triton.JITFunction, dict, int, int]:
    """Kernel, compile-time arguments, warps and stages, as the launchers pass them."""
    options, config = variant.options, variant.options.config
    if variant.kernel == "norm":
        block_m, block_d, warps = norm_launch(padded_width(variant.d_model))
        flags = dict(HAS_NORM=True, HAS_MEAN=True, HAS_WEIGHT=True, HAS_BIAS=True, BLOCK_M=block_m, BLOCK_D=block_d)
        return norms_triton._norm_kernel, flags | dict(stride_hd=1, stride_w=1, stride_b=1), warps, config.num_stages
    if variant.kernel == "merge":
        block_s, block_m = running_sums.merge_blocks(MERGED_SPLITS)
        flags = options.row_flags(variant.targets) | dict(BLOCK_S=block_s, BLOCK_M=block_m, stride_t=1)
        if not variant.targets:
            flags |= dict(targets_ptr=None, t_ptr=None)
        return running_sums._merge_kernel, flags, 4, config.num_stages
    constants = options.product_flags() | dict(stride_b=1, stride_t=1)
    if not variant.bias:
        constants["bias_ptr"] = None
    if variant.aligned:
        constants["stride_wd"] = 1
    if variant.kernel == "targets":
        constants |= dict(BLOCK_M=target_logits.TARGET_ROWS)
        launch = (target_logits.TARGET_WARPS, target_logits.TARGET_STAGES)
        return _with_known(target_logits._target_kernel, constants, *launch)
    if variant.kernel == "ties":
        constants |= dict(BLOCK_M=target_logits.TARGET_ROWS, TILE=config.block_v)
        return _with_known(ties._ties_kernel, constants, target_logits.TARGET_WARPS, config.num_stages)
    is_tail = variant.kernel == "tail"
    tiles = tile_ranges(2 * config.block_v - is_tail, 2, 2, config, processors=1, by_tma=variant.by_tma)[-1]
    constants |= options.row_flags(variant.targets)
    constants |= dict(
        MASKED=tiles.masked,
        SWAPPED=config.kind == "few_rows",
        SAME_BITS=variant.same_bits,
        BLOCK_M=config.block_m,
        BLOCK_V=tiles.width,
        TAIL_V=config.tail_v,
    )
    if not variant.targets:
        constants |= dict(targets_ptr=None, t_ptr=None)
    kernel = lens_tma._tma_kernel if variant.by_tma else lens_kernel._lens_kernel
    return _with_known(kernel, constants, config.num_warps, config.num_stages)


def _with_known(kernel, constants: dict, num_warps: int, num_stages: int) -> tuple[triton.JITFunction, dict, int, int]:
    known = {name: value for name, value in constants.items() if name in kernel.arg_names}
    return kernel, known, num_warps, num_stages


def _type_of(name: str, variant: LensVariant) -> str:
    if name in ("x_ptr", "w_ptr") or (variant.kernel == "norm" and name.endswith("_ptr")):
        return "*" + _TYPES[variant.dtype]
    if name in ("argmax_ptr", "rank_ptr"):
        return "*i64" if variant.kernel in ("merge", "ties") else "*i32"
    if name.endswith("_ptr"):
        return _INTS.get(name, "*fp32")
    return "fp32" if name in _FLOATS else "i32"
