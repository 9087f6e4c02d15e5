"""The stable rank of the loss's Hessian where a finished run ended, for more and for fewer examples.

FedLoRU's argument (Park and Klabjan, 2024, Theorem 3.3, Figure 2a): the fewer examples a client has, the larger the
stable rank of its loss, and the more it gains from low-rank updates. A small network need not show it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fedllm.config.schema import parse_section
from fedllm.core import Round
from fedllm.errors import FedError
from fedllm.models.build import with_running_statistics
from fedllm.models.curvature import Point, stable_rank
from fedllm.models.network import Network, fitted
from fedllm.recipe import page as recipes
from fedllm.recipe.sections import Recipe
from fedllm.storage import run_folder as folder
from fedllm.tasks.arrays import Arrays, Examples, cross_entropy


def write(run: Path, samples: Sequence[int], probes: int, overrides: Sequence[str] = ()) -> Path:
    """Measures, and writes ``hessian.json`` into the run's folder; its path.

    Raises:
        FedError: no finished run of a network, more samples than the run had examples, fewer than 2 probes.
    """
    if not (run / "recipe.yaml").is_file():
        raise FedError(f"{run} is no run's folder: it has no recipe.yaml. Give the folder that run.output named.")
    recipe = recipes.load([f"recipe={run / 'recipe.yaml'}", *overrides])
    if not recipe.worker.whole:
        raise FedError(
            f"{run} trained a language model's adapters (worker.name={recipe.worker_name}): the Hessian is measured of "
            "networks that were trained whole, worker.name=vision."
        )
    if probes < 2 or min(samples) < 1:
        raise FedError(f"--samples {min(samples)} --probes {probes}: at least 1 example and 2 probes.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = exported(run / recipe.worker.exported).to(device)
    task, data = recipe.data.task, recipe.data
    examples = task.load(data.path, "train", data.train_rows, recipe.run.seed).to(device)
    if max(samples) > len(examples):
        raise FedError(f"--samples {max(samples)}: the run has {len(examples)} training examples.")
    net = with_fixed_statistics(net, task, examples, recipe.worker.test_batch_size)
    rows = [measured(net, task, examples, n, probes, recipe) for n in samples]
    told = {"parameters": sum(p.numel() for p in net.parameters()), "probes": probes, "rows": rows}
    folder.write(run / "hessian.json", json.dumps(told, indent=1))
    return run / "hessian.json"


def exported(place: Path) -> nn.Module:
    """The network in a run's ``model/`` folder, with its values.

    Raises:
        FedError: the folder is not there, or holds only a part of a network.
    """
    if not (place / "network.json").is_file():
        raise FedError(f"{place} has no network.json: let the run finish, which writes its network there.")
    told = json.loads((place / "network.json").read_text())
    network: Network = parse_section(Network, told["model"], "model")
    make = network.maker(told["variant"], told["classes"], told["length"])
    return fitted(make(), load_file(place / "model.safetensors"))


@torch.no_grad()
def with_fixed_statistics(net: nn.Module, task: Arrays, examples: Examples, size: int) -> nn.Module:
    """A copy for the test, its norms on the statistics of all these examples: batch statistics would couple them."""
    net = with_running_statistics(net)
    if any(isinstance(module, nn.BatchNorm2d) for module in net.modules()):
        net.train()
        for at in torch.arange(len(examples)).split(size):
            net(task.test_batch(examples, at)[0])
    return net.eval()


def measured(net: nn.Module, task: Arrays, examples: Examples, n: int, probes: int, recipe: Recipe) -> dict[str, Any]:
    """The curvature of the mean loss of ``n`` examples: those of fewer are among those of more."""
    started, rnd = time.perf_counter(), Round(0, recipe.run.seed)
    chosen = torch.randperm(len(examples), generator=rnd.rng("hessian"))[:n]

    def term(at: Tensor, params: Point) -> Tensor:
        x, y = task.test_batch(examples, at)
        z = torch.func.functional_call(net, dict(params), (x,))
        return cross_entropy(torch.stack(z).mean(0) if isinstance(z, tuple) else z, y) * (len(at) / n)

    losses = [partial(term, at) for at in chosen.split(recipe.worker.test_batch_size)]
    params = {name: p.detach() for name, p in net.named_parameters()}
    found = stable_rank(losses, params, probes, rnd.rng("probes"))
    return {"samples": n, **dataclasses.asdict(found), "seconds": round(time.perf_counter() - started, 2)}
