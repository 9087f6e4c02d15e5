"""Small convolutional networks: the five of Yi et al. (FedLoRA, 2023), and one for minutes on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedllm.errors import FedError
from fedllm.models.build import NORM_TENSORS, fan_out, norm2d, reset, uniform
from fedllm.models.resnet import Head
from fedllm.models.submodel import kept
from fedllm.structure import Anatomy, Cut, Features, FedModel

YI_SIZES = ((32, 2000), (16, 2000), (32, 1000), (32, 800), (32, 500))
"""CNN-1 to CNN-5: filters of the second convolution, units of FC1. CNN-4's printed 3.81 MB fits no FC1 near 800."""

REPRESENTATION = 500
"""FC2's units: the one interface that all five share."""


class YiCNN(FedModel):
    """conv5-ReLU-pool, conv5-ReLU-pool, FC1-ReLU, FC2-ReLU, FC3 on 3 x 32 x 32.

    Args:
        kind: 1 to 5.
        classes: outputs.
    """

    def __init__(self, kind: int = 1, classes: int = 10):
        super().__init__()
        if not 1 <= kind <= len(YI_SIZES):
            raise FedError(f"Yi's networks are CNN-1 to CNN-{len(YI_SIZES)}, got {kind}.")
        filters, units = YI_SIZES[kind - 1]
        self.hidden_sizes = {"conv1": 16, "conv2": filters, "fc1": units, "fc2": REPRESENTATION}
        self.conv1 = nn.Conv2d(3, 16, 5)
        self.conv2 = nn.Conv2d(16, filters, 5)
        self.fc1 = nn.Linear(25 * filters, units)
        self.fc2 = nn.Linear(units, REPRESENTATION)
        self.fc3 = nn.Linear(REPRESENTATION, classes)

    def hidden(self, x: Tensor) -> Tensor:
        """FC1's output after ReLU, ``(N, units)``."""
        x = nn.functional.max_pool2d(torch.relu(self.conv1(x)), 2)  # (N, 16, 14, 14)
        x = nn.functional.max_pool2d(torch.relu(self.conv2(x)), 2)  # (N, filters, 5, 5)
        return torch.relu(self.fc1(x.flatten(1)))

    def representation(self, x: Tensor) -> Tensor:
        """FC2's output after ReLU, ``(N, 500)``: what FedProto averages and FedKD compares."""
        return torch.relu(self.fc2(self.hidden(x)))

    def features(self, x: Tensor) -> Features:
        """The outputs of FC1, FC2 and FC3."""
        hidden = self.hidden(x)
        representation = torch.relu(self.fc2(hidden))
        return Features(hidden, representation, self.fc3(representation))

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 32, 32) -> (N, classes)
        return self.fc3(self.representation(x))

    def initialize(self, generator: torch.Generator) -> None:
        for module in self.modules():
            reset(module, generator, uniform)

    def anatomy(self) -> Anatomy:
        """One group per hidden layer; FC1 reads the 25 pixels of every channel of the second convolution."""
        layers = ("conv1", "conv2", "fc1", "fc2", "fc3")
        groups = self.hidden_sizes
        axes: dict[str, tuple[Cut | None, ...]] = {
            "conv1.weight": (Cut("conv1"), None, None, None),
            "conv2.weight": (Cut("conv2"), Cut("conv1"), None, None),
            "fc1.weight": (Cut("fc1"), Cut("conv2", inner=25)),
            "fc2.weight": (Cut("fc2"), Cut("fc1")),
            "fc3.weight": (None, Cut("fc2")),
        }
        axes |= {f"{name}.bias": (Cut(name),) for name in groups}
        return Anatomy(groups, axes, layers, ("conv1", "fc3"), (layers,), ("fc3",))


