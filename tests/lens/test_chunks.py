"""Long contexts in chunks: the states, ranks and rows of one pass, no more held than of a chunk, and refused if not."""

import weakref
from dataclasses import replace
from itertools import accumulate

import numpy as np
import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from families import GROUPED, ROPE, VOCAB, build
from faults import at_pass
from refinelens import LogitLens
from refinelens.config import SweepConfig
from refinelens.errors import FaultError
from refinelens.lens import chunks, prefix
from refinelens.lens.chunks import CPU_CHUNK, LONG, holds_less, prove_chunks
from refinelens.lens.prefix import compare, difference, in_chunks, roomy_cache
from refinelens.lens.reading import LayerReading
from refinelens.lens.runner import ForwardRunner, ModelInput
from refinelens.store.process import Interrupted
from refinelens.sweeping.sweep import resume_sweep, run_sweep
from sweeps import predictions, stop_after
from tiny import save_tiny_lens, shake

FEW = 7  # tokens of a chunk, a prime that no context here is a multiple of
FLOATS = ("target_logprob", "max_logprob", "entropy", "kl", "jsd", "mid_logprob")


def ids_of(length, seed=0):
    return torch.randint(3, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def short(monkeypatch):
    """Contexts of more than 20 tokens are long, and chunks short."""
    monkeypatch.setattr(chunks, "LONG", 20)
    monkeypatch.setattr(chunks, "PROVEN", 25)
    monkeypatch.setattr(chunks, "CPU_CHUNK", FEW)


@pytest.fixture
def lens():
    return LogitLens(build("llama"))


@pytest.fixture
def passes(monkeypatch):
    """Of every pass: tokens, and positions whose states it kept."""
    made, own = [], LogitLens.hidden

    def hidden(self, ids, positions, *more):
        made.append((ids.shape[1], positions.shape[-1]))
        return own(self, ids, positions, *more)

    monkeypatch.setattr(LogitLens, "hidden", hidden)
    return made


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "gemma3", "gpt_oss", "bloom"])
@pytest.mark.parametrize("size", [1, FEW, 23, 100])  # a token, a prime, the context, more than it
def test_chunks_are_the_whole_pass(name, size):
    """Also where windows of 4 tokens are shorter than a chunk, and where a chunk has none of the positions."""
    lens, ids, positions = LogitLens(build(name)), ids_of(23), torch.tensor([[0, 6, 7, 20, 22]])
    expected, seen = lens.hidden(ids, positions), []
    found = torch.full_like(expected, torch.nan)
    for here, states in in_chunks(lens, ids, positions, roomy_cache(23), size):
        found[:, :, here] = states
        seen.append(states.shape[2])
    assert difference(found, expected) < 5e-6 and sum(seen) == 5 and len(seen) == -(-23 // size)


@pytest.mark.parametrize(
    "positions, shape",
    [(None, [31]), (slice(3, None), [28]), (range(0, 31), [31]), (list(range(2, 29)), [27])],
)
def test_a_long_text_is_read_in_chunks(lens, short, passes, positions, shape):
    ids = ids_of(31)[0]
    found = lens.read(ids, targets=5, positions=positions, alternatives=[7, 8], top_k=3)
    assert lens.proofs[FEW].used and "of 25 tokens" in lens.proofs[FEW].why
    read = [made for made in passes[-5:]]
    assert all(n <= FEW and kept <= FEW for n, kept in read) and sum(kept for _, kept in read) == shape[0]
    lens.proofs.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "LONG", 1000)
        expected = lens.read(ids, targets=5, positions=positions, alternatives=[7, 8], top_k=3)
    assert not lens.proofs and list(found.shape[1:]) == shape
    assert_same_reading(found, expected)


def test_longer_contexts_have_shorter_chunks(lens, passes, monkeypatch):
    """So that a mask of a chunk by all tokens so far, and eager weights, stay as large as they are."""
    monkeypatch.setattr(prefix, "FULL_CHUNKS", 2 * FEW)
    ids, positions = ids_of(61), torch.arange(61)[None]
    found = torch.cat([states for _, states in in_chunks(lens, ids, positions, roomy_cache(61), FEW)], 2)
    sizes = [n for n, _ in passes]
    assert sizes[:8] == [7, 7, 3, 3, 3, 3, 3, 1] and set(sizes[7:]) == {1} and sum(sizes) == 61
    assert max(n * end for n, end in zip(sizes, accumulate(sizes), strict=True)) <= FEW * 2 * FEW
    assert difference(found, lens.hidden(ids, positions)) < 5e-6


