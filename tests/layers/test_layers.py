"""Interventions on every family: against models rebuilt and hooked by hand, and that nothing is left behind."""

import copy
import gc
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from families import BY_BLOCK, CASES, VOCAB, build, others_slow
from refinelens import LogitLens
from refinelens.doctor import model_findings
from refinelens.errors import UnsupportedModelError
from refinelens.layers.ablation import scan
from refinelens.layers.interventions import EVERY, LAST, Intervention, MeanContributions, contribution, patched
from refinelens.lens.blocks import ActivationCache, FrozenCache, check_replay
from refinelens.lens.prefix import Branches
from refinelens.model.loading import LoadedModel
from tiny import tiny_gpt2

HALVES = ("attn", "mlp")
POST_NORM = {"opt-350m", "opt-no-norm", "bloom-post"}  # the residual stream is normed, or is not what blocks add to
ONE_BY_ONE = {"bloom", "bloom-post"}  # its ALiBi tensor is made for the batch
IDS = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(3, VOCAB, (1, 11), generator=torch.Generator().manual_seed(2))


def lens_of(model):
    return LogitLens(model)


def ablated(lens, name, tokens=EVERY, cached=False, at_a_time=1, ids=IDS, means=None):
    """Downstream states under one intervention at every block: see `scan`."""
    sublayers = check_replay(lens).sublayers if name in HALVES else []
    run = ActivationCache.record(lens, ids, cached)
    return run, scan(run, Intervention(name, tokens, sublayers, means).of_context(run), at_a_time)


@contextmanager
def hooked(module, change):
    handle = module.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def assert_no_hooks(model):
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks, type(module).__name__


@pytest.mark.medium
@pytest.mark.parametrize("name", others_slow(CASES, BY_BLOCK))
def test_a_restart_is_the_run(name):
    """From every block on, and with keys and values held; bit for bit where the whole context is run again."""
    lens = lens_of(build(name))
    own, n = lens.hidden(IDS, torch.tensor([10]))[:, 0, 0], lens.n_layers
    run, cached = ActivationCache.record(lens, IDS), ActivationCache.record(lens, IDS, cached=True)
    assert torch.equal(run.answer_states(), own)
    torch.testing.assert_close(cached.answer_states(), own, rtol=1e-4, atol=1e-4)
    for first in range(n):
        state, held = run.states[first], cached.states[first]
        for index in range(first, n):
            state, held = run.block(index, state), cached.block(index, held)
            assert torch.equal(state, run.states[index + 1]) and torch.equal(held, cached.states[index + 1])
    found = check_replay(lens)
    assert found.cached and found.batched == (name not in ONE_BY_ONE)
    assert (None in found.sublayers) == (name in POST_NORM)
    assert_no_hooks(lens.model)


@pytest.mark.parametrize("name, halves", [("llama", "found"), ("opt-350m", "of whole blocks alone")])
def test_doctor_says_what_can_be_intervened_on(name, halves):
    findings = dict(model_findings(LoadedModel(name, build(name), None, "", "", "", "", ())))
    assert findings["interventions"].startswith("every block starts again") and halves in findings["interventions"]


@pytest.mark.medium
@pytest.mark.parametrize("tokens", [EVERY, LAST], ids=["all", "answer"])
@pytest.mark.parametrize("name", others_slow(CASES, BY_BLOCK))
def test_a_skip_is_the_model_with_that_block_hooked(name, tokens):
    """The model itself runs whole, with a hook that gives a block's input as its output."""
    lens = lens_of(build(name))
    _, downstream = ablated(lens, "skip", tokens)
    for index, block in enumerate(lens.blocks):

        def skip(_module, args, kwargs, output):
            given = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point())
            made = output[0] if isinstance(output, tuple) else output
            made = made.clone()
            made[:, tokens] = given[:, tokens]
            return (made, *output[1:]) if isinstance(output, tuple) else made

        with hooked(block, skip):
            own = lens.hidden(IDS, torch.tensor([10]))[index + 1 :, 0, 0]
        assert torch.equal(downstream[index], own)


