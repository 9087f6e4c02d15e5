"""ResNet-18 with a CIFAR stem (He et al., 2016), and the versions that grow with depth (DepthFL, ProgFed)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedllm.errors import FedError
from fedllm.models.build import NORM_TENSORS, fan_out, norm2d, reset
from fedllm.models.submodel import kept
from fedllm.structure import Anatomy, Cut, FedModel

WIDTHS = (64, 128, 256, 512)


class Scaler(nn.Module):
    """HeteroFL's: ``x / rate`` at training, so that a narrow client's activations have the full model's size."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return x / self.rate if self.training and self.rate != 1.0 else x


class Shortcut(nn.Module):
    """1 x 1 convolution and norm, where a block changes the shape. It carries no number and is never factorised."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str, scale: float):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
        self.scaler = Scaler(scale)
        self.norm = norm2d(norm, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.scaler(self.conv(x)))


class Block(nn.Module):
    """relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))."""

    def __init__(self, c_in: int, c_out: int, stride: int, norm: str, scale: float):
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.norm1 = norm2d(norm, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.norm2 = norm2d(norm, c_out)
        changes = stride != 1 or c_in != c_out
        self.shortcut = Shortcut(c_in, c_out, stride, norm, scale) if changes else nn.Identity()
        self.scaler = Scaler(scale)

    def forward(self, x: Tensor) -> Tensor:  # (N, c_in, H, W) -> (N, c_out, H/stride, W/stride)
        h = torch.relu(self.norm1(self.scaler(self.conv1(x))))
        return torch.relu(self.norm2(self.scaler(self.conv2(h))) + self.shortcut(x))


class Stem(nn.Module):
    """3 x 3 convolution, stride 1, no max-pool: also for 64 x 64 images."""

    def __init__(self, c_out: int, norm: str, scale: float):
        super().__init__()
        self.conv = nn.Conv2d(3, c_out, 3, 1, 1, bias=False)
        self.scaler = Scaler(scale)
        self.norm = norm2d(norm, c_out)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm(self.scaler(self.conv(x))))


class Head(nn.Module):
    """Global average pool and a linear layer."""

    def __init__(self, channels: int, classes: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x).flatten(1))


class SideExit(nn.Module):
    """DepthFL's exit after an early stage: biased 3 x 3 convolution, stride 2, to the last width; norm; head."""

    def __init__(self, c_in: int, c_out: int, classes: int, norm: str):
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, 2, 1)
        self.norm = norm2d(norm, c_out)
        self.head = Head(c_out, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.conv(x))))


class ResNet(FedModel):
    """ResNet-18: stem, four stages of two blocks (strides 1, 2, 2, 2), head.

    Args:
        classes: outputs.
        width: share of the channels of every stage and the stem, rounded up.
        norm: ``batch``, ``running`` or ``gn`` (see ``norm2d``); every reference of these papers uses ``batch``.
        scale: HeteroFL's scaler, 1 for none.
        stages: how many stages it has, 1 to 4; fewer than four end in a linear head of their own (ProgFed).
        widths: channels of the four stages at width 1.
    """

    def __init__(
        self,
        classes: int = 10,
        width: float = 1.0,
        norm: str = "batch",
        scale: float = 1.0,
        stages: int = 4,
        widths: Sequence[int] = WIDTHS,
    ):
        super().__init__()
        if not 1 <= stages <= len(widths):
            raise FedError(f"this network has 1 to {len(widths)} stages, got {stages}.")
        self.widths = tuple(kept(c, width) for c in widths)
        self.stem = Stem(self.widths[0], norm, scale)
        self.stages = nn.ModuleList(
            stage(self.widths[max(i - 1, 0)], self.widths[i], 1 if i == 0 else 2, norm, scale) for i in range(stages)
        )
        self.heads = nn.ModuleDict({str(stages): Head(self.widths[stages - 1], classes)})

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, classes)
        x = self.stem(x)
        for blocks in self.stages:
            x = blocks(x)
        (head,) = self.heads.values()
        return head(x)

    def initialize(self, generator: torch.Generator) -> None:
        for module in self.modules():
            reset(module, generator, fan_out)

    def anatomy(self) -> Anatomy:
        """One group per residual stream (the stem and stage 1 share one), one per block's inner convolution."""
        streams = [f"stage{i}" for i in range(len(self.stages))]
        groups = dict(zip(streams, self.widths, strict=False))
        outputs = {"stem.conv": streams[0]}
        for name in self._blocks():
            i = int(name.split(".")[1])
            groups[f"{name}.inner"] = self.widths[i]
            outputs |= {
                f"{name}.conv1": f"{name}.inner",
                f"{name}.conv2": streams[i],
                f"{name}.shortcut.conv": streams[i],
            }
        inputs = {f"{name}.conv2": f"{name}.inner" for name in self._blocks()}
        for name in self._blocks():
            _, at, j = name.split(".")
            inputs[f"{name}.conv1"] = inputs[f"{name}.shortcut.conv"] = streams[max(int(at) - (j == "0"), 0)]
        return self._anatomy(groups, outputs, inputs, {f"heads.{h}.fc": streams[int(h) - 1] for h in self.heads})

    def legacy_anatomy(self) -> Anatomy:
        """Every convolution a group of its own: two branches of an identity shortcut then carry different channels."""
        groups, outputs = {"stem.conv": self.widths[0]}, {"stem.conv": "stem.conv"}
        inputs: dict[str, str] = {}
        before, after_stage = "stem.conv", []
        for name in self._blocks():
            conv1, conv2 = f"{name}.conv1", f"{name}.conv2"
            groups |= dict.fromkeys((conv1, conv2), self.widths[int(name.split(".")[1])])
            outputs |= {conv1: conv1, conv2: conv2, f"{name}.shortcut.conv": conv2}
            inputs |= {conv1: before, conv2: conv1, f"{name}.shortcut.conv": before}
            before = conv2
            after_stage += [conv2] if name.endswith(".1") else []
        return self._anatomy(groups, outputs, inputs, {f"heads.{h}.fc": after_stage[int(h) - 1] for h in self.heads})

    def _blocks(self) -> list[str]:
        return [f"stages.{i}.{j}" for i in range(len(self.stages)) for j in range(2)]

    def _anatomy(self, groups: dict, outputs: dict, inputs: dict, heads: dict) -> Anatomy:
        axes: dict[str, tuple[Cut | None, ...]] = {}
        names = {name for name, _ in self.named_modules()}
        for conv, group in outputs.items():
            if conv in names:
                axes[f"{conv}.weight"] = (Cut(group), Cut(inputs[conv]) if conv in inputs else None, None, None)
                parent, _, last = conv.rpartition(".")
                norm = f"{parent}.{last.replace('conv', 'norm')}"
                axes |= {f"{norm}.{kind}": (Cut(group),) for kind in NORM_TENSORS}
        for head, group in heads.items():
            axes[f"{head}.weight"] = (None, Cut(group))
        convs = [f"{name}.{conv}" for name in self._blocks() for conv in ("conv1", "conv2")]
        last = f"heads.{len(self.stages)}.fc"
        return Anatomy(
            groups=groups,
            axes=axes,
            layers=("stem.conv", *convs, last),
            whole=("stem.conv", last),
            blocks=(("stem",), *((f"stages.{i}", f"heads.{i + 1}") for i in range(len(self.stages)))),
            heads=tuple(f"heads.{h}" for h in self.heads),
        )


