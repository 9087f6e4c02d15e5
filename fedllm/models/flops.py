"""What a client-round costs, counted from the model: parameters, the cost of a forward pass, and the papers' columns.

Two conventions, never mixed. The papers' "COMM(GB)" is one byte per parameter in one direction; the true figure is 4
bytes per number sent, both ways. Their "FLOPs" is one forward pass of one image per client and round.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

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
