"""Prefix reuse: contexts that branch off a cache are those that ran whole, and what cannot branch runs whole."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from families import FAMILIES, GROUPED, ROPE, TOKENS, VOCAB, build
from faults import at_pass
from refinelens import LogitLens
from refinelens.config import SweepConfig
from refinelens.doctor import model_findings
from refinelens.errors import FaultError, InputError
from refinelens.lens.prefix import PROBE_TOKENS, Branches, branch_order, check_branching, difference, shared_length
from refinelens.lens.runner import ForwardRunner, ModelInput
from refinelens.model.loading import LoadedModel
from refinelens.sweeping.sweep import run_sweep
from sweeps import predictions
from tiny import shake

WINDOWS = ["mistral", "gemma2", "gemma3", "gpt_oss", "phi3-tied", "starcoder2-no-bias", "gpt_neo", "falcon-alibi"]
EXACT = dict.fromkeys([*FAMILIES, *WINDOWS])


def random_ids(length, seed):
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def question(seed=0):
    """Contexts of one question as token ids: a gold document moves through others; at two sizes, in any order."""
    start, gold, end = (random_ids(n, seed + i) for i, n in enumerate((3, 5, 4)))
    others = [random_ids(n, seed + 10 + n) for n in (6, 1, 7, 2)]
    contexts = []
    for size in (3, 5):
        for position in range(size):
            documents = others[: size - 1]
            documents.insert(position, gold)
            contexts.append(tuple(start + sum(documents, []) + end))
    return contexts


def whole(lens, ids, positions):
    return lens.hidden(torch.tensor([ids]), torch.tensor([list(positions)]))


def trie_tokens(contexts):
    """Tokens of the trie: every different beginning once."""
    return len({ids[: end + 1] for ids in contexts for end in range(len(ids))})


@pytest.mark.medium
@pytest.mark.parametrize("name", EXACT)
def test_branches_are_the_whole_runs(name):
    """Several answer tokens; windows of 4 tokens are shorter than what is shared and what is cropped."""
    lens, contexts = LogitLens(build(name)), question()
    assert check_branching(lens).used
    branches, ran = Branches(lens), 0
    for index in branch_order(contexts):
        ids = contexts[index]
        positions = [len(ids) - 3, len(ids) - 2, len(ids) - 1]
        branched = branches.hidden(torch.tensor([ids]), torch.tensor([positions]))
        ran += len(ids) - branches.shared
        expected = whole(lens, ids, positions)
        # Both sum the same products in another order, over three layers: far below the gate's 1e-4.
        assert difference(branched, expected) < 5e-6
        ours, theirs = (lens.stats(states, torch.tensor([5, 6, 7])) for states in (branched, expected))
        assert torch.equal(ours.argmax, theirs.argmax) and torch.equal(ours.target_rank, theirs.target_rank)
    assert ran == trie_tokens(contexts) < sum(map(len, contexts))


def test_order_is_a_walk_through_the_trie():
    contexts = [(1, 2, 3), (1, 9), (1, 2, 4, 5), (7,), (1, 2), (1, 9)]
    order = branch_order(contexts)
    assert sorted(order) == list(range(6))
    walked = [contexts[i] for i in order]
    shared = [shared_length(a, b) for a, b in zip([()] + walked[:-1], walked, strict=True)]
    assert sum(map(len, walked)) - sum(shared) == trie_tokens(contexts) == 7


@pytest.mark.parametrize(
    "contexts, shared",
    [
        ([[5, 6, 7], [8, 6, 7]], [0, 0]),  # nothing in common
        ([[5, 6, 7], [5, 6, 7]], [0, 1]),  # the same twice: what is kept runs again
        ([[5, 6, 7, 8], [5, 6, 7]], [0, 1]),  # one the beginning of the other
        ([[5, 6, 7], [5, 6, 7, 8, 9]], [0, 3]),
        ([[5], [5], [5, 6]], [0, 0, 0]),  # the first token is kept
    ],
)
def test_what_is_shared(contexts, shared):
    lens = LogitLens(build("llama"))
    branches, found = Branches(lens), []
    for ids in contexts:
        positions = list(range(len(ids) - min(2, len(ids)), len(ids)))
        branched = branches.hidden(torch.tensor([ids]), torch.tensor([positions]))
        assert branched.shape == (4, 1, len(positions), 32)
        torch.testing.assert_close(branched, whole(lens, ids, positions), rtol=1e-5, atol=1e-5)
        found.append(branches.shared)
    assert found == shared


def test_a_failed_run_leaves_no_cache():
    lens = LogitLens(build("gpt2"))
    branches, ids, positions = Branches(lens), torch.tensor([[5, 6, 7, 8]]), torch.tensor([[3]])
    branches.hidden(ids, positions)
    fault = lens.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        branches.hidden(ids, positions)
    fault.remove()
    expected = whole(lens, [5, 6, 7, 8], [3])
    torch.testing.assert_close(branches.hidden(ids, positions), expected)
    assert branches.shared == 0


def mamba():
    return tf.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=VOCAB, state_size=4, **TOKENS)


def hybrid():
    return tf.Lfm2Config(**GROUPED, layer_types=["conv", "full_attention", "conv"])


def dynamic_rope():
    return tf.LlamaConfig(**GROUPED, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0})


@pytest.mark.parametrize(
    "config, why",
    [
        (mamba, "MambaForCausalLM cannot branch: its layers do not go on from a cache of keys and values"),
        (hybrid, "Lfm2ForCausalLM cannot branch: its layers do not go on from a cache of keys and values"),
        (dynamic_rope, "LlamaForCausalLM cannot branch: with rope_type dynamic"),
    ],
)
def test_what_cannot_branch_is_refused(config, why):
    """And doctor says so."""
    torch.manual_seed(0)
    model = shake(tf.AutoModelForCausalLM.from_config(config())).eval()
    reuse = check_branching(LogitLens(model))
    assert not reuse.used and reuse.why.startswith(why)
    loaded = LoadedModel("mine", model, None, "", "", "", "", ())
    assert dict(model_findings(loaded))["prefix reuse"] == f"contexts run whole: {reuse.why}"


def crop_too_little(cache, tokens):
    for layer in cache.layers:
        layer.crop(tokens)
    cache.layers[1].keys = cache.layers[1].keys.roll(1, -2)


def crop_nothing(cache, tokens):
    pass


def crop_and_round(cache, tokens):
    for layer in cache.layers:
        layer.crop(tokens)
        layer.values = layer.values.bfloat16().float()


def crop_and_forget(cache, tokens):
    """Goes wrong behind 20 tokens, more than the gate runs."""
    for layer in cache.layers:
        layer.crop(tokens)
    if cache.get_seq_length() > 20:
        cache.layers[0].values[..., :10, :] = 0


@pytest.fixture
def crop_by(monkeypatch):
    """Makes Transformers' cache crop in another way."""
    return lambda crop: monkeypatch.setattr(DynamicCache, "crop", crop)


