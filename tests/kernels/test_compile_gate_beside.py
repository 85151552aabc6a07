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
from refinelens.kernels.config import pinned_config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
pytestmark = [
    pytest.mark.medium,
    pytest.mark.skipif(bool(gate.tools_missing()), reason="this Triton brings no disassembler"),
]
CAP, LINEAR = dict(softcap=True), dict(bias=True, scale=True)
# The options of logits that each kernel may meet: averages of weights are of linear heads, maxima come before the cap,
# only heads without bias and scale have targets with the bits of the main product, and only capped ones do without
# averages.
OF_LOGITS = {"probabilities": [{}, LINEAR], "average": [{}], "maxima": [{}, LINEAR], "maxima-tail": [{}, LINEAR]}
OF_LOGITS |= {name: [{}, LINEAR] for name in gate_beside.LISTED}
OF_LOGITS["expected-capped"] = [CAP, CAP | LINEAR]
ANY = [{}, CAP, LINEAR, CAP | LINEAR]
FEW = {
    "list": LensVariant("list"),
    "several": LensVariant("several", same_bits=True),
    "jensen-shannon": LensVariant("jensen-shannon", softcap=True),
}


def forms(kernel):
    """Of every dtype and generation, aligned and not."""
    if kernel not in gate_beside.PRODUCTS:
        yield LensVariant(kernel)
        return
    for dtype, generation, aligned in itertools.product((BF16, FP16, FP32), gate.GENERATIONS, (True, False)):
        bare = LensVariant(kernel, dtype, generation, aligned=aligned)
        for on in OF_LOGITS.get(kernel, ANY):
            if kernel != "several-maxima":
                yield replace(bare, **on)
            fits = kernel == "several" or (kernel == "several-maxima" and aligned and dtype != FP32)
            if fits and on in ({}, CAP):
                yield replace(bare, same_bits=True, **on)


def check(variants):
    reports = inspect_all(variants)
    assert {name: found for name, report in reports.items() if (found := violations(variants[name], report))} == {}
    assert all(0 < report.registers <= 255 and report.instructions > 50 for report in reports.values())


def test_common_forms_compile_clean():
    check(FEW)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", gate_beside.KERNELS)
def test_every_form_compiles_clean(kernel):
    check({str(variant): variant for variant in forms(kernel)})


def test_everything_at_once_is_rejected():
    """Why maxima have a launch of their own where targets have not the bits of the product."""
    # The widest tile, which no Triton from 3.8 on is given.
    widest = replace(pinned_config(BF16, aligned=True, n_rows=1024), kind="plain")
    variant = LensVariant("several-maxima", **CAP, **LINEAR, config=widest)
    (report,) = inspect_all({"all": variant}).values()
    assert any("spills" in violation for violation in violations(variant, report))
