"""The factorised layers: the split is the layer, its inverse is the split's, and the decays are what they say."""

import pytest
import torch
from torch import nn

from fedllm.errors import FedError
from fedllm.models.build import build
from fedllm.models.cnn import SmallCNN, YiCNN
from fedllm.models.factorized import (
    FactorConv,
    FactorEmbedding,
    FactorLinear,
    clamped,
    decay,
    factorize,
    frobenius_decay,
    from_matrix,
    full_rank,
    kronecker_decay,
    l2_decay,
    product,
    products,
    rank_of,
    ranks,
    recover,
    recover_weights,
    smallest_singular_values,
    split,
    split_weights,
    to_matrix,
    weights_of,
)
from fedllm.models.transformer import MaskedLM


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


def pico_lm():
    return MaskedLM(vocab=50, d=16, heads=4, ffn=24, depth=2, length=8)


def test_the_matrix_entry_by_entry():
    """M[(o,a),(i,b)] = W[o,i,a,b] for c_out = 2, c_in = 3, k = 2: row o k + a, column i k + b."""
    W = torch.arange(24.0).reshape(2, 3, 2, 2)
    M = to_matrix(W)
    assert M.shape == (4, 6)
    for o, i, a, b in ((0, 0, 0, 1), (1, 2, 0, 1), (0, 2, 1, 0), (1, 0, 1, 1)):
        assert M[o * 2 + a, i * 2 + b] == W[o, i, a, b]
    assert from_matrix(M, 2).equal(W)


def test_the_smallest_singular_values_of_a_network_are_those_of_an_svd():
    """A CNN whose later layers are factorised: of both factors the smaller; of the stem, the one of its matrix."""
    net = build(lambda: factorize(SmallCNN(), ranks(SmallCNN(), SmallCNN().anatomy(), 2, 0.2)), seeded())
    found, weights = smallest_singular_values(net.state_dict()), net.state_dict()
    assert set(found) == {f"convs.{i}" for i in range(5)}
    for i in (0, 1):
        assert found[f"convs.{i}"] == pytest.approx(
            float(torch.linalg.svdvals(to_matrix(weights[f"convs.{i}.weight"]))[-1]), abs=1e-5
        )
    for i in (2, 3, 4):
        UV = product(weights[f"convs.{i}.first.weight"], weights[f"convs.{i}.second.weight"])
        least = min(float(torch.linalg.svdvals(side)[-1]) for side in (UV.A, UV.B))
        assert found[f"convs.{i}"] == pytest.approx(least, rel=1e-4)


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (4, 6, 5, 5), (7, 9, 1, 1), (6, 10), (10, 6)])
def test_recover_inverts_a_split_of_full_rank(shape):
    W = normal(*shape)
    rank = min(to_matrix(W).shape)
    torch.testing.assert_close(recover(*split(W, rank)), W, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(8, 5, 3, 3), (6, 10)])
def test_a_split_is_the_best_approximation(shape):
    W = normal(*shape).double()
    S = torch.linalg.svdvals(to_matrix(W))
    for rank in (1, 3, 5):
        error = torch.linalg.vector_norm(W - recover(*split(W, rank)).double())
        torch.testing.assert_close(error, S[rank:].norm(), rtol=1e-6, atol=1e-6)


