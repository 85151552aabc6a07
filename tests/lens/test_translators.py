"""Reading the layers through translators, against the formula in fp64."""

from copy import copy, deepcopy

import pytest
import torch

from lens_folders import D_MODEL, N_LAYERS, VOCAB, random_translators, tiny
from refinelens import LogitLens
from refinelens.errors import InputError
from refinelens.lens.translators import Translators
from tiny import assert_matches_truth, truth

POSITIONS = torch.tensor([0, 3, 4, 7, 8, 9, 10])


@pytest.fixture(scope="module", params=["gpt_neox", "gemma2"])
def lens(request):
    return LogitLens(tiny(request.param))


def hidden_and_targets(lens, batch=2, positions=POSITIONS):
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, VOCAB, (batch, 11), generator=generator)
    targets = torch.randint(VOCAB, (batch, len(positions)), generator=generator)
    return lens.hidden(ids, positions), targets


def fields(reading):
    names = ("argmax", "target_rank", "max_logit", "logsumexp", "entropy", "target_logit")
    return {name: getattr(reading.stats, name) for name in names} | {"kl": reading.kl}


def by_hand(hidden, translators, dtype):
    """Every layer below the output translated row by row, in another dtype."""
    x, weight, bias = (t.to(dtype) for t in (hidden, translators.weight, translators.bias))
    moved = [x[layer] + x[layer] @ weight[layer].mT + bias[layer] for layer in range(translators.n_layers)]
    return torch.stack([*moved, x[-1]])


