"""Slices: what a client holds, what comes back, and that channels mean the same everywhere."""

import pytest
import torch

from fedllm.errors import FedError
from fedllm.models.build import build
from fedllm.models.cnn import Adapter, SmallCNN, YiCNN
from fedllm.models.resnet import ExitResNet, ResNet
from fedllm.models.submodel import (
    Anatomy,
    Cut,
    at_depth,
    entries,
    index,
    kept,
    permuted,
    prefix,
    put,
    random,
    read,
    rolling,
    rows,
    scatter_mean,
    take,
    written,
)
from fedllm.models.transformer import MaskedLM

PICO = (4, 8, 12, 16)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pico_resnet(width=1.0, norm="batch"):
    return ResNet(width=width, norm=norm, widths=PICO)


def pico_lm(width=1.0):
    return MaskedLM(vocab=30, width=width, d=16, heads=4, ffn=24, depth=2, length=8)


MODELS = {
    "resnet": (pico_resnet, lambda: torch.randn(4, 3, 16, 16, generator=seeded())),
    "resnet_running": (
        lambda width=1.0: pico_resnet(width, "running"),
        lambda: torch.randn(4, 3, 16, 16, generator=seeded()),
    ),
    "small_cnn": (lambda width=1.0: SmallCNN(width=width), lambda: torch.randn(4, 3, 16, 16, generator=seeded())),
    "yi": (lambda: YiCNN(5), lambda: torch.randn(2, 3, 32, 32, generator=seeded())),
    "adapter": (lambda: Adapter("direct", 20, 8), lambda: torch.randn(2, 20, generator=seeded())),
    "lm": (pico_lm, lambda: torch.randint(0, 31, (3, 8), generator=seeded())),
}
SCALED = ("resnet", "resnet_running", "small_cnn", "lm")
RULES = {
    "heterofl": lambda anatomy, rate: prefix(anatomy, rate),
    "fedrolex": lambda anatomy, rate: rolling(anatomy, rate, 5),
    "feddropout": lambda anatomy, rate: random(anatomy, rate, seeded()),
}


def made(name):
    """A model with no two equal parameters: norms' gains and offsets drawn too."""
    model = build(MODELS[name][0], seeded())
    generator = seeded(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_axis_has_the_size_it_declares(name):
    model = made(name)
    anatomy, tensors = model.anatomy(), model.state_dict()
    assert {cut.group for cuts in anatomy.axes.values() for cut in cuts if cut} == set(anatomy.groups)
    for weight, cuts in anatomy.axes.items():
        if weight in tensors:
            assert len(cuts) == tensors[weight].ndim
            sizes = [
                c.outer * anatomy.groups[c.group] * c.inner if c else s
                for c, s in zip(cuts, tensors[weight].shape, strict=True)
            ]
            assert sizes == list(tensors[weight].shape)
    assert all(name in dict(model.named_modules()) for name in (*anatomy.layers, *anatomy.heads))
    assert set(anatomy.depths(model.state_dict())) == set(tensors)


@pytest.mark.parametrize("name", MODELS)
def test_permuting_the_channels_of_every_group_keeps_the_function(name):
    """The whole of the declaration in one law: an axis in the wrong group, or one forgotten, changes the output."""
    model, x = made(name), MODELS[name][1]()
    before = model.eval()(x)
    order = permuted(model.anatomy(), 1.0, seeded(3))
    assert any(not channels.equal(channels.sort().values) for channels in order.values())
    model.load_state_dict(take(model.state_dict(), index(model.anatomy(), order)))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def test_the_published_feddropout_mixes_channels_across_identity_shortcuts():
    model, x = made("resnet"), MODELS["resnet"][1]()
    anatomy = model.legacy_anatomy()
    before = model.eval()(x)
    model.load_state_dict(take(model.state_dict(), index(anatomy, permuted(anatomy, 1.0, seeded(3)))))
    assert (model(x) - before).abs().max() > 0.1
    model.load_state_dict(take(model.state_dict(), index(anatomy, prefix(anatomy, 1.0))))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCALED)
def test_a_slice_is_the_model_of_that_width(name, rule):
    model = made(name)
    for rate in (0.25, 0.5, 0.75):
        small = build(lambda rate=rate: MODELS[name][0](width=rate), seeded())
        part = take(model.state_dict(), index(model.anatomy(), RULES[rule](model.anatomy(), rate)))
        small.load_state_dict(part)
        assert torch.isfinite(small(MODELS[name][1]())).all()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_rate_one_holds_everything(name, rule):
    model = made(name)
    weights, where = model.state_dict(), index(model.anatomy(), RULES[rule](model.anatomy(), 1.0))
    part = take(weights, where)
    assert all(part[n].shape == weights[n].shape for n in weights)
    back = put({n: torch.full_like(t, -9) for n, t in weights.items()}, part, where)
    assert all(back[n].equal(weights[n]) for n in weights)
    if rule != "fedrolex":  # which starts its window elsewhere
        assert all(part[n].equal(weights[n]) for n in weights)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_putting_a_slice_back_changes_nothing_and_reads_back(name, rule):
    model = made(name)
    weights, where = model.state_dict(), index(model.anatomy(), RULES[rule](model.anatomy(), 0.5))
    part = take(weights, where)
    assert all(t.equal(weights[n]) for n, t in put(weights, part, where).items())
    marked = {n: t + 1 for n, t in part.items()}
    assert all(t.equal(marked[n]) for n, t in take(put(weights, marked, where), where).items())
    changed = sum(int((put(weights, marked, where)[n] != weights[n]).sum()) for n in weights)
    assert changed == sum(t.numel() for t in marked.values())