@pytest.mark.parametrize("crop", [crop_too_little, crop_nothing, crop_and_round])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom", "gemma3"])
def test_gate_refuses_a_cache_that_was_tampered_with(name, crop, crop_by):
    lens = LogitLens(build(name))
    crop_by(crop)
    reuse = check_branching(lens)
    assert not reuse.used and type(lens.model).__name__ in reuse.why


def crop_and_round_off(cache, tokens):
    """As another order of sums would in half precision: some values are off by a rounding."""
    for layer in cache.layers:
        layer.crop(tokens)
    values = cache.layers[-1].values
    values[..., ::3, :] *= 1 + torch.finfo(values.dtype).eps


@pytest.mark.parametrize(
    "crop, fits", [(crop_and_round_off, True), (crop_too_little, False), (crop_nothing, False), (None, True)]
)
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gate_in_half_precision_allows_rounding_alone(name, crop, fits, crop_by):
    lens = LogitLens(build(name).to(torch.bfloat16))
    if crop is not None:
        crop_by(crop)
    reuse = check_branching(lens)
    assert reuse.used is fits
    if fits:  # a bfloat16 model is in the place of a GPU's
        assert f"allowed {lens.parity.tolerance:.2g}" in reuse.why and lens.parity.tolerance == 2 * 2**-7
    if crop is crop_and_round_off:
        assert "largest difference 0 " not in reuse.why, "the test shows something"


