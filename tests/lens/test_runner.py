"""Contexts in batches of several lengths: the states each has alone, fewer where memory runs out, errors by name."""

import weakref

import pytest
import torch

from families import VOCAB, build
from refinelens import LogitLens
from refinelens.errors import FaultError, InputError
from refinelens.lens.prefix import difference
from refinelens.lens.runner import TOKENS_PER_BATCH, ForwardRunner, MemoryLimit, ModelInput, Proof, in_batches

LENGTHS = (9, 30, 10, 1, 29, 11, 28)


def inputs_of(lengths, named=True):
    draw = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, VOCAB, (n,), generator=draw).tolist() for n in lengths]
    names = [f"context {index}" if named else "" for index in range(len(lengths))]
    return [ModelInput(own, range(max(0, len(own) - 3), len(own)), name) for own, name in zip(ids, names, strict=True)]


class Machine:
    """A lens whose passes may fail; keeps the lengths of the contexts of each."""

    def __init__(self, lens, check=lambda ids: None, device="cpu"):
        self.lens, self.check, self.passes = lens, check, []
        self.model, self.device = None, torch.device(device)

    def hidden(self, ids, positions, mask, cache, *_):
        self.passes.append([ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist())
        self.check(ids)
        return self.lens.hidden(ids, positions, mask, cache) if self.lens else torch.zeros(4, *positions.shape, 8)


@pytest.fixture(scope="module")
def lens():
    return LogitLens(build("llama"))


@pytest.mark.parametrize("batch_size", [None, 1, 2, 3, 100])  # none, and one that leaves a rest
def test_states_are_those_of_a_context_alone(lens, batch_size):
    """Whatever stands beside it; contexts of similar length do."""
    inputs, machine = inputs_of(LENGTHS), Machine(lens)
    found = {states.index: states for states in ForwardRunner(machine, batch_size).run(inputs)}
    assert sorted(found) == list(range(len(inputs)))
    for index, one in enumerate(inputs):
        alone = lens.hidden(torch.tensor([one.ids]), torch.tensor(list(one.positions)))[:, 0]
        assert found[index].hidden.shape == alone.shape and found[index].n_saved == 0
        assert difference(found[index].hidden, alone) < 5e-6
        if batch_size in (None, 1):
            assert torch.equal(found[index].hidden, alone)
    size = batch_size or 1
    ordered = list(LENGTHS) if size == 1 else sorted(LENGTHS, reverse=True)
    assert machine.passes == [ordered[start : start + size] for start in range(0, len(ordered), size)]


def test_a_gpu_fills_its_batches_by_tokens():
    """Padding included: no pass of several contexts is larger than the limit, and none leaves room for one more."""
    lengths = [700, 650, 300, 299, 5000, 20000, *[20] * 900]
    machine = Machine(None, device="cuda")
    assert len(list(ForwardRunner(machine).run(inputs_of(lengths)))) == len(lengths)
    assert sorted(sum(machine.passes, [])) == sorted(lengths) and machine.passes[0] == [20000]
    for batch, following in zip(machine.passes, [*machine.passes[1:], []], strict=True):
        assert len(batch) * max(batch) <= TOKENS_PER_BATCH or len(batch) == 1
        assert not following or (len(batch) + 1) * max(batch) > TOKENS_PER_BATCH


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_fewer_from_when_memory_ran_out(lens, error):
    said, held = [], []

    def check(ids):
        assert all(tensor() is None for tensor in held), "what did not fit is let go before the next try"
        states = torch.zeros(4)
        held.append(weakref.ref(states))
        if len(ids) > 2:
            raise error

    machine = Machine(lens, check)
    runner = ForwardRunner(machine, 7)
    for _ in range(2):
        assert len(list(runner.run(inputs_of(LENGTHS), warn=said.append))) == len(LENGTHS)
    assert list(map(len, machine.passes)) == [7, 3, 1, *[1] * 6, *[1] * 7]
    assert said == [
        "out of memory with 7 contexts of 30 tokens; from here on at most 3 at a time",
        "out of memory with 3 contexts of 30 tokens; from here on at most 1 at a time",
    ]
    assert runner.limit.at_most == 1


@pytest.mark.parametrize(
    "error, words",
    [
        (InputError("hidden: expected finite"), "hidden: expected finite"),
        (RuntimeError("a fault in a driver"), "RuntimeError: a fault in a driver"),
        (MemoryError(), "``device``: expected memory for one context of 11 tokens, got out of memory; use fewer"),
    ],
)
def test_of_a_batch_the_context_at_fault_is_named(lens, error, words):
    inputs = inputs_of(LENGTHS)
    broken = inputs[5].ids

    def check(ids):
        if any(row[: len(broken)] == broken for row in ids.tolist()):
            raise error

    with pytest.raises(FaultError, match=f"^context 5: {words}"):
        list(ForwardRunner(Machine(lens, check), 4).run(inputs))
    with pytest.raises(type(error)) as raised:
        list(ForwardRunner(Machine(lens, check), 4).run(inputs_of(LENGTHS, named=False)))
    assert raised.value is error, "without a name it is left as it is"


def test_a_fault_that_passes_is_survived(lens):
    """A batch that failed once runs in halves; nothing is run twice that was run, and later calls are as before."""
    failed = []

    def check(ids):
        if not failed:
            failed.append(len(ids))
            raise InputError("once")

    runner = ForwardRunner(Machine(lens, check), 4)
    assert {states.index for states in runner.run(inputs_of(LENGTHS))} == set(range(len(LENGTHS)))
    assert runner.limit.at_most is None and failed == [4]


def test_what_goes_on_from_a_pass(lens):
    """It is told which contexts ran and is given their keys and values; what it gives is theirs."""
    inputs, seen = inputs_of(LENGTHS), []

    def then(batch, cache):
        seen.append((len(batch), None if cache is None else len(cache.layers[0].keys)))
        return [f"text of {one.name}" for one in batch]

    for keeps in (True, False):
        runner = ForwardRunner(lens, 4, keeps_cache=keeps)
        assert all(states.written == f"text of context {states.index}" for states in runner.run(inputs, then))
    assert seen == [(4, 4), (3, 3), (4, None), (3, None)]


def test_nothing_to_run(lens):
    assert list(ForwardRunner(lens).run([])) == []
    assert list(in_batches([], pytest.fail, pytest.fail)) == []


def test_a_limit_is_kept():
    """Whatever is batched, a context or not: no second try at what did not fit, and nothing is left out."""
    limit, tried = MemoryLimit(), []

    def work(batch):
        tried.append(len(batch))
        if len(batch) > 5:
            raise MemoryError
        return batch

    def batched(n, work):
        sizes = (lambda left: limit.of(20), lambda batch: limit.lower(len(batch)))
        return sum(in_batches(range(n), work, *sizes), [])

    for n in (20, 20, 2):
        assert batched(n, work) == list(range(n))
    assert tried == [20, 10, *[5] * 4, *[5] * 4, 2]
    with pytest.raises(MemoryError):
        batched(20, lambda batch: (_ for _ in ()).throw(MemoryError))


def test_a_proof_is_due_for_contexts_more_than_twice_as_long():
    proof = Proof()
    assert [proof.is_due(n) for n in (5, 10, 11, 22, 9, 23)] == [True, False, True, False, False, True]
