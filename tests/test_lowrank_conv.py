"""LoRA on convolutions: what it computes, where it starts, and the nested factors of mFedLoRU."""

import pytest
import torch
from torch import nn

from fedllm.core import Model, Round
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.models.build import build, drawn
from fedllm.models.cnn import YiCNN
from fedllm.models.flops import trainable
from fedllm.models.lowrank_conv import (
    LowRankConv,
    Pair,
    Spec,
    adapt,
    adaptable,
    folded,
    freeze,
    merge,
    nested_in,
    pairs_of,
    plain,
    start,
    unfolded,
)
from fedllm.models.network import Network, fitted
from fedllm.models.resnet import ResNet

PICO = (8, 12, 16, 20)
SHARED = {"shared": Spec(rank=3, alpha=6.0)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, size=16):
    return torch.randn(n, 3, size, size, generator=seeded(9))


def adapted(specs=SHARED, base="frozen"):
    """A ResNet with pairs on every convolution but the stem, their values all different from zero."""
    model = build(lambda: ResNet(widths=PICO), seeded())
    adapt(model, adaptable(model, model.anatomy()), specs, base)
    generator = seeded(1)
    with torch.no_grad():
        for pair in (module for module in model.modules() if isinstance(module, Pair)):
            for tensor in (*pair.parameters(), *pair.buffers()):
                tensor.normal_(std=0.1, generator=generator)
    return model


def test_adaptable_convolutions_include_the_shortcuts_and_not_the_stem():
    model = ResNet(widths=PICO)
    names = adaptable(model, model.anatomy())
    assert len(names) == 16 + 3 and "stem.conv" not in names
    assert sum(name.endswith("shortcut.conv") for name in names) == 3


@pytest.mark.parametrize("stride, padding, k, bias", [(1, 1, 3, False), (2, 1, 3, True), (2, 0, 1, False)])
def test_an_adapted_convolution_is_one_convolution(stride, padding, k, bias):
    """W + (alpha/r) up down, Delta[o,i,a,b] = (alpha/r) sum_r up[o,r] down[r,(i,a,b)]."""
    conv = nn.Conv2d(4, 6, k, stride, padding, bias=bias)
    layer = LowRankConv(conv, conv.weight.detach(), {"shared": Spec(3, 6.0), "private": Spec(2, 5.0)})
    for p in layer.parameters():
        nn.init.normal_(p)
    W = conv.weight.detach().clone()
    for name, scale in (("shared", 6 / 3), ("private", 5 / 2)):
        pair = layer.get_submodule(name)
        down = pair.down.weight.reshape(-1, 4, k, k)
        W += scale * torch.einsum("or,riab->oiab", pair.up.weight, down)
    x = torch.randn(2, 4, 9, 9, generator=seeded())
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, W, conv.bias, stride, padding), rtol=1e-4, atol=1e-4)


def test_biased_convolutions_keep_their_bias():
    model = build(lambda: YiCNN(5), seeded())
    x = images(2, 32)
    before = model(x)
    adapt(model, adaptable(model, model.anatomy()), SHARED)
    nn.init.zeros_(model.conv2.shared.up.weight)
    nn.init.normal_(model.conv2.shared.down.weight)
    torch.testing.assert_close(model(x), before)
    assert model.conv2.bias.requires_grad


def test_a_start_keeps_the_base_or_is_the_factors_alone():
    """LoRA's scale, 6 / 3 = 2, is in B: entries up to 2 / sqrt(3). The rows of A are up to 1 / sqrt(4 k^2)."""
    W = torch.randn(8, 4, 3, 3, generator=seeded())
    kept, nothing = start(W, "keep", 6.0, seeded)
    assert kept is W and nothing(3).rank == 0 and nothing(3).shape == (8, 36)
    zero, both = start(W, "zero", 6.0, seeded)
    product = both(3)
    assert not zero.any() and zero.shape == W.shape and product.shape == (8, 36) and product.rank == 3
    assert 1 < float(product.B.abs().max()) <= 2 / 3**0.5 and 0.1 < float(product.A.abs().max()) <= 1 / 6
    assert torch.equal(both(3).B, product.B), "the generator is new every time"


def test_the_base_is_a_buffer_or_a_parameter_under_the_same_name():
    frozen, thawed = adapted(), adapted(base="trained")
    assert set(frozen.state_dict()) == set(thawed.state_dict())
    assert set(ResNet(widths=PICO).state_dict()) < set(frozen.state_dict())
    parameters = dict(frozen.named_parameters())
    assert "stages.0.0.conv1.weight" not in parameters and "stem.conv.weight" in parameters
    bases = sum(m.weight.numel() for m in frozen.modules() if isinstance(m, LowRankConv))
    assert trainable(thawed) - trainable(frozen) == bases


def test_a_merge_adds_exactly_delta():
    """W + 6/3 up down where the pair is; the merge mutates nothing it was given."""
    model = adapted()
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    merged = merge(model.state_dict(), "shared", 6.0)
    assert all(t.equal(weights[n]) for n, t in model.state_dict().items())
    for layer, product in pairs_of(weights, "shared").items():
        delta = 6 / 3 * (product.B @ product.A)
        name = f"{layer}.weight"
        torch.testing.assert_close(
            merged[name] - weights[name], delta.reshape(weights[name].shape), rtol=1e-4, atol=1e-5
        )
    unchanged = [n for n in weights if merged[n].equal(weights[n])]
    assert len(weights) - len(unchanged) == 19


def test_dropout_acts_in_training_only():
    model, x = adapted({"shared": Spec(4, dropout=0.5)}), images()
    assert model.eval()(x).equal(model(x))
    model.train()
    assert not model(x).equal(model(x))