@pytest.mark.medium
def test_in_half_precision_prefixes_are_shared_where_asked_for(options, tmp_path):
    """With what was allowed in the manifest; ids are those of whole runs, or tied with them."""
    half = replace(options, dtype="bfloat16", examples=2)
    on, off = (run_sweep(replace(half, reuse_prefix=how), tmp_path / how) for how in ("on", "off"))
    assert on.manifest["prefix_reuse"]["used"] and on.manifest["counts"]["tokens_saved"] > 0
    assert "allowed 0.016; argmax " in on.manifest["prefix_reuse"]["why"]
    for ours, theirs in zip(predictions(on), predictions(off), strict=True):
        np.testing.assert_allclose(ours["max_logprob"], theirs["max_logprob"], atol=0.1)
        same = np.equal(ours["argmax"], theirs["argmax"])
        assert same.mean() > 0.7 and ours["question_id"] == theirs["question_id"]


@pytest.fixture(scope="module")
def options(tiny_model, question_file):
    return SweepConfig(model=str(tiny_model), task=str(question_file), documents=(2, 4), device="cpu")


@pytest.fixture(scope="module")
def ran_whole(options, tmp_path_factory):
    return run_sweep(replace(options, reuse_prefix="off"), tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="module")
def branched(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


def assert_same(run, other):
    for ours, theirs in zip(predictions(run), predictions(other), strict=True):
        exact = {k: v for k, v in ours.items() if not isinstance(v, list) or not isinstance(v[0], float)}
        assert exact == {k: theirs[k] for k in exact} and "target_rank" in exact and "argmax" in exact
        for name in ("target_logprob", "max_logprob", "entropy", "kl"):
            np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5)


def test_a_sweep_with_reuse_is_the_sweep_without(branched, ran_whole):
    assert_same(branched, ran_whole)
    reused, plain = branched.manifest, ran_whole.manifest
    assert reused["prefix_reuse"]["used"] and "argmax equal" in reused["prefix_reuse"]["why"]
    assert plain["prefix_reuse"] == {"used": False, "why": "``reuse_prefix='off'``"}
    tokens = {(r["question_id"], r["documents"], r["gold_position"]): r["n_tokens"] for r in predictions(branched)}
    assert plain["counts"]["tokens_computed"] == sum(tokens.values()) and plain["counts"]["tokens_saved"] == 0
    assert sum(reused["counts"][f"tokens_{what}"] for what in ("computed", "saved")) == sum(tokens.values())
    assert reused["counts"]["tokens_saved"] > 0.2 * sum(tokens.values())


def test_one_question_gives_the_same_rows_alone(options, branched, tmp_path):
    """Nothing is shared between questions, so that which others were asked before changes no bit."""
    every = predictions(branched)
    alone = predictions(run_sweep(replace(options, examples=1), tmp_path / "alone"))
    asked = {row["question_id"] for row in alone}
    assert len(asked) == 1 and asked != {every[0]["question_id"]}
    assert alone == [row for row in every if row["question_id"] in asked]


def test_the_table_counts_tokens(branched, ran_whole):
    from refinelens.report.summary import read_report
    from refinelens.report.tables import notes

    counts = branched.manifest["counts"]
    computed, saved = counts["tokens_computed"], counts["tokens_saved"]
    line = f"{computed} tokens computed, {saved} saved by shared prefixes ({(computed + saved) / computed:.2f} times)."
    assert line in notes(read_report(branched))
    computed = ran_whole.manifest["counts"]["tokens_computed"]
    line = f"{computed} tokens computed, 0 saved by shared prefixes; contexts ran whole: ``reuse_prefix='off'``."
    assert line in notes(read_report(ran_whole))


@pytest.mark.medium
def test_a_real_context_may_show_what_the_gate_cannot(options, ran_whole, tmp_path, crop_by):
    crop_by(crop_and_forget)
    run = run_sweep(options, tmp_path / "run")
    assert predictions(run) == predictions(ran_whole)
    assert not run.manifest["prefix_reuse"]["used"]
    assert "GPT2LMHeadModel branched is not the model" in run.manifest["prefix_reuse"]["why"]


class Spy:
    """A lens that tells of every pass how many tokens it had and whether they went on from a cache."""

    def __init__(self, lens):
        self.lens, self.passes = lens, []

    def __getattr__(self, name):
        return getattr(self.lens, name)

    def hidden(self, ids, positions, mask=None, cache=None, *more):
        self.passes.append((ids.shape[1], cache is not None))
        return self.lens.hidden(ids, positions, mask, cache, *more)

    @property
    def whole(self):
        return [n_tokens for n_tokens, branched in self.passes if not branched]