@pytest.mark.medium
@pytest.mark.parametrize("name", others_slow(sorted(set(CASES) - POST_NORM), BY_BLOCK))
def test_halves_leave_what_the_other_half_adds(name):
    """Attention and feed-forward part zero-ablated together are a skip; each alone is neither that nor nothing."""
    lens = lens_of(build(name))
    sublayers, run = check_replay(lens).sublayers, ActivationCache.record(lens, IDS)
    for index in range(run.n_layers):
        outs = [Intervention(half, EVERY, sublayers, None).output(run, index) for half in HALVES]
        for out in outs:
            assert not torch.equal(out, run.states[index]) and not torch.equal(out, run.states[index + 1])
        assert not torch.equal(*outs)
        last = Intervention("attn", LAST, sublayers, None).output(run, index)
        assert torch.equal(last[:, :-1], run.states[index + 1][:, :-1])
        torch.testing.assert_close(last[:, -1], outs[0][:, -1], rtol=1e-5, atol=1e-5)
    assert_no_hooks(lens.model)


def test_halves_of_a_llama_are_its_own():
    lens = lens_of(build("llama"))
    run, downstream = ablated(lens, "mlp")
    block, state = lens.blocks[1], run.states[1]
    with torch.no_grad():
        call = run.calls[1]
        added = block.self_attn(block.input_layernorm(state), **call.kwargs)[0]
    torch.testing.assert_close(downstream[1][0], (state + added)[0, -1], rtol=1e-5, atol=1e-5)