def stage(c_in: int, c_out: int, stride: int, norm: str, scale: float) -> nn.Sequential:
    """Two blocks; the first one changes the shape."""
    return nn.Sequential(Block(c_in, c_out, stride, norm, scale), Block(c_out, c_out, 1, norm, scale))


class ExitResNet(ResNet):
    """DepthFL (Kim et al., 2023): exits after stages 1 to ``stages``; the exit of stage 4 is ResNet-18's own head.

    The published code has separable-convolution exits with attention; these are the ones whose cost FedLMT's Table 1
    prints (its 230M / 404M / 557M / 692M operations are met exactly, its parameter column within 0.6 %, 6 % for beta3).
    """

    def __init__(
        self,
        classes: int = 10,
        norm: str = "batch",
        stages: int = 4,
        widths: Sequence[int] = WIDTHS,
    ):
        super().__init__(classes, 1.0, norm, 1.0, stages, widths)
        last = len(widths)
        self.heads = nn.ModuleDict(
            {str(i): SideExit(widths[i - 1], widths[-1], classes, norm) for i in range(1, min(stages, last - 1) + 1)}
        )
        if stages == last:
            self.heads[str(last)] = Head(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # (N, 3, H, W) -> one (N, classes) per exit
        x, logits = self.stem(x), []
        for i, blocks in enumerate(self.stages, start=1):
            x = blocks(x)
            logits.append(self.heads[str(i)](x))
        return tuple(logits)

    def anatomy(self) -> Anatomy:
        """Depth only: the blocks and exits; no channel groups."""
        convs = [f"{name}.{conv}" for name in self._blocks() for conv in ("conv1", "conv2")]
        return Anatomy(
            groups={},
            axes={},
            layers=("stem.conv", *convs),
            whole=("stem.conv",),
            blocks=(("stem",), *((f"stages.{i}", f"heads.{i + 1}") for i in range(len(self.stages)))),
            heads=tuple(f"heads.{h}" for h in self.heads),
        )


class GrowingResNet(ResNet):
    """ProgFed (Wang et al., 2022): a linear head after every stage; of those that are left the last one answers."""

    def __init__(
        self,
        classes: int = 10,
        norm: str = "batch",
        stages: int = 4,
        widths: Sequence[int] = WIDTHS,
    ):
        super().__init__(classes, 1.0, norm, 1.0, stages, widths)
        self.heads = nn.ModuleDict({str(i): Head(self.widths[i - 1], classes) for i in range(1, stages + 1)})

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, classes)
        x = self.stem(x)
        for blocks in self.stages:
            x = blocks(x)
        return list(self.heads.values())[-1](x)


def stage_rounds(rounds: int, stages: int = 4) -> tuple[int, ...]:
    """ProgFed's schedule (Wang et al., 2022): ``T / (2S)`` rounds for every stage but the last, which gets the rest."""
    early = rounds // (2 * stages)
    return (*[early] * (stages - 1), rounds - early * (stages - 1))
