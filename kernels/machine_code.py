"""What the compiler made of a kernel: registers, spills, tensor core use, instructions per logit."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
MMA = ("HGMMA", "HMMA", "UTCHMMA")  # of Hopper, Ampere, Blackwell


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


def tools_missing() -> list[str]:
    """The disassemblers bundled with Triton that this installation lacks."""
    return [name for name in ("cuobjdump", "nvdisasm") if not (_TOOLS / name).exists()]


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
