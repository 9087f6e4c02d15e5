"""Federated fine-tuning of language models whose clients train LoRA adapters of different ranks."""

import os

__version__ = "0.1.0"

# Read by the OpenMP library when torch loads it. By default a thread spins hundreds of thousands of turns at every
# barrier: where anything else runs on the machine, that makes a step many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
