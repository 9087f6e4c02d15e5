"""Models are described on the meta device, then filled by a generator: no global random state, counting is free."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from fedllm.structure import FedModel

Net = TypeVar("Net", bound=nn.Module)


F = TypeVar("F", bound=FedModel)


def describe(make: Callable[[], Net]) -> Net:
    """The model on the meta device: shapes and names, no memory, nothing drawn."""
    with torch.device("meta"):
        return make()


def drawn(described: FedModel, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Values for every parameter and buffer of a network on the meta device, by name, in the network's own order."""
    model = copy.deepcopy(described).to_empty(device="cpu")
    model.initialize(generator)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def build(make: Callable[[], F], generator: torch.Generator, device: torch.device | str = "cpu") -> F:
    """The model with weights drawn from ``generator``, a CPU one: every device starts from the same numbers."""
    model = describe(make).to_empty(device="cpu")
    model.initialize(generator)
    return model.to(device)


def reset(module: nn.Module, generator: torch.Generator, conv: Callable[[nn.Conv2d, torch.Generator], None]) -> None:
    """Initialises the module's own parameters: ``conv`` for convolutions, PyTorch's rules for the other layers."""
    match module:
        case nn.Conv2d():
            conv(module, generator)
        case nn.Linear():
            uniform(module, generator)
        case nn.Embedding():
            nn.init.normal_(module.weight, generator=generator)
        case nn.BatchNorm2d():
            module.reset_parameters()
        case nn.GroupNorm() | nn.LayerNorm():
            module.reset_parameters()


def fan_out(module: nn.Conv2d, generator: torch.Generator) -> None:
    """Kaiming normal over the outputs (He et al., 2015), bias zero."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def uniform(module: nn.Conv2d | nn.Linear, generator: torch.Generator) -> None:
    """``U(-1/sqrt(fan_in), 1/sqrt(fan_in))`` for weight and bias, PyTorch's default."""
    bound = module.weight[0].numel() ** -0.5
    nn.init.uniform_(module.weight, -bound, bound, generator=generator)
    if module.bias is not None:
        nn.init.uniform_(module.bias, -bound, bound, generator=generator)


NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""What a norm may have per channel, whatever its kind."""


def norm2d(kind: str, channels: int) -> nn.Module:
    """The normalisation after a convolution.

    Args:
        kind: ``batch``, batch statistics at training and at test; ``running``, statistics kept for test; ``gn``, two
            groups, no batch at all.
    """
    match kind:
        case "batch":
            return nn.BatchNorm2d(channels, track_running_stats=False)
        case "running":
            return nn.BatchNorm2d(channels)
        case "gn":
            return nn.GroupNorm(2 if channels % 2 == 0 else 1, channels)
    raise ValueError(f"norm is one of batch, running, gn, got {kind!r}.")


def with_running_statistics(model: Net) -> Net:
    """A copy whose batch norms keep cumulative statistics from here on (HeteroFL's sBN: refresh, then evaluate)."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features, eps=module.eps, momentum=None, device=module.weight.device)
            fresh.weight, fresh.bias = module.weight, module.bias
            replace(model, name, fresh)
    return model


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Puts ``module`` where ``name`` was."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
