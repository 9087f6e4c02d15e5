"""The vision papers' models: drawn by a generator, right shapes, and each structure checked against its formula."""

import math

import pytest
import torch
from torch import nn

from fedllm.errors import FedError
from fedllm.models.build import build, describe, norm2d, with_running_statistics
from fedllm.models.cnn import Adapter, SmallCNN, YiCNN
from fedllm.models.flanc import BasisConv, FlancResNet, bases, orthogonality
from fedllm.models.resnet import ExitResNet, ResNet, Scaler, stage_rounds
from fedllm.models.transformer import Attention, MaskedLM

PICO = (8, 16, 24, 32)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images(n=4, size=16, seed=0):
    return torch.randn(n, 3, size, size, generator=seeded(seed))


MODELS = {
    "resnet": (lambda: ResNet(widths=PICO), images),
    "resnet_gn": (lambda: ResNet(norm="gn", widths=PICO), images),
    "resnet_running": (lambda: ResNet(norm="running", widths=PICO), images),
    "exits": (lambda: ExitResNet(widths=PICO), images),
    "flanc": (lambda: FlancResNet(width=0.75, widths=(32, 64)), images),
    "small_cnn": (SmallCNN, images),
    "yi": (lambda: YiCNN(5), lambda: images(size=32)),
    "adapter": (lambda: Adapter("direct", 20, 8), lambda: torch.randn(2, 20, generator=seeded())),
    "lm": (
        lambda: MaskedLM(50, d=16, ffn=24, depth=2, length=8),
        lambda: torch.randint(0, 51, (3, 8), generator=seeded()),
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_weights_come_from_the_generator_alone(name):
    make, _ = MODELS[name]
    torch.manual_seed(1)
    untouched = torch.get_rng_state()
    one, again, other = (build(make, seeded(s)) for s in (5, 5, 6))
    assert torch.get_rng_state().equal(untouched)
    weights = dict(one.named_parameters())
    assert all(p.equal(weights[n]) for n, p in again.named_parameters())
    drawn = [n for n, p in other.named_parameters() if not p.equal(weights[n])]
    assert {n for n, p in weights.items() if p.ndim > 1} <= set(drawn)
    assert all(torch.isfinite(t).all() for t in one.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_gets_a_gradient(name):
    make, data = MODELS[name]
    model = build(make, seeded())
    logits = model(data())
    sum(z.square().sum() for z in (logits if isinstance(logits, tuple) else (logits,))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []


def test_describing_takes_no_memory():
    assert {p.device.type for p in describe(ResNet).parameters()} == {"meta"}


def test_convolutions_are_drawn_with_fan_out():
    """std = sqrt(2 / (c_out k^2)); norms start at gain 1 and offset 0."""
    model = build(ResNet, seeded())
    weight = model.stages[3][0].conv1.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (512 * 9)), rel=0.01)
    assert model.stem.norm.weight.eq(1).all() and model.stem.norm.bias.eq(0).all()


@pytest.mark.parametrize("size", [32, 64])
def test_the_stem_keeps_the_image_and_three_stages_halve_it(size):
    model, x = build(lambda: ResNet(classes=7, widths=PICO), seeded()), images(2, size)
    h, sides = model.stem(x), []
    for blocks in model.stages:
        h = blocks(h)
        sides.append(tuple(h.shape[1:]))
    assert sides == [(c, size // d, size // d) for c, d in zip(PICO, (1, 2, 4, 8), strict=True)]
    assert model(x).shape == (2, 7)


def test_shortcuts_only_where_the_shape_changes():
    model = describe(ResNet)
    changing = [n for n, m in model.named_modules() if n.endswith("shortcut") and not isinstance(m, nn.Identity)]
    assert changing == ["stages.1.0.shortcut", "stages.2.0.shortcut", "stages.3.0.shortcut"]
    assert not any(isinstance(m, nn.Conv2d) and m.bias is not None for m in model.modules())


def test_norm_modes():
    """batch: the answer depends on who shares the batch, nothing is stored. running: stored. gn: neither."""
    x, others = images(1), images(3, seed=1)
    for kind, depends, buffers in (("batch", True, False), ("running", False, True), ("gn", False, False)):
        model = build(lambda kind=kind: ResNet(norm=kind, widths=PICO), seeded()).eval()
        alone, together = model(x), model(torch.cat([x, others]))[:1]
        assert ((alone - together).abs().max() > 1e-3) == depends
        assert bool(list(model.buffers())) == buffers
    with pytest.raises(ValueError, match="instance"):
        norm2d("instance", 4)


def test_running_statistics_are_of_the_data_seen_since():
    """The cumulative mean over two batches is the mean of theirs; the original is unchanged."""
    model = nn.Sequential(norm2d("batch", 3))
    fresh = with_running_statistics(model)
    a, b = images(4) + 1, images(4, seed=1) - 2
    fresh.train()
    fresh(a), fresh(b)
    torch.testing.assert_close(fresh[0].running_mean, (a.mean((0, 2, 3)) + b.mean((0, 2, 3))) / 2)
    assert not list(model.buffers())
    resnet = build(lambda: ResNet(widths=PICO), seeded())
    x = images()
    static = with_running_statistics(resnet)
    static(x)
    torch.testing.assert_close(static.train()(x), resnet(x))
    assert (static.eval()(x[:1]) - static(x)[:1]).abs().max() < 1e-5


def test_the_scaler_divides_in_training_only():
    x = images()
    assert Scaler(0.5)(x).equal(x / 0.5)
    assert Scaler(0.5).eval()(x).equal(x)
    plain, scaled = (build(lambda s=s: ResNet(scale=s, widths=PICO), seeded()) for s in (1.0, 0.25))
    torch.testing.assert_close(scaled(x), plain(x), rtol=1e-2, atol=1e-2)  # batch norm undoes it, up to its epsilon


def test_width_rounds_up():
    assert describe(lambda: ResNet(width=0.3)).widths == (20, 39, 77, 154)
    assert describe(lambda: SmallCNN(width=0.4)).channels == [7, 13, 13, 26, 26]


def test_the_last_exit_is_the_plain_network():
    deep = build(lambda: ExitResNet(widths=PICO), seeded())
    plain = build(lambda: ResNet(widths=PICO), seeded(1))
    plain.load_state_dict({n: t for n, t in deep.state_dict().items() if n in plain.state_dict()})
    x = images()
    logits = deep(x)
    assert [z.shape for z in logits] == [(4, 10)] * 4
    assert logits[-1].equal(plain(x))
    with pytest.raises(FedError, match="1 to 4"):
        ExitResNet(stages=5)


def test_a_growing_network_keeps_its_stages_and_drops_its_head():
    """ProgFed: M_s holds every tensor of M_(s-1) but the head's."""
    nets = [describe(lambda s=s: ResNet(stages=s)) for s in (1, 2, 3, 4)]
    for small, large in zip(nets, nets[1:], strict=False):
        lost = set(small.state_dict()) - set(large.state_dict())
        (head,) = small.anatomy().heads
        assert lost == {f"{head}.fc.weight", f"{head}.fc.bias"}
    assert set(nets[-1].state_dict()) == set(describe(ResNet).state_dict())
    assert build(lambda: ResNet(stages=2, widths=PICO), seeded())(images()).shape == (4, 10)


def test_rounds_of_each_stage():
    assert stage_rounds(2000) == (250, 250, 250, 1250)
    assert stage_rounds(3000) == (375, 375, 375, 1875)
    assert stage_rounds(7, 1) == (7,)


def test_a_basis_convolution_is_the_convolution_it_composes():
    """W[o, g b + i] = sum_j coefficients[o, g n_b + j] basis[j, i] for group g."""
    layer = BasisConv(6, 5, n_b=4, b=2, stride=2)
    nn.init.normal_(layer.basis, generator=seeded())
    coefficients = layer.coefficients.weight.reshape(5, 3, 4)  # (c_out, groups, n_b)
    W = torch.einsum("ogj,jihw->ogihw", coefficients, layer.basis).reshape(5, 6, 3, 3)
    x = torch.randn(2, 6, 9, 9, generator=seeded(1))
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, W, None, 2, 1), rtol=1e-4, atol=1e-5)


def test_flanc_bases_fit_every_width_and_start_orthogonal():
    narrow, wide = (build(lambda f=f: FlancResNet(width=f, widths=(32, 64)), seeded()) for f in (0.25, 1.75))
    assert {n: b.shape for n, b in bases(narrow).items()} == {n: b.shape for n, b in bases(wide).items()}
    assert len(bases(narrow)) == 8
    assert narrow.stem.conv.out_channels == wide.stem.conv.out_channels == 32
    assert orthogonality(wide).item() < 1e-10
    with torch.no_grad():
        wide.stages[0][0].conv1.basis.mul_(2)  # B B^T = 4 I: mean of (3 I)^2 over 8 x 8 is 9 / 8
    assert orthogonality(wide).item() == pytest.approx(9 / 8, rel=1e-4)


def test_yi_representation():
    model, x = build(lambda: YiCNN(3, 100), seeded()), images(2, 32)
    assert model.hidden(x).shape == (2, 1000)
    R = model.representation(x)
    assert R.shape == (2, 500) and R.min() >= 0
    assert model(x).equal(model.fc3(R))
    with pytest.raises(FedError, match="CNN-1 to CNN-5"):
        YiCNN(6)


def test_adapters_differ_by_the_activation_between():
    direct, factorised = (build(lambda k=k: Adapter(k, 20, 8), seeded()) for k in ("direct", "decomposition"))
    x = torch.randn(4, 20, generator=seeded())
    W, b = factorised.up.weight @ factorised.down.weight, factorised.up(factorised.down.bias)
    torch.testing.assert_close(factorised(x), x @ W.T + b)
    torch.testing.assert_close(direct(x), direct.up(torch.relu(direct.down(x))))
    with pytest.raises(FedError, match="decomposition or direct"):
        Adapter("low", 2, 2)


def test_attention_is_scaled_dot_product_in_every_head():
    layer, x = Attention(12, 3, 0.0), torch.randn(2, 5, 12, generator=seeded())
    q, k, v = (f(x).reshape(2, 5, 3, 4).transpose(1, 2) for f in (layer.query, layer.key, layer.value))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 12)
    torch.testing.assert_close(layer(x), layer.output(mixed))


def test_the_masked_lm_reads_the_mask_token_and_never_says_it():
    model = build(lambda: MaskedLM(50, d=16, ffn=24, depth=2, length=8), seeded()).eval()
    tokens = torch.randint(0, 50, (2, 8), generator=seeded())
    masked = tokens.clone()
    masked[0, 3] = model.mask_token
    logits = model(masked)
    assert logits.shape == (2, 8, 50)
    assert (logits[0, 5] - model(tokens)[0, 5]).abs().max() > 0  # every position sees every other
    assert logits[1].equal(model(tokens)[1])
    assert (model(tokens[:, :4])[0, 0] - model(tokens)[0, 0]).abs().max() > 0
