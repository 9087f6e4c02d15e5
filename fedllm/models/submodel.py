"""Which slice of which axis of which weight a client holds: width (channels) and depth (blocks), for any model.

A model declares its ``Anatomy``. A rule (HeteroFL, FedRolex, FedDropout) picks ``Channels``, the channels kept of every
group; ``index`` spells them out per weight; ``take`` cuts the client's weights out, ``scatter_mean`` puts them back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from fedllm.errors import FedError
from fedllm.structure import Anatomy, Cut

Weights = Mapping[str, Tensor]
Channels = Mapping[str, Tensor]
"""Group -> the channels kept of it, ``(n,)`` int64, in the order in which the client holds them."""
Index = Mapping[str, tuple[Tensor | None, ...]]
"""Weight -> per axis the entries kept, ``(n,)`` int64 or None for all. A weight that is not named is kept whole."""


def written(anatomy: Anatomy) -> Tensor:
    """The anatomy as text, ``(bytes,)`` uint8: a server keeps it in its state, and needs no model to go on."""
    return torch.tensor(list(json.dumps(asdict(anatomy)).encode()), dtype=torch.uint8)


def read(text: Tensor) -> Anatomy:
    """What was given to ``written``."""
    fields = json.loads(bytes(text.tolist()))
    axes = {
        name: tuple(None if cut is None else Cut(**cut) for cut in cuts) for name, cuts in fields.pop("axes").items()
    }
    groups, blocks = fields.pop("groups"), tuple(tuple(block) for block in fields.pop("blocks"))
    beside = fields.pop("beside", {})  # older states have none
    rest = {key: tuple(value) for key, value in fields.items()}
    return Anatomy(groups=groups, axes=axes, blocks=blocks, beside=beside, **rest)


def at_depth(anatomy: Anatomy, weights: Weights, depth: int | None) -> dict[str, Tensor]:
    """The weights that a client of this depth holds; None is the whole depth."""
    if depth is None:
        return dict(weights)
    if not 1 <= depth < len(anatomy.blocks):
        raise FedError(f"depth is 1 to {len(anatomy.blocks) - 1} for this model, got {depth}.")
    needs = anatomy.depths(weights)
    return {name: tensor for name, tensor in weights.items() if needs[name] <= depth}


def kept(size: int, rate: float) -> int:
    """``ceil(rate * size)``, the channels left of a group."""
    if not 0 < rate <= 1:
        raise FedError(f"a width is a share of the channels, above 0 and at most 1, got {rate}.")
    return math.ceil(rate * size - 1e-9)  # 0.6 * 5 is 3.0000000000000004


def prefix(anatomy: Anatomy, rate: float) -> Channels:
    """HeteroFL (Diao et al., 2021): the first channels of every group."""
    return {group: torch.arange(kept(size, rate)) for group, size in anatomy.groups.items()}


def rolling(anatomy: Anatomy, rate: float, t: int) -> Channels:
    """FedRolex (Alam et al., 2022): channels ``(t + j) mod c`` for ``j < n``, one window per group, round by round."""
    return {group: (t + torch.arange(kept(size, rate))) % size for group, size in anatomy.groups.items()}


def random(anatomy: Anatomy, rate: float, generator: torch.Generator) -> Channels:
    """FedDropout (Caldas et al., 2018): a fresh subset of every group, in the order of the full model."""
    drawn = permuted(anatomy, rate, generator)
    return {group: channels.sort().values for group, channels in drawn.items()}


def permuted(anatomy: Anatomy, rate: float, generator: torch.Generator) -> Channels:
    """A fresh subset of every group in random order.

    With an anatomy that gives every convolution a group of its own this is what the published FedDropout runs did: the
    two branches of an identity shortcut then carry different channels, and not even rate 1 preserves the function.
    """
    return {g: torch.randperm(size, generator=generator)[: kept(size, rate)] for g, size in anatomy.groups.items()}


def index(anatomy: Anatomy, channels: Channels) -> Index:
    """The entries of every weight's axes that these channels are."""
    return {
        name: tuple(
            None if cut is None else entries(cut, channels[cut.group], anatomy.groups[cut.group]) for cut in cuts
        )
        for name, cuts in anatomy.axes.items()
    }


