"""Plans: a call like an earlier one launches the same kernels with the same arguments, and nothing is looked up again.

The kernels are stand-ins that note what they are given; `benchmarks/host_time.py` has a driver that does.
"""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from gate_process import own_environment
from lens_cases import SMALL, TMA
from refinelens.kernels import config, fused_lens, kernel, kernel_tma, launches, norm_kernel
from refinelens.kernels.fused_lens import packed_lens
from refinelens.kernels.reference import LayerNorm, LensHead, RMSNorm

KERNELS = [
    (norm_kernel, "_norm_kernel"),
    (kernel, "_target_kernel"),
    (kernel, "_lens_kernel"),
    (kernel, "_merge_kernel"),
    (kernel_tma, "_tma_kernel"),
    (kernel_tma, "_ties_kernel"),
]
ARGUMENTS = {name: getattr(module, name).arg_names for module, name in KERNELS}


class FakeKernel:
    """Notes ordinary launches in ``ordinary`` and those of what it was compiled to in ``replayed``, alike."""

    def __init__(self, name, arg_names, ordinary, replayed):
        self.name, self.arg_names, self.ordinary = name, arg_names, ordinary
        self.compiled = SimpleNamespace(function=name, packed_metadata=None, run=self.run)
        self.replayed = replayed

    def __getitem__(self, grid):
        def launch(*args, **flags):
            given = dict(zip(self.arg_names, args, strict=False)) | flags
            given = [given[name] for name in self.arg_names]
            given = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in given]
            self.ordinary.append((self.name, *grid, given))
            return self.compiled

        return launch

    def run(self, x, y, z, stream, function, metadata, launch_metadata, enter, leave, *args):
        assert (y, z, launch_metadata, enter, leave) == (1, 1, None, None, None)
        self.replayed.append((function, x, list(args)))


@pytest.fixture
def launched(monkeypatch):
    """What was launched in the ordinary way, and what was replayed."""
    made = SimpleNamespace(ordinary=[], replayed=[])
    for module, name in KERNELS:
        fake = FakeKernel(name, ARGUMENTS[name], made.ordinary, made.replayed)
        monkeypatch.setattr(module, name, fake)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(launches, "driver", SimpleNamespace(active=StillDriver()))
    launches.forget_plans()
    yield made
    launches.forget_plans()


class StillDriver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def make(n_rows=5, d_model=64, n_vocab=70, dtype=torch.float32):
    """Operands at addresses of their own."""
    hidden, weight = torch.zeros(n_rows, d_model, dtype=dtype), torch.zeros(n_vocab, d_model, dtype=dtype)
    norm = LayerNorm(torch.zeros(d_model), torch.zeros(d_model))
    return dict(hidden=hidden, head=LensHead(weight, norm), targets=torch.zeros(n_rows, dtype=torch.int64))


