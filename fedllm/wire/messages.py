"""A note and tensors as one string of bytes: what goes between processes, and what waits for a resumed round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from mmap import mmap
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from fedllm.core import Tensors, under, within
from fedllm.wire.serialization import flatten, unflatten


def pack(note: Mapping[str, Any], groups: Mapping[str, Tensors]) -> bytes:
    """A JSON note and groups of tensors as bytes: the note's length in 8 bytes, the note, a safetensors file."""
    text = json.dumps({**note, "groups": list(groups)}).encode()
    flat: dict[str, Tensor] = {}
    for group, tensors in groups.items():
        flat |= {name: tensor.clone() for name, tensor in flatten(under(group, tensors)).items()}
    return len(text).to_bytes(8, "little") + text + (save(flat) if flat else b"")


def unpack(message: bytes | mmap) -> tuple[dict[str, Any], dict[str, Tensors]]:
    """What ``pack`` was given. Nothing in it is ever executed."""
    end = 8 + int.from_bytes(message[:8], "little")
    note = json.loads(message[8:end])
    tensors = unflatten(load(message[end:])) if len(message) > end else {}
    return note, {group: within(group, tensors) for group in note.pop("groups")}
