"""Federated fine-tuning of language models whose clients train LoRA adapters of different ranks."""

import importlib
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedllm.library import RunResult as RunResult
    from fedllm.library import Simulation as Simulation
    from fedllm.library import load_recipe as load_recipe
    from fedllm.library import run as run
    from fedllm.library import simulate as simulate

__version__ = "0.1.0"

# Read by the OpenMP library when torch loads it. By default a thread spins hundreds of thousands of turns at every
# barrier: where anything else runs on the machine, that makes a step many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

EXPORTS = ("RunResult", "Simulation", "load_recipe", "run", "simulate")


def __getattr__(name: str) -> object:
    """Loads the library when one of its names is asked for, so that ``import fedllm`` stays light."""
    if name in EXPORTS:
        return getattr(importlib.import_module("fedllm.library"), name)
    raise AttributeError(f"module 'fedllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *EXPORTS])
