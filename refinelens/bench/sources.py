"""Where a problem comes from: random numbers, or the hidden states of a model."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import InputError
from ..kernels.norms import LayerNorm
from ..lenses.logit_lens import LogitLens
from ..model.loading import DTYPES, load_model, resolve_device
from ..tasks.task import load_task
from .memory import available_memory
from .options import BenchOptions
from .problem import Problem

# GPT-2's sizes; rows are 13 layers x 32 positions on a CPU and 13 x 1024 on a GPU.
ROWS = {"cpu": 13 * 32, "cuda": 13 * 1024}
D_MODEL, VOCAB = 768, 50257
CONTEXT = 128  # tokens that the model reads at once


def make_problem(options: BenchOptions) -> Problem:
    """The problem that the options ask for.

    Raises:
        InputError: A device that is not there, a model that cannot be used, or sizes beyond the memory.
    """
    device = resolve_device(options.device)
    rows = options.rows or ROWS[device]
    if options.model is not None:
        return _model_problem(options, device, rows)
    dtype = {"cpu": torch.float32, "cuda": torch.bfloat16}[device] if options.dtype == "auto" else DTYPES[options.dtype]
    return random_problem(rows, options.d_model or D_MODEL, options.vocab or VOCAB, dtype, device)


def random_problem(rows: int, d_model: int, vocab: int, dtype: torch.dtype, device: str) -> Problem:
    """Gaussian states and weights; logits have unit variance."""
    needed = (rows + vocab) * d_model * dtype.itemsize
    there = available_memory(device)
    if there is not None and needed > there:
        raise InputError(
            f"--rows, --d-model, --vocab: expected states and unembedding that fit into the {there / 1e9:.3g} GB "
            f"available on {device}, got {needed / 1e9:.3g} GB"
        )
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    norm = LayerNorm(torch.ones(d_model, device=device, dtype=dtype), randn(d_model) / 8)
    unembedding = randn(vocab, d_model).div_(d_model**0.5)
    targets = torch.randint(vocab, (rows,), generator=generator, device=device)
    return Problem(randn(rows, d_model), unembedding, norm, targets)


def _model_problem(options: BenchOptions, device: str, rows: int) -> Problem:
    """States of every layer on the built-in passages, position by position; targets are the next tokens."""
    name = options.model
    loaded = load_model(name, device, options.dtype, options.trust_remote_code)
    lens = LogitLens.from_model(loaded.model)
    parts = lens.parts
    if parts.bias is not None or parts.softcap is not None or parts.logit_scale != 1.0 or parts.projection is not None:
        raise InputError(
            f"--model {name}: expected an unembedding without bias, projection, softcap or logit scale, which not "
            "every competitor knows; leave --model out"
        )
    layers = lens.n_layers + 1
    text = "\n\n".join(question.gold.text for question in load_task("builtin").questions)
    tokens = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    if rows > layers * (len(tokens) - 1):
        raise InputError(f"--rows: expected at most {layers * (len(tokens) - 1)} with --model {name}, got {rows}")
    positions = -(-rows // layers)
    states = []
    for start in range(0, positions, CONTEXT):
        ids = tokens[start : min(start + CONTEXT, positions)]
        kept = lens.hidden(ids[None], torch.arange(len(ids)))  # [layer, 1, position, d_model]
        states.append(kept[:, 0].transpose(0, 1).reshape(-1, kept.shape[-1]))
    targets = tokens[1 : positions + 1].repeat_interleave(layers)[:rows].to(device)
    return Problem(torch.cat(states)[:rows], parts.unembedding, parts.norm, targets, states=Path(name).name)
