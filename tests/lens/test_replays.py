"""Short readings that come again are replayed: once they gave the bits of ordinary launches, and never else."""

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import torch

from families import VOCAB, build
from refinelens import LogitLens
from refinelens.errors import InputError
from refinelens.kernels.lists_reference import MOST_LISTED
from refinelens.kernels.reference import LayerNorm, LensHead
from refinelens.lens import replays
from refinelens.lens.replays import MOST_RECORDED, ORDINARY, Readout, Replays

WIDTH = 16
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Played:
    """As a recording: its launches see its own buffers, and what it hands out are copies out of one more."""

    made = []

    def __init__(self, run, *inputs):
        self.run, self.replayed = run, 0
        self.inputs = [None if one is None else one.clone(memory_format=torch.contiguous_format) for one in inputs]
        Played.made.append(self)

    def replay(self, *inputs):
        from refinelens.kernels.graphs import packed, unpacked

        self.replayed += 1
        self.take(inputs)
        found = self.run(*self.inputs)
        data, places = packed(found)
        return unpacked(found, data.clone(), places)

    def take(self, inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given)


class Baked(Played):
    """Has what it read when it was made, whatever it is given."""

    def take(self, inputs):
        pass


class Refused(Played):
    def __init__(self, run, *inputs):
        super().__init__(run, *inputs)
        raise RuntimeError("operation not permitted when stream is capturing")


@pytest.fixture(autouse=True)
def made():
    Played.made.clear()
    return Played.made


def readout(**more):
    generator = torch.Generator().manual_seed(0)
    weight, scale = (torch.randn(*shape, generator=generator) for shape in ((67, WIDTH), (WIDTH,)))
    given = {"kl": True, "top_k": 5, "normed": False, "backend": "reference"} | more
    return Readout(LensHead(weight, LayerNorm(scale, None, 1e-5)), **given)


def call(seed, layers=3, rows=5, targets=True):
    generator = torch.Generator().manual_seed(seed)
    block = torch.randn(layers, rows, WIDTH, generator=generator)
    return block, torch.randint(67, (rows,), generator=generator) if targets else None, None, False


def again(replay, read, given, times=ORDINARY + 1):
    return [replay(read, *given) for _ in range(times)][-1]


@pytest.mark.parametrize("more", [{}, {"kl": False, "top_k": 0}, {"normed": True}])
def test_the_third_of_a_kind_is_recorded(made, more):
    """And its results, and those of later ones, are the bits of ordinary launches, each the caller's own."""
    replay, read, found = Replays(Played, "cpu"), readout(**more), []
    for seed in range(ORDINARY + 3):
        assert len(made) == (seed > ORDINARY)
        found.append(replay(read, *call(seed)))
    assert made[0].replayed == 2 + 3  # two of them the proof
    assert all(one == read(*call(seed)) for seed, one in enumerate(found))
    found[-1].argmax.zero_()
    assert replay(read, *call(seed)) == read(*call(seed))


@pytest.mark.parametrize("record", [Baked, Refused])
@pytest.mark.parametrize("targets", [True, False])
def test_a_recording_that_is_wrong_or_cannot_be_made(made, record, targets):
    """Also one of states that are all alike. A wrong one is that of its kind, after one that failed none is tried."""
    replay, read = Replays(record, "cpu"), readout()
    zeros = (torch.zeros(3, 5, WIDTH), torch.zeros(5, dtype=torch.int64) if targets else None, None, False)
    again(replay, read, zeros)
    for seed in range(3):
        assert replay(read, *call(seed, targets=targets)) == read(*call(seed, targets=targets))
    assert len(made) == 1 and made[0].replayed == (record is Baked), "tried once"
    again(replay, read, call(0, rows=4))
    assert len(made) == (2 if record is Baked else 1) and replay.enabled == (record is Baked)


def test_broken_values_are_no_reason_against_a_recording(made, monkeypatch):
    monkeypatch.setattr("refinelens.op.fused_lens.check_result", lambda *given: None)  # as by Triton, which asks later
    replay, read = Replays(Played, "cpu"), readout(kl=False, top_k=0)
    broken, targets, *more = call(0)
    broken[0, 0, 0] = torch.nan
    again(replay, read, (broken, targets, *more))
    assert replay(read, *call(1)) == read(*call(1)) and made[0].replayed == 4


def test_kinds_have_recordings_of_their_own(made, monkeypatch):
    replay, read = Replays(Played, "cpu"), readout()
    head, (block, targets, *rest) = read.head, call(0)
    heads = [
        *(LensHead(head.weight.clone(), head.norm), LensHead(head.weight[:30], head.norm), LensHead(head.weight, None)),
        *(replace(head, softcap=2.0), replace(head, scale=0.5), replace(head, norm=replace(head.norm, eps=1e-2))),
        replace(head, bias=torch.arange(67.0)),
    ]
    half = LensHead(head.weight.half(), head.norm)
    strided = torch.cat([block, block], 1)[:, : block.shape[1]]
    targets = targets.clamp(max=29)
    kinds = [
        *((read, call(0)), (read, call(0, rows=4)), (read, call(0, layers=2)), (read, call(0, targets=False))),
        *((one, call(0)) for one in (replace(read, kl=False), replace(read, top_k=3))),
        *((replace(read, head=one), (block, targets, *rest)) for one in heads),
        *((replace(read, head=half), (block.half(), targets, *rest)), (read, (strided, targets, *rest))),
    ]
    monkeypatch.setattr(replays, "MOST_RECORDED", len(kinds))
    for times in (1, 2):
        for number, (one, given) in enumerate(kinds):
            assert again(replay, one, given) == one(*given), number
        assert len(made) == len(kinds), times