def test_zero_translators_are_the_plain_lens_exactly(lens):
    hidden, targets = hidden_and_targets(lens)
    zeros = Translators(torch.zeros(N_LAYERS, D_MODEL, D_MODEL), torch.zeros(N_LAYERS, D_MODEL))
    plain, through = (fields(lens.read_states(hidden, targets, t)) for t in (None, zeros))
    for name in plain:
        assert torch.equal(plain[name], through[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_random_translators_are_the_formula(family, dtype):
    lens = LogitLens(tiny(family).to(dtype))
    hidden, targets = hidden_and_targets(lens)
    translators = random_translators(dtype=dtype)
    reading, head = lens.read_states(hidden, targets, translators), lens.head

    def computed(in_dtype):
        moved, wanted = by_hand(hidden, translators, in_dtype).flatten(0, 2), targets.expand(N_LAYERS + 1, -1, -1)
        rest = (head.bias, head.softcap, head.scale, in_dtype)
        return truth(moved, head.weight, head.norm, wanted.flatten(), *rest)

    exact, own = computed(torch.float64), computed(dtype)
    stats = type(reading.stats)(
        **{name: None if value is None else value.flatten() for name, value in vars(reading.stats).items()}
    )
    assert_matches_truth(stats, exact, own, targets.expand(N_LAYERS + 1, -1, -1).flatten())
    wanted, torchs = (kl_to_last(values["z"], head.softcap, hidden.shape[:-1]) for values in (exact, own))
    slack = 64 * torch.finfo(torch.float32).eps * float(exact["z"].abs().max())
    assert (reading.kl - wanted).abs().max() <= (torchs - wanted).abs().max() + slack
    assert (reading.kl[:-1] > 0.1).all() and not reading.kl[-1].any()


def kl_to_last(z, softcap, shape):
    """KL(p_final || p_layer) from whole logits before the softcap."""
    logits = z if softcap is None else softcap * torch.tanh(z / softcap)
    log_p = logits.log_softmax(-1).view(*shape, -1)
    return (log_p[-1].exp() * (log_p[-1] - log_p)).sum(-1)


def test_the_output_is_the_models_own_prediction_through_any_lens(lens):
    hidden, targets = hidden_and_targets(lens)
    plain, through = (fields(lens.read_states(hidden, targets, t)) for t in (None, random_translators()))
    for name in plain:
        assert torch.equal(plain[name][-1], through[name][-1]), name
        assert not torch.equal(plain[name][:-1], through[name][:-1]), f"{name}: the maps must change something"


# Of 14 rows and 4 layers: blocks of 14 // 4 = 3 rows with a rest of 2, of 5 rows with a rest of 4, of all rows.
@pytest.fixture
def translated_rows(monkeypatch):
    """Sets how many translated states are held at a time: at the sizes of a test, all of them."""
    return lambda rows: monkeypatch.setattr("refinelens.lens.translators.TRANSLATED_BYTES", rows * D_MODEL * 4)


@pytest.mark.parametrize("rows", [1, 20, 56])
def test_blocks_of_rows_give_the_numbers_of_one_call(lens, rows, translated_rows):
    hidden, targets = hidden_and_targets(lens)
    whole = fields(lens.read_states(hidden, targets, random_translators()))
    translated_rows(rows)
    blocks = fields(lens.read_states(hidden, targets, random_translators()))
    for name, value in whole.items():
        assert blocks[name].shape == hidden.shape[:-1]
        if value.dtype == torch.int64:
            assert torch.equal(blocks[name], value), name
        else:
            torch.testing.assert_close(blocks[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("translators", [None, random_translators()], ids=["plain", "random"])
def test_one_row_fewer_than_layers(lens, translators):
    hidden, targets = hidden_and_targets(lens, batch=1, positions=torch.tensor([10]))
    reading = lens.read_states(hidden, targets, translators)
    assert reading.kl.shape == reading.stats.argmax.shape == (N_LAYERS + 1, 1, 1)


@pytest.mark.parametrize("translators", [None, random_translators()], ids=["plain", "random"])
def test_no_positions_are_an_empty_reading(lens, translators):
    hidden, targets = hidden_and_targets(lens, positions=torch.tensor([], dtype=torch.int64))
    reading = lens.read_states(hidden, targets, translators)
    assert reading.kl.shape == reading.stats.argmax.shape == reading.stats.target_rank.shape == (N_LAYERS + 1, 2, 0)


def test_a_model_of_one_layer():
    lens = LogitLens(tiny("gpt_neox", n_layers=1))
    hidden, targets = hidden_and_targets(lens)
    translators = random_translators(n_layers=1)
    reading = lens.read_states(hidden, targets, translators)
    moved = lens.stats(by_hand(hidden, translators, torch.float32), targets)
    assert torch.equal(reading.stats.argmax, moved.argmax) and torch.equal(reading.stats.target_rank, moved.target_rank)


def test_one_layer_alone_is_that_layer_of_all():
    hidden = torch.randn(N_LAYERS + 1, 5, D_MODEL, generator=torch.Generator().manual_seed(1))
    translators = random_translators()
    for layer in range(N_LAYERS):
        torch.testing.assert_close(translators.one(layer, hidden[layer]), translators(hidden)[layer])


def test_translators_that_do_not_fit_are_one_line(lens):
    hidden, targets = hidden_and_targets(lens)
    for translators in [random_translators(N_LAYERS - 1), random_translators(d_model=16)]:
        with pytest.raises(InputError, match=r"hidden: expected shape \[\d, N, \d+\] in torch.* like the translators"):
            lens.read_states(hidden, targets, translators)
    rows = hidden.flatten(1, -2)
    with pytest.raises(InputError, match="in torch.bfloat16 on cpu like the translators, got .* in torch.float32"):
        random_translators(dtype=torch.bfloat16)(rows)
    with pytest.raises(InputError, match="on meta like the translators, got .* on cpu"):
        weight, bias = random_translators().weight, random_translators().bias
        moved = object.__new__(Translators)  # their numbers cannot be looked at there
        vars(moved).update(weight=weight.to("meta"), bias=bias.to("meta"))
        moved(rows)


def test_dtype_follows_the_model(lens):
    """Maps of another dtype are those of the model's, rounded once; numbers that do not fit there are refused."""
    hidden, targets = hidden_and_targets(lens)
    half = random_translators(dtype=torch.bfloat16)
    ours, theirs = (fields(lens.read_states(hidden, targets, t)) for t in (half, half.to("cpu", torch.float32)))
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)
    large = Translators(1e5 * torch.ones(N_LAYERS, D_MODEL, D_MODEL), torch.zeros(N_LAYERS, D_MODEL))
    small = LogitLens(deepcopy(lens.model).half())
    with pytest.raises(InputError, match="infinity in the weight of layer 0 once in float16; use ``dtype='float32'``"):
        small.read_states(hidden.half(), targets, large)


@pytest.fixture
def ahead(lens, translated_rows):
    """The lens as on a GPU, by Triton and checked at the end; here in its interpreter."""
    pytest.importorskip("triton")
    translated_rows(20)
    ahead = copy(lens)
    ahead.backend = "triton"
    assert ahead._checks_at_once(ahead.head.weight) and not lens._checks_at_once(lens.head.weight)
    return ahead


@pytest.mark.medium
def test_values_checked_at_the_end_are_those_checked_at_once(lens, ahead):
    hidden, targets = hidden_and_targets(lens)
    ours, theirs = (fields(each.read_states(hidden, targets, random_translators())) for each in (ahead, lens))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, at NaN
@pytest.mark.parametrize("row", [0, -1], ids=["first-block", "last-block"])
def test_what_is_wrong_is_said_at_the_end_too(lens, ahead, row):
    hidden, targets = hidden_and_targets(lens)
    outside = targets.flatten().clone()
    outside[row] = 10**6
    with pytest.raises(InputError, match="targets: expected ids from 0 to .*, got 1000000 at row"):
        ahead.read_states(hidden, outside.view_as(targets), random_translators())
    broken = hidden.clone()
    broken.flatten(1, -2)[1, row, 3] = torch.nan
    with pytest.raises(InputError, match="hidden: expected finite values, got NaN in row"):
        ahead.read_states(broken, targets)
    huge = random_translators()
    huge.weight[1] = 1e38
    with pytest.raises(InputError, match="lens: expected translated states that fit torch.float32"):
        ahead.read_states(hidden, targets, huge)


def test_input_of_another_shape_is_one_line(lens):
    hidden, _ = hidden_and_targets(lens)
    with pytest.raises(InputError, match=r"targets: expected a shape that broadcasts to \[2, 7\], got \[3\]"):
        lens.read_states(hidden, torch.tensor([1, 2, 3]))
    with pytest.raises(InputError, match=r"states: expected .* got \[3, 2, 7, 32\]"):
        lens.read_states(hidden[:-1])


@pytest.mark.parametrize(
    "weight, bias, message",
    [
        (torch.zeros(3, 4, 5), torch.zeros(3, 4), r"expected a weight .* got \[3, 4, 5\] and \[3, 4\]"),
        (torch.zeros(3, 4, 4), torch.zeros(2, 4), r"got \[3, 4, 4\] and \[2, 4\]"),
        (torch.zeros(4, 4), torch.zeros(4), r"got \[4, 4\] and \[4\]"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(3, 4), "one floating dtype, got torch.int64"),
        (torch.zeros(3, 4, 4).bfloat16(), torch.zeros(3, 4), "got torch.bfloat16 and torch.float32"),
        (torch.zeros(3, 4, 4), torch.tensor([[0.0] * 4] * 2 + [[0, 0, 0, torch.nan]]), "in the bias of layer 2"),
    ],
)
def test_maps_that_are_none_are_refused(weight, bias, message):
    with pytest.raises(InputError, match=message):
        Translators(weight, bias)
