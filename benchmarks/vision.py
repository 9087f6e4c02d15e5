"""Client-steps a second of the vision worker against a straightforward loop of the same network, in one process.

    python benchmarks/vision.py --out results/vision_speed.json

The plain loop is what most published code does: a ``DataLoader`` that augments one picture at a time, the network in
its default memory layout, a fresh copy of the global weights by ``load_state_dict``, SGD, and ``state_dict`` back.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fedllm.core import Client, Model, Round
from fedllm.models.build import build, drawn
from fedllm.models.network import Network
from fedllm.tasks.arrays import Examples
from fedllm.tasks.images import CIFAR10
from fedllm.workers.settings import Vision
from fedllm.workers.vision import VisionWorker

CLIENT = Client("c0", 256)
NETWORKS = {
    "cnn": Network("cnn"),
    "ResNet-18, a quarter as wide": Network("resnet18", widths=(16, 32, 64, 128)),
}


class Pictures(Dataset):
    """One picture at a time: scaled, normalised, cropped and mirrored."""

    def __init__(self, examples: Examples) -> None:
        self.examples, self.task = examples, CIFAR10()

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        x = (self.examples.x[i].float() / 255 - torch.tensor(self.task.mean)[:, None, None]) / torch.tensor(
            self.task.std
        )[:, None, None]
        x = torch.nn.functional.pad(x, (4,) * 4)
        down, right = torch.randint(9, (2,)).tolist()
        x = x[:, down : down + 32, right : right + 32]
        assert self.examples.y is not None
        return (x.flip(-1) if torch.rand(()) < 0.5 else x), self.examples.y[i]


def plain(net: nn.Module, weights: dict[str, Tensor], examples: Examples) -> dict[str, Tensor]:
    """A client's round, written down directly."""
    net = copy.deepcopy(net)
    net.load_state_dict(weights)
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for x, y in DataLoader(Pictures(examples), batch_size=64, shuffle=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


def rate(once: Callable[[], object], steps: int, repeats: int) -> float:
    """Steps a second, the best of ``repeats`` rounds after one to warm up."""
    once()
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - started)
    return steps / min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    examples = Examples(torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8, generator=rng), torch.arange(256) % 10)
    results = {}
    for name, network in NETWORKS.items():
        make = network.maker("plain", 10)
        model = Model(drawn(make(), rng), anatomy=make().anatomy(), make=make)
        parts = {CLIENT.id: list(range(256))}
        worker = VisionWorker(Vision(), CIFAR10(), model, examples, examples, parts, parts, 10, torch.device("cpu"))
        net = build(make, rng)
        ours = rate(lambda: worker.of(CLIENT).train(model.weights, {}, Round(1, 0)), 4, given.repeats)  # noqa: B023
        theirs = rate(lambda: plain(net, dict(model.weights), examples), 4, given.repeats)  # noqa: B023
        results[name] = {"worker": ours, "plain_loop": theirs, "times_as_fast": ours / theirs}
        print(f"{name}: {ours:.1f} client-steps a second, {theirs:.1f} in a plain loop: {ours / theirs:.2f} times")
    if given.out:
        command = shlex.join(["python", "benchmarks/vision.py", *sys.argv[1:]])
        report = {"command": command, "threads": given.threads, "batch_size": 64, "steps_per_second": results}
        given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
