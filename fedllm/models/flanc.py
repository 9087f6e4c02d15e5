"""FLANC (Mei et al., 2022): every width is composed from the same small bases, which all clients share and average."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedllm.models.build import fan_out, norm2d, reset
from fedllm.models.resnet import WIDTHS, Head, Shortcut, Stem
from fedllm.structure import Anatomy, FedModel


class BasisConv(nn.Module):
    """``n_b`` kernels of ``b`` channels on every group of ``b`` inputs, then a 1 x 1 convolution of coefficients.

    basis: ``(n_b, b, 3, 3)``, the same whatever the client's width; coefficients: ``(c_out, n_b c_in / b, 1, 1)``.
    """

    def __init__(self, c_in: int, c_out: int, n_b: int, b: int, stride: int):
        super().__init__()
        self.stride = stride
        self.basis = nn.Parameter(torch.empty(n_b, b, 3, 3))
        self.coefficients = nn.Conv2d(n_b * c_in // b, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (N, c_in, H, W)
        n, c_in, height, width = x.shape
        b = self.basis.shape[1]
        groups = x.reshape(n * c_in // b, b, height, width)
        maps = nn.functional.conv2d(groups, self.basis, stride=self.stride, padding=1)  # (N c_in/b, n_b, H', W')
        return self.coefficients(maps.reshape(n, -1, *maps.shape[2:]))


class FlancBlock(nn.Module):
    """A residual block of two basis convolutions."""

    def __init__(self, c_in: int, c_out: int, n_b: int, b: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = BasisConv(c_in, c_out, n_b, b, stride)
        self.norm1 = norm2d(norm, c_out)
        self.conv2 = BasisConv(c_out, c_out, n_b, b, 1)
        self.norm2 = norm2d(norm, c_out)
        changes = stride != 1 or c_in != c_out
        self.shortcut = Shortcut(c_in, c_out, stride, norm, 1.0) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class FlancResNet(FedModel):
    """ResNet-18 out of bases.

    Args:
        classes: outputs.
        width: the client's multiplier f of the stages' outputs; FedLMT's levels are 0.25, 0.75, 1.25 and 1.75.
        norm: see ``norm2d``.
        widths: the reference widths. The bases depend on them and not on f, and the stem keeps the first one.
    """

    def __init__(self, classes: int = 10, width: float = 1.0, norm: str = "batch", widths: Sequence[int] = WIDTHS):
        super().__init__()
        outputs = [round(width * c) for c in widths]
        self.stem = Stem(widths[0], norm, 1.0)
        stages = []
        c_in = widths[0]
        for i, (reference, c_out) in enumerate(zip(widths, outputs, strict=True)):
            before = widths[max(i - 1, 0)]  # the reference width of what enters the stage
            first = FlancBlock(c_in, c_out, reference // 4, before // 8, 1 if i == 0 else 2, norm)
            second = FlancBlock(c_out, c_out, reference // 4, reference // 8, 1, norm)
            stages.append(nn.Sequential(first, second))
            c_in = c_out
        self.stages = nn.ModuleList(stages)
        self.head = Head(c_in, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, classes)
        x = self.stem(x)
        for blocks in self.stages:
            x = blocks(x)
        return self.head(x)

    def initialize(self, generator: torch.Generator) -> None:
        """A block's two bases are halves of one orthogonal tensor; the rest as in ResNet-18."""
        for module in self.modules():
            reset(module, generator, fan_out)
            if isinstance(module, FlancBlock):
                n_b, b, k, _ = module.conv1.basis.shape
                both = nn.init.orthogonal_(torch.empty(2 * n_b, b * k * k), generator=generator)
                with torch.no_grad():
                    module.conv1.basis.copy_(both[:n_b].reshape(n_b, b, k, k))
                    module.conv2.basis.copy_(both[n_b:].reshape(n_b, b, k, k))

    def anatomy(self) -> Anatomy:
        """Numbered as ResNet-18; nothing is sliced and nothing is factorised: the widths share their bases whole."""
        convs = [
            f"stages.{i}.{j}.{conv}" for i in range(len(self.stages)) for j in range(2) for conv in ("conv1", "conv2")
        ]
        layers = ("stem.conv", *convs, "head.fc")
        blocks = (("stem", *(f"stages.{i}" for i in range(len(self.stages))), "head"),)
        return Anatomy(groups={}, axes={}, layers=layers, whole=layers, blocks=blocks, heads=("head",))


def bases(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that clients of every width share."""
    return {name: p for name, p in model.named_parameters() if name.endswith(".basis")}


def orthogonality(model: nn.Module) -> Tensor:
    """``sum_banks mean((B B^T - I)^2)``, B the ``(n_b, 9 b)`` basis; FLANC adds it with coefficient 10."""
    terms = []
    for basis in bases(model).values():
        B = basis.flatten(1)
        terms.append((B @ B.T - torch.eye(B.shape[0], device=B.device, dtype=B.dtype)).square().mean())
    return torch.stack(terms).sum()
