"""The compile-only gate: every kernel of the lens compiled as it is launched, without a GPU, and judged.

Registers, spills, tensor core use and instructions per logit are read from the machine code by the disassemblers that
come with Triton. In reading order: a variant of a kernel and its report; how a variant is compiled; how machine code is
read.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import gate_beside
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from refinelens.kernels import kernel, kernel_tma, launches, norm_kernel
from refinelens.kernels.config import HOPPER, LensConfig, LensOptions, pinned_config, sized_config, tile_ranges
from refinelens.kernels.reference import LayerNorm, LensHead

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA = ("HGMMA", "HMMA", "UTCHMMA")  # of Hopper, Ampere, Blackwell
# Per generation: PTX target, the product its tensor cores take, bytes of shared memory of a block.
GENERATIONS = {
    8: (80, "sm_80", "HMMA", 166_912),
    9: (90, "sm_90a", "HGMMA", 232_448),
    10: (100, "sm_100a", "UTCHMMA", 232_448),
}
MERGED_SPLITS = 200  # more than processors, so that a program holds the most rows times splits
LAUNCH = ("num_warps", "num_stages", "maxnreg")  # arguments of a launch that no kernel sees
PRODUCTS = ("main", "tail", "targets", "ties", *gate_beside.PRODUCTS)  # the kernels that multiply
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_FLOATS = {"zero", "scale", "softcap", "eps", "offset"}
_INTS = {"targets_ptr": "*i64", "parts_argmax_ptr": "*i32", "parts_rank_ptr": "*i32"}


def tools_missing() -> list[str]:
    """The disassemblers bundled with Triton that this installation lacks."""
    return [name for name in ("cuobjdump", "nvdisasm") if not (_TOOLS / name).exists()]


@dataclass(frozen=True)
class LensVariant:
    """One launchable specialisation of a kernel.

    Args:
        kernel: ``"main"`` (whole tiles), ``"tail"`` (the rest of the vocabulary; by TMA both), ``"targets"``,
            ``"ties"``, ``"norm"``, ``"merge"`` or one of `gate_beside`.
        n_rows: Rows of the call, which decide the pinned configuration.
        aligned: `config.is_aligned` of the unembedding.
        same_bits: `fused_lens.target_matches_main_product` of the call.
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
        head = LensHead(
            weight=torch.empty(0, self.d_model, dtype=self.dtype),
            bias=torch.empty(0, dtype=torch.float32) if self.bias else None,
            softcap=30.0 if self.softcap else None,
            scale=2.0 if self.scale else 1.0,
        )
        is_beside = self.kernel in gate_beside.KERNELS
        choose = sized_config if is_beside else pinned_config
        config = self.config or choose(self.dtype, self.aligned, self.n_rows, self.generation)
        if is_beside:
            config = gate_beside.launched(self.kernel, config)
        return LensOptions(head, config, self.targets, self.same_bits)

    @property
    def by_tma(self) -> bool:
        """Whether the kernel is that of `kernel_tma`."""
        return self.kernel in ("main", "tail") and self.options.by_tma


@dataclass(frozen=True)
class KernelReport:
    """Figures of one compiled kernel.

    ``outside_per_logit`` counts the instructions of the loop over tiles outside its K loop, per logit of a
    thread; None where there is no such loop. ``box_errors`` names TMA copies whose box is not their shared tile.
    """

    target: str
    registers: int
    stack_bytes: int
    local_accesses: int
    shared_bytes: int
    products: dict[str, int]  # of ``MMA``, how often each occurs
    tma_loads: int
    instructions: int
    outside_per_logit: float | None
    box_errors: tuple[str, ...]


