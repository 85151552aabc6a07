"""The states that a lens reads are those that the model computes of the context alone, or the model is refused."""

import threading

import pytest
import torch
import transformers as tf
from torch import nn

from families import GROUPED, VOCAB, build, make_random
from refinelens import LogitLens
from refinelens.doctor import model_findings
from refinelens.errors import InputError, UnsupportedModelError
from refinelens.model.loading import LoadedModel
from refinelens.model.positions import position_limit
from tiny import shake

SHORT, LONG = 10, 30  # tokens, on either side of ORIGINAL
ORIGINAL = 16  # positions that a model was trained on before its rotation was scaled
THETA = {"rope_theta": 10000.0}
LONGROPE = {
    **THETA,
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}
DYNAMIC = {**THETA, "rope_type": "dynamic", "factor": 4.0}
NEAR = {**GROUPED, "max_position_embeddings": ORIGINAL}
BY_LENGTH = {
    "longrope-phi3": lambda: tf.Phi3Config(
        **GROUPED, rope_parameters=dict(LONGROPE), original_max_position_embeddings=ORIGINAL
    ),
    "longrope-llama": lambda: tf.LlamaConfig(**GROUPED, rope_parameters=dict(LONGROPE)),
    "dynamic-llama": lambda: tf.LlamaConfig(**NEAR, rope_parameters=dict(DYNAMIC)),
    "dynamic-qwen2": lambda: tf.Qwen2Config(**NEAR, rope_parameters=dict(DYNAMIC)),
}


def make(config, dtype=torch.float32):
    """The random model of a configuration."""
    torch.manual_seed(0)
    return make_random(tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)).to(dtype)


