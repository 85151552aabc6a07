"""Attention without hidden keys is attention with them, for every mask a model can make."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from refinelens.model.hooks import BLOCK, SkipHiddenKeys, _blocks_of


def operands(n_queries, n_keys, heads=2, batch=1):
    draw = torch.Generator().manual_seed(n_queries + n_keys)
    shapes = (n_queries, n_keys, n_keys)
    return [torch.randn(batch, heads, n, 8, generator=draw) for n in shapes]


def causal(n_queries, n_keys):
    return torch.ones(n_queries, n_keys, dtype=torch.bool).tril(n_keys - n_queries)[None, None]


# One query; a block less one, whole, and one more; a cache that ends inside a block, at its end, and none.
@pytest.mark.parametrize("n_queries", [1, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 3])
@pytest.mark.parametrize("past", [0, 1, BLOCK - 1, BLOCK, BLOCK + 7])
@pytest.mark.parametrize("window", [None, 5])
def test_causal_masks_and_windows(n_queries, past, window):
    q, k, v = operands(n_queries, past + n_queries)
    mask = causal(n_queries, past + n_queries)
    if window is not None:
        mask = mask.triu(past - window + 1)
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    with SkipHiddenKeys():
        ours = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("window, second", [(None, slice(0, 2 * BLOCK)), (9, slice(BLOCK - 9, 2 * BLOCK))])
def test_fewer_keys_are_looked_at(window, second):
    """Of two blocks of queries the first needs one of keys; behind a window the second does not need the start."""
    mask = causal(2 * BLOCK, 2 * BLOCK)
    mask = mask if window is None else mask.triu(-window)
    assert [keys for _, keys, _ in _blocks_of(mask)] == [slice(0, BLOCK), second]


def test_padding_and_a_query_that_sees_nothing():
    """A key that is padding is hidden from all; a query without keys gives what torch gives."""
    q, k, v = operands(6, 6, batch=2)
    mask = causal(6, 6).repeat(2, 1, 1, 1)
    mask[1, ..., :2] = False  # padding on the left: the first two queries see nothing
    whole = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with SkipHiddenKeys():
        ours = scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, whole, equal_nan=True)


@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(1, 1, 6, 6)}])
def test_the_rest_goes_its_ordinary_way(kwargs):
    """No mask, torch's own causal one, a mask of numbers: the same bits."""
    whole = scaled_dot_product_attention(*operands(6, 6), **kwargs)
    with SkipHiddenKeys():
        assert torch.equal(scaled_dot_product_attention(*operands(6, 6), **kwargs), whole)


def test_scale_and_grouped_queries_are_kept():
    q, k, v = operands(6, 9, heads=4)
    k, v, mask = k[:, :2], v[:, :2], causal(6, 9)
    options = {"scale": 0.3, "enable_gqa": True}
    whole = scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    with SkipHiddenKeys():
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, attn_mask=mask, **options), whole)