def inspect_variant(variant: LensVariant) -> KernelReport:
    """Compile ``variant`` and report on it; not possible under ``TRITON_INTERPRET=1``."""
    jitted, passed = _specialisation(variant)
    constants = {name: value for name, value in passed.items() if name in jitted.arg_names}
    launch = {name: passed[name] for name in LAUNCH if name in passed}
    vectors = {"width"} if variant.kernel == "norm" else {"x_ptr", "width"}
    if variant.aligned and variant.kernel in PRODUCTS:
        vectors |= {"w_ptr", "d_model", "stride_wv"}
    vectors |= gate_beside.VECTORS
    signature, attrs = {}, {}
    for position, name in enumerate(jitted.arg_names):
        signature[name] = "constexpr" if name in constants else _type_of(name, variant)
        if name in vectors and name not in constants:
            attrs[(position,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(jitted, signature, constants, attrs),
        target=GPUTarget("cuda", GENERATIONS[variant.generation][0], 32),
        options=launch | launches.OPTIONS,
    )
    tile = constants["BLOCK_M"] * constants["BLOCK_V"] if variant.kernel in ("main", "tail") else None
    return read_kernel(compiled, tile and tile // (32 * launch["num_warps"]))


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
    if variant.kernel == "norm":
        vector = torch.empty(variant.d_model, dtype=torch.float32)
        flags = norm_kernel.norm_flags(LayerNorm(vector, vector), norm_kernel.padded_width(variant.d_model))
        return norm_kernel._norm_kernel, flags | dict(stride_hd=1, stride_w=1, stride_b=1)
    # As Triton does, strides of 1 and absent operands become constants.
    constants = dict(stride_b=1, stride_t=1) | (dict(stride_wd=1) if variant.aligned else {})
    if variant.kernel in gate_beside.KERNELS:
        jitted, flags = gate_beside.specialisation(variant.kernel, options)
        return jitted, flags | constants
    if variant.kernel == "ties":
        return kernel_tma._ties_kernel, kernel_tma.tie_flags(options) | constants
    constants |= {} if variant.bias else dict(bias_ptr=None)
    constants |= {} if variant.targets else dict(targets_ptr=None, target_z_ptr=None)
    if variant.kernel == "merge":
        return kernel._merge_kernel, kernel.merge_flags(MERGED_SPLITS, options) | constants
    if variant.kernel == "targets":
        return kernel._target_kernel, kernel.target_flags(options) | constants
    is_tail = variant.kernel == "tail"
    tiles = tile_ranges(2 * config.block_v - is_tail, 2, 2, config, processors=1, by_tma=variant.by_tma)[-1]
    if variant.by_tma:
        return kernel_tma._tma_kernel, kernel_tma.tma_flags(options, tiles) | constants
    return kernel._lens_kernel, kernel.tile_flags(options, tiles) | constants


def _type_of(name: str, variant: LensVariant) -> str:
    if own := gate_beside.type_of(variant.kernel, name, _TYPES[variant.dtype]):
        return own
    if name in ("x_ptr", "w_ptr") or (variant.kernel == "norm" and name.endswith("_ptr")):
        return "*" + _TYPES[variant.dtype]
    if name in ("argmax_ptr", "rank_ptr"):
        return "*i64" if variant.kernel in ("merge", "ties") else "*i32"
    if name.endswith("_ptr"):
        return _INTS.get(name, "*fp32")
    return "fp32" if name in _FLOATS else "i32"


def read_kernel(compiled, logits_per_thread: int | None) -> KernelReport:
    """Report on what ``triton.compile`` returned; ``logits_per_thread`` of a tile, None without tiles."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", cubin.name)
        listing = _run("nvdisasm", "-c", cubin.name)
    code = [line for line in listing.splitlines() if _opcode(line) or line.startswith(".L")]
    opcodes = [_opcode(line) for line in code]
    families = Counter(opcode.split(".")[0] for opcode in opcodes)
    outside = _outside_k_loop(code, opcodes, logits_per_thread) if logits_per_thread else None
    return KernelReport(
        target=re.search(r"\.target (\w+)", compiled.asm["ptx"])[1],
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack_bytes=int(re.search(r"STACK:(\d+)", usage)[1]),
        local_accesses=families["LDL"] + families["STL"],
        shared_bytes=compiled.metadata.shared,
        products={name: families[name] for name in MMA if families[name]},
        tma_loads=families["UTMALDG"],
        instructions=sum(map(bool, opcodes)),
        outside_per_logit=outside and outside / logits_per_thread,
        box_errors=tuple(_box_errors(compiled.asm["ttgir"])),
    )


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout


def _opcode(line: str) -> str:
    """``HGMMA.64x256x16`` of ``/*2b50*/ @P0 HGMMA.64x256x16 R24, ...``; empty for other lines."""
    match = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line)
    return match[1] if match else ""


def _outside_k_loop(code: list[str], opcodes: list[str], logits_per_thread: int) -> int | None:
    """Instructions of the loop over tiles, without those of its K loop.

    The loop over tiles is the shortest that holds a product and an exponential per logit, the K loop the shortest
    in it that holds a product. Where both are one loop, the part that all but a tile's last step jump over.
    """
    labels = {line.split(":")[0]: position for position, line in enumerate(code) if line.startswith(".L")}
    loops, jumps = [], []
    for position, line in enumerate(code):
        branch = re.search(r"BRA(?:\.\w+)*\s.*`\((\.L\w+)\)", line)
        target = labels.get(branch[1], position) if branch else position
        if any(opcode.startswith(MMA) for opcode in opcodes[target:position]):
            loops.append((target, position))
        elif target > position:
            jumps.append((position, target))
    loops.sort(key=_length)
    for loop in loops:
        if _exponentials(opcodes, loop) >= logits_per_thread:
            inner = next(other for other in loops if loop[0] <= other[0] and other[1] <= loop[1])
            if inner != loop:
                return _count(opcodes, loop) - _count(opcodes, inner)
            within = (jump for jump in jumps if loop[0] <= jump[0] and jump[1] <= loop[1])
            skipped = [jump for jump in within if _exponentials(opcodes, jump) >= logits_per_thread]
            return _count(opcodes, min(skipped, key=_length)) if skipped else None
    return None


def _length(part: tuple[int, int]) -> int:
    return part[1] - part[0]


def _exponentials(opcodes: list[str], part: tuple[int, int]) -> int:
    return opcodes[slice(*part)].count("MUFU.EX2")


def _count(opcodes: list[str], part: tuple[int, int]) -> int:
    return sum(map(bool, opcodes[slice(*part)]))


def _box_errors(ttgir: str) -> list[str]:
    """TMA copies whose descriptor was made for another box than the shared tile they fill."""
    boxes, errors = {}, []
    for line in ttgir.splitlines():
        if made := re.search(r"tensormap_create (%\w+), %\w+, \[([^]]*)\]", line):
            sizes = [int(size) for size in re.findall(r"%c(\d+)_i32", made[2])]
            boxes[made[1]] = "x".join(map(str, reversed(sizes)))
        elif named := re.search(r"(%\w+) = ttng.reinterpret_tensor_descriptor (%\w+)", line):
            boxes[named[1]] = boxes.get(named[2])
        elif copy := re.search(r"async_tma_copy_global_to_local (%\w+)\[.*-> !ttg.memdesc<([\dx]+)x\w+,", line):
            if boxes.get(copy[1]) != copy[2]:
                errors.append(f"a TMA box of {boxes.get(copy[1])} fills a tile of {copy[2]}")
    return errors
