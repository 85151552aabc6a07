"""What the compiler makes of a lens kernel, read without a GPU: registers, spills, tensor core use."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import lens_triton
from .configs import LensConfig, pinned_config

MAX_SHARED = 232_448  # bytes a block may use on sm_90
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLOATS = {"logit_scale", "softcap"}
_POINTERS = {"targets_ptr": "*i64", "argmax_ptr": "*i32", "rank_ptr": "*i32"}


@dataclass(frozen=True)
class LensVariant:
    """One launchable specialisation of the main kernel or, with ``kernel``, of the targets' one.

    ``aligned`` is ``configs.is_aligned`` of the unembedding; ``config`` None takes the pinned tile sizes.
    """

    dtype: torch.dtype = torch.bfloat16
    aligned: bool = True
    targets: bool = True
    bias: bool = False
    scale: bool = False
    softcap: bool = False
    kernel: str = "_lens_kernel"
    config: LensConfig | None = None

    @property
    def options(self) -> lens_triton.LensOptions:
        """The launcher's options, with empty operands, that lead to this specialisation."""
        return lens_triton.LensOptions(
            unembedding=torch.empty(0, dtype=self.dtype),
            bias=torch.empty(0) if self.bias else None,
            softcap=30.0 if self.softcap else None,
            logit_scale=2.0 if self.scale else 1.0,
            config=self.config or pinned_config(self.dtype, self.aligned, self.bias),
        )


@dataclass(frozen=True)
class KernelReport:
    """Figures of one compiled kernel.

    ``outside_per_logit`` counts the instructions of the loop over tiles outside its K loop, per logit of a
    thread; None where there is no such pair of loops.
    """

    target: str
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    hgmma: int
    hmma: int
    instructions: int
    outside_per_logit: float | None


def tools_missing() -> list[str]:
    """The disassemblers bundled with Triton that this installation lacks."""
    return [name for name in ("cuobjdump", "nvdisasm") if not (_TOOLS / name).exists()]


def inspect_variant(variant: LensVariant) -> KernelReport:
    """Compile ``variant`` for sm_90 and report on it; not possible under ``TRITON_INTERPRET=1``."""
    kernel, config = getattr(lens_triton, variant.kernel), variant.options.config
    constants = {name: value for name, value in _constants(variant).items() if name in kernel.arg_names}
    vectors = {"x_ptr", "width"} | ({"w_ptr", "d_model", "stride_wv"} if variant.aligned else set())
    signature, attrs = {}, {}
    for position, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else _type_of(name, variant.dtype)
        if name in vectors:
            attrs[(position,)] = [["tt.divisibility", 16]]
    is_main = variant.kernel == "_lens_kernel"
    num_warps = config.num_warps if is_main else lens_triton.TARGET_WARPS
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attrs),
        target=GPUTarget("cuda", 90, 32),
        options=dict(num_warps=num_warps, num_stages=config.num_stages),
    )
    return _report(compiled, config.block_m * config.block_v / (32 * num_warps) if is_main else None)


def violations(report: KernelReport, ceiling: float | None = None) -> list[str]:
    """What makes the kernel of ``report`` unfit to ship, in words; empty if nothing does.

    ``ceiling`` bounds ``outside_per_logit``.
    """
    found = []
    if report.target != "sm_90a":
        found.append(f"compiled for {report.target}, not sm_90a")
    if report.stack_bytes or report.local_accesses:
        found.append(f"spills: {report.stack_bytes} bytes of stack, {report.local_accesses} local accesses")
    if not report.hgmma:
        found.append("no HGMMA")
    if report.hmma:
        found.append(f"{report.hmma} HMMA")
    if report.shared_bytes > MAX_SHARED:
        found.append(f"{report.shared_bytes} bytes of shared memory, at most {MAX_SHARED}")
    if ceiling is not None and (report.outside_per_logit is None or report.outside_per_logit > ceiling):
        found.append(f"{report.outside_per_logit} instructions a logit outside the K loop, at most {ceiling}")
    return found


def _constants(variant: LensVariant) -> dict:
    options = variant.options
    is_main = variant.kernel == "_lens_kernel"
    constants = {
        **lens_triton.product_flags(options),
        **lens_triton.row_flags(options, variant.targets),
        "BLOCK_M": options.config.block_m if is_main else lens_triton.target_rows(options.config),
        "BLOCK_V": options.config.block_v,
        "stride_b": 1,
        "stride_t": 1,
    }
    absent = {"bias_ptr": not variant.bias}
    if is_main:
        absent |= {"targets_ptr": not variant.targets, "t_ptr": not variant.targets}
    constants |= {name: None for name, is_absent in absent.items() if is_absent}
    return constants | ({"stride_wd": 1} if variant.aligned else {})


def _type_of(name: str, dtype: torch.dtype) -> str:
    if name in ("x_ptr", "w_ptr"):
        return "*" + _TYPES[dtype]
    if name.endswith("_ptr"):
        return _POINTERS.get(name, "*fp32")
    return "fp32" if name in _FLOATS else "i32"


def _report(compiled, logits_per_thread: float | None) -> KernelReport:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        listing = _run("nvdisasm", "-c", cubin.name)
    code = [line for line in listing.splitlines() if _opcode(line) or line.startswith(".L")]
    opcodes = [_opcode(line) for line in code]
    outside = _outside_k_loop(code)
    return KernelReport(
        target=re.search(r"\.target (\w+)", compiled.asm["ptx"])[1],
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_accesses=sum(op.startswith(("LDL", "STL")) for op in opcodes),
        shared_bytes=compiled.metadata.shared,
        hgmma=sum(op.startswith("HGMMA") for op in opcodes),
        hmma=sum(op.startswith("HMMA") for op in opcodes),
        instructions=sum(bool(op) for op in opcodes),
        outside_per_logit=outside / logits_per_thread if outside and logits_per_thread else None,
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _opcode(line: str) -> str:
    """``HGMMA.64x256x16`` of ``/*2b50*/ @P0 HGMMA.64x256x16 R24, ...``; empty for other lines."""
    match = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
    return match[1] if match else ""


def _outside_k_loop(code: list[str]) -> int | None:
    """Instructions of the loop around the innermost loop with an HGMMA, without that innermost loop."""
    labels = {line.split(":")[0]: position for position, line in enumerate(code) if line.startswith(".L")}
    loops = []
    for position, line in enumerate(code):
        branch = re.search(r"BRA(?:\.\w+)* `\((\.L\w+)\)", line)
        start = labels.get(branch[1], position) if branch else position
        if start < position and any(_opcode(inner).startswith("HGMMA") for inner in code[start:position]):
            loops.append((position - start, start, position))
    if len(loops) < 2:
        return None
    sizes = [sum(bool(_opcode(line)) for line in code[start:end]) for _, start, end in sorted(loops)[:2]]
    return sizes[1] - sizes[0]