def test_a_context_twice_as_long_is_a_proof_of_its_own(crop_by):
    """Whatever was proven on shorter ones: here a cache that goes wrong behind 20 tokens."""
    spy, contexts = Spy(LogitLens(build("gpt2"))), []
    for first, n_shared in ((10, 7), (20, 20), (30, 60)):
        shared = [first, *random_ids(n_shared - 1, first)]
        contexts += [tuple([*shared, token, 5, 6]) for token in (40, 50)]
    inputs = [ModelInput(ids, range(len(ids) - 2, len(ids))) for ids in contexts]
    runner = ForwardRunner(spy, reuse=check_branching(spy.lens))
    for _ in range(2):
        assert len(list(runner.run(inputs))) == len(inputs) and runner.reuse.used
    assert spy.whole == [10, 23, 63], "each of those once"
    spy.passes.clear()
    crop_by(crop_and_forget)
    runner = ForwardRunner(spy, reuse=runner.reuse)
    found = {states.index: states.hidden for states in runner.run(inputs)}
    assert spy.whole == [10, 23, 63] and not runner.reuse.used
    assert "GPT2LMHeadModel branched is not the model" in runner.reuse.why
    for index, one in enumerate(inputs):
        torch.testing.assert_close(found[index], whole(spy.lens, one.ids, one.positions)[:, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.medium
def test_a_model_that_cannot_branch_runs_whole(options, ran_whole, tmp_path, crop_by):
    crop_by(crop_nothing)
    run = run_sweep(options, tmp_path / "run")
    assert predictions(run) == predictions(ran_whole)
    assert "GPT2LMHeadModel cannot branch" in run.manifest["prefix_reuse"]["why"]
    message = "``reuse_prefix='on'``: expected a model whose cache can branch, got GPT2LMHead"
    with pytest.raises(InputError, match=message):
        run_sweep(replace(options, reuse_prefix="on"), tmp_path / "on")


@pytest.mark.parametrize(
    "change, why",
    [
        ({"dtype": "bfloat16"}, "in half precision rounding may change ranks"),
        ({"batch_size": "2"}, "``batch_size='2'``"),
    ],
)
def test_auto_says_why_it_runs_whole(options, tmp_path, change, why):
    run = run_sweep(replace(options, examples=1, **change), tmp_path / "run")
    assert run.manifest["prefix_reuse"] == {"used": False, "why": why}


def test_a_broken_state_names_its_context(options, tmp_path):
    ran = []

    def broken(ids, states):
        ran.append(ids.shape[1])
        if max(ran) > 40 and ids.shape[1] < 20:  # one that branches off
            states.fill_(float("nan"))

    named = r"^question 0, \d documents, gold position \d: hidden: .* got NaN in row 0"
    with at_pass(broken), pytest.raises(FaultError, match=named):
        run_sweep(options, tmp_path / "run")


@pytest.mark.medium
def test_out_of_memory_runs_the_question_whole(options, ran_whole, tmp_path):
    ran, failed = [], []

    def small_machine(ids, states):
        ran.append(ids.shape[1])
        if max(ran) > 40 and ids.shape[1] < 20 and not failed:  # one that branches off
            failed.append(ids)
            raise MemoryError

    with at_pass(small_machine):
        run = run_sweep(options, tmp_path / "run")
    assert_same(run, ran_whole)
    assert failed and run.manifest["counts"]["tokens_saved"] > 0

    def no_machine(ids, states):
        if ids.shape[1] > PROBE_TOKENS:
            raise MemoryError

    named = r"^question 0, \d documents, .* expected memory for one context of"
    with at_pass(no_machine), pytest.raises(FaultError, match=named):
        run_sweep(options, tmp_path / "none")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reuse_prefix": "yes"}, "``reuse_prefix``: expected auto, on, off, got 'yes'"),
        ({"reuse_prefix": "on", "batch_size": "4"}, "``reuse_prefix='on'``: expected ``batch_size`` auto or 1, got 4"),
    ],
)
def test_bad_options(options, change, message):
    with pytest.raises(InputError, match=message):
        replace(options, **change)