def test_take_copies():
    weights = {"w": torch.zeros(2)}
    take(weights, {})["w"].add_(1)
    assert weights["w"].equal(torch.zeros(2))


def test_entries_by_hand():
    """Channels 2 and 0 of 3: two heads of three channels give 2 0 5 3, two pixels a channel give 4 5 0 1."""
    channels = torch.tensor([2, 0])
    assert entries(Cut("g", outer=2), channels, 3).tolist() == [2, 0, 5, 3]
    assert entries(Cut("g", inner=2), channels, 3).tolist() == [4, 5, 0, 1]


def test_scatter_mean_by_hand():
    """Row 0 of a 2 x 2 weight is held by both clients, row 1 by the second, column 1 by the second only."""
    weights = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([5.0, 6.0])}
    first = {"w": torch.tensor([[10.0]])}
    second = {"w": torch.tensor([[20.0, 21.0], [22.0, 23.0]])}
    where = [{"w": (torch.tensor([0]), torch.tensor([0]))}, {}]
    after = scatter_mean(weights, [first, second], where)
    assert after["w"].tolist() == [[15.0, 21.0], [22.0, 23.0]]
    assert after["b"].equal(weights["b"])
    uneven = scatter_mean(weights, [first, second], where, shares=[3.0, 1.0])
    assert uneven["w"].tolist() == [[12.5, 21.0], [22.0, 23.0]]


def test_nobody_trains_what_lies_beyond_the_widest_client():
    """HeteroFL at rate 1/2: every scalar outside the prefix is bit for bit what it was."""
    model = made("resnet")
    weights, where = model.state_dict(), index(model.anatomy(), prefix(model.anatomy(), 0.5))
    trained = {n: t + 1 for n, t in take(weights, where).items()}
    after = scatter_mean(weights, [trained, trained], [where, where])
    outside = put({n: torch.ones_like(t, dtype=torch.bool) for n, t in weights.items()},
                  {n: torch.zeros_like(t, dtype=torch.bool) for n, t in trained.items()}, where)  # fmt: skip
    assert sum(int(mask.sum()) for mask in outside.values()) > 0
    for n in weights:
        assert after[n][outside[n]].equal(weights[n][outside[n]])
        torch.testing.assert_close(after[n][~outside[n]], weights[n][~outside[n]] + 1)


def test_full_width_clients_average_as_fedavg_does():
    model = made("resnet")
    weights = model.state_dict()
    replies = [{n: t + k for n, t in weights.items()} for k in (1.0, 2.0, 6.0)]
    where = [index(model.anatomy(), rolling(model.anatomy(), 1.0, t)) for t in (0, 1, 2)]
    parts = [take(reply, at) for reply, at in zip(replies, where, strict=True)]
    for n, tensor in scatter_mean(weights, parts, where).items():
        torch.testing.assert_close(tensor, weights[n] + 3.0)


def test_equal_clients_average_to_themselves_whatever_they_hold():
    model = made("lm")
    weights = model.state_dict()
    where = [index(model.anatomy(), rule(model.anatomy(), rate)) for rule in RULES.values() for rate in (0.25, 0.75)]
    after = scatter_mean(weights, [take(weights, at) for at in where], where)
    assert all(torch.allclose(after[n], weights[n], atol=1e-6) for n in weights)


def test_the_order_of_clients_does_not_matter():
    model = made("small_cnn")
    weights = model.state_dict()
    where = [
        index(model.anatomy(), random(model.anatomy(), rate, seeded(i))) for i, rate in enumerate((0.5, 0.75, 1.0))
    ]
    parts = [{n: t * (i + 2) for n, t in take(weights, at).items()} for i, at in enumerate(where)]
    there, back = scatter_mean(weights, parts, where), scatter_mean(weights, parts[::-1], where[::-1])
    for n in weights:
        torch.testing.assert_close(there[n], back[n])


def test_counters_are_copied():
    weights = {"n": torch.tensor(3)}
    assert scatter_mean(weights, [{"n": torch.tensor(7)}], [{}])["n"] == 7
    assert scatter_mean(weights, [{}], [{}])["n"] == 3


def test_fedrolex_touches_every_channel():
    """After c rounds every channel has been held, each equally often; a prefix never leaves its place."""
    anatomy = made("resnet").anatomy()
    rounds = max(anatomy.groups.values())
    for group, size in anatomy.groups.items():
        seen = torch.zeros(size, dtype=torch.int64)
        for t in range(size):
            seen[rolling(anatomy, 0.5, t)[group]] += 1
        assert seen.tolist() == [kept(size, 0.5)] * size
        union = torch.cat([rolling(anatomy, 0.25, t)[group] for t in range(rounds)]).unique()
        assert union.tolist() == list(range(size))
    assert rolling(anatomy, 0.5, 3)["stage0"].tolist() == [3, 0]
    assert all(prefix(anatomy, 0.5)[g].tolist() == list(range(kept(c, 0.5))) for g, c in anatomy.groups.items())


