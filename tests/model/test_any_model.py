"""Models drawn at random: each is refused, or read as it computes itself in fp64, whatever batch and threads."""

from copy import deepcopy

import pytest
import torch
import transformers as tf
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch import nn

from families import make_random
from refinelens import LogitLens
from refinelens.errors import UnsupportedModelError
from refinelens.model.hooks import stream_of

VOCAB = 53  # a prime
ORIGINAL = 16  # positions before a rotation is scaled; contexts lie on both sides
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": VOCAB, **TOKENS}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": ORIGINAL,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0, 1.0, 1.0, 1.0],
        "long_factor": [1.0, 2.0, 4.0, 8.0],
        "original_max_position_embeddings": ORIGINAL,
    },
}
LENGTHS = {"dynamic": ORIGINAL}  # what a configuration states as its positions; others state what scaling reaches


def rotary(kind, ropes=tuple(ROPES), **more):
    """A family whose configuration takes rotations of these kinds."""

    def config(draw, n_layers):
        rope = draw(st.sampled_from(ropes))
        positions = LENGTHS.get(rope, 64)
        parameters = {"rope_theta": 10000.0, **ROPES[rope]}
        tied = {"tie_word_embeddings": draw(st.booleans())}
        own = {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in more.items()}
        made = kind(
            **SIZES,
            **tied,
            **own,
            num_hidden_layers=n_layers,
            max_position_embeddings=positions,
            rope_parameters=parameters,
        )
        if rope == "longrope" and hasattr(made, "original_max_position_embeddings"):
            made.original_max_position_embeddings = ORIGINAL
            made.rope_parameters["original_max_position_embeddings"] = ORIGINAL
        return made

    return config


def other(kind, **names):
    """A family of another naming, or without rotation."""

    def config(draw, n_layers):
        values = {name: draw(value) if isinstance(value, st.SearchStrategy) else value for name, value in names.items()}
        layers = values.pop("layers", "num_hidden_layers")
        return kind(vocab_size=VOCAB, **TOKENS, **values, **{layers: n_layers})

    return config


GPT = {"n_embd": 32, "n_head": 4, "n_positions": 64, "layers": "n_layer"}
WIDE = {"hidden_size": 32, "num_attention_heads": 4}
CAP, SCALE = st.sampled_from([None, 2.0, 30.0]), st.sampled_from([0.0625, 1.0, 3.0])
KEYS = st.sampled_from([1, 2, 4])
FAMILIES = {
    "llama": rotary(tf.LlamaConfig, num_key_value_heads=KEYS, attention_bias=st.booleans()),
    "qwen2": rotary(tf.Qwen2Config, num_key_value_heads=KEYS),
    "phi3": rotary(tf.Phi3Config, ("default", "longrope"), num_key_value_heads=KEYS),
    "phi": rotary(tf.PhiConfig, partial_rotary_factor=1.0),  # unembedding bias
    "gpt_neox": rotary(tf.GPTNeoXConfig, use_parallel_residual=st.booleans(), rotary_pct=1.0),
    "cohere": rotary(tf.CohereConfig, num_key_value_heads=KEYS, logit_scale=SCALE),
    "granite": rotary(tf.GraniteConfig, num_key_value_heads=KEYS, logits_scaling=SCALE),
    "gemma2": other(
        tf.Gemma2Config,
        **WIDE,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=4,
        final_logit_softcapping=CAP,
        tie_word_embeddings=st.booleans(),
    ),
    "gpt2": other(tf.GPT2Config, **GPT),
    "gptj": other(tf.GPTJConfig, **GPT, rotary_dim=4, tie_word_embeddings=st.booleans()),  # unembedding bias
    "opt": other(
        tf.OPTConfig,
        **WIDE,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=st.sampled_from([16, 32]),
        do_layer_norm_before=st.booleans(),
    ),
    "bloom": other(tf.BloomConfig, hidden_size=32, n_head=4, layers="n_layer"),
    "mpt": other(tf.MptConfig, d_model=32, n_heads=4, max_seq_len=64, layers="n_layers"),
    "falcon": other(tf.FalconConfig, **WIDE, alibi=st.booleans(), new_decoder_architecture=st.booleans()),
    "mamba": other(tf.MambaConfig, hidden_size=32, state_size=4),
}
BLOCKS = ("own", "own", "own", "shared", "twice", "all but one")
REFUSED = ("twice", "all but one")


class Otherwise(nn.ModuleList):
    """Blocks that a model does not go through once each: every one twice, or all but the last."""

    def __init__(self, blocks, twice):
        super().__init__(blocks)
        self.twice = twice

    def __iter__(self):
        return iter(self[:])

    def __getitem__(self, key):
        if not isinstance(key, slice):
            return super().__getitem__(key)
        blocks = list(self._modules.values())[key]
        return [block for block in blocks for _ in range(2)] if self.twice else blocks[:-1]


def blocks_of(model):
    """(what holds the blocks, its name for them), found by hand."""
    base = next(m for m in (model.base_model, getattr(model.base_model, "decoder", None)) if _list_name(m))
    return base, _list_name(base)


def _list_name(module):
    return next((n for n, m in getattr(module, "_modules", {}).items() if isinstance(m, nn.ModuleList)), None)


