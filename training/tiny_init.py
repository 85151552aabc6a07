"""Where the training of the model in the package begins: heads that look back, match and copy.

Begun as GPT-2 begins, training stays for long on a plateau where it copies the value of any document.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

SPREAD = 0.14  # root mean square of tokens and positions; AdamW's first steps would drown GPT-2's 0.02
COPY = 0.28  # how much a head of the first block adds of what it copies, as a share of a normed state
PEAK = 40.0  # score of the position that a head of the first block looks at


@torch.no_grad()
def initialise(model: GPT2LMHeadModel) -> None:
    """Set embeddings and attention; the feed-forward parts stay as GPT-2 has them.

    Positions are sine waves (Vaswani et al. 2017, section 3.5) in as many dimensions as a head has, tokens random
    numbers in the others. Head h of the first block looks h + 1 tokens back; the heads of the other blocks look for
    what is like the query and copy it (the mimetic initialisation of Trockman and Kolter 2023, arXiv 2305.09828).
    """
    d_model, d_head = model.config.n_embd, model.config.n_embd // model.config.n_head
    words = d_model - d_head  # dimensions of tokens; those of positions follow
    # From nearly half a turn a token to half a turn in all, so that every distance looks different.
    rates = torch.logspace(math.log10(0.9 * math.pi), math.log10(math.pi / 160), d_head // 2)
    angles = torch.arange(model.config.n_positions)[:, None] * rates
    positions, tokens = model.transformer.wpe.weight.zero_(), model.transformer.wte.weight.normal_(std=SPREAD)
    positions[:, words:] = math.sqrt(2) * SPREAD * torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)
    tokens[:, words:] = 0.0
    first, *others = (block.attn for block in model.transformer.h)
    _look_back(first, rates, words)
    for attention in others:
        _match(attention, words)


def _look_back(attention: nn.Module, rates: Tensor, words: int) -> None:
    """Let head h copy what stands h + 1 tokens back, all heads into the same dimensions."""
    d_model, d_head = attention.embed_dim, attention.head_dim
    query, key, value = torch.zeros(3, d_model, d_model)
    gain = math.sqrt(PEAK / math.sqrt(d_head))
    copied = nn.init.orthogonal_(torch.empty(words, d_head))
    for head in range(attention.num_heads):
        columns = slice(head * d_head, (head + 1) * d_head)
        back = (head + 1) * rates
        turn = torch.stack([torch.stack([back.cos(), back.sin()]), torch.stack([-back.sin(), back.cos()])])
        query[words:, columns] = gain * torch.block_diag(*turn.unbind(-1))
        key[words:, columns] = gain * torch.eye(d_head)
        value[:words, columns] = copied
    attention.c_attn.weight.copy_(torch.cat([query, key, value], dim=1))
    attention.c_proj.weight.zero_()[:, :words] = COPY * copied.T.repeat(attention.num_heads, 1)


def _match(attention: nn.Module, words: int) -> None:
    """Let queries equal keys, of tokens alone, and the output map be the values' transposed."""
    d_model = attention.embed_dim
    similar = torch.randn(d_model, d_model) / math.sqrt(d_model)
    value = nn.init.orthogonal_(torch.empty(d_model, d_model))
    similar[words:], value[words:] = 0.0, 0.0
    attention.c_attn.weight.copy_(torch.cat([similar, similar, value], dim=1))
    attention.c_proj.weight.copy_(SPREAD * value.T)
