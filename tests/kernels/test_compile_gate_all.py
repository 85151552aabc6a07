"""Every form of every kernel that can be launched compiles clean; some twenty minutes on one core."""

import itertools
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

import gate
from gate import LensVariant, violations
from gate_process import inspect_all
from refinelens.kernels.config import by_pointers, pinned_config

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
FLAGS = [
    dict(zip(("targets", "bias", "scale", "softcap"), on, strict=True))
    for on in itertools.product((True, False), repeat=4)
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(gate.tools_missing()), reason="this Triton brings no disassembler"),
]


def with_same_bits(variants):
    """And the forms without a guard of the target, which only plain logits with targets have."""
    for variant in variants:
        yield variant
        if variant.targets and not (variant.bias or variant.scale or variant.softcap):
            yield replace(variant, same_bits=True)


def main_kernels(dtype, generation):
    # Five tile sizes by row count, and the unaligned one.
    for aligned, n_rows in ((True, 1024), (True, 264), (True, 100), (True, 60), (True, 5), (False, 1024)):
        for kernel, on in itertools.product(("main", "tail"), FLAGS):
            yield LensVariant(kernel, dtype, generation, n_rows, aligned=aligned, **on)


def other_kernels(dtype, generation):
    for aligned, bias, scale in itertools.product((True, False), repeat=3):
        yield LensVariant("targets", dtype, generation, aligned=aligned, bias=bias, scale=scale)
    for d_model in (1, 64, 768, 4096, 16384):
        yield LensVariant("norm", dtype, generation, d_model=d_model)
    for targets, softcap in itertools.product((True, False), repeat=2):
        yield LensVariant("merge", dtype, generation, targets=targets, softcap=softcap)


def kernels_by_tma(dtype):
    pinned = pinned_config(dtype, aligned=True, n_rows=1024)
    plain = replace(by_pointers(pinned), kind="plain")
    for config in (pinned, replace(pinned, num_stages=pinned.num_stages + 1), plain):
        for kernel, on in itertools.product(("main", "tail", "ties"), FLAGS):
            yield LensVariant(kernel, dtype, config=config, **on)


def check(variants):
    variants = {str(variant): variant for variant in with_same_bits(variants)}
    assert len(variants) > 10
    reports = inspect_all(variants)
    assert {name: found for name, report in reports.items() if (found := violations(variants[name], report))} == {}


@pytest.mark.parametrize("generation", [8, 9, 10])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_main_kernels(dtype, generation):
    check(main_kernels(dtype, generation))


@pytest.mark.parametrize("generation", [8, 9, 10])
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_other_kernels(dtype, generation):
    check(other_kernels(dtype, generation))


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_kernels_by_tma(dtype):
    check(kernels_by_tma(dtype))