def test_the_cache_is_gone_before_a_reading_is_put_together(lens, short, monkeypatch):
    lens.read(ids_of(31)[0])  # with the proof
    caches, alive = [], []

    def recorded(n_tokens):
        caches.append(weakref.ref(cache := roomy_cache(n_tokens)))
        return cache

    own = LayerReading.cat

    def cat(parts, dim):
        alive.extend(one() is not None for one in caches if len(parts) == 5)
        return own(parts, dim)

    monkeypatch.setattr(chunks, "roomy_cache", recorded)
    monkeypatch.setattr(LayerReading, "cat", staticmethod(cat))
    lens.read(ids_of(31)[0])
    assert alive == [False]


def assert_same_reading(found, expected):
    assert found.shape == expected.shape and found.tokens.is_batch == expected.tokens.is_batch
    for name in ("argmax", "rank", "targets", "top_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert torch.equal(found.alternatives.rank, expected.alternatives.rank)
    for name in ("logprob", "max_logprob", "entropy", "kl", "top_logprobs"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=2e-5)
    assert len(found.to_frame()) == found.argmax.numel()


def test_a_batch_of_one_has_targets_by_position(lens, short):
    """Each chunk is given those of its own positions."""
    ids = ids_of(31)
    several = torch.stack([ids.roll(-1), ids.roll(-2)], -1)
    found = lens.read(ids, targets=ids.roll(-1), alternatives=several)
    assert found.shape == (4, 1, 31) and lens.proofs[FEW].used
    one = lens.read(ids[0], targets=ids[0].roll(-1), alternatives=several[0])
    assert torch.equal(found.rank[:, 0], one.rank) and torch.equal(found.logprob[:, 0], one.logprob)
    assert torch.equal(found.alternatives.rank[:, 0], one.alternatives.rank)
    assert torch.equal(found.alternatives.rank[..., 0], found.rank), "the same targets, given in another way"


@pytest.mark.parametrize("given", [{"positions": -1}, {"positions": [4, 3, *range(5, 30)]}])
def test_what_is_read_in_one_pass(lens, short, passes, given):
    """Few positions, whose states are less than a cache, and those in another order than the tokens'."""
    lens.read(ids_of(31)[0], **given)
    assert not lens.proofs and passes[-1][0] == 31


def test_two_texts_are_read_in_one_pass(lens, short, passes):
    lens.read(torch.cat([ids_of(31), ids_of(31, 1)]))
    assert not lens.proofs and passes[-1] == (31, 31)


def test_a_model_that_cannot_is_read_in_one_pass(short, passes):
    torch.manual_seed(0)
    config = tf.LlamaConfig(**GROUPED, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0})
    lens = LogitLens(shake(tf.LlamaForCausalLM(config)).eval())
    reading = lens.read(ids_of(31)[0])
    assert not lens.proofs[FEW].used and "with rope_type dynamic" in lens.proofs[FEW].why
    assert reading.shape == (4, 31) and passes[-1] == (31, 31)


def forgets(self, keys, values, layer, *more, **kwargs):
    """A cache that goes wrong behind 20 tokens, more than the gate runs."""
    keys, values = OWN_UPDATE(self, keys, values, layer, *more, **kwargs)
    if layer == 0 and keys.shape[-2] > 20:
        values = values.clone()
        values[..., :10, :] = 0
    return keys, values


OWN_UPDATE = DynamicCache.update


def test_a_long_text_may_show_what_the_gate_cannot(lens, short, monkeypatch, passes):
    monkeypatch.setattr(DynamicCache, "update", forgets)
    found = lens.read(ids_of(31)[0])
    proof = lens.proofs[FEW]
    assert not proof.used and "LlamaForCausalLM branched is not the model" in proof.why
    assert passes[-1] == (31, 31) and found.shape == (4, 31)


def test_a_model_that_takes_no_such_cache_is_read_in_one_pass(lens, short, monkeypatch, passes):
    def refuse(*given, **more):
        raise TypeError("no cache of this kind")

    monkeypatch.setattr(chunks, "roomy_cache", lambda tokens: refuse)
    found, proof = lens.read(ids_of(31)[0]), lens.proofs[FEW]
    assert not proof.used and "LlamaForCausalLM does not run in chunks (" in proof.why
    assert passes[-1] == (31, 31) and found.shape == (4, 31)


