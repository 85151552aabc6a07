"""What ships must compile without spills and with tensor cores; read from the machine code, without a GPU.

Every kernel in its common forms, most of them slow; `test_compile_gate_all.py` has every form that can be launched.
"""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import gate
from gate import LensVariant, violations
from gate_process import inspect_all
from refinelens.kernels.config import LIMITS, LensConfig, by_pointers, pinned_config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MAIN = LensVariant(same_bits=True)
SAFE = LensVariant()
EVERYTHING = dict(bias=True, scale=True, softcap=True)
WITHOUT_TMA = replace(by_pointers(pinned_config(BF16, aligned=True, n_rows=1024)), kind="plain")
# Variant and ceiling of the instructions per logit outside the K loop: measured at 256 columns plus a tenth. Where
# `config.by_pointers` halves the columns, fewer logits share what is done once a row, a tenth more each.
SHIPPED = {
    "bf16": (MAIN, 12.6),
    "bf16-no-targets": (replace(SAFE, targets=False), 9.1),
    "bf16-no-tma": (replace(MAIN, config=WITHOUT_TMA), 15.2),
    "bf16-target-apart": (SAFE, 18.1),
    "bf16-bias": (replace(SAFE, bias=True), 20.1),
    "bf16-softcap": (replace(SAFE, softcap=True), 27.1),
    "bf16-everything": (replace(SAFE, **EVERYTHING), 30.3),
    "bf16-tail": (replace(MAIN, kernel="tail"), 12.6),
    "bf16-tail-apart": (replace(SAFE, kernel="tail"), 29.8),
    "bf16-tail-everything": (replace(SAFE, kernel="tail", **EVERYTHING), 46.8),
    "bf16-unaligned": (replace(SAFE, aligned=False, **EVERYTHING), None),
    "bf16-5-rows": (replace(MAIN, n_rows=5), None),
    "bf16-60-rows": (replace(MAIN, n_rows=60), None),
    "bf16-100-rows": (replace(MAIN, n_rows=100), None),
    "bf16-264-rows": (replace(MAIN, n_rows=264), None),
    "bf16-264-rows-everything": (replace(SAFE, n_rows=264, **EVERYTHING), None),
    "bf16-60-rows-everything": (replace(SAFE, n_rows=60, kernel="tail", **EVERYTHING), None),
    "bf16-ties": (replace(MAIN, kernel="ties"), None),
    "bf16-targets": (replace(SAFE, kernel="targets"), None),
    "bf16-targets-unaligned": (replace(SAFE, kernel="targets", aligned=False, bias=True, scale=True), None),
    "bf16-norm": (replace(SAFE, kernel="norm"), None),
    "merge": (replace(SAFE, kernel="merge", softcap=True), None),
    "fp16": (replace(MAIN, dtype=FP16), 12.6),
    "fp32": (replace(MAIN, dtype=FP32), 22.6),
    "fp32-everything": (replace(SAFE, dtype=FP32, **EVERYTHING), 45.0),
    "fp32-tail": (replace(SAFE, dtype=FP32, kernel="tail", **EVERYTHING), 46.0),
    "fp32-targets": (replace(SAFE, dtype=FP32, kernel="targets"), None),
    "fp32-norm-wide": (replace(SAFE, dtype=FP32, kernel="norm", d_model=16384), None),
    "sm80-bf16": (replace(MAIN, generation=8), None),
    "sm80-bf16-tail": (replace(SAFE, generation=8, kernel="tail", **EVERYTHING), None),
    "sm80-bf16-5-rows": (replace(MAIN, generation=8, n_rows=5), None),
    "sm80-fp32": (replace(SAFE, generation=8, dtype=FP32, **EVERYTHING), None),
    "sm80-targets": (replace(SAFE, generation=8, kernel="targets"), None),
    "sm100-bf16": (replace(MAIN, generation=10), None),
    "sm100-bf16-tail": (replace(SAFE, generation=10, kernel="tail", **EVERYTHING), None),
    "sm100-fp32": (replace(SAFE, generation=10, dtype=FP32, **EVERYTHING), None),
    "sm100-targets": (replace(SAFE, generation=10, kernel="targets"), None),
}
BY_TMA = pinned_config(BF16, aligned=True, n_rows=1024)
BIG = replace(BY_TMA, kind="plain")
REJECTED = {
    "big tile, element-wise loads": replace(SAFE, aligned=False, config=BIG, **EVERYTHING),
    "big tile, half the warps": replace(SAFE, config=replace(BIG, num_warps=4)),
    "more stages than shared memory": replace(SAFE, config=replace(BIG, num_stages=6)),
    "no warp group": replace(SAFE, config=LensConfig(32, 64, 64, 64, num_warps=4, num_stages=2)),
    "plain for Ampere": replace(SAFE, generation=8, config=BIG),
    "TMA with half the warps": replace(MAIN, config=replace(BY_TMA, num_warps=4)),
}
pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(
        bool(gate.tools_missing()), reason=f"this Triton brings no {' and no '.join(gate.tools_missing())}"
    ),
]


