"""A client that trains a whole network, or a part of one, by SGD. Plain PyTorch; nothing here knows an algorithm.

The weights that arrive say which network they belong to (``fedllm.models.network.fitted``), so narrow, shallow,
factorised and full clients share this code. Arrays fit in memory: batches are cut and augmented as tensors, without
loader processes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core import Client, ClientWorker, LocalResult, LocalTraining, Loss, Model, Phase, Round, Score, Tensors
from fedllm.lowrank import LowRank
from fedllm.models.build import with_running_statistics
from fedllm.models.flops import Meter
from fedllm.models.lowrank_conv import SHARED, folded, nested_in, plain, unfolded
from fedllm.models.network import fitted, load, scaled
from fedllm.tasks.arrays import Arrays, Examples, cross_entropy
from fedllm.workers.settings import Vision


def everything(name: str) -> bool:
    return True


def output(net: nn.Module, x: Tensor) -> Any:
    return net(x)


@dataclass(frozen=True)
class VisionClient(ClientWorker):
    """One client's view of the worker."""

    worker: VisionWorker
    client: Client

    @property
    def steps(self) -> int:
        return self.worker.settings.steps_for(len(self.worker.parts[self.client.id]))

    @property
    def model(self) -> Model:
        """The client's network with the values that it can draw from the run's seed, at no cost in bytes."""
        return self.worker.own.get(self.client.level, self.worker.model)

    @property
    def shared(self) -> Model:
        """The server's network, which is another one where clients have their own."""
        return self.worker.model

    @property
    def labels(self) -> Tensor:
        """The classes that this client has examples of, ascending; words, of a text."""
        train, at = self.worker.train_set, self.worker.parts[self.client.id]
        return (train.x if train.y is None else train.y)[at].unique().cpu()

    def rate(self, rnd: Round) -> float:
        return self.worker.settings.learning_rate_in(rnd.index, self.worker.rounds)

    def _drift(self, drift: Tensors) -> dict[str, Tensor]:
        """By the network's own names: of products as their pairs."""
        products = {name: value for name, value in drift.items() if isinstance(value, LowRank)}
        pairs = unfolded(products, self.worker.settings.alpha)
        return {name: value for name, value in drift.items() if name not in products} | pairs

    def fit(self, request: LocalTraining) -> LocalResult:
        """Trains weights of a network on this client's examples; the memory is not used, and returned.

        Metrics: ``train_loss`` (mean over steps), ``steps``, ``flops`` (``fedllm.models.flops.Meter``), ``seconds``.
        """
        options = (
            "frozen",
            "nested",
            "part",
            "loss",
            "penalty",
            "phases",
            "scale",
            "alphas",
            "network",
            "forward",
            "proximal",
            "drift",
        )
        request.only("worker.name=vision", *options)
        sent, part, nested, rnd, penalty = request.weights, request.part, request.nested, request.rnd, request.penalty
        loss: Loss = request.loss or cross_entropy
        forward = request.forward or output
        if part[0] == part[1]:
            return LocalResult(dict(sent), dict(request.memory), {})
        started = time.perf_counter()
        worker, settings = self.worker, self.worker.settings
        products = {name: value for name, value in sent.items() if isinstance(value, LowRank)}
        whole = {name: value for name, value in sent.items() if name not in products}
        pairs, inner = unfolded(products, settings.alpha), nested_in(nested)
        trained = whole | (inner or pairs)
        net = worker.fitted(
            {**plain(self.model, request.frozen), **pairs, **trained},
            request.alphas,
            request.network or self.model.make,
        ).train()
        scaled(net, request.scale)
        params = {name: p for name, p in net.named_parameters() if name in trained}
        for name, p in net.named_parameters():
            p.requires_grad_(name in trained)
            p.grad = None
        begun = {name: p.detach().clone() for name, p in params.items()} if request.proximal else {}
        drift = {name: value.to(params[name]) for name, value in self._drift(request.drift).items() if name in params}
        rate = self.rate(rnd)
        optimizer = torch.optim.SGD(params.values(), rate, settings.momentum, weight_decay=settings.weight_decay)
        first = round(part[0] * self.steps)
        count = max(1, round(part[1] * self.steps) - first)
        turns = _turns(request.phases or ((1.0, everything),), count)
        losses = []
        meter = Meter()
        draws = ("local", self.client.id) if part[0] == 0.0 else ("local", self.client.id, part[0])
        with _own_randomness(rnd.rng(*draws).initial_seed(), worker.device):
            for step, at in islice(enumerate(self._batches(rnd)), first, first + count):
                if step - first in turns:
                    for name, p in params.items():
                        p.requires_grad_(turns[step - first](name))
                        p.grad = None  # a gradient of zero would still let momentum and decay move a frozen weight
                x, y = worker.task.train_batch(worker.train_set, at, rnd.rng("augment", self.client.id, step))
                optimizer.zero_grad(set_to_none=True)
                with meter.step(len(at), fresh=step - first in turns):
                    value = loss(forward(net, x.contiguous(memory_format=worker.layout(x))), y)
                    if penalty is not None:
                        value = value + penalty(net)
                    if request.proximal:
                        apart = [(p - begun[name]).square().sum() for name, p in params.items()]
                        value = value + request.proximal / 2 * torch.stack(apart).sum()
                    value.backward()
                if settings.max_grad_norm:
                    nn.utils.clip_grad_norm_(params.values(), settings.max_grad_norm)
                optimizer.step()
                with torch.no_grad():
                    for name, moved in drift.items():
                        params[name].sub_(moved, alpha=rate)
                losses.append(value.detach())
                worker.on_step(float(losses[-1]) if worker.device.type == "cpu" else None)
        held = net.state_dict()
        ended = {name: held[name].detach().to("cpu", copy=True).contiguous() for name in trained}
        returned = {name: ended[name] for name in whole} | folded(ended, nested or products, settings.alpha)
        mean = float(torch.stack(losses).mean())
        metrics = {"train_loss": mean, "steps": float(len(losses)), "flops": meter.flops}
        metrics["seconds"] = time.perf_counter() - started
        return LocalResult(returned, dict(request.memory), metrics)

    def score(
        self,
        weights: Tensors,
        alphas: Mapping[str, float] | None = None,
        forward: Callable[..., object] | None = None,
    ) -> dict[str, float]:
        """The task's scores of ``forward(net, x)`` on this client's own test examples, if it has any.

        Args:
            weights: of the network, or what was learned on top of its frozen ones.
        """
        at = self.worker.test_parts.get(self.client.id)
        return (
            {}
            if at is None or not len(at)
            else self.worker.measure(weights, at, alphas, self.model.make, forward or output)
        )

    def outputs(
        self, weights: Tensors, forward: Callable[..., object] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``forward(net, x)`` and the targets of all the client's training examples, a test batch at a time."""
        worker = self.worker
        return self._passed(worker.train_set, worker.parts[self.client.id], weights, forward or output)

    def test_outputs(
        self, weights: Tensors, forward: Callable[..., object] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of the client's own test examples."""
        worker = self.worker
        return self._passed(worker.test_set, worker.test_parts[self.client.id], weights, forward or output)

    @torch.no_grad()
    def _passed(
        self, examples: Examples, rows: Tensor, weights: Tensors, forward: Callable[..., Any]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        worker = self.worker
        net = worker.fitted(weights, None, self.model.make).eval()
        for at in rows.split(worker.settings.test_batch_size):
            x, y = worker.task.test_batch(examples, at)
            yield forward(net, x.contiguous(memory_format=worker.layout(x))), y

    def _batches(self, rnd: Round) -> Iterator[Tensor]:
        """Indices into the training examples, ``(B,)`` each, without end; the order has a generator of its own."""
        rows, size, rng = (
            self.worker.parts[self.client.id],
            self.worker.settings.batch_size,
            rnd.rng("order", self.client.id),
        )
        while True:
            order = rows[torch.randperm(len(rows), generator=rng)]
            yield from (at for at in order.split(size) if len(at) > 1 or len(rows) == 1)


def _turns(phases: Sequence[Phase], steps: int) -> dict[int, Callable[[str], bool]]:
    """The step each phase begins at; an earlier one gets the odd step."""
    turns, share = {}, 0.0
    for part, trains in phases:
        turns[math.ceil(share * steps - 1e-9)] = trains
        share += part
    return turns


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Dropout draws from the global generator: seeded for this block, and put back after it."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class VisionWorker:
    """The data, and a network of each shape that was asked for; it serves every client that this process stands for.

    Args:
        settings: how clients train.
        task: makes batches of the examples.
        model: the network; its weights have values.
        train_set, test_set: the examples, moved to the device.
        parts, test_parts: every client's indices into them, by client id.
        rounds: rounds of the run, for the schedule.
        on_step: called with the loss after every optimizer step, None where that would wait for a GPU.
        own: networks of the clients' own, by the level of the clients that have them.
    """

    def __init__(
        self,
        settings: Vision,
        task: Arrays,
        model: Model,
        train_set: Examples,
        test_set: Examples,
        parts: Mapping[str, Sequence[int]],
        test_parts: Mapping[str, Sequence[int]],
        rounds: int,
        device: torch.device,
        on_step: Callable[[float | None], None] = lambda loss: None,
        own: Mapping[str, Model] | None = None,
    ) -> None:
        self.settings, self.task, self.model, self.rounds, self.device = settings, task, model, rounds, device
        self.own = own or {}
        self.train_set, self.test_set = train_set.to(device), test_set.to(device)
        self.parts = {id: torch.tensor(part) for id, part in parts.items()}
        self.test_parts = {id: torch.tensor(part) for id, part in test_parts.items()}
        self.on_step = on_step
        self._nets: dict[Any, nn.Module] = {}

    def of(self, client: Client) -> VisionClient:
        """This worker, standing for ``client``."""
        return VisionClient(self, client)

    def fitted(
        self,
        weights: Tensors,
        alphas: Mapping[str, float] | None = None,
        make: Callable[[], Any] | None = None,
    ) -> nn.Module:
        """The network of these weights with their values in it; one of each shape is kept and filled again.

        Args:
            make: describes it, by default the server's.
        """
        make = make or self.model.make
        alphas = {SHARED: self.settings.alpha, **(alphas or {})}
        shape = (tuple((n, tuple(t.shape)) for n, t in sorted(weights.items())), tuple(sorted(alphas.items())))
        if shape not in self._nets:
            net: Any = fitted(make(), weights, alphas, self.settings.dropout, self.model.frozen or ()).to(self.device)
            self._nets[shape] = net.to(memory_format=torch.channels_last) if len(self.task.shape) == 3 else net
        net = self._nets[shape]
        load(net, weights)
        return net

    def layout(self, x: Tensor) -> torch.memory_format:
        """Convolutions read images by pixel, channels innermost."""
        return torch.channels_last if x.ndim == 4 else torch.contiguous_format

    def evaluate(self, update: Tensors, alphas: Mapping[str, float] | None = None) -> Score:
        """Scores of the network with these weights, or this update of frozen ones; without any, of the one before.

        Weights that are not a whole network (what personal models share) have no score.
        """
        frozen = self.model.frozen or {}
        weights = update or {name: W for name, W in self.model.weights.items() if name not in frozen}
        if not any(name.startswith(head) for head in self.model.anatomy.heads for name in weights):
            return Score({}, [])
        metrics: dict[str, float] = {}
        if self.settings.score != "clients":
            metrics |= self.measure(weights, torch.arange(len(self.test_set)), alphas)
        if self.settings.score != "pooled":
            each = [self.measure(weights, at, alphas) for at in self.test_parts.values() if len(at)]
            metrics |= {
                f"{key}_clients": sum(one[key] for one in each) / len(each) for key in (each[0] if each else ())
            }
        return Score(metrics, [])

    @torch.no_grad()
    def measure(
        self,
        weights: Tensors,
        at: Tensor,
        alphas: Mapping[str, float] | None = None,
        make: Callable[[], Any] | None = None,
        forward: Callable[[Any, Tensor], Any] = output,
    ) -> dict[str, float]:
        """The task's scores on the test examples ``at``, in their order; exits are averaged, and scored alone too."""
        net = self.fitted(plain(self.model, weights), alphas, make)
        if self.settings.statistics == "static":
            net = with_running_statistics(net).train()
            for batch in torch.arange(len(self.train_set)).split(self.settings.test_batch_size):
                net(self.task.test_batch(self.train_set, batch)[0])
        net.eval()
        tallies: list[Any] = []
        exits: list[list[Any]] = []
        for batch in at.split(self.settings.test_batch_size):
            x, y = self.task.test_batch(self.test_set, batch)
            z = forward(net, x.contiguous(memory_format=self.layout(x)))
            several = z if isinstance(z, tuple) else (z,)
            tallies.append(self.task.tally(torch.stack(several).mean(0), x, y))
            exits.append([self.task.tally(one, x, y) for one in several] if len(several) > 1 else [])
        metrics = self.task.metrics(tallies)
        for i, alone in enumerate(zip(*exits, strict=True), start=1):
            metrics |= {f"exit{i}_{key}": value for key, value in self.task.metrics(alone).items() if key != "loss"}
        return metrics