def addresses(given):
    head = given["head"]
    tensors = (given["hidden"], head.weight, head.norm.weight, head.norm.bias, head.bias, given["targets"])
    return [tensor.data_ptr() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize(
    "how, kernels",
    [
        (dict(config=SMALL), ["_norm_kernel", "_target_kernel", "_lens_kernel", "_lens_kernel", "_merge_kernel"]),
        (
            dict(config=TMA, same_bits=True),
            ["_norm_kernel", "_target_kernel", "_tma_kernel", "_merge_kernel", "_ties_kernel"],
        ),
    ],
    ids=["pointers", "tma"],
)
def test_a_second_call_gets_the_arguments_of_the_first(launched, monkeypatch, how, kernels):
    first, second = make(), make()
    results = [packed_lens(**first, **how)]
    assert [name for name, *_ in launched.ordinary] == kernels and not launched.replayed
    for function in ("pinned_config", "tile_ranges"):  # nothing is decided again
        monkeypatch.delattr(config, function)
    for function in ("config_for", "normed_rows", "reduce_rows", "launch_targets", "chunk_blocks"):
        monkeypatch.delattr(fused_lens, function)
    results.append(packed_lens(**second, **how))
    assert len(launched.ordinary) == len(kernels)
    moved = dict(zip(addresses(first), addresses(second), strict=True))
    for before, after in zip(*results, strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype
        moved |= {a.data_ptr(): b.data_ptr() for a, b in zip(before, after, strict=True)}
    buffers = {}  # between the kernels: in one workspace, each where it was relative to what it is a part of
    for (name, programs, args), (function, replayed_programs, replayed) in zip(
        launched.ordinary, launched.replayed, strict=True
    ):
        assert (name, programs) == (function, replayed_programs) and len(args) == len(replayed)
        for argument, value, other in zip(ARGUMENTS[name], args, replayed, strict=True):
            if not argument.endswith("_ptr") or value is None:
                assert value == other and type(value) is type(other), argument
            elif value in moved:
                assert other == moved[value], argument
            else:
                assert buffers.setdefault(value, other) == other, argument
    assert len(set(buffers.values())) == len(buffers) >= 6  # x_hat, and five statistics of every split


def test_buffers_do_not_overlap(launched):
    """Every buffer of the workspace, from its beginning to the next one's."""
    given = make()
    packed_lens(**given, config=SMALL)
    (plan,) = launches._plans.values()
    sizes = [5 * 4 * 3 * 4, 5 * 4 * 2 * 4]  # rows x splits of both launches x statistics, fp32 and int32
    padded = 64 * 64 * 4
    assert plan._workspace == sum(-(-size // 256) * 256 for size in (padded, *sizes))
    places = {(number, offset) for made in plan.launches for _, number, offset in made.pointers}
    own = sorted(offset for number, offset in places if number == 8)  # six operands and two results come before
    assert own[0] == 0 and own[1] == padded and own[-1] < plan._workspace


def variations():
    """Another kind each, by one thing."""
    given = make()
    head, norm = given["head"], given["head"].norm
    shifted = torch.zeros(70 * 64 + 1)[1:].view(70, 64)
    yield "rows", given | dict(hidden=torch.zeros(6, 64), targets=torch.zeros(6, dtype=torch.int64))
    yield "no targets", given | dict(targets=None)
    yield "strided targets", given | dict(targets=torch.zeros(10, dtype=torch.int64)[::2])
    yield "strided rows", given | dict(hidden=torch.zeros(5, 65)[:, :64])
    yield "alignment of hidden", given | dict(hidden=torch.zeros(5 * 64 + 1)[1:].view(5, 64))
    yield "alignment of the unembedding", given | dict(head=replace(head, weight=shifted))
    yield "alignment of the norm", given | dict(head=replace(head, norm=LayerNorm(torch.zeros(65)[1:], norm.bias)))
    yield "tokens", given | dict(head=replace(head, weight=torch.zeros(71, 64)))
    yield "half", make(dtype=torch.float16)
    yield "norm", given | dict(head=replace(head, norm=RMSNorm(norm.weight)))
    yield "norm in half", given | dict(head=replace(head, norm=LayerNorm(norm.weight.half(), norm.bias.half())))
    yield "no norm", given | dict(head=replace(head, norm=None))
    yield "eps", given | dict(head=replace(head, norm=replace(norm, eps=1e-3)))
    yield "bias", given | dict(head=replace(head, bias=torch.zeros(70)))
    yield "softcap", given | dict(head=replace(head, softcap=5.0))
    yield "scale", given | dict(head=replace(head, scale=0.5))
    yield "configuration", given | dict(config=replace(SMALL, splits=1))
    yield "bits", given | dict(same_bits=True)


@pytest.mark.parametrize("given", [pytest.param(given, id=name) for name, given in variations()])
def test_another_kind_has_a_plan_of_its_own(launched, given):
    packed_lens(**make(), config=SMALL)
    before = len(launched.ordinary)
    for _ in range(2):
        packed_lens(**dict(config=SMALL) | given)
    once = len(launched.ordinary) - before
    assert once > 0 and len(launched.replayed) == once and len(launches._plans) == 2
    packed_lens(**make(), config=SMALL)
    assert len(launched.replayed) == once + before


def assert_ordinary(launched, given=None, **how):
    for _ in range(2):
        packed_lens(**given or make(), config=SMALL, **how)
    assert launched.ordinary and not launched.replayed


def test_an_operand_that_is_two_is_launched_in_the_ordinary_way(launched):
    """The next call of the kind may have two in its place."""
    given = make(n_rows=70)
    assert_ordinary(launched, given | dict(hidden=given["head"].weight))


def test_several_chunks_are_launched_in_the_ordinary_way(launched, monkeypatch):
    monkeypatch.setattr(config, "X_HAT_BYTES", 1)
    kept = []
    own = launches.Recorder.plan
    monkeypatch.setattr(launches.Recorder, "plan", lambda self: kept.append(len(self.buffers)) or own(self))
    assert_ordinary(launched, make(n_rows=70))
    assert kept and not any(kept)  # the buffers of earlier chunks are gone


def test_an_unknown_triton_is_launched_in_the_ordinary_way(launched, monkeypatch):
    monkeypatch.setattr(launches.triton, "__version__", "9.1.0")
    assert_ordinary(launched)


def test_hooks_hear_of_every_launch(launched):
    """As profilers set them."""
    packed_lens(**make(), config=SMALL)
    before = len(launched.ordinary)
    hooks = launches.knobs.runtime.launch_enter_hook
    hooks.add(print)
    try:
        packed_lens(**make(), config=SMALL)
    finally:
        hooks.remove(print)
    assert len(launched.ordinary) == 2 * before and not launched.replayed
    packed_lens(**make(), config=SMALL)
    assert len(launched.replayed) == before


def test_plans_are_bounded(launched, monkeypatch):
    monkeypatch.setattr(launches, "MAX_PLANS", 2)
    for n_rows in (1, 2, 3):
        packed_lens(**make(n_rows), config=SMALL)
    assert [kind[-6][1][0] for kind in launches._plans] == [2, 3]


SCRIPT = """
import json
import torch
import host_time
host_time.pretend()
from host_time import StandIn
from refinelens.kernels.fused_lens import packed_lens
from refinelens.kernels.config import LensConfig
from refinelens.kernels.reference import LayerNorm, LensHead
def call(**how):
    # Kept until both calls are over, so that no address comes again.
    kept.append((torch.zeros(5, 64).bfloat16(), torch.zeros(70, 64).bfloat16(), torch.zeros(64), torch.zeros(5).long()))
    hidden, weight, norm, targets = kept[-1]
    StandIn.launches.clear()
    packed_lens(hidden, LensHead(weight, LayerNorm(norm, None)), targets, **how)
    return [list(given) for given in StandIn.launches], [t.data_ptr() for t in kept[-1]]
kept, out = [], []
# As small as tensor cores take them: it is the launchers that matter.
config = LensConfig(64, 32, 32, 32, num_warps=4, num_stages=2, kind="tma", splits=2)
for same_bits in (False, True):
    how = dict(config=config, same_bits=same_bits)
    (first, old), (second, new) = call(**how), call(**how)
    moved = dict(zip(old, new))
    for a, b in zip(first, second, strict=True):
        tensors = [isinstance(value, torch.Tensor) for value in a]
        pairs = [(x.data_ptr() if is_tensor else x, y) for x, y, is_tensor in zip(a, b, tensors, strict=True)]
        numbers = [x == y for (x, y), is_tensor in zip(pairs[9:], tensors[9:]) if not is_tensor]
        operands = [moved[x] == y for x, y in pairs if x in moved and isinstance(y, int)]
        addresses = [type(y) is int for (_, y), is_tensor in zip(pairs, tensors) if is_tensor]
        out.append(dict(name=a[4], same=a[:6] == b[:6], silent=b[6:9] == [None] * 3, numbers=all(numbers),
                        operands=all(operands), addresses=all(addresses)))
print(json.dumps(out))
"""


@pytest.mark.slow
def test_launchers_of_this_triton_are_given_the_same():
    """Compiled kernels of the installed Triton: what its launchers get in a replay is what Triton gives them itself."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=own_environment())
    assert run.returncode == 0, run.stderr[-4000:]
    launches = json.loads(run.stdout.splitlines()[-1])
    names = ["_norm_kernel", "_target_kernel", "_lens_kernel", "_merge_kernel"]
    names += ["_norm_kernel", "_target_kernel", "_tma_kernel", "_merge_kernel", "_ties_kernel"]
    assert [launch.pop("name") for launch in launches] == names
    assert all(all(launch.values()) for launch in launches), launches
