"""How the work of a lens is divided: nothing left out, nothing done twice, buffers bounded."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from refinelens.kernels.config import LensConfig, choose_group, choose_splits, chunk_blocks, tile_ranges
from refinelens.kernels.kernel import block_and_split


@pytest.mark.parametrize("d_model, itemsize", [(1, 2), (576, 2), (768, 4), (4096, 2), (16384, 4)])
@pytest.mark.parametrize("n_rows", [1, 129, 13 * 16384, 10**7])
def test_buffers_stay_small(n_rows, d_model, itemsize):
    width = -(-d_model // 64) * 64
    blocks = chunk_blocks(n_rows, width * itemsize, block_m=128, processors=132)
    splits = choose_splits(blocks, tiles=501, processors=132)
    assert 1 <= splits <= 501
    rows = 128 * blocks
    assert rows * width * itemsize + rows * (splits + 1) * 20 <= 64 * 10**6  # and the tail's partials


def test_splits_fill_the_processors():
    assert choose_splits(row_blocks=1, tiles=197, processors=132) == 99  # two tiles a program
    assert choose_splits(row_blocks=104, tiles=197, processors=132) == 5  # 520 programs, 4 waves
    assert choose_splits(row_blocks=128, tiles=197, processors=132) == 1


@pytest.mark.medium
@pytest.mark.parametrize("row_blocks, splits, group", [(1, 1, 1), (1, 5, 12), (13, 5, 4), (24, 11, 12), (7, 3, 7)])
def test_programs_are_a_permutation_of_blocks_and_splits(row_blocks, splits, group):
    seen = mapped(row_blocks, splits, group)
    assert sorted(map(tuple, seen)) == [(block, split) for block in range(row_blocks) for split in range(splits)]


def test_chunks_fill_the_processors():
    blocks = chunk_blocks(13 * 16384, 768 * 2, block_m=128, processors=132)
    assert blocks == 132  # GPT-2: of 1,664 row blocks
    assert chunk_blocks(33 * 1024, 4096 * 2, block_m=128, processors=132) == 24  # Llama-3-8B: eleven of 24
    assert chunk_blocks(13 * 1024, 768 * 2, block_m=128, processors=132) == 104  # all there are


@pytest.mark.medium
def test_neighbours_share_few_row_blocks_and_tiles():
    # Llama-3-8B on 132 processors: a chunk of 24 row blocks of 1 MB in 11 splits runs as two groups of 12.
    assert choose_splits(row_blocks=24, tiles=501, processors=132) == 11
    group = choose_group(block_bytes=128 * 4096 * 2)
    assert group == 12 and choose_group(block_bytes=128 * 768 * 2) == 24
    first_wave = mapped(24, 11, group)[:132]
    assert {block for block, _ in first_wave} == set(range(12))
    assert [split for _, split in first_wave[:13]] == [0] * 12 + [1]


def mapped(row_blocks, splits, group):
    """What the device function returns to every program, in the order of their numbers."""
    out = torch.full((row_blocks * splits, 2), -1, device="cuda" if torch.cuda.is_available() else "cpu")
    _mapping_kernel[(len(out),)](out, row_blocks, splits, group)
    return out.tolist()


@triton.jit
def _mapping_kernel(out_ptr, row_blocks, n_splits, group):
    program = tl.program_id(0)
    block, split = block_and_split(program, row_blocks, n_splits, group)
    tl.store(out_ptr + 2 * program, block)
    tl.store(out_ptr + 2 * program + 1, split)


@pytest.mark.parametrize("n_vocab", [1, 31, 32, 33, 64, 95, 50257])
@pytest.mark.parametrize("kind", ["plain", "few_rows", "tma"])
def test_tiles_cover_the_vocabulary_once(kind, n_vocab):
    config = LensConfig(16, 32, 16, 32, num_warps=4, num_stages=2, kind=kind)
    end = 0
    for tiles in tile_ranges(n_vocab, 2, 64, config, 132, by_tma=False):
        assert tiles.first * tiles.width == end and tiles.count > 0
        end += tiles.count * tiles.width
        assert tiles.masked == (end > n_vocab or tiles.width == 16)
    assert n_vocab <= end < n_vocab + 16


def test_the_tma_kernel_takes_the_rest_along():
    config = LensConfig(16, 32, 16, 32, num_warps=4, num_stages=2, kind="tma")
    for n_vocab in (1, 32, 70):
        (tiles,) = tile_ranges(n_vocab, 2, 64, config, 132, by_tma=True)
        assert tiles.count == -(-n_vocab // 32) and tiles.width == 32
        assert tiles.masked == (n_vocab != 32)


def test_unfit_configurations_are_refused():
    with pytest.raises(ValueError, match="kind: expected one of plain, few_rows, tma, got 'fast'"):
        LensConfig(16, 32, 16, 32, num_warps=4, num_stages=2, kind="fast")
    with pytest.raises(ValueError, match="tail_v: expected a divisor of block_v 32, got 24"):
        LensConfig(16, 32, 24, 32, num_warps=4, num_stages=2)


def test_one_row_block_takes_one_launch():
    config = LensConfig(16, 32, 32, 32, num_warps=4, num_stages=2)
    for n_vocab, masked in ((70, True), (64, False), (5, True)):
        (tiles,) = tile_ranges(n_vocab, 1, 64, config, 132, by_tma=False)
        assert tiles.count == -(-n_vocab // 32) and tiles.masked == masked
    assert len(tile_ranges(70, 2, 64, config, 132, by_tma=False)) == 2
