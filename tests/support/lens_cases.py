"""Operands and checks shared by the tests of the Triton lens."""

import torch

from refinelens.kernels import config, tiles
from refinelens.kernels.config import LensConfig
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.reference import LayerNorm, LensHead, RMSNorm, apply_norm, fused_lens_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
DTYPES = [torch.float32, torch.float16, BF16]
SMALL = LensConfig(32, 32, 16, 32, num_warps=4, num_stages=2, splits=3)
FEW_ROWS = LensConfig(16, 32, 32, 32, num_warps=4, num_stages=2, kind="few_rows", splits=2)
TMA = LensConfig(32, 32, 16, 64, num_warps=4, num_stages=2, kind="tma", splits=2)
NORMS = {
    "none": lambda d: None,
    "layer": lambda d: LayerNorm(1 + 0.2 * randn(d, seed=7), randn(d, seed=8)),
    "layer-plain": lambda d: LayerNorm(None),
    "rms": lambda d: RMSNorm(1 + 0.2 * randn(d, seed=7)),
    "rms-offset": lambda d: RMSNorm(0.2 * randn(d, seed=7), offset=1.0),
    "rms-plain": lambda d: RMSNorm(None),
}


def poison_buffers(monkeypatch):
    """Whatever the launcher allocates starts as NaN or -1: an entry that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        buffer = empty(*args, **kwargs)
        return buffer.fill_(float("nan") if buffer.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


# The sizes of tiles that any call may have: of each version of Triton and generation of GPU.
EVERY_VERSION = [(version, generation) for version in config.BY_TRITON for generation in (8, 9, 10)]


def tiles_of(monkeypatch, version, generation):
    """Kernels beside the lens are launched as with that version of Triton on that generation."""
    monkeypatch.setattr(config, "LIMITS", config.BY_TRITON[version])
    monkeypatch.setattr(tiles, "generation_of", lambda device: generation)


def randn(*shape, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def randint(low, high, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(DEVICE)


def operands(n_rows, d_model, n_vocab, dtype):
    """Hidden states that no norm would leave alone, unembedding, targets."""
    hidden = (3 * randn(n_rows, d_model, seed=1) + 0.5).to(dtype)
    targets = randint(0, n_vocab, (n_rows,), seed=3)
    return hidden, randn(n_vocab, d_model, seed=2, dtype=dtype), targets


def check(hidden, unembedding, norm=None, targets=None, bias=None, softcap=None, logit_scale=1.0, config=SMALL):
    """Compare with fp64 within the error of torch's own computation; return the output and the count of
    rows whose argmax or rank that error leaves open."""
    head = LensHead(unembedding, norm, bias, softcap, logit_scale)
    out = fused_lens_triton(hidden, head, targets, config=config)
    truth = fused_lens_reference(hidden, head, targets, dtype=torch.float64)
    z = head.z(apply_norm(hidden, norm, torch.float64))
    # Without a norm nothing is rounded to the operands' dtype, and fp32 accuracy is due.
    own_dtype = torch.float32 if norm is None else hidden.dtype
    own_z = head.z(apply_norm(hidden, norm).to(own_dtype))
    slack = 4 if own_dtype == torch.float32 else 1  # orders of summation differ; logits are not rounded
    error = slack * (own_z.double() - z).abs().max() + 8 * 2**-23 * z.abs().max().clamp(min=1)
    if softcap is not None:
        error += 8 * 2**-23 * softcap  # the cap is a difference of numbers of its own size
    spread = max(1.0, torch.tensor(float(z.shape[1])).log().item())  # of log-probabilities, in the entropy
    for name in ("max_logit", "logsumexp", "entropy", "target_logit"):
        got, expected = getattr(out, name), getattr(truth, name)
        if expected is None:
            assert got is None
            continue
        assert got.dtype == torch.float32 and got.shape == expected.shape
        assert (got - expected).abs().max() <= error * (spread if name == "entropy" else 1), name
    return out, check_order(out, truth, z, targets, 2 * error)


def check_order(out, truth, z, targets, error):
    n_rows = len(z)
    assert out.argmax.dtype == torch.int64
    behind = z.max(1).values - z.gather(1, out.argmax[:, None])[:, 0]
    open_rows = out.argmax != truth.argmax
    assert (behind[open_rows] <= error).all()
    if targets is None:
        assert out.target_rank is None
        return int(open_rows.sum())
    assert out.target_rank.dtype == torch.int64
    assert torch.equal(out.target_rank == 0, out.argmax == targets)
    close = ((z - z.gather(1, targets[:, None])).abs() <= error).sum(1) - 1  # but for the target itself
    assert ((out.target_rank - truth.target_rank).abs() <= close).all()
    open_rows |= out.target_rank != truth.target_rank
    assert open_rows.shape == (n_rows,)
    return int(open_rows.sum())
