"""What ships must compile for sm_90 without spills and with tensor cores; read from the machine code."""

import os
import pickle
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from refinelens.kernels import gate
from refinelens.kernels.configs import LensConfig, pinned_config
from refinelens.kernels.gate import LensVariant, violations

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = dict(bias=True, scale=True, softcap=True)
# Instructions per logit outside the K loop: measured plus a tenth. With targets some 7.5 of them lie in the
# branch that only a tile with one of its rows' targets takes.
SHIPPED = {
    "bf16": (LensVariant(BF16), 27),
    "bf16-no-targets": (LensVariant(BF16, targets=False), 16),
    "bf16-bias": (LensVariant(BF16, bias=True), 27),
    "bf16-softcap": (LensVariant(BF16, softcap=True), 40),
    "bf16-everything": (LensVariant(BF16, **EVERYTHING), 42),
    "bf16-unaligned": (LensVariant(BF16, aligned=False, **EVERYTHING), None),
    "bf16-targets": (LensVariant(BF16, kernel="_target_kernel"), None),
    "bf16-targets-bias": (LensVariant(BF16, kernel="_target_kernel", bias=True, scale=True), None),
    "bf16-targets-unaligned": (LensVariant(BF16, kernel="_target_kernel", aligned=False), None),
    "fp16": (LensVariant(FP16), 27),
    "fp32": (LensVariant(FP32), 32),
    "fp32-no-targets": (LensVariant(FP32, targets=False), 20),
    "fp32-softcap": (LensVariant(FP32, softcap=True), 48),
    "fp32-everything": (LensVariant(FP32, **EVERYTHING), 53),
    "fp32-unaligned": (LensVariant(FP32, aligned=False, **EVERYTHING), None),
    "fp32-targets": (LensVariant(FP32, kernel="_target_kernel", bias=True), None),
}
BIG = pinned_config(BF16, aligned=True, bias=False)
REJECTED = {
    "big tile, element-wise loads": LensVariant(BF16, aligned=False, config=BIG),
    "big tile, half the warps": LensVariant(BF16, config=LensConfig(128, 256, 64, num_warps=4, num_stages=3)),
    "more stages than shared memory": LensVariant(BF16, config=LensConfig(128, 256, 64, 8, num_stages=6)),
    "no warp group": LensVariant(BF16, config=LensConfig(32, 64, 64, num_warps=4, num_stages=2)),
}
SCRIPT = """
import pickle, sys
from refinelens.kernels.gate import inspect_variant
variants = pickle.load(sys.stdin.buffer)
pickle.dump({name: inspect_variant(variant) for name, variant in variants.items()}, sys.stdout.buffer)
"""
pytestmark = pytest.mark.skipif(
    bool(gate.tools_missing()), reason=f"this Triton brings no {' and no '.join(gate.tools_missing())}"
)


@pytest.fixture(scope="module")
def reports():
    """Reports of all variants from one process: ahead-of-time compilation fails in an interpreting one."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    variants = {name: variant for name, (variant, _) in SHIPPED.items()} | REJECTED
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=pickle.dumps(variants), capture_output=True, env=environment
    )
    assert run.returncode == 0, run.stderr.decode()
    return pickle.loads(run.stdout)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_kernel_passes(name, reports):
    variant, ceiling = SHIPPED[name]
    report = reports[name]
    print(report)
    assert violations(report, ceiling) == []
    assert 0 < report.registers <= 255 and report.instructions > 100 and report.shared_bytes > 0
    if variant.kernel == "_lens_kernel":
        assert report.outside_per_logit is not None


@pytest.mark.parametrize(
    "name, reason",
    [
        ("big tile, element-wise loads", "spills"),
        ("big tile, half the warps", "spills"),
        ("more stages than shared memory", "shared memory, at most 232448"),
        ("no warp group", "no HGMMA"),
        ("no warp group", "HMMA"),
    ],
)
def test_gate_catches(name, reason, reports):
    print(reports[name])
    assert any(reason in violation for violation in violations(reports[name]))


def test_ceiling_catches(reports):
    assert any("outside the K loop, at most 5" in violation for violation in violations(reports["bf16"], 5))


def test_targets_and_softcap_cost_instructions(reports):
    """The count follows the source: it is read from the loops, not from the size of the kernel."""
    plain, ranked, capped = (reports[n].outside_per_logit for n in ("bf16-no-targets", "bf16", "bf16-softcap"))
    assert 8 < plain < ranked < capped < 60
