"""Versions and devices, as a bug report needs them; no path, no name of a machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import fedllm

LIBRARIES = (
    "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors", "huggingface_hub", "numpy",
    "bitsandbytes", "flwr", "dp-accounting", "opacus", "lm-eval", "trackio", "vllm",
)  # fmt: skip


def report() -> str:
    """One line each: ``name  version``."""
    found = {"fedllm": fedllm.__version__, "python": platform.python_version()}
    found |= {"system": f"{platform.system()} {platform.machine()}", "cores": str(len(os.sched_getaffinity(0)))}
    found |= {name: version(name) for name in LIBRARIES}
    found["devices"] = devices()
    width = max(map(len, found))
    return "\n".join(f"{name:{width}}  {told}" for name, told in found.items())


def version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def devices() -> str:
    import torch

    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(place) for place in range(count)) or "CPU alone"