def test_the_proof_is_that_of_no_context(lens, short, passes):
    """Whatever a process meets first: of one length, more than a chunk of it, and of one text."""
    runs = [lens.read(ids_of(n, n)[0]) and lens.proofs.pop(FEW) for n in (61, 31)]
    assert runs[0] == runs[1] and runs[0].used
    assert passes.count((25, 25)) == 2


def test_the_proof_stays_within_the_positions(short, passes):
    config = tf.GPT2Config(vocab_size=VOCAB, n_positions=22, n_embd=16, n_layer=2, n_head=2)
    assert prove_chunks(LogitLens(shake(tf.GPT2LMHeadModel(config)).eval()), FEW).used
    assert max(passes) == (22, 22)


def test_without_memory_to_compare_it_is_the_gate_that_counts(lens, short, monkeypatch):
    own = LogitLens.hidden

    def hidden(self, ids, *more):
        if ids.shape[1] > 20:
            raise MemoryError
        return own(self, ids, *more)

    monkeypatch.setattr(LogitLens, "hidden", hidden)
    proof = prove_chunks(lens, FEW)
    assert proof.used and proof.why.endswith("no memory for 25 tokens in one pass to compare with")


def test_argmaxes_may_differ_where_tokens_are_tied(lens):
    """Two tokens with nearly one unembedding row: a step of a state makes the other win, and by how much is said."""
    ids, positions = ids_of(9), torch.arange(9)[None]
    whole = lens.hidden(ids, positions)
    winner = int(lens.stats(whole).argmax[-1, 0, 3])
    other, weight = (winner + 1) % VOCAB, lens.head.weight.data
    apart = torch.randn(lens.d_model, generator=torch.Generator().manual_seed(0)) * weight[winner].norm() / 100
    logits = lens.head.logits(whole[-1, 0, 3:4])[0]
    share = 1e-5 * float(logits.max() - logits.min()) / float(lens.head.logits(whole[-1, 0, 3:4]).abs().max())
    weight[other] = weight[winner] * (1 - share)  # so far below
    weight[other] += apart
    moved, step = whole.clone(), 1e-5
    while int(lens.stats(moved).argmax[-1, 0, 3]) == int(lens.stats(whole).argmax[-1, 0, 3]):
        step *= -1.5
        moved[-1, 0, 3] = whole[-1, 0, 3] + step * apart
    total = whole[..., 0].numel()
    assert compare(lens, [(whole, whole)]).why.endswith("argmax equal")
    tied = compare(lens, [(whole, whole), (moved, whole)], tie=0.1)
    assert f"argmax different in 1 of {2 * total}, by " in tied.why
    margin = float(tied.why.split(", by ")[1].split()[0])
    expected = lens.head.logits(whole[-1, 0, 3:4])[0]
    own = int(lens.stats(moved).argmax[-1, 0, 3])
    expected = float((expected.max() - expected[own]) / (expected.max() - expected.min()))
    assert margin == pytest.approx(expected, rel=0.05) and margin > 0
    if difference(moved, whole) <= lens.parity.tolerance:
        assert tied.used and not compare(lens, [(moved, whole)], tie=margin / 2).used


def test_which_contexts_hold_less_in_chunks(lens):
    """All positions of a long one, whatever its attention; few positions only where attention holds all pairs."""
    assert CPU_CHUNK < LONG and not holds_less(lens, LONG, LONG)
    assert holds_less(lens, LONG + 1, LONG + 1) and not holds_less(lens, 32_000, LONG)
    lens.model.config._attn_implementation = "eager"
    assert holds_less(lens, LONG + 1, 1) and not holds_less(lens, LONG, LONG)


def eager():
    torch.manual_seed(0)
    config = tf.LlamaConfig(**GROUPED)
    config._attn_implementation = "eager"
    return LogitLens(shake(tf.LlamaForCausalLM(config)).eval())


def test_a_runner_keeps_few_positions_and_hands_on_many(short, passes):
    """In parts of a chunk each, their positions in order; what comes of the cache goes with the last."""
    lens, lengths = eager(), []
    inputs = [ModelInput(ids_of(n, n)[0].tolist(), list(range(n - kept, n)), f"{n}") for n, kept in
              ((31, 3), (12, 12), (25, 25), (40, 30))]  # fmt: skip

    def then(batch, cache):
        lengths.append(cache.get_seq_length())
        return [f"text of {one.name}" for one in batch]

    runner = ForwardRunner(lens, keeps_cache=True, chunk_tokens=FEW)
    found = list(runner.run(inputs, then))
    assert runner.chunks.used and lengths == [31, 25, 40, 12]
    for index, one in enumerate(inputs):
        own = [states for states in found if states.index == index]
        assert [states.written for states in own] == [None] * (len(own) - 1) + [f"text of {one.name}"]
        assert sum((list(states.input.positions) for states in own), []) == list(one.positions)
        assert len(own) == {31: 1, 12: 1, 25: 4, 40: 5}[len(one.ids)]
        expected = lens.hidden(torch.tensor([one.ids]), torch.tensor([one.positions]))[:, 0]
        assert difference(torch.cat([states.hidden for states in own], 1), expected) < 5e-6