VARIANTS = {name: variant for name, (variant, _) in SHIPPED.items()} | REJECTED
# The one that is launched most, one with every option, and one to reject; all others are slow.
FEW = ("bf16", "bf16-tail-everything")
FEW_REJECTED = ("big tile, element-wise loads",)


@pytest.fixture(scope="session")
def reports():
    return inspect_all({name: VARIANTS[name] for name in FEW + FEW_REJECTED})


@pytest.fixture(scope="session")
def all_reports():
    return inspect_all(VARIANTS)


@pytest.fixture
def report(name, request):
    return request.getfixturevalue("reports" if name in FEW + FEW_REJECTED else "all_reports")[name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in SHIPPED]
)
def test_shipped_kernel_passes(name, report):
    variant, ceiling = SHIPPED[name]
    if ceiling is not None and not variant.by_tma and LIMITS.columns < 256:
        ceiling *= 1.1
    print(report)
    assert violations(variant, report, ceiling) == []
    assert 0 < report.registers <= 255 and report.instructions > 100
    if variant.kernel in ("main", "tail"):
        assert report.shared_bytes > 0


@pytest.mark.parametrize(
    "name, reason",
    [
        ("big tile, element-wise loads", "spills"),
        pytest.param("big tile, half the warps", "spills", marks=pytest.mark.slow),
        pytest.param("more stages than shared memory", "shared memory, at most 232448", marks=pytest.mark.slow),
        pytest.param("no warp group", "products ['HMMA'], expected ['HGMMA']", marks=pytest.mark.slow),
        pytest.param("plain for Ampere", "spills", marks=pytest.mark.slow),
        pytest.param("TMA with half the warps", "spills", marks=pytest.mark.slow),
    ],
)
def test_gate_catches(name, reason, report):
    print(report)
    assert any(reason in violation for violation in violations(REJECTED[name], report))


@pytest.mark.parametrize(
    "found, reason",
    [
        ({"shared_bytes": 232449}, "232449 bytes of shared memory, at most 232448"),
        ({"products": {"HMMA": 1}}, "products ['HMMA'], expected ['HGMMA']"),
        ({"stack_bytes": 8}, "spills: 8 bytes of stack, 0 local accesses"),
        ({"tma_loads": 0}, "0 TMA loads in a kernel by TMA"),
    ],
)
def test_gate_catches_each_figure_by_itself(found, reason, reports):
    assert violations(MAIN, replace(reports["bf16"], **found)) == [reason]


def test_ceiling_catches(reports):
    assert any("outside the K loop, at most 5" in violation for violation in violations(MAIN, reports["bf16"], 5))


def test_wrong_targets_and_boxes_are_caught(reports):
    *others, loads = violations(replace(MAIN, generation=10), reports["bf16"])
    assert others == ["compiled for sm_90a, not sm_100a", "products ['HGMMA'], expected ['UTCHMMA']"]
    assert loads.endswith("TMA loads in a kernel without TMA")
    ttgir = """
      ttng.tensormap_create %d, %p, [%c64_i32, %c128_i32], [%width, %rows]
      %x = ttng.reinterpret_tensor_descriptor %d : !tt.ptr<i8> to !tt.tensordesc<tensor<128x64xbf16, #shared1>>
      ttng.async_tma_copy_global_to_local %x[%i, %k] %b, %m, %t : -> !ttg.memdesc<64x64xbf16, #shared1, #smem>
      ttng.async_tma_copy_global_to_local %x[%i, %k] %b, %m, %t : -> !ttg.memdesc<128x64xbf16, #shared1, #smem>
    """
    assert gate._box_errors(ttgir) == ["a TMA box of 128x64 fills a tile of 64x64"]


@pytest.mark.slow
def test_targets_and_softcap_cost_instructions(all_reports):
    """The count follows the source: it is read from the loops, not from the size of the kernel."""
    names = ("bf16-no-targets", "bf16", "bf16-no-tma", "bf16-target-apart", "bf16-softcap")
    bare, ranked, branchless, apart, capped = (all_reports[name].outside_per_logit for name in names)
    assert 8 < bare < ranked < branchless < apart < capped < 30
