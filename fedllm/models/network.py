"""The networks that are trained whole, by name, and the network that a set of weights belongs to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedllm.config.types import Count, Whole
from fedllm.core import Client
from fedllm.errors import FedError
from fedllm.models.build import describe
from fedllm.models.cnn import SMALL_WIDTHS, SmallCNN, YiCNN
from fedllm.models.factorized import factorize
from fedllm.models.flanc import FlancResNet
from fedllm.models.lowrank_conv import Spec, adapt
from fedllm.models.resnet import ExitResNet, GrowingResNet, ResNet, Scaler
from fedllm.models.transformer import MaskedLM
from fedllm.structure import FedModel

Make = Callable[..., FedModel]


@dataclass(frozen=True)
class Network:
    """Which network, trained from its first weights on.

    Args:
        name: ``resnet18`` (CIFAR stem), ``cnn`` (five convolutions), ``cnn1`` to ``cnn5`` (of other widths), ``yi1`` to
            ``yi5``, or ``transformer`` (masked words).
        own: networks of the clients' own, dealt out in turn: client k has ``own[k mod len(own)]``, and ``name`` is the
            one that is shared, where any is. By default ``name`` for all.
        norm: after convolutions: on ``batch`` statistics at the test too, on ``running`` ones there, or ``gn``.
        widths: channels of the ResNet's four stages or of the CNN's convolutions; by default the papers'.
        d: the transformer's embedding size.
        ffn: units between its feed-forward layers.
        depth: its layers.
        w0: the frozen convolutions of rules on low-rank updates: ``zero``, and both factors of the update drawn
            (FedLoRU's code), or ``keep``, as the network draws them, and no update at first (its text).
    """

    name: str = "resnet18"
    own: tuple[str, ...] = ()
    norm: Literal["batch", "running", "gn"] = "batch"
    widths: tuple[Count, ...] | None = None
    d: Count = 128
    ffn: Count = 2048
    depth: Whole = 3
    w0: Literal["zero", "keep"] = "zero"

    def of(self, client: Client) -> Network:
        """The network that this client's weights belong to."""
        return replace(self, name=client.level, own=()) if self.own else self

    def maker(self, variant: str, classes: int, length: int = 0) -> Make:
        """Describes the network on the meta device; keywords change its size (``width=0.5``, ``stages=2``).

        Args:
            variant: ``plain``, or a paper's own: ``exits`` (DepthFL), ``growing`` (ProgFed), ``flanc``.
            classes: outputs; words, of the transformer.
            length: tokens of its inputs.

        Raises:
            FedError: no network of that name, or it has no such variant.
        """
        sizes = {} if self.widths is None else {"widths": self.widths}
        settings: dict[str, dict[str, Any]] = {
            "resnet18": {"classes": classes, "norm": self.norm, **sizes},
            "cnn": {"classes": classes, "norm": self.norm, **sizes},
            "transformer": {"vocab": classes, "d": self.d, "ffn": self.ffn, "depth": self.depth, "length": length},
            **{f"yi{kind}": {"kind": kind, "classes": classes} for kind in range(1, 6)},
            **{
                f"cnn{kind}": {"classes": classes, "norm": self.norm, "widths": widths}
                for kind, widths in enumerate(SMALL_WIDTHS, start=1)
            },
        }
        if self.name not in NETWORKS:
            raise FedError(f"model.name={self.name}: there is no network of that name. Valid: {', '.join(NETWORKS)}.")
        if variant not in NETWORKS[self.name]:
            having = ", ".join(name for name, variants in NETWORKS.items() if variant in variants)
            raise FedError(
                f"model.name={self.name} has no variant {variant!r}, which this algorithm needs: take {having}."
            )
        kind = NETWORKS[self.name][variant]
        return lambda **changes: describe(lambda: kind(**{**settings[self.name], **changes}))


FLANC = partial(FlancResNet, width=0.5)
"""By default at a width at which every block that may have a shortcut has one: weights without them are fitted too."""

NETWORKS: dict[str, dict[str, Callable[..., FedModel]]] = {
    "resnet18": {"plain": ResNet, "exits": ExitResNet, "growing": GrowingResNet, "flanc": FLANC},
    "cnn": {"plain": SmallCNN},
    "transformer": {"plain": MaskedLM},
    **{f"yi{kind}": {"plain": YiCNN} for kind in range(1, 6)},
    **{f"cnn{kind}": {"plain": SmallCNN} for kind in range(1, 6)},
}
"""``model.name`` -> variant -> class."""


def fitted(
    described: FedModel,
    weights: Mapping[str, Tensor],
    alphas: Mapping[str, float] | None = None,
    dropout: float = 0.0,
    frozen: Collection[str] = (),
) -> FedModel:
    """The network that ``weights`` belong to: their names and shapes say what was cut away, split or added.

    Layers that they lack are gone (depth), axes are as long as theirs (width), ``LAYER.first`` and ``LAYER.second``
    make a layer factorised, ``LAYER.PAIR.up`` and ``LAYER.PAIR.down`` put a low-rank pair beside it, and their
    ``.outer`` and ``.inner`` a nested one inside.

    Args:
        described: the whole network, on the meta device; it becomes the answer.
        alphas: pair -> LoRA's alpha.
        dropout: between the factors of a pair.
        frozen: weights that are buffers where a pair stands beside them: they neither train nor count.

    Raises:
        FedError: weights that this network has no place for.
    """
    ranks = {n.removesuffix(".first.weight"): t.shape[0] for n, t in weights.items() if n.endswith(".first.weight")}
    factorize(described, ranks)
    for pair, alpha in (alphas or {}).items():
        end = f".{pair}.up.weight"
        for layer in [name.removesuffix(end) for name in weights if name.endswith(end)]:
            outer = weights.get(f"{layer}.{pair}.up.outer")
            spec = Spec(weights[layer + end].shape[1], alpha, dropout, None if outer is None else outer.shape[1])
            adapt(described, [layer], {pair: spec}, base="frozen" if f"{layer}.weight" in frozen else "trained")
    _prune(described, weights)
    for name, tensor in weights.items():
        _place(described, name, tensor)
    left = [name for name, tensor in described.state_dict().items() if name not in weights]
    if left:
        raise FedError(
            f"{left[0]} has no value: {len(weights)} weights were given, {len(left)} of the network's are missing."
        )
    return described


def _prune(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Removes the modules that have parameters and got none."""
    held = {name.rpartition(".")[0] for name in weights}
    held |= {".".join(path.split(".")[:i]) for path in held for i in range(1, path.count(".") + 1)}
    for name, module in list(net.named_modules()):
        if name and name not in held and any(True for _ in module.parameters()):
            parent, _, child = name.rpartition(".")
            if parent and parent not in held:
                continue  # gone with it
            owner = net.get_submodule(parent)
            if isinstance(owner, nn.ModuleList | nn.ModuleDict):
                delattr(owner, child)
            else:
                setattr(owner, child, nn.Identity())


def _place(net: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, kind = name.rpartition(".")
    try:
        module = net.get_submodule(owner)
    except AttributeError:
        module = nn.Identity()
    if kind in module._parameters:
        module._parameters[kind] = nn.Parameter(tensor.clone(), requires_grad=tensor.is_floating_point())
    elif kind in module._buffers:
        module._buffers[kind] = tensor.clone()
    else:
        raise FedError(f"{name} is no weight of this network.")
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(tensor.shape)


def load(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies the values in, on whatever device the network is."""
    own = net.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def scaled(net: nn.Module, rate: float) -> None:
    """Sets every scaler of the network to HeteroFL's rate; 1 for none."""
    for module in net.modules():
        if isinstance(module, Scaler):
            module.rate = rate
