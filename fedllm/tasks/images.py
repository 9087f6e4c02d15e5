"""Image classification: CIFAR, SVHN, Tiny-ImageNet, MNIST and Fashion-MNIST from Parquet, and images made to order."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from fedllm.config.types import Count, NonNegative, Seed, Whole
from fedllm.errors import FedError, Unreachable
from fedllm.tasks.arrays import Arrays, Examples, chosen

Split = Literal["train", "test"]

IMAGE = ("image", "img")
"""What the column of pictures is called."""


@dataclass(frozen=True)
class Images(Arrays):
    """Pictures of one size with one label each, kept as bytes and normalised a batch at a time.

    A client's images are augmented after they are normalised, so that the border of a shifted one is the mean colour's.

    Args:
        pad: a training image is cut at random out of itself with so many zeros around.
        flip: mirror every other training image, at random.

    Attributes:
        hub: the data set's id there, and its configuration.
        splits: our names -> the names of its files.
        side: pixels; smaller images get a border.
        mean, std: per channel, of values in [0, 1].
    """

    pad: Whole = 0
    flip: bool = False

    hub: ClassVar[tuple[str, str | None]]
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "test"}
    side: ClassVar[int] = 32
    count: ClassVar[int] = 10
    label: ClassVar[str] = "label"
    size: ClassVar[Mapping[str, int]]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.side, self.side)

    @property
    def classes(self) -> int:
        return self.count

    @property
    def rows(self) -> Mapping[str, int]:
        return self.size

    def load(self, path: str | None, split: Split, most: int | None, seed: int) -> Examples:
        table, labels, at = self._chosen(path, split, most, seed)
        image = next(name for name in IMAGE if name in table.column_names)
        pictures = [_decoded(row["bytes"], self.side) for row in table.column(image).take(at).to_pylist()]
        return Examples(torch.from_numpy(np.stack(pictures)), torch.from_numpy(labels.astype(np.int64)))

    def labels(self, path: str | None, split: Split, most: int | None, seed: int) -> list[int]:
        return [int(label) for label in self._chosen(path, split, most, seed)[1]]

    def _chosen(self, path: str | None, split: Split, most: int | None, seed: int) -> tuple[Any, Any, Any]:
        """The whole table, the labels of the rows that are used, and which these are."""
        table = self._local(Path(path).expanduser(), split) if path is not None else self._hub(split)
        where, names = path or self.hub[0], table.column_names
        if self.label not in names or not any(name in names for name in IMAGE):
            raise FedError(
                f"{where}: an image set needs the columns 'image' (or 'img') and {self.label!r}, "
                f"and there are: {', '.join(names)}."
            )
        at = chosen(len(table), most, split, seed)
        labels = np.asarray(table.column(self.label))[at]
        if len(labels) == 0 or labels.min() < 0 or labels.max() >= self.count:
            raise FedError(f"{where}, {split}: labels from 0 to {self.count - 1} are needed.")
        return table, labels, at

    def train_batch(self, examples: Examples, at: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        x, y = self.test_batch(examples, at)
        if self.flip:
            mirrored = (torch.rand(len(x), generator=rng) < 0.5).to(x.device)[:, None, None, None]
            x = torch.where(mirrored, x.flip(-1), x)
        return (cropped(x, self.pad, rng) if self.pad else x), y

    def test_batch(self, examples: Examples, at: Tensor) -> tuple[Tensor, Tensor]:
        assert examples.y is not None
        at = at.to(examples.x.device)
        x = examples.x[at].float().div_(255)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (x - mean).div_(std).expand(-1, 3, -1, -1), examples.y[at]

    def _local(self, path: Path, split: Split) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        names = dict.fromkeys((split, self.splits[split]))
        found = [sorted(path.glob(f"**/{name}*.parquet")) for name in names] if path.is_dir() else []
        files = next((files for files in found if files), None)
        if files is None:
            raise FedError(
                f"data.path={path} has no {split}.parquet: give a folder with train.parquet and test.parquet."
            )
        _check_parts(path, split, files)
        tables = []
        for file in files:
            try:
                tables.append(pq.ParquetFile(file).read())
            except (OSError, pa.ArrowInvalid) as error:
                raise FedError(f"{file} cannot be read: {str(error).splitlines()[0]}.") from error
        try:
            return pa.concat_tables(tables, promote_options="default").combine_chunks()
        except pa.ArrowInvalid as error:
            raise FedError(f"data.path={path}: the files of {split} have other columns than each other.") from error

    def _hub(self, split: Split) -> Any:
        from datasets import load_dataset

        name, subset = self.hub
        try:
            return load_dataset(name, subset, split=self.splits[split]).data.table
        except Exception as error:  # the client's errors come from five libraries; to the user they are one
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise Unreachable(
                f"The data set {name} could not be had from the Hub ({reason}). "
                "Give local files instead: data.path=FOLDER with train.parquet and test.parquet."
            ) from error


PART = re.compile(r"(?P<set>.*)-(?P<number>\d+)-of-(?P<parts>\d+)(-[0-9a-f]+)?\.parquet")
"""A data set in several files, as the Hub names them: ``train-00000-of-00003.parquet``."""


def _check_parts(path: Path, split: Split, files: list[Path]) -> None:
    """Raises FedError where the files are not one file, or all parts of one set."""
    parts = [PART.fullmatch(file.name) for file in files]
    shown = ", ".join(str(file.relative_to(path)) for file in files[:3]) + (", ..." if len(files) > 3 else "")
    sets = {(file.parent, part["set"], int(part["parts"])) for file, part in zip(files, parts, strict=True) if part}
    if len(files) == 1 and not sets:
        return
    if not all(parts) or len(sets) > 1:
        raise FedError(f"data.path={path} has several sets of {split} rows: {shown}. Give the folder of one of them.")
    wanted = next(iter(sets))[2]
    there = {int(part["number"]) for part in parts if part}
    missing = [number for number in range(wanted) if number not in there]
    if missing or len(files) != wanted:
        raise FedError(f"data.path={path}: part {missing[0] if missing else wanted} of {wanted} of {split} is missing.")


def _decoded(image: bytes, side: int) -> Any:
    """``(channels, side, side)`` uint8; a smaller image gets a black border."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(image))
        pixels = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise FedError(f"an image cannot be decoded: {error}.") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    height, width = pixels.shape[1:]
    if max(height, width) > side:
        raise FedError(f"an image of {height} x {width} pixels was given, and {side} x {side} is the most here.")
    down, right = side - height, side - width
    return np.pad(pixels, ((0, 0), (down // 2, down - down // 2), (right // 2, right - right // 2)))


def cropped(x: Tensor, pad: int, rng: torch.Generator) -> Tensor:
    """Each image of ``x (B, C, H, W)`` moved by up to ``pad`` pixels in both directions, zeros following."""
    B, C, H, W = x.shape
    wide = torch.nn.functional.pad(x, (pad,) * 4)
    moves = torch.randint(2 * pad + 1, (2, B, 1), generator=rng).to(x.device)
    down, right = moves[0] + torch.arange(H, device=x.device), moves[1] + torch.arange(W, device=x.device)
    at = torch.arange(B, device=x.device)[:, None, None, None]
    return wide[at, torch.arange(C, device=x.device)[:, None, None], down[:, None, :, None], right[:, None, None, :]]


@dataclass(frozen=True)
class CIFAR10(Images):
    """50,000 and 10,000 photographs, ten classes."""

    pad: Whole = 4
    flip: bool = True

    hub = ("uoft-cs/cifar10", None)
    size: ClassVar[Mapping[str, int]] = {"train": 50_000, "test": 10_000}
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2023, 0.1994, 0.2010)


@dataclass(frozen=True)
class CIFAR100(Images):
    """50,000 and 10,000 photographs, a hundred classes."""

    pad: Whole = 4
    flip: bool = True

    hub = ("uoft-cs/cifar100", None)
    count = 100
    label = "fine_label"
    size: ClassVar[Mapping[str, int]] = {"train": 50_000, "test": 10_000}
    mean = (0.5071, 0.4865, 0.4409)
    std = (0.2673, 0.2564, 0.2762)


@dataclass(frozen=True)
class SVHN(Images):
    """73,257 and 26,032 house numbers, one digit in the middle of each."""

    pad: Whole = 2

    hub = ("ufldl-stanford/svhn", "cropped_digits")
    size: ClassVar[Mapping[str, int]] = {"train": 73_257, "test": 26_032}
    mean = (0.4377, 0.4438, 0.4728)
    std = (0.1980, 0.2010, 0.1970)


@dataclass(frozen=True)
class TinyImageNet(Images):
    """100,000 and 10,000 photographs of 64 x 64, two hundred classes; the validation split is the test set."""

    hub = ("zh-plus/tiny-imagenet", None)
    splits: ClassVar[Mapping[str, str]] = {"train": "train", "test": "valid"}
    side = 64
    count = 200
    size: ClassVar[Mapping[str, int]] = {"train": 100_000, "test": 10_000}
    mean = (0.4802, 0.4481, 0.3975)
    std = (0.2770, 0.2691, 0.2821)


@dataclass(frozen=True)
class MNIST(Images):
    """60,000 and 10,000 written digits, grey, with a border of two pixels."""

    hub = ("ylecun/mnist", None)
    size: ClassVar[Mapping[str, int]] = {"train": 60_000, "test": 10_000}
    mean = (0.1307,) * 3
    std = (0.3081,) * 3


@dataclass(frozen=True)
class FashionMNIST(MNIST):
    """60,000 and 10,000 pieces of clothing, grey, with a border of two pixels."""

    hub = ("zalando-datasets/fashion_mnist", None)
    mean = (0.2860,) * 3
    std = (0.3530,) * 3


@dataclass(frozen=True)
class Prototypes(Arrays):
    """Images made to order: a few noisy, shifted prototypes of each class, for tests and minutes on a CPU.

    A prototype is 3 x 5 x 5 normal numbers enlarged to ``side`` pixels and scaled to unit deviation. An image is one of
    its class's, rolled by up to 3 pixels both ways, times U(0.6, 1.4), plus noise.

    Args:
        sigma: standard deviation of the noise.
        kinds: prototypes a class.
        side: pixels.
        train_rows, test_rows: images to make.
        draw: seed of the prototypes and images.
    """

    sigma: NonNegative = 1.0
    kinds: Count = 4
    side: Count = 16
    train_rows: Count = 4000
    test_rows: Count = 1000
    draw: Seed = 0

    count: ClassVar[int] = 10

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, self.side, self.side)

    @property
    def classes(self) -> int:
        return self.count

    @property
    def rows(self) -> Mapping[str, int]:
        return {"train": self.train_rows, "test": self.test_rows}

    def load(self, path: str | None, split: Split, most: int | None, seed: int) -> Examples:
        if path is not None:
            raise FedError(f"data.path={path}: these images are made here; leave data.path out.")
        shapes = torch.randn(self.count * self.kinds, 3, 5, 5, generator=torch.Generator().manual_seed(self.draw))
        large = torch.nn.functional.interpolate(shapes, (self.side, self.side), mode="bicubic", align_corners=False)
        large = large / large.std(dim=(1, 2, 3), keepdim=True)
        rng = torch.Generator().manual_seed(2 * self.draw + 1 + (split == "test") * 2**32)
        n = self.rows[split]
        y = torch.arange(n) % self.count
        x = large[y * self.kinds + torch.randint(self.kinds, (n,), generator=rng)]
        x = _rolled(x, torch.randint(-3, 4, (2, n), generator=rng))
        x = x * (0.6 + 0.8 * torch.rand(n, 1, 1, 1, generator=rng))
        return Examples(x + self.sigma * torch.randn(x.shape, generator=rng), y)

    def train_batch(self, examples: Examples, at: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        return self.test_batch(examples, at)

    def test_batch(self, examples: Examples, at: Tensor) -> tuple[Tensor, Tensor]:
        assert examples.y is not None
        at = at.to(examples.x.device)
        return examples.x[at], examples.y[at]


def _rolled(x: Tensor, moves: Tensor) -> Tensor:
    """Image ``b`` of ``x (B, C, H, W)`` rolled by ``moves[:, b]`` pixels down and right."""
    B, C, H, W = x.shape
    down, right = (torch.arange(H) - moves[0][:, None]) % H, (torch.arange(W) - moves[1][:, None]) % W
    at = torch.arange(B)[:, None, None, None]
    return x[at, torch.arange(C)[:, None, None], down[:, None, :, None], right[:, None, None, :]]
