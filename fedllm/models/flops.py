"""What a client-round costs, counted from the model: parameters, the cost of a forward pass, and the papers' columns.

Two conventions, never mixed. The papers' "COMM(GB)" is one byte per parameter in one direction; the true figure is 4
bytes per number sent, both ways. Their "FLOPs" is one forward pass of one image per client and round.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from fedllm.core import FedError
from fedllm.lowrank import LowRank


@dataclass(frozen=True)
class Cost:
    """A forward pass.

    Args:
        macs: multiply-adds of convolutions, linear layers and matrix products.
        norm: output elements of the norms after convolutions.
        pool: input elements of average pools.
    """

    macs: int
    norm: int
    pool: int

    @property
    def total(self) -> int:
        """FedLMT's convention: 1 a multiply-add, 5 an output of a norm on batch statistics, 1 an input of a pool."""
        return self.macs + 5 * self.norm + self.pool


def params(model: nn.Module) -> int:
    """Numbers in the model's parameters; norms' gains and offsets are among them, buffers are not."""
    return sum(p.numel() for p in model.parameters())


def trainable(model: nn.Module) -> int:
    """Numbers that receive a gradient."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def sizes(tensors: Mapping[str, Tensor | LowRank]) -> int:
    """Numbers in a payload: a product counts as its two factors."""
    return sum(t.B.numel() + t.A.numel() if isinstance(t, LowRank) else t.numel() for t in tensors.values())


def forward_cost(model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Cost:
    """The cost of one input of this shape (without the batch), on the meta device: nothing is computed.

    Args:
        shape: ``(3, 32, 32)`` for an image; ``(64,)`` with ``torch.long`` for 64 tokens.
    """
    model = copy.deepcopy(model).to("meta").eval()
    seen: Counter[str] = Counter()

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            seen["norm"] += output.numel()
        elif isinstance(module, (nn.AvgPool2d, nn.AdaptiveAvgPool2d)):
            seen["pool"] += inputs[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.zeros(1, *shape, dtype=dtype, device="meta"))
    return Cost(counter.get_total_flops() // 2, seen["norm"], seen["pool"])


class Meter:
    """FLOPs of training as they are done: 2 a multiply-add of convolutions, linear layers and matrix products.

    Forward and backward of whatever a rule's loss runs, frozen and second networks and distillation included; what is
    element by element (norms, activations, the optimizer), tests and what the server computes are not. A step costs in
    proportion to its examples, so one step of each kind is counted and the others follow from it.
    """

    def __init__(self) -> None:
        self.flops = 0.0
        self._each = 0.0

    @contextmanager
    def step(self, examples: int, fresh: bool) -> Iterator[None]:
        """Around the forward and backward pass of one step; ``fresh`` where it is not of the kind of the last one."""
        counted = _Counted()
        with counted if fresh else nullcontext():
            yield
        if fresh:
            self._each = counted.flops / examples
        self.flops += self._each * examples


class _Counted(TorchDispatchMode):
    """FlopCounterMode's sum without its table of modules, which costs more than a small network's step."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func.overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@dataclass(frozen=True)
class Level:
    """What a client of one capacity does in a round.

    Args:
        name: ``b1``, ``b2`` ...
        params: of the client's model, the papers' "communication".
        forward_cost: of one input, ``Cost.total``.
        down_params, up_params: numbers really sent to and by the client.
        train_params: numbers it updates.
        extra_flops: operations besides training (an SVD at the server, a teacher's pass).
    """

    name: str
    params: int
    forward_cost: int
    down_params: int
    up_params: int
    train_params: int = 0
    extra_flops: int = 0


def level(name: str, model: nn.Module, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Level:
    """A client that is sent all of ``model``, trains it and sends it back."""
    n = params(model)
    return Level(name, n, forward_cost(model, shape, dtype).total, n, n, trainable(model))


@dataclass(frozen=True)
class Totals:
    """A whole run, both conventions.

    Args:
        comm_paper_gb: 1e-9 times the parameters of every drawn client's model: a byte a parameter, one direction.
        comm_bytes: 4 bytes for every number that travels, both directions, and ``fixed`` ones.
        flops_paper_1e12: 1e-12 times every drawn client's forward pass of one input.
    """

    comm_paper_gb: float
    comm_bytes: int
    flops_paper_1e12: float

    def json(self) -> dict[str, Any]:
        return {
            "comm_paper_gb": self.comm_paper_gb,
            "comm_bytes": self.comm_bytes,
            "flops_paper_1e12": self.flops_paper_1e12,
        }


def totals(levels: Iterable[Level], drawn: Mapping[str, float], fixed_params: int = 0) -> Totals:
    """The run's columns, for ``drawn[name]`` client-rounds at each level.

    Args:
        fixed_params: numbers sent besides the rounds (a first broadcast, accumulation); true bytes only.
    """
    by_name = {each.name: each for each in levels}
    if missing := [name for name in drawn if name not in by_name]:
        raise FedError(f"clients of level {missing} were drawn, and the levels are {list(by_name)}.")
    rounds = [(by_name[name], times) for name, times in drawn.items()]
    return Totals(
        comm_paper_gb=sum(each.params * times for each, times in rounds) / 1e9,
        comm_bytes=round(
            4 * (sum((each.down_params + each.up_params) * times for each, times in rounds) + fixed_params)
        ),
        flops_paper_1e12=sum(each.forward_cost * times for each, times in rounds) / 1e12,
    )


def plus(*runs: Totals) -> Totals:
    """Phases of one run, one after the other (ProgFed's stages)."""
    return Totals(
        sum(run.comm_paper_gb for run in runs),
        sum(run.comm_bytes for run in runs),
        sum(run.flops_paper_1e12 for run in runs),
    )


def assign(n: int, levels: Sequence[str]) -> list[str]:
    """Each client's level: ``n // len(levels)`` clients each in the given order, the remainder to the last."""
    size = max(1, n // len(levels))
    return [levels[min(i // size, len(levels) - 1)] for i in range(n)]


def expected(levels: Sequence[str], cohort: int, rounds: int) -> dict[str, float]:
    """Client-rounds per level in expectation over the draws."""
    return {name: rounds * cohort * times / len(levels) for name, times in Counter(levels).items()}


def draws(levels: Sequence[str], cohort: int, rounds: int, seed: int) -> dict[str, int]:
    """Client-rounds per level when ``cohort`` of these clients are drawn every round, without replacement.

    The stream is ``np.random.seed(seed)`` and one ``np.random.choice`` a round. FedLMT's printed communication
    identifies its seed: 31.
    """
    stream = np.random.RandomState(seed)
    seen: Counter[str] = Counter({name: 0 for name in levels})
    for _ in range(rounds):
        seen.update(levels[i] for i in stream.choice(range(len(levels)), cohort, replace=False))
    return dict(seen)