def test_recordings_are_few(made, monkeypatch):
    replay, read = Replays(Played, "cpu"), readout()
    for rows in range(1, MOST_RECORDED + 3):
        assert again(replay, read, call(0, rows=rows)) == read(*call(0, rows=rows))
    assert len(made) == MOST_RECORDED
    monkeypatch.setattr(replays, "MOST_COUNTED", 3)
    once = Replays(Played, "cpu")
    for rows in range(1, 9):
        once(read, *call(0, rows=rows))
    assert len(once._calls) <= 3


def test_what_stays_ordinary(made):
    """Whatever waits for the device in between, is long, or runs where there are no graphs."""
    read, (block, targets, _, _) = readout(), call(0)
    several = torch.zeros(5, 2, dtype=torch.int64)
    for replay, one, given in (
        (Replays(Played, "cpu"), read, (block, targets, None, True)),
        (Replays(Played, "cpu"), read, (block, targets, several, False)),
        (Replays(Played, "cpu"), replace(read, top_k=MOST_LISTED + 1), call(0)),
        (Replays(Played, "cpu"), read, call(0, rows=342)),
        (Replays(Played, "cpu"), readout(kl=False, top_k=0), call(0, rows=0)),
        (Replays(Played, "cuda"), read, call(0)),
    ):
        assert again(replay, one, given) == one(*given)
    off = Replays(Played, "cpu")
    off.enabled = False
    again(off, read, call(0))
    assert not made


def test_one_thread_replays_at_a_time(made):
    replay, read = Replays(Played, "cpu"), readout()
    again(replay, read, call(0))
    inside, go_on = threading.Event(), threading.Event()

    def waits(self, *inputs):
        inside.set()
        assert go_on.wait(30)
        return self.run(*inputs)

    made[0].replay = waits.__get__(made[0])  # of the instance
    thread = threading.Thread(target=replay, args=(read, *call(0)))
    thread.start()
    assert inside.wait(30)
    assert replay(read, *call(1)) == read(*call(1)), "meanwhile an ordinary one"
    go_on.set()
    thread.join(30)


def test_inference_mode_and_copies(made):
    """Buffers belong to neither mode; a copy has none of them."""
    replay, read = Replays(Played, "cpu"), readout()
    with torch.inference_mode():
        again(replay, read, call(0))
    assert replay(read, *call(1)) == read(*call(1))
    for other in (copy.deepcopy(replay), pickle.loads(pickle.dumps(replay))):
        assert not other._recorded and replay._recorded and other._record is Played and other.enabled
    replay.enabled = False
    assert not copy.deepcopy(replay).enabled


@pytest.fixture
def lens(monkeypatch):
    lens = LogitLens(build("llama"))
    lens.replays = Replays(Played, "cpu")
    monkeypatch.setattr(LogitLens, "_checks_at_once", lambda self, states: True)
    return lens


def test_a_lens_reads_by_itself_so(lens, made):
    ids = torch.randint(3, VOCAB, (8, 6), generator=torch.Generator().manual_seed(0))
    ordinary = LogitLens(lens.model)
    for row in ids:
        assert lens.read(row, targets=row[0], positions=[2, 5]) == ordinary.read(row, targets=row[0], positions=[2, 5])
    assert len(made) == 1 and made[0].replayed == 2 + len(ids) - ORDINARY
    lens.replays.enabled = False
    lens.read(ids[0], targets=ids[0, 0], positions=[2, 5])
    assert made[0].replayed == 2 + len(ids) - ORDINARY


def test_what_is_wrong_is_said_as_ever(lens, made):
    states = lens.hidden(torch.arange(3, 9)[None], torch.arange(6))[:, 0]
    for _ in range(ORDINARY + 2):
        lens.read_states(states, 5)
    assert made[0].replayed
    states[1, 2, 3] = torch.nan
    with pytest.raises(InputError, match="expected finite values, got NaN in row 8"):
        lens.read_states(states, 5)
    with pytest.raises(InputError, match="targets: expected ids from 0"):
        lens.read_states(states.nan_to_num(), VOCAB)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_graphs_of_a_gpu_give_the_same_bits(name, dtype):
    model = build(name).to("cuda", dtype)
    lens, ordinary = LogitLens(model), LogitLens(model)
    ordinary.replays.enabled = False
    for seed in range(ORDINARY + 4):
        ids = torch.randint(3, VOCAB, (4, 9), generator=torch.Generator().manual_seed(seed))
        for more in ({"kl": False, "top_k": 0}, {}):
            assert lens.read(ids, targets=ids.roll(-1), **more) == ordinary.read(ids, targets=ids.roll(-1), **more)
    of_kind = {kind[-4]: recording is not None for kind, recording in lens.replays._recorded.items()}  # by kl
    print(f"{name} in {dtype}: replayed {of_kind}")
    assert of_kind[False], "the plain lens, as GraphedLens does it"