class Adapter(FedModel):
    """FedLoRA-Yi's shared adapter on a client's representation.

    Args:
        kind: ``decomposition``, a factorised FC3 for heterogeneous models, nothing between its factors;
            ``direct``, a smaller classifier with a ReLU for homogeneous ones.
        d_in: 500 for FC2's output, 2000 for CNN-1's FC1 output.
        hidden: its inner width, 20 to 80 or 100 to 500.
        classes: outputs.
    """

    def __init__(self, kind: str, d_in: int, hidden: int, classes: int = 10):
        super().__init__()
        if kind not in ("decomposition", "direct"):
            raise FedError(f"an adapter is of kind decomposition or direct, got {kind!r}.")
        self.down = nn.Linear(d_in, hidden)
        self.between = nn.ReLU() if kind == "direct" else nn.Identity()
        self.up = nn.Linear(hidden, classes)

    def forward(self, R: Tensor) -> Tensor:  # (N, d_in) -> (N, classes)
        return self.up(self.between(self.down(R)))

    def initialize(self, generator: torch.Generator) -> None:
        for module in self.modules():
            reset(module, generator, uniform)

    def anatomy(self) -> Anatomy:
        axes: dict[str, tuple[Cut | None, ...]] = {
            "down.weight": (Cut("hidden"), None),
            "down.bias": (Cut("hidden"),),
            "up.weight": (None, Cut("hidden")),
        }
        groups = {"hidden": self.down.out_features}
        return Anatomy(groups, axes, ("down", "up"), ("down", "up"), (("down", "up"),), ("up",))


SMALL_WIDTHS = (
    (16, 32, 32, 64, 64),
    (8, 32, 32, 64, 64),
    (16, 16, 32, 48, 64),
    (8, 16, 32, 32, 64),
    (8, 16, 16, 32, 64),
)
"""Five networks for clients whose models differ, in minutes on a CPU: they share the last layer's 64 inputs alone."""


class SmallCNN(FedModel):
    """Five 3 x 3 convolutions (strides 1, 2, 1, 2, 1), each with norm and ReLU, pool, linear: no residuals.

    Args:
        classes: outputs.
        width: share of the channels of every convolution, rounded up.
        norm: see ``norm2d``.
        widths: channels at width 1.
        c_in: image channels.
    """

    def __init__(
        self,
        classes: int = 10,
        width: float = 1.0,
        norm: str = "batch",
        widths: tuple[int, ...] = (16, 32, 32, 64, 64),
        c_in: int = 3,
    ):
        super().__init__()
        channels = [c_in, *(kept(c, width) for c in widths)]
        pairs = list(zip(channels, channels[1:], strict=False))
        self.channels = channels[1:]
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, 2 if i % 2 else 1, 1, bias=False) for i, (a, b) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(norm2d(norm, b) for _, b in pairs)
        self.head = Head(channels[-1], classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, c_in, H, W) -> (N, classes)
        return self.features(x).logits

    def features(self, x: Tensor) -> Features:
        """The pooled channels of the last convolution, twice, and the logits."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        pooled = self.head.pool(x).flatten(1)
        return Features(pooled, pooled, self.head.fc(pooled))

    def initialize(self, generator: torch.Generator) -> None:
        for module in self.modules():
            reset(module, generator, fan_out)

    def anatomy(self) -> Anatomy:
        """One group per convolution."""
        n = len(self.convs)
        groups = {f"conv{i}": c for i, c in enumerate(self.channels)}
        axes: dict[str, tuple[Cut | None, ...]] = {"head.fc.weight": (None, Cut(f"conv{n - 1}"))}
        for i in range(n):
            axes[f"convs.{i}.weight"] = (Cut(f"conv{i}"), Cut(f"conv{i - 1}") if i else None, None, None)
            axes |= {f"norms.{i}.{kind}": (Cut(f"conv{i}"),) for kind in NORM_TENSORS}
        layers = (*(f"convs.{i}" for i in range(n)), "head.fc")
        norms = {f"norms.{i}": f"convs.{i}" for i in range(n)}
        return Anatomy(groups, axes, layers, (layers[0], layers[-1]), (("convs", "norms", "head"),), ("head",), norms)
