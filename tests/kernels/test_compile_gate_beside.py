"""The kernels beside the lens compile without spills and with tensor cores, in every form that is launched."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import gate_beside

import gate
from gate import LensVariant, violations
from gate_process import inspect_all

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
EVERYTHING = dict(bias=True, scale=True, softcap=True)
LINEAR = dict(bias=True, scale=True)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(gate.tools_missing()), reason="this Triton brings no disassembler"),
]
# Those that make logits take a softcap, but for the averages of weights, which are of linear heads.
CAPPED = ("log-probabilities", "expected-capped", "jensen-shannon")


def forms(kernel):
    """Of every dtype and generation, aligned and not, as bare as can be and with every option."""
    if kernel not in gate_beside.PRODUCTS:
        yield LensVariant(kernel)
        return
    for dtype, generation, aligned in itertools.product((BF16, FP16, FP32), gate.GENERATIONS, (True, False)):
        bare = LensVariant(kernel, dtype, generation, aligned=aligned)
        yield bare
        if kernel != "average":
            yield replace(bare, **(EVERYTHING if kernel in CAPPED else LINEAR))


@pytest.mark.parametrize("kernel", gate_beside.KERNELS)
def test_every_form_compiles_clean(kernel):
    variants = {str(variant): variant for variant in forms(kernel)}
    reports = inspect_all(variants)
    assert {name: found for name, report in reports.items() if (found := violations(variants[name], report))} == {}
    assert all(0 < report.registers <= 255 and report.instructions > 50 for report in reports.values())