def test_a_split_is_balanced():
    """U_r sqrt(S_r) and V_r sqrt(S_r): both Gram matrices are diag(S_r)."""
    W = normal(8, 5, 3, 3)
    UV = product(*split(W, 4))
    S = torch.diag(torch.linalg.svdvals(to_matrix(W))[:4])
    torch.testing.assert_close(UV.B.T @ UV.B, S, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(UV.A @ UV.A.T, S, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [3, None])
def test_products_and_weights_are_inverse(k):
    first, second = (normal(4, 5, 1, 3), normal(6, 4, 3, 1, seed=1)) if k else (normal(4, 5), normal(6, 4, seed=1))
    back = weights_of(product(first, second), k)
    assert back[0].equal(first) and back[1].equal(second)


def test_surplus_directions_can_train_if_a_generator_is_given():
    """A matrix of rank 2 split at rank 5: the product is the matrix, U's new columns are zero and V's are not."""
    W = from_matrix(normal(12, 2) @ normal(2, 9, seed=1), 3)
    for generator in (None, seeded(3)):
        first, second = split(W, 5, generator)
        torch.testing.assert_close(recover(first, second), W, rtol=1e-4, atol=1e-4)
        assert second[:, 2:].abs().max() == 0
        assert (first[2:].abs().max() > 0) == (generator is not None)


@pytest.mark.parametrize(
    "stride, padding, k, size", [(1, 1, 3, 9), (2, 1, 3, 9), (2, 1, 3, 8), (1, 0, 5, 9), (2, 2, 5, 7)]
)
def test_a_factorised_convolution_of_full_rank_is_the_convolution(stride, padding, k, size):
    conv = nn.Conv2d(4, 6, k, stride, padding)
    model = factorize(nn.Sequential(conv), {"0": full_rank(conv)})
    model.load_state_dict(
        split_weights({"0.weight": conv.weight.data, "0.bias": conv.bias.data}, {"0": full_rank(conv)})
    )
    assert isinstance(model[0], FactorConv)
    x = normal(2, 4, size, size)
    torch.testing.assert_close(model(x), conv(x), rtol=1e-4, atol=1e-5)


def test_a_truncated_layer_computes_its_recovered_weight():
    """Whatever the rank, the two convolutions are one convolution with U V^T."""
    conv = nn.Conv2d(4, 6, 3, 2, 1, bias=False)
    first, second = split(conv.weight.data, 2)
    layer = FactorConv(4, 6, 3, 2, 2, 1)
    layer.load_state_dict({"first.weight": first, "second.weight": second})
    x = normal(2, 4, 9, 9)
    whole = nn.functional.conv2d(x, recover(first, second), None, 2, 1)
    torch.testing.assert_close(layer(x), whole, rtol=1e-5, atol=1e-6)
    assert (layer(x) - conv(x)).abs().max() > 0.01  # rank 2 of 12 loses something


def test_factorised_linear_and_table():
    linear, table = nn.Linear(7, 5), nn.Embedding(11, 4)
    parts = split_weights(
        {"l.weight": linear.weight.data, "l.bias": linear.bias.data, "t.weight": table.weight.data}, {"l": 5, "t": 4}
    )
    lowered, looked = FactorLinear(7, 5, 5), FactorEmbedding(11, 4, 4)
    lowered.load_state_dict({name[2:]: tensor for name, tensor in parts.items() if name[0] == "l"})
    looked.load_state_dict({name[2:]: tensor for name, tensor in parts.items() if name[0] == "t"})
    x, tokens = normal(3, 7), torch.tensor([[0, 10], [3, 3]])
    torch.testing.assert_close(lowered(x), linear(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(looked(tokens), table(tokens), rtol=1e-4, atol=1e-5)


MODELS = {
    "cnn": (SmallCNN, lambda: normal(4, 3, 16, 16)),
    "yi": (lambda: YiCNN(5), lambda: normal(2, 3, 32, 32)),
    "lm": (pico_lm, lambda: torch.randint(0, 51, (3, 8), generator=seeded())),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_spectral_model_of_full_rank_is_the_model(name):
    make, data = MODELS[name]
    full = build(make, seeded())
    layer_ranks = {each: full_rank(full.get_submodule(each)) for each in full.anatomy().factorable(1)}
    low = factorize(build(make, seeded(1)), layer_ranks)
    low.load_state_dict(split_weights(full.state_dict(), layer_ranks))
    x = data()
    torch.testing.assert_close(low.eval()(x), full.eval()(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_an_exported_low_rank_model_gives_the_same_logits(name):
    make, data = MODELS[name]
    model = build(make, seeded())
    low = factorize(build(make, seeded()), ranks(model, model.anatomy(), 1, 0.4))
    low.initialize(seeded(2))
    recovered = recover_weights(low.state_dict())
    assert set(recovered) == set(model.state_dict())
    model.load_state_dict(recovered)
    x = data()
    assert (low.eval()(x) - model.eval()(x)).abs().max() < 1e-4


def test_rho_counts_the_layers_that_stay():
    anatomy = SmallCNN().anatomy()
    assert anatomy.factorable(1) == ("convs.1", "convs.2", "convs.3", "convs.4")
    assert anatomy.factorable(3) == ("convs.3", "convs.4")
    assert anatomy.factorable(5) == anatomy.factorable(6) == ()
    with pytest.raises(FedError, match="0 to 6"):
        anatomy.factorable(7)


def test_ranks_round_halves_to_even_and_stay_within_bounds():
    assert rank_of(nn.Conv2d(9, 5, 3), 0.5) == 2  # round(2.5)
    assert rank_of(nn.Conv2d(9, 7, 3), 0.5) == 4  # round(3.5)
    assert rank_of(nn.Conv2d(9, 64, 3), 0.001) == 1
    assert rank_of(nn.Conv2d(2, 64, 3), 1.4) == 6  # min(3 * 64, 3 * 2)
    assert rank_of(nn.Linear(128, 2048), 0.25) == 32
    assert rank_of(nn.Embedding(3, 100), 0.02) == 2
    with pytest.raises(FedError, match="BatchNorm2d"):
        rank_of(nn.BatchNorm2d(3), 0.5)


def test_a_clamped_layer_is_told():
    model = SmallCNN(widths=(2, 16, 16, 16, 16))
    assert clamped(model, model.anatomy(), 1, 0.5) == ("convs.1",)  # wanted 8 of min(48, 6)
    assert clamped(model, model.anatomy(), 2, 0.5) == ()


def test_a_grouped_convolution_is_refused():
    with pytest.raises(FedError, match="without groups"):
        factorize(nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), {"0": 1})


def low_model():
    model = SmallCNN()
    low = factorize(model, ranks(model, model.anatomy(), 1, 0.4))
    low.initialize(seeded())
    return low


def test_the_gram_form_is_the_frobenius_norm():
    for UV in products(low_model()).values():
        torch.testing.assert_close(frobenius_decay(UV), UV.dense().square().sum(), rtol=1e-5, atol=1e-5)


def test_decays_by_hand():
    """U = [1; 2], V = [3; 0; 1]: |U|^2 = 5, |V|^2 = 10, |U V^T|^2 = 50 (rank 1: equal to the Kronecker decay)."""
    first, second = torch.tensor([[3.0, 0, 1]]), torch.tensor([[1.0], [2.0]])
    UV = product(first, second)
    assert (frobenius_decay(UV), l2_decay(UV), kronecker_decay(UV)) == (50, 15, 50)


def test_frobenius_decay_never_exceeds_kronecker_decay():
    for seed in range(20):
        r = 1 + seed % 5
        UV = product(normal(r, 4, 1, 3, seed=seed), normal(6, r, 3, 1, seed=seed + 100))
        assert frobenius_decay(UV) <= kronecker_decay(UV) * (1 + 1e-6)


def test_the_decay_of_a_model_sums_and_weighs_its_layers():
    model = low_model()
    factors = products(model).values()
    assert len(factors) == 4
    expected = 0.5 * sum(l2_decay(UV) for UV in factors) + 2 * sum(kronecker_decay(UV) for UV in factors)
    torch.testing.assert_close(decay(model, {"l2": 0.5, "kronecker": 2.0}), expected)


@pytest.mark.parametrize("name", ["frobenius", "l2", "kronecker"])
def test_a_step_along_the_decay_shrinks_it(name):
    model = low_model()
    before = decay(model, {name: 1.0})
    before.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-4 * p.grad
    assert decay(model, {name: 1.0}) < before
    touched = {n.split(".")[-2] for n, p in model.named_parameters() if p.grad is not None}
    assert touched == {"first", "second"}


def test_a_model_without_factors_has_no_decay():
    assert decay(SmallCNN(), {"frobenius": 1.0}) == 0