def test_feddropout_draws_from_its_generator():
    anatomy = made("resnet").anatomy()
    one, again, other = (random(anatomy, 0.5, seeded(s)) for s in (1, 1, 2))
    assert all(one[g].equal(again[g]) for g in one)
    assert any(not one[g].equal(other[g]) for g in one)
    assert all(c.unique().numel() == kept(anatomy.groups[g], 0.5) for g, c in one.items())


def test_how_many_channels_are_kept():
    assert [kept(64, rate) for rate in (0.25, 0.5, 0.75, 1.0)] == [16, 32, 48, 64]
    assert kept(5, 0.5) == 3
    assert kept(5, 0.6) == 3  # 0.6 * 5 is a little above 3 in floating point
    for rate in (0.0, 1.5, -0.1):
        with pytest.raises(FedError, match="width"):
            kept(8, rate)


def test_rows_of_absent_classes_do_not_enter_the_mean():
    """A head of three classes on two inputs; the client holds input 1 and has data of classes 0 and 2."""
    weights = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
    where = {"fc.weight": (None, torch.tensor([1]))}
    part = {"fc.weight": torch.tensor([[1.0], [2.0], [3.0]]), "fc.bias": torch.tensor([4.0, 5.0, 6.0])}
    tensors, at = rows(part, where, ("fc.weight", "fc.bias"), torch.tensor([0, 2]))
    after = scatter_mean(weights, [tensors], [at])
    assert after["fc.weight"].tolist() == [[0, 1], [0, 0], [0, 3]]
    assert after["fc.bias"].tolist() == [4, 0, 6]
    assert where == {"fc.weight": where["fc.weight"]} and part["fc.bias"].numel() == 3


def test_depth_is_a_prefix_of_blocks():
    model = build(lambda: ExitResNet(widths=PICO), seeded())
    weights, anatomy = model.state_dict(), model.anatomy()
    for depth in (1, 2, 3, 4):
        part = at_depth(anatomy, weights, depth)
        small = build(lambda depth=depth: ExitResNet(stages=depth, widths=PICO), seeded(1))
        small.load_state_dict(part)
        assert len(small(torch.randn(2, 3, 16, 16, generator=seeded()))) == depth
    assert set(at_depth(anatomy, weights, None)) == set(weights)
    with pytest.raises(FedError, match="1 to 4"):
        at_depth(anatomy, weights, 5)


def test_a_tensor_is_averaged_over_the_clients_deep_enough():
    model = build(lambda: ExitResNet(widths=PICO), seeded())
    weights, anatomy = model.state_dict(), model.anatomy()
    shallow = {n: t + 2 for n, t in at_depth(anatomy, weights, 1).items()}
    deeper = {n: t + 4 for n, t in at_depth(anatomy, weights, 2).items()}
    after = scatter_mean(weights, [shallow, deeper], [{}, {}])
    torch.testing.assert_close(after["stem.conv.weight"], weights["stem.conv.weight"] + 3)
    torch.testing.assert_close(after["heads.2.head.fc.bias"], weights["heads.2.head.fc.bias"] + 4)
    assert after["stages.2.0.conv1.weight"].equal(weights["stages.2.0.conv1.weight"])


def test_numbers_of_the_layers():
    """The stem is 1, the 3 x 3 convolutions 2 to 17, the head 18; norms and shortcuts go with the layer before."""
    model = pico_resnet()
    numbers = model.anatomy().numbers(model.state_dict())
    assert numbers["stem.conv.weight"] == numbers["stem.norm.bias"] == 1
    assert numbers["stages.0.0.conv1.weight"] == 2 and numbers["stages.3.1.conv2.weight"] == 17
    assert numbers["stages.1.0.shortcut.norm.weight"] == numbers["stages.1.0.conv2.weight"] == 7
    assert numbers["heads.4.fc.weight"] == 18 == len(model.anatomy().layers)
    assert len(model.anatomy().factorable(1)) == 16


def test_numbers_of_the_layers_where_norms_stand_behind_all_convolutions():
    """Each norm goes with its own convolution, as in the residual nets, also after the anatomy came from its text."""
    model = SmallCNN(widths=(2, 3, 3, 4, 4))
    for anatomy in (model.anatomy(), read(written(model.anatomy()))):
        numbers = anatomy.numbers(model.state_dict())
        for i in range(5):
            assert numbers[f"convs.{i}.weight"] == numbers[f"norms.{i}.weight"] == numbers[f"norms.{i}.bias"] == i + 1
        assert numbers["head.fc.weight"] == numbers["head.fc.bias"] == 6


def test_a_weight_in_no_block_is_an_error():
    anatomy = Anatomy({}, {}, (), (), (("stem",),), ())
    with pytest.raises(FedError, match="tail.weight"):
        anatomy.depths(["tail.weight"])