def without_block(model, index, prefix):
    """The same weights in a model that was never given this block."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers -= 1
    smaller = type(model)(config).eval()
    weights = {}
    for key, value in model.state_dict().items():
        if key.startswith(prefix):
            number, rest = key.removeprefix(prefix).split(".", 1)
            if int(number) == index:
                continue
            key = f"{prefix}{int(number) - (int(number) > index)}.{rest}"
        weights[key] = value
    smaller.load_state_dict(weights)
    return smaller


@pytest.mark.parametrize(
    "name, prefix", [("gpt2", "transformer.h."), ("llama", "model.layers."), ("gpt_neox", "gpt_neox.layers.")]
)
def test_a_skip_is_a_model_rebuilt_without_the_block(name, prefix):
    model = build(name)
    lens = lens_of(model)
    _, downstream = ablated(lens, "skip")
    for index in range(lens.n_layers):
        smaller = without_block(model, index, prefix)
        with torch.no_grad():
            own = smaller(IDS).logits[0, -1]
        stats = lens.stats(downstream[index][-1][None], own.argmax()[None])
        assert int(stats.target_rank) == 0
        torch.testing.assert_close(stats.target_logprob[0], own.log_softmax(-1).max(), rtol=1e-5, atol=1e-5)
        assert torch.equal(downstream[index][-1], lens_of(smaller).hidden(IDS, torch.tensor([10]))[-1, 0, 0])


@pytest.mark.parametrize("name", ["skip", "attn", "mlp", "mean"])
@pytest.mark.parametrize("cached", [False, True])
def test_a_block_that_adds_nothing_costs_exactly_nothing(name, cached):
    model = tiny_gpt2(VOCAB)
    block = model.transformer.h[1]
    with torch.no_grad():
        for part in (block.attn.c_proj, block.mlp.c_proj):
            part.weight.zero_()
            part.bias.zero_()
    lens = lens_of(model)
    means = MeanContributions.of_nothing(3, 11, 32, "cpu")
    for ids in (IDS, OTHER):
        means.add(ActivationCache.record(lens, ids, cached), EVERY)
    run, downstream = ablated(lens, name, EVERY, cached, at_a_time=8, means=means)
    assert torch.equal(downstream[1], run.answer_states()[2:])
    assert not torch.equal(downstream[0], run.answer_states()[1:])


@pytest.mark.parametrize("cached", [False, True])
def test_the_mean_of_one_context_changes_nothing(cached):
    lens = lens_of(build("llama"))
    run, means = ActivationCache.record(lens, IDS, cached), MeanContributions.of_nothing(3, 11, 32, "cpu")
    means.add(run, EVERY)
    _, downstream = ablated(lens, "mean", EVERY, cached, means=means)
    for index, states in enumerate(downstream):
        assert torch.equal(states, run.answer_states()[index + 1 :])


def test_means_go_by_the_place_from_the_nearer_end():
    lens = lens_of(build("llama"))
    runs = [ActivationCache.record(lens, IDS), ActivationCache.record(lens, OTHER[:, :7])]
    means = MeanContributions.of_nothing(3, 11, 32, "cpu")
    for run in runs:
        means.add(run, EVERY)
    long, short = (contribution(run, 1, EVERY) for run in runs)
    mean = means.of(runs[0], 1, EVERY)
    torch.testing.assert_close(mean[:3], (long[:3] + short[:3]) / 2)  # 7 // 2 tokens count from the start
    torch.testing.assert_close(mean[-4:], (long[-4:] + short[-4:]) / 2)
    assert torch.equal(mean[3:7], long[3:7]), "only the long context has these places"
    assert means.count.sum() == 11 + 7


def test_means_survive_the_disk(tmp_path):
    run, means = ActivationCache.record(lens_of(build("gpt2")), IDS), MeanContributions.of_nothing(3, 11, 32, "cpu")
    means.add(run, EVERY)
    means.save(tmp_path / "means.safetensors")
    again = MeanContributions.load(tmp_path / "means.safetensors", "cpu")
    assert torch.equal(again.mean, means.mean) and torch.equal(again.count, means.count)


@pytest.mark.medium
@pytest.mark.parametrize("name", others_slow(sorted(set(CASES) - ONE_BY_ONE), BY_BLOCK))
def test_held_keys_and_values_are_the_whole_context(name):
    """At the last token alone or whole, all runs of the scan at a time, against every one by itself."""
    lens = lens_of(build(name))
    for way in ("skip", "control"):
        _, whole = ablated(lens, way, LAST)
        _, held = ablated(lens, way, LAST, cached=True, at_a_time=8)
        _, together = ablated(lens, way, LAST, at_a_time=8)
        for one, *others in zip(whole, held, together, strict=True):
            for other in others:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gpt_neox", "gemma2", "mixtral"])
def test_a_scan_on_a_gpu(name, dtype):
    """All runs of the scan at a time; in fp32 what the CPU gives."""
    _, own = ablated(lens_of(build(name)), "attn")
    lens = lens_of(build(name).to("cuda", dtype))
    replay = check_replay(lens)
    assert replay.batched and None not in replay.sublayers
    assert replay.at_a_time(11, cached=False, on_cpu=False) > lens.n_layers
    _, downstream = ablated(lens, "attn", at_a_time=8)
    for one, other in zip(own, downstream, strict=True):
        assert torch.isfinite(other).all()
        if dtype == torch.float32:
            torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-3)


def test_a_scan_leaves_held_keys_and_values_as_they_were():
    lens = lens_of(build("llama"))
    run = ActivationCache.record(lens, IDS, cached=True)
    cache = next(value for value in run.calls[0].kwargs.values() if isinstance(value, FrozenCache))
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    last, shared = torch.tensor([[10]]), [Branches(lens) for _ in range(2)]
    for branches in shared:
        branches.hidden(IDS, last)
    undisturbed = shared[0].hidden(IDS, last)
    clean = run.block(2, run.states[2])
    scan(run, Intervention("skip", EVERY, [], None).of_context(run), 8)
    assert cache.get_seq_length() == 10
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    assert torch.equal(run.block(2, run.states[2]), clean)
    assert torch.equal(shared[1].hidden(IDS, last), undisturbed), "a prefix that was shared before"


def test_a_patch_of_its_own_states_is_nothing_and_the_last_layer_is_the_other_run():
    lens = lens_of(build("gpt2"))
    run, other = ActivationCache.record(lens, IDS, cached=True), ActivationCache.record(lens, OTHER, cached=True)
    for index, states in enumerate(scan(run, patched(run, run.answer_states()), 8)):
        assert torch.equal(states, run.answer_states()[index + 1 :])
    downstream = scan(run, patched(run, other.answer_states()), 8)
    assert torch.equal(downstream[-1][-1], other.answer_states()[-1])
    assert not torch.equal(downstream[0][-1], other.answer_states()[-1]), "earlier tokens are still its own"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("half", HALVES)
def test_no_hook_is_left_behind(half, error):
    lens = lens_of(build("llama"))
    sublayers, run = check_replay(lens).sublayers, ActivationCache.record(lens, IDS)

    def fail(*_):
        raise error

    for module in (lens.blocks[2].mlp, lens.model.model.norm):
        handle = module.register_forward_pre_hook(fail)
        with pytest.raises(error):
            scan(run, Intervention(half, EVERY, sublayers, None).of_context(run), 1)
            ActivationCache.record(lens, IDS)
        handle.remove()
        assert_no_hooks(lens.model)


@pytest.mark.medium
def test_a_scan_takes_half_a_forward_pass_per_layer():
    model = tiny_gpt2(VOCAB, n_layer=12)
    lens, calls = lens_of(model), []
    replay = check_replay(lens)
    handles = [b.register_forward_hook(lambda *_: calls.append(1)) for b in model.transformer.h]
    means = MeanContributions.of_nothing(12, 11, 32, "cpu")
    means.add(ActivationCache.record(lens, OTHER), EVERY)
    calls.clear()
    run = ActivationCache.record(lens, IDS)
    for name in ("skip", "mean", "attn", "mlp"):
        scan(run, Intervention(name, EVERY, replay.sublayers, means).of_context(run), 1)
    assert len(calls) == 12 + 4 * 66 + 2 * 12  # the clean run, what follows each block, blocks with a zero-ablated half
    assert len(calls) / 12 / 4 <= 0.6 * 12
    for handle in handles:
        handle.remove()


@pytest.mark.medium
def test_a_scan_holds_one_state_per_run_that_is_under_way():
    """Of the layers that are behind, the last token alone."""
    lens = lens_of(tiny_gpt2(VOCAB, n_layer=12))
    run, found = ActivationCache.record(lens, IDS), []

    def count(*_):
        tensors = [held for held in gc.get_objects() if type(held) is torch.Tensor and held.layout == torch.strided]
        stores = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        found.append(sum(size == 11 * 32 * 4 for size in stores.values()))

    count()
    with hooked(lens.blocks[11], count):
        scan(run, Intervention("skip", EVERY, [], None).of_context(run), 1)
    assert max(found) - found[0] <= 11 + 6  # runs under way, and what a block has in hand


def test_blocks_that_remember_are_refused_by_name():
    """Such a block gives something else when it is called again."""

    class Counting(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.calls = block, 0

        def forward(self, hidden, *args, **kwargs):
            self.calls += 1
            return self.block(hidden, *args, **kwargs) * (1.0 + 0.01 * self.calls)

    model = tiny_gpt2(VOCAB)
    lens = lens_of(model)
    model.transformer.h[1] = Counting(model.transformer.h[1])
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel: expected blocks that can be started again"):
        check_replay(lens)
    assert_no_hooks(model)


def test_a_model_that_skips_its_own_blocks_is_refused_by_name():
    model = tiny_gpt2(VOCAB)
    lens = lens_of(model)
    model.transformer.h = model.transformer.h[:2].eval()
    with pytest.raises(UnsupportedModelError, match="GPT2LMHeadModel: .* got .* got 2 runs of 2 blocks"):
        check_replay(lens)