@st.composite
def models(draw):
    """(model, whether a lens must refuse it)."""
    family, n_layers = draw(st.sampled_from(sorted(FAMILIES))), draw(st.integers(1, 3))
    config, blocks = FAMILIES[family](draw, n_layers), draw(st.sampled_from(BLOCKS))
    padded = draw(st.booleans())
    note(f"{family}, {n_layers} layers, blocks {blocks}, padded {padded}, {config.to_diff_dict()}")
    torch.manual_seed(draw(st.integers(0, 99)))
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if padded:
        model.resize_token_embeddings(VOCAB, pad_to_multiple_of=32, mean_resizing=False)
    model = make_random(model)
    base, name = blocks_of(model)
    own = list(getattr(base, name))
    if blocks == "shared":
        setattr(base, name, nn.ModuleList([own[0]] * n_layers))
    elif blocks in REFUSED:
        setattr(base, name, Otherwise(own, blocks == "twice"))
    return model, blocks in REFUSED


def truth(model, ids):
    """Logits ``[n_layers + 1, token, vocab]`` of the model's own readout of every layer, in fp64.

    The output of its last block is replaced by the states of each layer in turn.
    """
    wide = deepcopy(model).double()
    base, name = blocks_of(wide)
    blocks, states = list(getattr(base, name)), []
    n_layers = len(blocks)

    def run(replacement=None):
        calls = []

        def before(_block, args, kwargs):
            if replacement is None and not states:
                states.append(
                    next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v) and v.is_floating_point())
                )

        def after(_block, _args, output):
            calls.append(1)
            if replacement is None:
                states.append(stream_of(output))
            elif len(calls) == n_layers:
                return (replacement, *output[1:]) if isinstance(output, tuple) else replacement

        handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in set(blocks)]
        handles += [block.register_forward_hook(after) for block in set(blocks)]
        try:
            with torch.no_grad():
                return wide(ids, use_cache=False).logits[0].double()  # some models round theirs
        finally:
            for handle in handles:
                handle.remove()

    run()
    return torch.stack([run(state) for state in states])


def check_against(stats, logits, targets):
    """Statistics ``[n_layers + 1, token]`` are those of fp64 logits; ids but for what rounding cannot tell."""
    margin = 1e-4 * (logits.amax() - logits.amin())
    torch.testing.assert_close(stats.max_logit.double(), logits.amax(-1), rtol=0, atol=float(margin))
    torch.testing.assert_close(stats.logsumexp.double(), logits.logsumexp(-1), rtol=0, atol=float(margin))
    log_p = logits.log_softmax(-1)
    torch.testing.assert_close(
        stats.entropy.double(), -(log_p.exp() * log_p).sum(-1), rtol=1e-3, atol=1e-3 + float(margin)
    )
    gap = logits.amax(-1) - logits.gather(-1, stats.argmax[..., None])[..., 0]
    assert (gap <= margin).all()
    own = logits.gather(-1, targets.expand(len(logits), -1)[..., None])
    exact, near = (logits > own).sum(-1), ((logits - own).abs() <= margin).sum(-1)
    assert ((stats.target_rank - exact).abs() <= near).all()


def check(drawn, lengths, side, threads):
    model, refused = drawn
    if refused:
        with pytest.raises(UnsupportedModelError):
            LogitLens(model)
        return
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths]
    wanted = [truth(model, ids) for ids in rows]  # a copy of the model, before anything else ran
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        try:
            lens = LogitLens(model)
        except UnsupportedModelError as error:
            note(str(error))
            assert any(word in str(error) for word in ("expected a LayerNorm or RMSNorm", "one list of"))
            return
        width = max(lengths)
        ids, mask = (torch.zeros(len(rows), width, dtype=torch.int64) for _ in "12")
        starts = [0 if side == "right" else width - n for n in lengths]
        for row, (own, start) in enumerate(zip(rows, starts, strict=True)):
            ids[row, start : start + own.shape[1]], mask[row, start : start + own.shape[1]] = own, 1
        for row, (own, start) in enumerate(zip(rows, starts, strict=True)):
            places = torch.arange(own.shape[1])
            targets = (own[0] + 7) % VOCAB
            check_against(lens.read(own, targets, places).of(0, len(places)).stats, wanted[row], targets)
            positions = torch.tensor(starts)[:, None].expand(-1, len(places)).clone()
            positions[row] = places + start
            stats = lens.read(ids, targets, positions, attention_mask=mask).stats.map(lambda t, row=row: t[:, row])
            check_against(stats, wanted[row], targets)
    finally:
        torch.set_num_threads(before)


DRAWN = {
    "drawn": models(),
    "lengths": st.lists(st.integers(1, 40), min_size=1, max_size=4),
    "side": st.sampled_from(["left", "right"]),
    "threads": st.sampled_from([1, 2]),
}
LOOSE = {"deadline": None, "suppress_health_check": list(HealthCheck), "database": None}


@pytest.mark.medium
@settings(max_examples=40, derandomize=True, **LOOSE)
@given(**DRAWN)
def test_any_model_is_refused_or_read_as_it_computes(drawn, lengths, side, threads):
    check(drawn, lengths, side, threads)


@pytest.mark.slow
@settings(max_examples=1000, **LOOSE)
@given(**DRAWN)
def test_many_more_models(drawn, lengths, side, threads):
    check(drawn, lengths, side, threads)
