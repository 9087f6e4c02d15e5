"""Bytes, exact: what a payload weighs on the wire, per client and direction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from fedllm.core import Tensors
from fedllm.lowrank import LowRank
from fedllm.wire.compression import Int8

_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_ORDER = {dtype: place for place, dtype in enumerate(_NAMES)}  # safetensors writes the last of these first


def flatten(tensors: Tensors) -> dict[str, Tensor]:
    """Plain tensors, for safetensors: a product becomes ``name#B`` and ``name#A``, in 8 bits ``#b``, ``#a`` too."""
    flat: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if isinstance(value, Int8):
            flat |= {f"{name}#B": value.codes_B.contiguous(), f"{name}#A": value.codes_A.contiguous()}
            flat |= {f"{name}#b": value.scale_B, f"{name}#a": value.scale_A}
        elif isinstance(value, LowRank):
            flat |= {f"{name}#B": value.B.contiguous(), f"{name}#A": value.A.contiguous()}
        else:
            flat[name] = value.contiguous()
    return flat


def unflatten(flat: dict[str, Tensor]) -> dict[str, Tensor | LowRank]:
    """What ``flatten`` was given, sorted by name, as files have it."""
    tensors: dict[str, Tensor | LowRank] = {}
    for name in sorted(flat):
        owner, _, factor = name.rpartition("#")
        if factor == "B" and f"{owner}#b" in flat:
            tensors[owner] = Int8.unpacked(*(flat[f"{owner}#{part}"] for part in "BAba"))
        elif factor == "B":
            tensors[owner] = LowRank(flat[name], flat[f"{owner}#A"])
        elif factor not in ("A", "b", "a") or f"{owner}#B" not in flat:
            tensors[name] = flat[name]
    return tensors


def canonical(tensors: Tensors) -> dict[str, Tensor | LowRank]:
    """The same values in the order and memory layout that a file would give them back in.

    Kernels round by layout, so what is kept in memory must be laid out as what is read from disk or the wire: a resumed
    run, or one on many processes, is then the same to the bit.
    """
    return unflatten(flatten(tensors))


def digest(tensors: Tensors) -> str:
    """16 hex digits that tell payloads apart: names, dtypes, shapes and every bit."""
    state = hashlib.blake2b(digest_size=8)
    for name, tensor in sorted(flatten(tensors).items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        state.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def can_travel(tensors: object) -> bool:
    """Whether a file could hold them: tensors by name, dense, of a dtype that safetensors has."""
    if not isinstance(tensors, Mapping):
        return False
    parts = [
        part for value in tensors.values() for part in ((value.B, value.A) if isinstance(value, LowRank) else (value,))
    ]
    return all(
        isinstance(part, Tensor) and part.dtype in _NAMES and part.layout == torch.strided and not part.is_meta
        for part in parts
    )


def size(tensors: Tensors) -> int:
    """Bytes of the safetensors file that holds ``tensors``: its length field, its header, its data; 0 for nothing."""
    if not tensors:
        return 0
    flat = flatten(tensors)
    order = sorted(flat, key=lambda name: (-_ORDER[flat[name].dtype], name))
    header, offset = {}, 0
    for name in order:
        end = offset + flat[name].numel() * flat[name].element_size()
        shape = list(flat[name].shape)
        header[name] = {"dtype": _NAMES[flat[name].dtype], "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + (text + 7) // 8 * 8 + offset