def random_ids(n_tokens, seed=0):
    return torch.randint(3, VOCAB, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


def own_states(model, ids):
    """Transformers' own: the residual stream before every block, the last one left out, which is normed."""
    with torch.no_grad():
        return torch.stack(model(ids, output_hidden_states=True).hidden_states[:-1])


def padded(rows, side):
    """One batch of several contexts, with its mask and the places of each row's tokens."""
    width = max(ids.shape[1] for ids in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, own in enumerate(rows):
        start = 0 if side == "right" else width - own.shape[1]
        ids[row, start : start + own.shape[1]], mask[row, start : start + own.shape[1]] = own, 1
    return ids, mask


@pytest.mark.medium
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", [*BY_LENGTH, "gpt2", "opt", "bloom", "mpt", "llama", "gemma3", "mixtral", "gpt_oss"])
def test_a_context_in_a_batch_is_the_context_alone(name, side):
    """Contexts shorter than the one beside them, padded on either side, and as the model itself computes them."""
    lens = LogitLens(make(BY_LENGTH[name]()) if name in BY_LENGTH else build(name))
    rows = [random_ids(n, seed) for seed, n in enumerate((SHORT, LONG, 1 + SHORT, 3))]
    ids, mask = padded(rows, side)
    for row, own in enumerate(rows):
        places = torch.arange(own.shape[1]) + (0 if side == "right" else ids.shape[1] - own.shape[1])
        positions = torch.stack([mask[i].nonzero()[:1, 0].expand(len(places)) for i in range(len(rows))])
        positions[row] = places
        found = lens.hidden(ids, positions, mask)[:, row]
        alone = lens.hidden(own, torch.arange(own.shape[1]))[:, 0]
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)
        fresh = make(BY_LENGTH[name]()) if name in BY_LENGTH else lens.model
        torch.testing.assert_close(alone[:-1], own_states(fresh, own)[:, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", BY_LENGTH)
def test_what_ran_before_is_forgotten(name, dtype):
    """Dynamic NTK keeps the frequencies of the longest context so far, for all that are longer than the original."""
    model = make(BY_LENGTH[name](), dtype)
    ids, positions = random_ids(ORIGINAL + 4), torch.arange(ORIGINAL + 4)
    wanted = own_states(make(BY_LENGTH[name](), dtype), ids)
    own_states(model, random_ids(60))  # by its owner, before there is a lens
    lens = LogitLens(model)
    for before in (60, 40, SHORT):
        lens.hidden(random_ids(before, seed=before), torch.tensor([0]))
        assert torch.equal(lens.hidden(ids, positions)[:-1], wanted)


def test_doctor_says_what_runs_one_at_a_time():
    lens = dict(model_findings(LoadedModel("m", make(BY_LENGTH["longrope-phi3"]()), None, "", "", "", "", ())))
    assert lens["batches"].startswith("none, one at a time: with rope_type longrope states depend on the longest")
    assert lens["prefix reuse"].startswith("contexts run whole: Phi3ForCausalLM cannot branch: with rope_type longrope")
    other = dict(model_findings(LoadedModel("m", build("llama"), None, "", "", "", "", ())))
    assert other["batches"] == "states do not depend on what else is in one"


def test_a_kind_without_a_name_is_found_by_what_it_does():
    """Rotation that follows the longest position of a batch, in a model whose configuration says nothing of it."""
    model = build("llama")
    rotary = model.model.rotary_emb
    own = rotary.forward

    def by_longest(x, position_ids, *others):
        scale = 1.0 if int(position_ids.max()) < 32 else 3.0
        cos, sin = own(x, position_ids / scale, *others)
        return cos, sin

    rotary.forward = by_longest
    lens = LogitLens(model)
    assert lens.independence.one_at_a_time == "states depend on what else is in a batch"
    rows = [random_ids(SHORT), random_ids(50, seed=1)]
    ids, mask = padded(rows, "right")
    found = lens.hidden(ids, torch.arange(SHORT), mask)[:, 0]
    assert torch.equal(found, lens.hidden(rows[0], torch.arange(SHORT))[:, 0])


def test_what_no_short_context_puts_right_is_refused():
    """A model that remembers for good."""
    model = build("llama")
    rotary, longest = model.model.rotary_emb, [0]
    own = rotary.forward

    def remembering(x, position_ids, *others):
        longest[0] = max(longest[0], int(position_ids.max()))
        return own(x, position_ids * (1.0 + longest[0] / 64), *others)

    rotary.forward = remembering
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM: expected states that are a function of the"):
        LogitLens(model)


@pytest.mark.parametrize(
    "mask, position, message",
    [
        ([[1, 1, 0, 1]], 0, "expected the real tokens of row 0 side by side, got gaps between them"),
        ([[0, 0, 0, 0]], 0, "expected the real tokens of row 0 side by side, got none"),
        ([[1, 1, 2, 0]], 0, r"expected ones and zeros of shape \[1, 4\], got other values"),
        ([[1, 1, 1]], 0, r"expected ones and zeros of shape \[1, 4\], got \[1, 3\]"),
        ([[0, 1, 1, 1]], 0, "positions: expected 1 to 3, the real tokens of row 0, got 0, which is padding"),
        ([[1, 1, 0, 0]], 2, "positions: expected 0 to 1, the real tokens of row 0, got 2, which is padding"),
    ],
)
def test_masks_that_are_none(mask, position, message):
    lens = LogitLens(build("gpt2"))
    with pytest.raises(InputError, match=message):
        lens.hidden(torch.ones(1, 4, dtype=torch.int64), torch.tensor([position]), torch.tensor(mask))


# ---------------------------------------------------------------- as many states as layers


def test_one_block_that_stands_there_three_times_is_three_layers():
    """As ALBERT and others share theirs: each call is a layer, and the states are the model's own."""
    copies, shared = build("llama"), build("llama")
    for index in (1, 2):
        copies.model.layers[index].load_state_dict(copies.model.layers[0].state_dict())
    shared.model.layers = nn.ModuleList([shared.model.layers[0]] * 3)
    ids, positions = random_ids(SHORT), torch.arange(SHORT)
    found, wanted = (LogitLens(model).read(ids, positions=positions).stats for model in (shared, copies))
    assert found.argmax.shape == (4, 1, SHORT)
    for name in ("argmax", "logsumexp", "entropy"):
        assert torch.equal(getattr(found, name), getattr(wanted, name))


class RunsTwice(nn.ModuleList):
    """Blocks that a model goes through twice."""

    def __getitem__(self, key):
        found = super().__getitem__(key)
        return [*found, *found] if isinstance(key, slice) else found


def test_blocks_that_run_twice_are_refused():
    model = build("llama")
    model.model.layers = RunsTwice(list(model.model.layers))
    with pytest.raises(UnsupportedModelError, match="expected each of its 3 blocks to run once, in order, got 6 runs"):
        LogitLens(model)


def test_blocks_are_counted_at_every_call():
    """A model may pass by a block for some inputs alone."""
    model = build("llama")
    lens = LogitLens(model)
    model.model.layers = model.model.layers[:2].eval()
    with pytest.raises(UnsupportedModelError, match="expected each of its 3 blocks to run once, in order, got 2 runs"):
        lens.hidden(random_ids(SHORT), torch.tensor([0]))


def test_blocks_that_return_a_list():
    model = build("bloom")
    plain = LogitLens(model).hidden(random_ids(SHORT), torch.arange(SHORT))
    for block in model.transformer.h:
        block.register_forward_hook(lambda _block, _args, output: list(output))
    assert torch.equal(LogitLens(model).hidden(random_ids(SHORT), torch.arange(SHORT)), plain)


@pytest.mark.medium
@pytest.mark.parametrize("name", ["llama", "dynamic-llama"])
def test_threads_that_share_a_lens_read_their_own_contexts(name):
    lens = LogitLens(make(BY_LENGTH[name]()) if name in BY_LENGTH else build(name))
    contexts = [random_ids(n, seed=n) for n in (5, 9, 20, 31)]
    wanted = [lens.hidden(ids, torch.tensor([4])) for ids in contexts]
    wrong = []

    def read():
        for _ in range(10):
            for ids, states in zip(contexts, wanted, strict=True):
                try:
                    found = lens.hidden(ids, torch.tensor([4]))
                    if not torch.equal(found, states):
                        wrong.append(float((found - states).abs().max()))
                except Exception as error:  # would end the thread without a word
                    wrong.append(error)

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---------------------------------------------------------------- what is proven is what is read


def other_embeddings(model, args, kwargs):
    """A forward hook before the whole model: embeddings of its own, larger than those of the tokens."""
    ids = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
    return (), kwargs | {"inputs_embeds": 1.5 * model.get_input_embeddings()(ids)}


def test_hooks_on_the_whole_model_are_not_passed_by():
    """Whether they were there when the lens was made or came later."""
    model = build("llama")
    lens = LogitLens(model)
    handle = model.register_forward_pre_hook(other_embeddings, with_kwargs=True)
    with pytest.raises(InputError, match="LlamaForCausalLM: expected the hooks that it had when its lens was made"):
        lens.hidden(random_ids(SHORT), torch.tensor([0]))
    with pytest.raises(UnsupportedModelError, match="expected its base model to compute .* others from layer 0 on"):
        LogitLens(model)
    handle.remove()
    ids = random_ids(SHORT)
    assert torch.equal(lens.hidden(ids, torch.arange(SHORT))[0], model.model.embed_tokens(ids))


def test_training_mode_is_not_read():
    """Dropout, in any part of the model."""
    model = build("gpt2")
    lens = LogitLens(model.train())
    assert not model.training
    model.transformer.h[1].train()
    with pytest.raises(InputError, match="GPT2LMHeadModel: expected evaluation mode, .* got training mode"):
        lens.hidden(random_ids(SHORT), torch.tensor([0]))


def test_hooks_inside_the_model_are_read():
    """Steering a block is a part of the model."""
    model = build("llama")
    model.model.layers[1].register_forward_hook(lambda _block, _args, output: output + 1.0)
    ids = random_ids(SHORT)
    lens = LogitLens(model)
    assert torch.equal(lens.read(ids).argmax[-1, 0], model(ids).logits[0].argmax(-1))


@pytest.mark.parametrize(
    "config, message",
    [
        ("PromptTuningConfig", r"expected states \[1, 8, d_model\] of the tokens that went in, got \[1, 12, 32\]"),
        ("PrefixTuningConfig", "expected its base model to compute the states .* got others from layer 1 on"),
        ("PromptEncoderConfig", r"expected states \[1, 8, d_model\] of the tokens that went in, got \[1, 12, 32\]"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # peft's own
def test_virtual_tokens_are_refused(config, message):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("llama"), getattr(peft, config)(task_type="CAUSAL_LM", num_virtual_tokens=4))
    with pytest.raises(UnsupportedModelError, match=message):
        LogitLens(model)


def lora(*modules):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=list(modules), init_lora_weights=False)
    torch.manual_seed(0)
    return peft.get_peft_model(build("llama"), config).eval()


def test_an_adapter_is_a_part_of_the_model():
    model, ids = lora("q_proj", "down_proj"), random_ids(SHORT)
    lens = LogitLens(model)
    own = model(ids).logits[0]
    assert torch.equal(lens.read(ids).argmax[-1, 0], own.argmax(-1))
    assert not torch.equal(own.argmax(-1), build("llama")(ids).logits[0].argmax(-1))
    merged = LogitLens(model.merge_and_unload())
    again = lens.hidden(ids, torch.arange(SHORT))
    torch.testing.assert_close(merged.hidden(ids, torch.arange(SHORT)), again, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_the_unembedding_is_named():
    with pytest.raises(UnsupportedModelError, match="expected an unembedding without an adapter, got one on .*head"):
        LogitLens(lora("q_proj", "lm_head"))
    LogitLens(lora("q_proj", "lm_head").merge_and_unload())


# ---------------------------------------------------------------- not refused without need


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt-350m", "nemotron"])
def test_the_default_dtype_is_nobodys_business(name, dtype):
    model, ids = build(name), random_ids(SHORT)
    wanted = LogitLens(model).read(ids, torch.tensor(5), torch.arange(SHORT)).stats
    torch.set_default_dtype(dtype)
    try:
        lens = LogitLens(model)
        found = lens.read(ids, torch.tensor(5), torch.arange(SHORT)).stats
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("argmax", "target_rank", "target_logprob", "entropy"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name


def test_autocast_around_a_lens_changes_nothing():
    """The model is read in the dtype that it was proven in."""
    model, ids = build("llama"), random_ids(SHORT)
    wanted = LogitLens(model).read(ids, torch.tensor(5), torch.arange(SHORT)).stats
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LogitLens(model).read(ids, torch.tensor(5), torch.arange(SHORT)).stats
    assert torch.equal(found.target_logprob, wanted.target_logprob)


DECODER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": VOCAB,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}


@pytest.mark.parametrize(
    "model",
    [
        lambda: tf.BartForCausalLM(tf.BartConfig(**DECODER, max_position_embeddings=64)),
        lambda: tf.WhisperForCausalLM(tf.WhisperConfig(**DECODER, max_target_positions=64)),
        lambda: tf.MarianForCausalLM(tf.MarianConfig(**DECODER, max_position_embeddings=64)),
        lambda: tf.TrOCRForCausalLM(tf.TrOCRConfig(**DECODER, max_position_embeddings=64)),
    ],
    ids=["bart", "whisper", "marian", "trocr"],
)
def test_a_decoder_is_counted_by_its_own_blocks(model):
    """Its configuration counts the encoder's two first, which are not there."""
    torch.manual_seed(0)
    model, ids = shake(model()).eval(), random_ids(SHORT)
    lens = LogitLens(model)
    own = model(ids, use_cache=False).logits[0]  # Transformers' own cache counts the encoder's blocks too
    assert lens.n_layers == 3
    assert torch.equal(lens.read(ids).argmax[-1, 0], own.argmax(-1))


def test_a_softcap_by_another_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2, "chunk_size": 8}
    model = make(tf.xLSTMConfig(vocab_size=VOCAB, **sizes, output_logit_soft_cap=2.0))
    assert LogitLens(model).head.softcap == 2.0


def test_prophetnet_has_three_streams():
    """A stream for each token that it predicts: there is no one state of a layer."""
    names = {"hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 3, "vocab_size": VOCAB}
    heads = {"num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "is_encoder_decoder": False}
    model = tf.ProphetNetForCausalLM(tf.ProphetNetConfig(**names, **heads, is_decoder=True)).eval()
    with pytest.raises(UnsupportedModelError, match=r"ProphetNetForCausalLM: expected states \[1, 8, d.*24, 32"):
        LogitLens(model)


def test_half_precision_that_mixes_with_fp32_has_a_remedy():
    model = make(tf.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=VOCAB), torch.bfloat16)
    with pytest.raises(UnsupportedModelError, match="MambaForCausalLM: .* torch.float32 at layer 1; use ``dtype='fl"):
        LogitLens(model)
    LogitLens(model.float())


def test_weights_that_are_elsewhere_are_named():
    model = build("llama")
    for part in (model.model.layers[1], model):
        part.to("meta")
        with pytest.raises(UnsupportedModelError, match="or one loaded with device_map, got weights that are nowhere"):
            LogitLens(model)


def test_limits_of_positions():
    """Rotation that is scaled by a factor reaches as far; a stated limit that is larger counts."""
    yarn = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
    limits = {
        "yarn": position_limit(make(tf.Qwen2Config(**NEAR, rope_parameters=yarn))),
        "yarn stated": position_limit(make(tf.Qwen2Config(**GROUPED, rope_parameters={**yarn, "factor": 2.0}))),
        "dynamic": position_limit(make(BY_LENGTH["dynamic-llama"]())),
        "longrope": position_limit(make(BY_LENGTH["longrope-phi3"]())),
        "default": position_limit(build("llama")),
        "learned": position_limit(build("gpt2")),
        "none": position_limit(build("bloom")),
    }
    assert limits == {
        "yarn": 4 * ORIGINAL,
        "yarn stated": 64,
        "dynamic": 4 * ORIGINAL,
        "longrope": 64,
        "default": 64,
        "learned": 64,
        "none": None,
    }