def test_nested_factors_cost_what_they_say_and_add_to_a_frozen_one():
    """r_k (m + r) for up, r_k (r + n) for down."""
    pair = Pair(m=40, n=90, spec=Spec(16, nested=4))
    assert sum(p.numel() for p in pair.parameters()) == 4 * (40 + 16) + 4 * (16 + 90)
    for tensor in (*pair.parameters(), *pair.buffers()):
        nn.init.normal_(tensor)
    torch.testing.assert_close(pair.up.matrix(), pair.up.weight + pair.up.outer @ pair.up.inner)
    torch.testing.assert_close(pair.down.matrix(), pair.down.weight + pair.down.outer @ pair.down.inner)


# --- between a rule's products and a network's weights


def network(w0="keep", name="resnet18"):
    make = Network(name, widths=PICO if name == "resnet18" else None).maker("plain", 10, 8)
    model = Model(drawn(make(), seeded()), anatomy=make().anatomy(), make=make)
    return freeze(model, w0, 6.0, Round(0, seed=1))


def test_a_frozen_network_starts_where_it_is_told():
    """Every convolution but the stem has a start, each another one; `zero` empties them and touches nothing else."""
    kept, zero = network("keep"), network("zero")
    assert len(kept.frozen) == 19 and kept.frozen.keys() == zero.frozen.keys()
    for name, W in kept.weights.items():
        assert torch.equal(zero.weights[name], torch.zeros_like(W) if name in zero.frozen else W)
    adapters = zero.adapters(2)
    assert list(adapters) == list(zero.weights)
    assert {n for n, value in adapters.items() if isinstance(value, LowRank)} == set(zero.frozen)
    alike = [adapters[f"stages.3.1.conv{i}.weight"].A for i in (1, 2)]
    assert alike[0].shape == alike[1].shape and not torch.equal(*alike)
    with pytest.raises(FedError, match="no convolution after its stem"):
        network(name="transformer")


def product(shape, r, key):
    generator = seeded(key)
    return LowRank(torch.randn(shape[0], r, generator=generator), torch.randn(r, shape[1], generator=generator) / 9)


def updates(model, r=3):
    """A product for every frozen convolution, and for one of them a matrix."""
    found = {name: product(start(1).shape, r, i) for i, (name, start) in enumerate(model.frozen.items())}
    last = list(found)[-1]
    return {**found, last: found[last].dense()}


def test_what_lies_beside_a_convolution_is_what_is_added_to_it():
    """The products as pairs compute what the ordinary network computes that has them in its weights."""
    model, x = network(), images()
    products = {name: M for name, M in updates(model).items() if isinstance(M, LowRank)}
    whole = {name: W for name, W in model.weights.items() if name not in model.frozen}
    beside = plain(model, whole) | unfolded(products, alpha=5.0)
    ours = fitted(model.make(), beside, {"shared": 5.0}, frozen=model.frozen).eval()
    theirs = fitted(model.make(), plain(model, whole | products)).eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    held = ours.state_dict()
    for name, M in folded(held, products, 5.0).items():
        torch.testing.assert_close((M.B, M.A), (products[name].B, products[name].A))
    assert not {"stages.0.0.conv1.weight"} & {name for name, _ in ours.named_parameters()}


def test_an_ordinary_network_has_matrices_and_products_in_its_weights():
    model = network()
    given = updates(model)
    whole = plain(model, given)
    assert whole.keys() == model.frozen.keys()
    for name, more in given.items():
        matrix = more.dense() if isinstance(more, LowRank) else more
        torch.testing.assert_close(whole[name], model.weights[name] + matrix.reshape(model.weights[name].shape))
    untouched = plain(model, {"stem.conv.weight": model.weights["stem.conv.weight"]})
    assert all(untouched[name].equal(W) for name, W in model.weights.items() if name in untouched)
    assert untouched.keys() == {*model.frozen, "stem.conv.weight"}


def test_nested_products_are_factors_with_what_is_added_to_them():
    """s (B / s + B_d B_u)(A + A_d A_u), s = 7 / 4: given before LoRA's scale, returned with it in B_d."""
    model, x = network(), images()
    products = {name: product(start(1).shape, 4, i) for i, (name, start) in enumerate(model.frozen.items())}
    nested = {f"B/{name}": product((M.shape[0], 4), 2, 1) for name, M in products.items()}
    nested |= {f"A/{name}": product((4, M.shape[1]), 2, 2) for name, M in products.items()}
    summed = {
        name: LowRank(M.B + 7 / 4 * nested[f"B/{name}"].dense(), M.A + nested[f"A/{name}"].dense())
        for name, M in products.items()
    }
    whole = plain(model, {name: W for name, W in model.weights.items() if name not in model.frozen})
    weights = whole | unfolded(products, 7.0) | nested_in(nested)
    ours = fitted(model.make(), weights, {"shared": 7.0}, frozen=model.frozen).eval()
    theirs = fitted(model.make(), whole | unfolded(summed, 7.0), {"shared": 7.0}).eval()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    for key, M in folded(ours.state_dict(), nested, 7.0).items():
        scale = 7 / 4 if key.startswith("B/") else 1.0
        torch.testing.assert_close((M.B, M.A), (scale * nested[key].B, nested[key].A))
    trains = {name for name, _ in ours.named_parameters() if "shared" in name}
    assert trains == {n for key in nested for n in nested_in({key: nested[key]})}


def test_only_convolutions_are_adapted():
    model = ResNet(widths=PICO)
    with pytest.raises(FedError, match="heads.4.fc"):
        adapt(model, ["heads.4.fc"], SHARED)
