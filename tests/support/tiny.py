"""Tiny random models and the reference computations that tests compare with."""

import pyarrow as pa
import torch
import transformers
from torch.nn import functional as F

WORDS = (
    "what is the door of arven brosk calmi dorra elska fenta red blue stone green black iron gate white brown "
    ". ? [ ] ( ) : Document Title Question Answer Write a high - quality answer for given question using only "
    "provided search results some which might be irrelevant 1 2 3 4 5 6 7 8 9 10 ,"
).split()


def word_tokenizer():
    """A word-level tokenizer, loadable by AutoTokenizer once saved."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {word: i for i, word in enumerate(["<pad>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def byte_tokenizer():
    """A tokenizer that has a token for every byte, and so none for unknown words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def tiny_gpt2(vocab_size, n_positions=256, n_layer=3, n_embd=32, seed=0):
    """A random GPT-2 whose norms are not the identity."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=n_positions,
        n_embd=n_embd,
        n_layer=n_layer,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return shake(transformers.GPT2LMHeadModel(config)).eval()


def shake(model):
    """Random norm weights and biases, so that a forgotten one shows."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def save_tiny_model(folder, vocab_size=None, tokenizer=None, **sizes):
    """Save `tiny_gpt2` and a tokenizer, by default of words, to a folder; ids beyond the tokenizer's never occur."""
    tokenizer = tokenizer or word_tokenizer()
    tokenizer.save_pretrained(folder)
    tiny_gpt2(vocab_size or len(tokenizer), **sizes).save_pretrained(folder)
    return folder


def save_tiny_lens(folder, model_folder, scale, seed=0):
    """Save a lens for the model of `save_tiny_model`: random translators, the identity with ``scale`` 0."""
    from refinelens.lens.files import save_lens
    from refinelens.lens.logit_lens import LogitLens, model_entry
    from refinelens.lens.translators import Translators
    from refinelens.model.loading import load_model

    loaded = load_model(str(model_folder), "cpu")
    lens = LogitLens(loaded.model)
    generator = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(lens.n_layers, lens.d_model, lens.d_model, generator=generator)
    manifest = {"format_version": 1, "kind": "linear", "model": model_entry(loaded, lens)}
    save_lens(folder, Translators(weight, torch.zeros(lens.n_layers, lens.d_model)), manifest)
    return folder


def write_part(run, index, rows):
    """Write one part of a run and return its entry in a manifest."""
    from dataclasses import asdict

    from refinelens.store.files import sha256_of
    from refinelens.store.results import PREDICTIONS, Part, write_rows

    path = run.part_path(index)
    write_rows([pa.Table.from_pylist(rows, schema=PREDICTIONS)], path)
    return asdict(Part(path.name, (index, index + 1), len(rows), sha256_of(path)))


def skip_unless_isa_runs():
    """Skip where this processor does not run the instruction set that REFINELENS_ISA names."""
    import pytest

    from refinelens import _C

    try:
        _C.instruction_set()
    except ValueError as error:
        pytest.skip(str(error))


def truth(hidden, unembedding, norm, targets, bias=None, softcap=None, logit_scale=1.0, dtype=torch.float64):
    """All statistics from whole logits, in fp64; with a narrower dtype, as torch computes them in it."""
    from refinelens.kernels.reference import LayerNorm

    x = hidden.to(dtype)
    width = (x.shape[-1],)
    if isinstance(norm, LayerNorm):
        x = F.layer_norm(x, width, _cast(norm.weight, dtype), _cast(norm.bias, dtype), norm.eps)
    elif norm is not None:
        weight = None if norm.weight is None else norm.weight.to(dtype) + norm.offset
        x = F.rms_norm(x, width, weight, norm.eps)
    z = F.linear(x, unembedding.to(dtype), _cast(bias, dtype)) * logit_scale
    wide = torch.promote_types(dtype, torch.float32)  # users widen half-precision logits before reducing
    z = z.to(wide)
    logits = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = logits.log_softmax(-1)
    own = z.gather(-1, targets[:, None])
    ids = torch.arange(z.shape[-1], device=z.device)
    return {
        "z": z,
        "argmax": torch.where(z == z.amax(-1, keepdim=True), ids, z.shape[-1]).amin(-1),
        "max_logit": logits.amax(-1),
        "logsumexp": logits.logsumexp(-1),
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "target_logit": logits.gather(-1, targets[:, None])[:, 0],
        "target_rank": ((z > own) | ((z == own) & (ids < targets[:, None]))).sum(-1),
    }


def _cast(tensor, dtype):
    return None if tensor is None else tensor.to(dtype)


def screening_error(stats):
    """What logsumexp and entropy of certified statistics may be off by; nothing for others."""
    bound = getattr(stats, "logsumexp_bound", None)
    return 0.0 if bound is None else max(0.02, float(bound.max()))


FLOATS = ("max_logit", "logsumexp", "entropy", "target_logit")


def assert_matches_truth(stats, exact, same_dtype, targets):
    """Statistics lie within the error of torch's own same-dtype computation; ids agree but for near-ties.

    Returns the number of rows whose argmax or rank differs, all of them near-ties in fp64.
    """
    slack = 4 * torch.finfo(torch.float32).eps * exact["z"].abs().amax().clamp(min=1)
    for name in FLOATS:
        allowed = (same_dtype[name] - exact[name]).abs().amax() + slack
        if name in ("logsumexp", "entropy"):
            allowed += screening_error(stats)
        error = (getattr(stats, name) - exact[name]).abs().amax()
        assert error <= allowed, f"{name}: error {error:.3g}, torch's own {allowed:.3g}"
    margin = 2 * ((same_dtype["z"] - exact["z"]).abs().amax() + slack)
    best = exact["z"].amax(-1)
    gap = best - exact["z"].gather(-1, stats.argmax[:, None])[:, 0]
    assert (gap <= margin).all(), "argmax differs by more than rounding"
    own = exact["z"].gather(-1, targets[:, None])
    near = ((exact["z"] - own).abs() <= margin).sum(-1)
    assert ((stats.target_rank - exact["target_rank"]).abs() <= near).all(), "rank differs by more than near-ties"
    assert ((stats.target_rank == 0) == (stats.argmax == targets)).all(), "rank 0 must mean argmax"
    return int(((stats.argmax != exact["argmax"]) | (stats.target_rank != exact["target_rank"])).sum())
