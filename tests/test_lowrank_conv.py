"""LoRA on convolutions: what it computes, what a merge changes, and the nested factors of mFedLoRU."""

import pytest
import torch
from torch import nn

from fedllm.accounting import trainable
from fedllm.core import FedError
from fedllm.models.build import build
from fedllm.models.cnn import YiCNN
from fedllm.models.lowrank_conv import (
    LowRankConv,
    NestedFactor,
    Pair,
    Spec,
    adapt,
    adaptable,
    factor,
    merge,
    nest,
    pairs_of,
    reconstruct,
    restart,
    start,
)
from fedllm.models.resnet import ResNet

PICO = (8, 12, 16, 20)
SHARED = {"shared": Spec(rank=3, alpha=6.0)}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, size=16):
    return torch.randn(n, 3, size, size, generator=seeded(9))


def adapted(specs=SHARED, w0="keep", base="frozen"):
    """A ResNet with pairs on every convolution but the stem, the factors' values all different from zero."""
    model = build(lambda: ResNet(widths=PICO), seeded())
    adapt(model, adaptable(model, model.anatomy()), specs, base)
    start(model, seeded(1), w0)
    return model


def trained(model):
    """As if some steps had been made: every parameter moved."""
    generator = seeded(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
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
    start(model, seeded(1), "keep")
    torch.testing.assert_close(model(x), before)
    assert model.conv2.bias.requires_grad


def test_keep_starts_from_the_function_and_zero_from_the_factors_alone():
    plain = build(lambda: ResNet(widths=PICO), seeded())
    kept, zero = adapted(w0="keep"), adapted(w0="zero")
    x = images()
    torch.testing.assert_close(kept(x), plain(x))
    for layer in (m for m in zero.modules() if isinstance(m, LowRankConv)):
        assert layer.weight.eq(0).all()
        assert all(p.abs().max() > 0 for p in layer.parameters())
    assert (zero(x) - plain(x)).abs().max() > 0.1


def test_the_base_is_a_buffer_or_a_parameter_under_the_same_name():
    frozen, thawed = adapted(), adapted(base="trained")
    assert set(frozen.state_dict()) == set(thawed.state_dict())
    assert set(ResNet(widths=PICO).state_dict()) < set(frozen.state_dict())
    parameters = dict(frozen.named_parameters())
    assert "stages.0.0.conv1.weight" not in parameters and "stem.conv.weight" in parameters
    bases = sum(m.weight.numel() for m in frozen.modules() if isinstance(m, LowRankConv))
    assert trainable(thawed) - trainable(frozen) == bases


def test_a_private_pair_starts_without_a_function():
    """Both bases: the second pair adds nothing at first, and can train (its down is not zero)."""
    for w0 in ("zero", "keep"):
        one, two = adapted(SHARED, w0), adapted({**SHARED, "private": Spec(2)}, w0)
        layer = two.stages[0][0].conv1
        assert layer.private.up.weight.eq(0).all() and layer.private.down.weight.abs().max() > 0
        two.load_state_dict(one.state_dict(), strict=False)
        x = images()
        torch.testing.assert_close(two(x), one(x))


def test_merge_and_restart_leave_the_function_unchanged():
    model, x = trained(adapted()), images()
    before = model(x)
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    model.load_state_dict(restart(merge(weights, "shared", 6.0), "shared", seeded(4)))
    assert (model(x) - before).abs().max() < 1e-4
    up = model.stages[1][0].conv1.shared.up.weight
    assert up.eq(0).all()
    assert not model.stages[1][0].conv1.shared.down.weight.equal(weights["stages.1.0.conv1.shared.down.weight"])


def test_a_merge_that_keeps_the_factors_adds_exactly_delta():
    """The effective weight goes from W + D to W + 2 D (the paper's code); the merge mutates nothing it was given."""
    model = trained(adapted())
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


def test_rank_of_two_merges():
    """W_T - W_0 in matrix form has rank 2 r after two merges with fresh factors, and 2 r is above r."""
    model = trained(adapted())
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    once = restart(merge(weights, "shared", 6.0), "shared", seeded(5))
    once = {n: t + 0.1 * torch.randn(t.shape, generator=seeded(6)) if ".shared." in n else t for n, t in once.items()}
    twice = merge(once, "shared", 6.0)
    name = "stages.3.1.conv1.weight"
    for after, rank in ((once, 3), (twice, 6)):
        difference = (after[name] - weights[name]).flatten(1).double()
        assert int(torch.linalg.matrix_rank(difference, rtol=1e-5)) == rank


def test_dropout_acts_in_training_only():
    model, x = adapted({"shared": Spec(4, dropout=0.5)}, w0="zero"), images()
    assert model.eval()(x).equal(model(x))
    model.train()
    assert not model(x).equal(model(x))


def test_nested_factors_start_from_the_received_ones_and_cost_what_they_say():
    """r_k (m + r) for up, r_k (r + n) for down."""
    pair = Pair(m=40, n=90, spec=Spec(16, budget=4))
    with torch.no_grad():
        for side in (pair.up, pair.down):
            side.weight.normal_(generator=seeded())
    nest(pair, seeded(1))
    assert pair.up.matrix().equal(pair.up.weight) and pair.up.outer.abs().max() > 0
    assert sum(p.numel() for p in pair.parameters()) == 4 * (40 + 16) + 4 * (16 + 90)
    pair.up.inner.data.normal_(generator=seeded(2))
    torch.testing.assert_close(pair.up.matrix(), pair.up.weight + pair.up.outer @ pair.up.inner)


def test_a_thin_factor_is_sent_as_it_is():
    """Budget 8 on a 12 x 16 factor takes 8 (12 + 16) = 224 numbers, more than its 192; on 40 x 16, 448 of 640."""
    assert not isinstance(factor(12, 16, 8), NestedFactor)
    assert isinstance(factor(40, 16, 8), NestedFactor)
    assert not isinstance(factor(40, 16, None), NestedFactor)


def test_the_server_rebuilds_the_factors_that_a_nested_client_computed_with():
    model = trained(adapted({"shared": Spec(6, 6.0, budget=1)}))
    sent = {n: t.clone() for n, t in model.state_dict().items()}
    returned = {n: p.detach() for n, p in model.named_parameters()}
    whole = reconstruct(sent, returned)
    layer = model.stages[2][1].conv2.shared
    assert isinstance(layer.up, NestedFactor)
    assert whole["stages.2.1.conv2.shared.up.weight"].equal(layer.up.matrix())
    assert whole["stem.conv.weight"].equal(model.stem.conv.weight)
    assert not any(n.endswith((".outer", ".inner")) for n in whole)
    direct = adapted({"shared": Spec(6, 6.0)})
    direct.load_state_dict({**sent, **whole}, strict=False)
    x = images()
    torch.testing.assert_close(direct(x), model(x), rtol=1e-3, atol=1e-4)


def test_only_convolutions_are_adapted():
    model = ResNet(widths=PICO)
    with pytest.raises(FedError, match="heads.4.fc"):
        adapt(model, ["heads.4.fc"], SHARED)
