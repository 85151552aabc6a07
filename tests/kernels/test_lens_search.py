"""The search for a configuration and the recording of graphs: what their hosts decide, and on a GPU what they do."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lens_cases import BF16, DEVICE, SMALL, operands
from refinelens.kernels import config, search
from refinelens.kernels.config import ShapeClass, pinned_config
from refinelens.kernels.fused_lens import fused_lens_triton
from refinelens.kernels.graphs import GraphedLens
from refinelens.kernels.reference import LensHead
from refinelens.kernels.search import Trial, candidate_configs, fastest, outputs_agree, search_config

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


def shape_class(dtype=BF16, n_vocab=50257, d_model=768, n_rows=13312, bias=False):
    aligned = d_model % 16 == 0
    options = (bias, False, True)
    return ShapeClass(torch.device("cpu"), dtype, aligned, n_vocab, d_model, options, n_rows.bit_length())


def test_candidates_start_with_the_pinned_configuration():
    found = candidate_configs(shape_class(), 13312, processors=132)
    assert found[0] == pinned_config(BF16, aligned=True, n_rows=13312)
    assert {config.kind for config in found} == {"tma", "plain"}
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    "shape", [shape_class(torch.float32), shape_class(d_model=65)], ids=["fp32", "unaligned"]
)
def test_no_candidate_by_tma_where_it_cannot_run(shape):
    assert {config.kind for config in candidate_configs(shape, 13312, processors=132)} == {"plain"}


def test_only_hopper_loads_by_tma():
    assert pinned_config(BF16, aligned=True, n_rows=1024, generation=9).kind == "tma"
    assert {pinned_config(BF16, True, 1024, generation).kind for generation in (8, 10)} == {"plain"}


def test_the_pinned_configuration_stays_unless_clearly_beaten():
    pinned, other, wrong = SMALL, replace(SMALL, group=8), replace(SMALL, group=4)
    unsound = Trial(wrong, False, ())
    assert fastest([Trial(pinned, True, (1.0,)), Trial(other, True, (0.99,)), unsound]) == pinned
    assert fastest([Trial(pinned, True, (1.0,)), Trial(other, True, (0.9,)), unsound]) == other


def test_outputs_agree_on_bits_of_logits_only():
    hidden, unembedding, targets = operands(5, 17, 67, torch.float32)
    out = fused_lens_triton(hidden, LensHead(unembedding), targets, config=SMALL)
    assert outputs_agree(out, out)
    assert outputs_agree(replace(out, entropy=out.entropy + 1e-6), out)
    assert not outputs_agree(replace(out, entropy=out.entropy + 1e-2), out)
    assert not outputs_agree(replace(out, max_logit=out.max_logit.nextafter(out.max_logit + 1)), out)
    assert not outputs_agree(replace(out, target_rank=out.target_rank + 1), out)


def test_a_kept_configuration_is_used_for_its_class_only():
    hidden, unembedding, targets = operands(5, 64, 67, torch.float32)
    head = LensHead(unembedding)
    shape = ShapeClass.of(hidden, head, targets)
    config.KEPT[shape] = SMALL
    try:
        assert config.config_for(shape, 5) == SMALL
        others = (
            ShapeClass.of(hidden, LensHead(unembedding, softcap=5.0), targets),
            ShapeClass.of(hidden, head, None),
            ShapeClass.of(hidden.repeat(2, 1), head, targets),
        )
        for other in others:
            assert config.config_for(other, 5) == pinned_config(torch.float32, aligned=True, n_rows=5)
    finally:
        del config.KEPT[shape]


@pytest.mark.skipif(DEVICE != "cpu", reason="is about machines without a CUDA device")
def test_search_without_a_gpu_is_refused():
    hidden, unembedding, _ = operands(5, 17, 67, torch.float32)
    with pytest.raises(ValueError, match="hidden: expected a CUDA device, got cpu"):
        search_config(hidden, LensHead(unembedding))


class FakeRecording:
    """Stands in for a captured graph: counts its replays, computes anew."""

    def __init__(self, run, hidden, targets):
        self.run, self.replays = run, 0

    def replay(self, hidden, targets):
        self.replays += 1
        return self.run(hidden, targets)


def test_graphs_are_recorded_once_per_shape_and_bounded():
    made = []

    def record(*call):
        made.append(FakeRecording(*call))
        return made[-1]

    hidden, unembedding, targets = operands(5, 17, 67, torch.float32)
    lens = GraphedLens(LensHead(unembedding), max_shapes=2, record=record)
    for _ in range(3):
        out = lens(hidden, targets)
    lens(hidden)  # without targets: another graph
    assert [recording.replays for recording in made] == [3, 1]
    third = lens(hidden[:3], targets[:3])  # beyond max_shapes, without a graph
    empty = lens(hidden[:0], targets[:0])
    assert len(made) == 2 and empty.argmax.shape == (0,)
    assert torch.equal(out.argmax[:3], third.argmax) and torch.equal(out.target_rank[:3], third.target_rank)


@needs_gpu
def test_replayed_graph_equals_a_plain_call():
    head = lens = None
    for seed in range(3):  # the graph must read the new values, and results must stay the caller's own
        hidden, unembedding, targets = operands(104, 768, 50257, BF16)
        hidden = hidden.roll(seed, 0)
        head = head or LensHead(unembedding)
        lens = lens or GraphedLens(head)
        expected = fused_lens_triton(hidden, head, targets)
        for name, value in lens(hidden, targets).items():
            assert torch.equal(value, getattr(expected, name)), name


@needs_gpu
def test_search_finds_a_sound_configuration():
    hidden, unembedding, targets = operands(1027, 768, 5000, BF16)
    tried = search.trials(hidden, LensHead(unembedding), targets)
    assert tried[0].agrees and all(trial.agrees for trial in tried if trial.config.kind == "plain")
    for trial in tried:
        print(trial.config.kind, trial.config.group, trial.config.splits, trial.agrees, sorted(trial.seconds)[:1])
    assert search_config(hidden, LensHead(unembedding), targets) in [trial.config for trial in tried if trial.agrees]
