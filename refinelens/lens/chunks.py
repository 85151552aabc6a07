"""Chunked prefill: long contexts run in chunks of tokens where that holds less, once proven on this very model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..model.hooks import text_config
from ..model.loading import is_out_of_memory
from ..model.positions import position_limit
from .inputs import Tokens, spread_alternatives, spread_targets
from .prefix import check_branching, compare, in_chunks, in_words, roomy_cache
from .reading import LayerReading

if TYPE_CHECKING:
    from .logit_lens import LogitLens

# Below this the states of all layers are no more than a batch of a sweep holds anyway, and the cache does not pay.
LONG = 4096  # tokens
CPU_CHUNK = 512  # tokens: matrix products of a CPU are no faster with more, and the mask is as long as the context
GPU_CHUNK = 2048  # tokens that keep one busy
PROVEN = 5120  # tokens of the text that is run in both ways, little more than those from which on a context is long
COMPARED = 64  # of its positions


@dataclass(frozen=True)
class ChunkedPrefill:
    """Whether long contexts run in chunks, and why, or why not."""

    used: bool
    why: str


def chunk_tokens(lens: LogitLens) -> int:
    """How many tokens a chunk has on the model's device."""
    return CPU_CHUNK if lens.device.type == "cpu" else GPU_CHUNK


def holds_less(lens: LogitLens, n_tokens: int, n_positions: int) -> bool:
    """Whether a context holds less memory in chunks: a cache takes the place of what a whole pass holds.

    That is the states of every layer, where more than `LONG` positions are read; or, in models whose attention computes
    all weights at once, these for every pair of tokens. A pass that keeps the states of few positions holds those of
    one layer at a time, which is less than the keys and values of all.
    """
    is_eager = getattr(text_config(lens.model), "_attn_implementation", None) == "eager"
    return n_tokens > LONG and (n_positions > LONG or is_eager)


def prove_chunks(lens: LogitLens, size: int) -> ChunkedPrefill:
    """Whether a model run in chunks is the model: on a few tokens as for prefix reuse, then on a long text.

    That is of `PROVEN` random tokens, or as many as the model has positions for, and the same for whoever asks: which
    contexts a process meets first must not decide how it runs them. States at `COMPARED` positions of every layer must
    be the same within the parity gate's tolerance, and argmaxes equal but for tokens that are tied within it.

    Args:
        lens: Of the model.
        size: Tokens of a chunk.
    """
    gate = check_branching(lens)
    if not gate.used:
        return ChunkedPrefill(False, gate.why)
    n_tokens = min(PROVEN, position_limit(lens.model) or PROVEN)
    n_vocab = min(text_config(lens.model).vocab_size, len(lens.model.get_input_embeddings().weight))
    tokens = torch.randint(n_vocab, (1, n_tokens), generator=torch.Generator().manual_seed(0))
    positions = torch.linspace(0, tokens.shape[1] - 1, COMPARED).long().unique()[None]
    try:
        parts = [own for _, own in in_chunks(lens, tokens, positions, roomy_cache(tokens.shape[1]), size)]
        chunked = torch.cat(parts, 2)
    except Exception as error:  # a model's own code may take no such cache; one pass still works
        if is_out_of_memory(error):
            raise
        return ChunkedPrefill(False, f"{type(lens.model).__name__} does not run in chunks ({in_words(error)})")
    try:
        whole = lens.hidden(tokens, positions)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return ChunkedPrefill(True, f"{gate.why}; no memory for {tokens.shape[1]} tokens in one pass to compare with")
    found = compare(lens, [(chunked, whole)], tie=lens.parity.tolerance)
    return ChunkedPrefill(found.used, f"{found.why}, of {tokens.shape[1]} tokens")


def proven(lens: LogitLens, size: int) -> ChunkedPrefill:
    """What `prove_chunks` found, the first time that it is asked."""
    if size not in lens.proofs:
        lens.proofs[size] = prove_chunks(lens, size)
    return lens.proofs[size]


def read_tokens(
    lens: LogitLens, tokens: Tokens, targets: Tensor | None, alternatives: Tensor | None, kl: bool, top_k: int
) -> LayerReading:
    """`LogitLens.read` of tokens; a long text of which all is read goes chunk by chunk, and its states are dropped."""
    is_batch = tokens.is_batch

    def read(states: Tensor, own: Tensor | None, others: Tensor | None) -> LayerReading:
        states = states if is_batch else states[:, 0]
        return lens.read_states(states, own, alternatives=others, kl=kl, top_k=top_k, check_last=False)

    if not _reads_in_chunks(lens, tokens):
        hidden = lens.hidden(tokens.input_ids, tokens.positions, tokens.mask)
        return replace(read(hidden, targets, alternatives), tokens=tokens)
    shape, device = tokens.positions.shape[0 if is_batch else 1 :], lens.head.weight.device
    whole, flat = spread_targets(targets, lens.tokenizer, shape, device)
    others, parts = spread_alternatives(alternatives, lens.tokenizer, shape, device), []
    n_tokens, size = tokens.input_ids.shape[1], chunk_tokens(lens)
    # The cache has no name here: it is gone before the parts are put together.
    for here, states in in_chunks(lens, tokens.input_ids, tokens.positions, roomy_cache(n_tokens), size):
        if states.numel():
            given = (None if v is None else v[here][None] if is_batch else v[here] for v in (flat, others))
            parts.append(read(states, *given))
    return replace(LayerReading.cat(parts, len(shape)), tokens=tokens, targets=whole)


def _reads_in_chunks(lens: LogitLens, tokens: Tokens) -> bool:
    """Whether one text with ascending positions is long enough, and the model, proven once, may run in chunks."""
    (n_texts, n_tokens), n_positions = tokens.input_ids.shape, tokens.positions.shape[1]
    if n_texts != 1 or tokens.mask is not None or not holds_less(lens, n_tokens, n_positions):
        return False
    if not bool((tokens.positions.diff() > 0).all()):
        return False
    return proven(lens, chunk_tokens(lens)).used
