"""The likeliest tokens of every row on a GPU, from the largest logit of every group of neighbouring tokens.

A row's ``k`` first tokens, by logit and, among equals, by id, lie in its ``k`` first groups by their largest logit and,
among equals, by their place: of a token in any other group, each of those groups has one that comes before it. So one
product over the vocabulary leaves maxima alone, `GROUP` times fewer than logits; a kernel picks groups by them; and a
second product, of a row and the tokens of its own groups, gives logits. In half precision they have the bits of the
first one where all products of a device add up alike; in fp32, whose three products it adds in another order, the last
bits may differ, and nearly equal logits may change places.

Logits and ids are compared as one number: the bits of a float, whose order is that of integers, above those of the id.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .config import LensOptions
from .kernel import UNALIGNED, VARYING, add_product, stride_of
from .kernel_more import GROUP

SAME = 16  # columns of a product that all are one row: the fewest that tensor cores take
_GROUP = tl.constexpr(GROUP)
_SEGMENTS = 128  # in which a row's groups are searched
_NOTHING = tl.constexpr(-(2**63))
_LARGEST = tl.constexpr(2**31 - 1)
_NOT_COMPILED_FOR = [*VARYING, "n_groups", "n_listed", "n_chosen"]
_UNALIGNED = [*UNALIGNED, "chosen_ptr", "ids_ptr", "z_ptr"]


@triton.jit
def _place(z, ids):
    """One int64 for a logit and an int32 id: larger for a larger logit, for equal ones for the lower id.

    NaN is above infinity; the zeros are equal.
    """
    bits = tl.where(z == 0.0, 0.0, z).to(tl.int32, bitcast=True)
    ordered = tl.where(z != z, _LARGEST, bits ^ ((bits >> 31) & _LARGEST))
    return (ordered.to(tl.int64) << 32) | (ids ^ _LARGEST).to(tl.int64)


@triton.jit
def _id_of(place):
    return (place & 0xFFFFFFFF).to(tl.int32) ^ _LARGEST


@triton.jit
def _z_of(place):
    ordered = (place >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & _LARGEST)).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _choose_kernel(
    maxima_ptr, chosen_ptr,  # [R, stride_g] fp32, [R, n_chosen] int32
    n_groups, n_chosen, stride_g, SEGMENTS: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """A program: the first groups of one row. Group ``i`` is of segment ``i % SEGMENTS``."""
    row = tl.program_id(0).to(tl.int64)
    segment = tl.arange(0, SEGMENTS)
    of_row = maxima_ptr + row * stride_g
    tops = tl.full([SEGMENTS], _NOTHING, tl.int64)  # first place of every segment
    for first in range(0, n_groups, SEGMENTS):
        z = tl.load(of_row + first + segment, mask=first + segment < n_groups, other=0.0)
        tops = tl.maximum(tops, tl.where(first + segment < n_groups, _place(z, first + segment), _NOTHING))
    offs_j = tl.arange(0, BLOCK_J)
    for i in range(n_chosen):
        place = tl.max(tops, 0)
        group = _id_of(place)
        tl.store(chosen_ptr + row * n_chosen + i, group)
        # Of the segment that had it, the first place after it.
        own = group % SEGMENTS
        ids = own + offs_j * SEGMENTS
        z = tl.load(of_row + ids, mask=ids < n_groups, other=0.0)
        places = _place(z, ids)
        rest = tl.max(tl.where((ids < n_groups) & (places < place), places, _NOTHING), 0)
        tops = tl.where(segment == own, rest, tops)


def choose_groups(maxima: Tensor, n_rows: int, n_groups: int, n_chosen: int) -> Tensor:
    """The first ``n_chosen`` of ``n_groups`` groups of every row, ``[R, n_chosen]`` int32.

    ``maxima`` are ``[R, at least n_groups]`` fp32.
    """
    chosen = torch.empty(n_rows, n_chosen, dtype=torch.int32, device=maxima.device)
    _choose_kernel[(n_rows,)](maxima, chosen, n_groups, n_chosen, maxima.stride(0), **choose_flags(n_groups))
    return chosen


def choose_flags(n_groups: int) -> dict:
    """What `choose_groups` compiles the kernel for."""
    block_j = triton.next_power_of_2(max(32, triton.cdiv(n_groups, _SEGMENTS)))
    return dict(SEGMENTS=_SEGMENTS, BLOCK_J=block_j, num_warps=1)


@triton.jit(do_not_specialize=_NOT_COMPILED_FOR, do_not_specialize_on_alignment=_UNALIGNED)
def _list_kernel(
    x_ptr, w_ptr, bias_ptr, chosen_ptr, ids_ptr, z_ptr,  # x_hat, w, [n_vocab], [R, n_chosen] int32, [R, n_listed] twice
    n_vocab, d_model, n_chosen, n_listed, width, stride_wv, stride_wd, stride_b, scale,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, INTERPRETED: tl.constexpr, PRECISION: tl.constexpr,
    SAME: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: the list of one row, from the product of the tokens of its groups and that row `SAME` times."""
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.arange(0, BLOCK_C)
    offs_k = tl.arange(0, BLOCK_K)
    mask_c = offs_c < n_chosen * _GROUP
    group = tl.load(chosen_ptr + row * n_chosen + offs_c // _GROUP, mask=mask_c, other=0)
    ids = group * _GROUP + offs_c % _GROUP
    token = tl.minimum(ids, n_vocab - 1).to(tl.int64)
    x_ptrs = x_ptr + row * width + offs_k[:, None] + tl.zeros([SAME], tl.int32)[None, :]
    w_ptrs = w_ptr + token[:, None] * stride_wv + offs_k.to(tl.int64)[None, :] * stride_wd
    z = tl.zeros([BLOCK_C, SAME], tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + token * stride_b).to(tl.float32)[:, None]
    z = add_product(z, x_ptrs, w_ptrs, d_model, stride_wd, True, INTERPRETED, PRECISION, BLOCK_K)
    # All columns are the same: the sum of one alone keeps NaN.
    z = tl.sum(tl.where((tl.arange(0, SAME) == 0)[None, :], z, 0.0), 1)
    if HAS_SCALE:
        z *= scale
    places = tl.where(mask_c & (ids < n_vocab), _place(z, ids), _NOTHING)
    for i in range(n_listed):
        place = tl.max(places, 0)
        tl.store(ids_ptr + row * n_listed + i, _id_of(place).to(tl.int64))
        tl.store(z_ptr + row * n_listed + i, _z_of(place))
        places = tl.where(places == place, _NOTHING, places)


def list_tokens(x_hat: Tensor, chosen: Tensor, k: int, options: LensOptions) -> tuple[Tensor, Tensor]:
    """The ``k`` first tokens among those of the ``chosen`` groups of every row: z fp32 and ids int64, ``[R, k]``."""
    n_rows, n_chosen = chosen.shape
    z = torch.empty(n_rows, k, dtype=torch.float32, device=chosen.device)
    ids = torch.empty(n_rows, k, dtype=torch.int64, device=chosen.device)
    head = options.head
    _list_kernel[(n_rows,)](
        x_hat, head.weight, head.bias, chosen, ids, z, *head.weight.shape, n_chosen, k,
        x_hat.shape[1], *head.weight.stride(), stride_of(head.bias), options.scale,
        **list_flags(options, n_chosen),
    )  # fmt: skip
    return z, ids


def list_flags(options: LensOptions, n_chosen: int) -> dict:
    """What `list_tokens` compiles the kernel for."""
    block_c = max(64, triton.next_power_of_2(n_chosen * GROUP))
    flags = options.product_flags() | options.logit_flags() | dict(SAME=SAME, BLOCK_C=block_c)
    few = block_c <= 128 and options.config.block_m > 64  # element-wise loads need registers for addresses too
    return flags | dict(num_warps=4 if few else 8, num_stages=3)
