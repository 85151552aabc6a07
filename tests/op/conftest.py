"""Set-up of tests of the C++ kernels."""

import ctypes
import platform

import pytest

from tiny import skip_unless_isa_runs

M_PERTURB = -6  # of malloc.h


@pytest.fixture(params=["v4", "v3", "baseline"])
def isa(request, monkeypatch):
    """The kernels of each instruction set that this processor runs."""
    monkeypatch.setenv("REFINELENS_ISA", request.param)
    skip_unless_isa_runs()
    return request.param


@pytest.fixture
def over_dirty_memory():
    """Calls a function twice, with memory that holds numbers of 3e38 and with zeros, and gives both results.

    glibc fills memory with a byte before it hands it out: what is read unwritten shows in every sum.
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("needs mallopt of glibc")
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p

    def run(function):
        results = []
        for byte in (0x7F, 0):
            assert libc.mallopt(M_PERTURB, 0xFF ^ byte)
            memory = libc.malloc(100_000)
            assert ctypes.string_at(memory, 100_000) == bytes([byte]) * 100_000
            libc.free(ctypes.c_void_p(memory))
            results.append(function())
        return results

    yield run
    libc.mallopt(M_PERTURB, 0)