def entries(cut: Cut, channels: Tensor, size: int) -> Tensor:
    """Entry ``(o size + c) inner + i`` for every outer ``o``, kept channel ``c`` and inner ``i``, in that order."""
    outer = torch.arange(cut.outer)[:, None, None] * size
    return ((outer + channels[None, :, None]) * cut.inner + torch.arange(cut.inner)).reshape(-1)


def take(weights: Weights, where: Index) -> dict[str, Tensor]:
    """The sub-model's weights, copies in the order of the index."""
    part = {}
    for name, tensor in weights.items():
        for axis, kept_entries in enumerate(where.get(name, ())):
            if kept_entries is not None:
                tensor = tensor.index_select(axis, kept_entries.to(tensor.device))
        part[name] = tensor.clone()
    return part


def put(weights: Weights, part: Weights, where: Index) -> dict[str, Tensor]:
    """``weights`` with the sub-model's scalars written back; a weight that ``part`` lacks stays."""
    whole = {name: tensor.clone() for name, tensor in weights.items()}
    for name, tensor in part.items():
        whole[name][_grid(where.get(name, ()), tensor)] = tensor.to(whole[name])
    return whole


def scatter_mean(
    weights: Weights, parts: Sequence[Weights], where: Sequence[Index], shares: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Per scalar the mean over the clients that held it; a scalar nobody held keeps its old value, bit for bit.

    Args:
        weights: the server's, whole.
        parts: what each client returned, any subset of the names.
        where: each client's index.
        shares: each client's weight in the mean, up to a common factor; uniform by default.

    Entries of integer type (counters) are copied from the last client that held them.
    """
    shares = [1.0] * len(parts) if shares is None else shares
    after = {}
    for name, old in weights.items():
        held = [(p[name], w.get(name, ()), s) for p, w, s in zip(parts, where, shares, strict=True) if name in p]
        if not old.is_floating_point():
            after[name] = held[-1][0].clone() if held else old.clone()
            continue
        total = torch.zeros_like(old, dtype=torch.promote_types(old.dtype, torch.float32))
        count = torch.zeros_like(total)
        for tensor, axes, share in held:
            grid = _grid(axes, tensor)
            total[grid] += share * tensor.to(total)
            count[grid] += share
        after[name] = torch.where(count > 0, (total / count).to(old.dtype), old)
    return after


def rows(part: Weights, where: Index, names: Iterable[str], keep: Tensor) -> tuple[dict[str, Tensor], dict]:
    """The part without the rows of ``names`` that ``keep (n,)`` does not list, and its index.

    HeteroFL's masking: a head's rows of classes that a client has no data of do not enter the mean.
    """
    tensors, at = dict(part), dict(where)
    for name in names:
        axes = at.get(name, (None,) * part[name].ndim)
        tensors[name] = part[name][keep.to(part[name].device)]
        at[name] = (keep if axes[0] is None else axes[0][keep], *axes[1:])
    return tensors, at


def _grid(axes: tuple[Tensor | None, ...], part: Tensor) -> tuple:
    """An open mesh that picks ``part``'s scalars out of the whole weight; trailing whole axes are copied as blocks."""
    cut = [axis for axis, chosen in enumerate(axes) if chosen is not None]
    if not cut:
        return (...,)
    n, mesh = cut[-1] + 1, []
    for axis, size in enumerate(part.shape[:n]):
        chosen = axes[axis]
        line = torch.arange(size) if chosen is None else chosen
        mesh.append(line.to(part.device).reshape([-1 if a == axis else 1 for a in range(n)]))
    return tuple(mesh)