def test_a_context_at_fault_is_named(short):
    lens = LogitLens(build("gpt2"))
    runner, one = ForwardRunner(lens, chunk_tokens=FEW), ModelInput(ids_of(31)[0].tolist(), range(31), "context 5")

    def no_memory(ids, states):
        if runner.chunks and runner.chunks.used:
            raise MemoryError

    with at_pass(no_memory), pytest.raises(FaultError, match="^context 5: .*expected memory for one context of 31"):
        list(runner.run([one]))


@pytest.fixture(scope="module")
def options(tiny_model, question_file, tmp_path_factory):
    folder = save_tiny_lens(tmp_path_factory.mktemp("lens") / "own", tiny_model, 0.1)
    return SweepConfig(
        *(str(tiny_model), str(question_file), (0, 2)),
        positions="all",
        lens=f"plain,{folder}",
        measures="jsd,states,sublayers",
        generate=3,
        device="cpu",
    )


@pytest.fixture(scope="module")
def ran_whole(options, tmp_path_factory):
    return run_sweep(options, tmp_path_factory.mktemp("runs") / "run")


@pytest.mark.medium
def test_a_sweep_in_chunks_is_the_sweep_in_one_pass(options, ran_whole, short, tmp_path, passes):
    """Through two lenses, with states, texts and what is inside the blocks; contexts that are short run whole."""
    run = run_sweep(options, tmp_path / "run")
    assert run.manifest["chunked_prefill"]["used"] and run.manifest["chunk_tokens"] == FEW
    assert "chunked_prefill" not in ran_whole.manifest and ran_whole.manifest["chunk_tokens"] == CPU_CHUNK
    assert run.manifest["counts"] == ran_whole.manifest["counts"]
    ours, theirs = predictions(run), predictions(ran_whole)
    lengths = {row["n_tokens"] for row in theirs}
    assert not {n for n, kept in passes if n == kept > 20} & lengths, "no pass keeps the states of a long context"
    assert min(lengths) <= 20 < 2 * FEW + 20 < max(lengths)
    for own, other in zip(ours, theirs, strict=True):
        for name, value in other.items():
            if isinstance(value, list) and any(isinstance(one, float) for one in value):
                given = [np.array(v, float) for v in (own[name], value)]  # None is NaN
                np.testing.assert_allclose(*given, rtol=2e-3 if name == "states" else 1e-3, atol=1e-4, err_msg=name)
            else:
                assert own[name] == value, name


@pytest.mark.medium
def test_a_resumed_run_has_the_chunks_that_it_began_with(options, short, tmp_path, monkeypatch):
    """Bit for bit, also where a chunk would be another one by now."""
    options = replace(options, lens=("plain",), measures=(), generate=0)
    whole = run_sweep(options, tmp_path / "whole", questions_per_part=1)
    with pytest.raises(Interrupted):
        run_sweep(options, tmp_path / "run", progress=stop_after(1))
    monkeypatch.setattr(chunks, "CPU_CHUNK", 5)
    run = resume_sweep(tmp_path / "run")
    files = [sorted((one.path / "predictions").iterdir()) for one in (whole, run)]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]] and len(files[0]) > 1


@pytest.mark.medium
def test_a_run_without_chunks_goes_on_without(options, ran_whole, short, tmp_path, monkeypatch):
    """One that an earlier version began, and one whose proof failed."""
    monkeypatch.setattr(DynamicCache, "update", forgets)
    refused = run_sweep(replace(options, generate=0), tmp_path / "refused")
    assert not refused.manifest["chunked_prefill"]["used"]
    own, other = predictions(refused), predictions(ran_whole)
    assert [row["target_logprob"] for row in own] == [row["target_logprob"] for row in other]
    from refinelens.sweeping.run_spec import RunSpec

    entries = [{}, {"chunk_tokens": 5}, {"chunk_tokens": 5, "chunked_prefill": {"used": False}}]
    assert [RunSpec(tmp_path, entry, "resume").chunk_tokens for entry in entries] == [0, 5, 0]
