"""The stable rank of a Hessian: by hand, against the exact one of a small network, and of a run's network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedllm.cli import main
from fedllm.commands import hessian
from fedllm.errors import FedError
from fedllm.models.curvature import Point, stable_rank
from fedllm.recipe import load

D = torch.tensor([5.0, -4.0, 3.0, 0.0], dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_diagonal_by_hand():
    """H = diag(5, -4, 3, 0): (25 + 16 + 9) / 25 = 2. Signs square to 1, so that every probe says 16 + 9 beside 25."""

    def half(params: Point) -> Tensor:
        return (torch.cat([params["a"], params["b"]]).square() * D).sum() / 4

    found = stable_rank([half, half], {"a": torch.ones(1).double(), "b": torch.zeros(3).double()}, 4, seeded())
    assert found.stable_rank == pytest.approx(2.0, rel=1e-2) and found.standard_error < 1e-2
    assert found.lambda_max == pytest.approx(5.0, rel=1e-3) and found.frobenius == pytest.approx(50**0.5, rel=1e-2)


def test_the_largest_eigenvalue_may_be_negative_and_have_a_twin():
    """diag(-5, 5, 1): |lambda| is 5 whichever of the two, and the stable rank 51 / 25; -H alone changes the sign."""
    twins = torch.tensor([-5.0, 5.0, 1.0], dtype=torch.float64)
    both = stable_rank([lambda p: (p["x"].square() * twins).sum() / 2], {"x": torch.ones(3).double()}, 400, seeded())
    assert abs(both.lambda_max) == pytest.approx(5.0, rel=1e-3)
    assert both.stable_rank == pytest.approx(51 / 25, abs=4 * both.standard_error + 1e-2)
    down = stable_rank([lambda p: (p["x"].square() * -D).sum() / 2], {"x": torch.ones(4).double()}, 2, seeded())
    assert down.lambda_max == pytest.approx(-5.0, rel=1e-3)


def test_a_flat_loss_has_no_curvature():
    found = stable_rank([lambda params: params["x"].sum()], {"x": torch.ones(3)}, 2, seeded())
    assert (found.stable_rank, found.lambda_max, found.frobenius, found.steps) == (0.0, 0.0, 0.0, 1)
    with pytest.raises(ValueError, match="at least 2 probes, got 1"):
        stable_rank([lambda params: params["x"].sum()], {"x": torch.ones(3)}, 1, seeded())


@pytest.mark.parametrize("steps", [0, 40])
def test_against_the_exact_hessian_of_a_small_network(steps: int):
    """178 parameters, before training and after: eigenvalues of the dense Hessian say what is right."""
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=seeded(p.numel())).double() / 3
    x = torch.randn(60, 8, generator=seeded(1)).double()
    y = torch.sin(x[:, :1] * 2) + x[:, 1:2]
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    params = {name: p.detach() for name, p in net.named_parameters()}
    sizes = [p.numel() for p in params.values()]

    def term(params: Point, at: slice) -> Tensor:
        return (torch.func.functional_call(net, dict(params), (x[at],)) - y[at]).square().sum() / len(x)

    def flat(w: Tensor) -> Tensor:
        parts = zip(params.items(), w.split(sizes), strict=True)
        return term({name: part.view(p.shape) for (name, p), part in parts}, slice(None))

    exact = torch.linalg.eigvalsh(torch.func.hessian(flat)(torch.cat([p.flatten() for p in params.values()])))
    largest, square = exact[exact.abs().argmax()], float(exact.square().sum())
    batches = [lambda p, at=at: term(p, at) for at in (slice(0, 25), slice(25, 60))]
    found, right = stable_rank(batches, params, 400, seeded()), square / float(largest) ** 2
    assert found.lambda_max == pytest.approx(float(largest), rel=1e-3)
    assert found.frobenius == pytest.approx(square**0.5, rel=0.03)
    assert found.stable_rank == pytest.approx(right, rel=0.05)
    assert abs(found.stable_rank - right) < 4 * found.standard_error < 0.2 * right
    few = stable_rank(batches, params, 2, seeded())
    assert few == stable_rank(batches, params, 2, seeded()), "the same generator, the same numbers"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs") / "vision"
    keys = ["run.rounds=1", "run.threads=1", "data.train_rows=40", "data.test_rows=20", "clients.count=2",
            "clients.participation=1", "data.partition.name=iid", "model.widths=[4,4,8,8,8]"]  # fmt: skip
    assert main(["train", "recipe=toy_capacities", f"run.output={place}", *keys]) == 0
    return place


def test_a_run_s_network_through_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]):
    """Its numbers are those of the dense Hessian at the exported weights, the norms on all examples' statistics."""
    assert main(["hessian", str(run), "--samples", "10", "40", "--probes", "60"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((run / "hessian.json").read_text())
    assert [row["samples"] for row in told["rows"]] == [10, 40]
    for row in told["rows"]:
        assert 1.0 <= row["stable_rank"] <= told["parameters"]
        assert row["frobenius"] ** 2 == pytest.approx(row["stable_rank"] * row["lambda_max"] ** 2)


def test_fixed_statistics_do_not_couple_the_examples(run: Path):
    """An example's output is the same alone and beside others, which batch statistics would not give."""
    recipe, net = load([f"recipe={run / 'recipe.yaml'}"]), hessian.exported(run / "model")
    task = recipe.data.task
    examples = task.load(None, "train", None, 0)
    fixed = hessian.with_fixed_statistics(net, task, examples, 20)
    x, _ = task.test_batch(examples, torch.arange(40))
    with torch.no_grad():
        torch.testing.assert_close(fixed(x)[:20], fixed(x[:20]))
        assert not torch.allclose(net.eval()(x)[:20], net(x[:20]), atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples", "41"], "--samples 41: the run has 40 training examples"),
        (["--samples", "0"], "at least 1 example and 2 probes"),
        (["--probes", "1"], "at least 1 example and 2 probes"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(run: Path, arguments: list[str], message: str):
    given = {"--samples": ["10"], "--probes": ["2"], arguments[0]: arguments[1:]}
    with pytest.raises(FedError, match=message):
        hessian.write(run, [int(n) for n in given["--samples"]], int(given["--probes"][0]))


def test_no_run_and_no_network(run: Path, tmp_path: Path):
    with pytest.raises(FedError, match="is no run's folder"):
        hessian.write(tmp_path, [10], 2)
    (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
    with pytest.raises(FedError, match=r"has no network\.json: let the run finish"):
        hessian.write(tmp_path, [10], 2)
    with pytest.raises(FedError, match="trained a language model's adapters"):
        (tmp_path / "recipe.yaml").write_text("model: {name: pico}\ndata: {name: word_problems}\n")
        hessian.write(tmp_path, [10], 2)
