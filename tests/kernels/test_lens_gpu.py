"""The Triton lens at the size of models, compiled; skipped without a CUDA device."""

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import DEVICE, DTYPES, check, operands
from refinelens.kernels.config import LensOptions, generation_of, pinned_config
from refinelens.kernels.fused_lens import fused_lens_triton, target_matches_main_product
from refinelens.kernels.kernel import LensRows, launch_targets
from refinelens.kernels.norm_kernel import normed_rows
from refinelens.kernels.reference import LensHead

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device; too large for the interpreter")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [576, 768])
def test_model_sized(d_model, dtype):
    n_rows, n_vocab = 1024 + 3, 50257  # GPT-2's vocabulary, rows that end inside a block
    hidden, unembedding, targets = operands(n_rows, d_model, n_vocab, dtype)
    unembedding *= d_model**-0.5
    out, left_open = check(hidden, unembedding, None, targets, config=None)
    print(f"{dtype} d_model {d_model}: {left_open} of {n_rows} rows left open, top logit {out.max_logit.max():.2f}")
    assert left_open <= 0.1 * n_rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d_model", [576, 768])
def test_target_logit_is_that_of_the_main_product(d_model, dtype):
    hidden, unembedding, _ = operands(1024 + 3, d_model, 50257, dtype)
    head = LensHead(unembedding)
    top = fused_lens_triton(hidden, head)
    config = pinned_config(dtype, aligned=True, n_rows=1027, generation=generation_of(hidden.device))
    # By its own kernel, before the merge puts the largest logit in its place.
    t = torch.full((1027,), float("nan"), device=DEVICE)
    rows = LensRows(normed_rows(hidden, None, config.block_m), top.argmax, t, 1027)
    launch_targets(rows, LensOptions(head, config, has_targets=True))
    mismatches = int((t != top.max_logit).sum())
    print(f"{dtype} d_model {d_model}: {mismatches} of 1027 target logits differ from the main product")
    torch.testing.assert_close(t, top.max_logit, rtol=2e-6, atol=1e-4)
    if target_matches_main_product(head, config):
        assert mismatches == 0  # the kernel counts ranks on that promise
