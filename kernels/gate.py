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
from .norms import LayerNorm
from .schedule import tile_ranges

# Per generation: PTX target, the product its tensor cores take, bytes of shared memory of a block.
GENERATIONS = {
    8: (80, "sm_80", "HMMA", 166_912),
    9: (90, "sm_90a", "HGMMA", 232_448),
    10: (100, "sm_100a", "UTCHMMA", 232_448),
}
MERGED_SPLITS = 200  # more than processors, so that a program holds the most rows times splits
LAUNCH = ("num_warps", "num_stages", "maxnreg")  # arguments of a launch that no kernel sees
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
            bias=torch.empty(0, dtype=torch.float32) if self.bias else None,
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
    kernel, passed = _specialisation(variant)
    constants = {name: value for name, value in passed.items() if name in kernel.arg_names}
    launch = {name: passed[name] for name in LAUNCH if name in passed}
    vectors = {"width"} if variant.kernel == "norm" else {"x_ptr", "width"}
    if variant.aligned and variant.kernel in PRODUCTS:
        vectors |= {"w_ptr", "d_model", "stride_wv"}
    signature, attrs = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type_of(name, variant)
        if name in vectors and name not in constants:
            attrs[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", GENERATIONS[variant.generation][0], 32),
        options=launch,
    )
    has_tiles = variant.kernel in ("main", "tail")
    logits = config.block_m * constants["BLOCK_V"] // (32 * launch["num_warps"]) if has_tiles else None
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


def _specialisation(variant: LensVariant) -> tuple[triton.JITFunction, dict]:
    """The kernel, and its compile-time arguments as the launcher passes them."""
    options, config = variant.options, variant.options.config
    strides = dict(stride_b=1, stride_t=1) | (dict(stride_wd=1) if variant.aligned else {})
    absent = dict(bias_ptr=None) if not variant.bias else {}
    if not variant.targets:
        absent |= dict(targets_ptr=None, t_ptr=None)
    if variant.kernel == "norm":
        vector = torch.empty(variant.d_model, dtype=torch.float32)
        flags = norms_triton.norm_flags(LayerNorm(vector, vector), norms_triton.padded_width(variant.d_model))
        return norms_triton._norm_kernel, flags | dict(stride_hd=1, stride_w=1, stride_b=1)
    if variant.kernel == "merge":
        flags = running_sums.merge_flags(MERGED_SPLITS, options.row_flags(variant.targets))
        return running_sums._merge_kernel, flags | strides | absent
    if variant.kernel == "targets":
        return target_logits._target_kernel, target_logits.target_flags(options) | strides | absent
    if variant.kernel == "ties":
        return ties._ties_kernel, ties.tie_flags(options) | strides
    is_tail = variant.kernel == "tail"
    tiles = tile_ranges(2 * config.block_v - is_tail, 2, 2, config, processors=1, by_tma=variant.by_tma)[-1]
    if variant.by_tma:
        return lens_tma._tma_kernel, lens_tma.tma_flags(options, tiles, variant.targets) | strides | absent
    flags = lens_kernel.tile_flags(options, tiles, variant.targets, variant.same_bits)
    return lens_kernel._lens_kernel, flags | strides | absent


def _type_of(name: str, variant: LensVariant) -> str:
    if name in ("x_ptr", "w_ptr") or (variant.kernel == "norm" and name.endswith("_ptr")):
        return "*" + _TYPES[variant.dtype]
    if name in ("argmax_ptr", "rank_ptr"):
        return "*i64" if variant.kernel in ("merge", "ties") else "*i32"
    if name.endswith("_ptr"):
        return _INTS.get(name, "*fp32")
    return "fp32" if name in _FLOATS else "i32"
