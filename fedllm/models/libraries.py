"""The libraries below, told to speak to their own developers only."""

from __future__ import annotations

import logging
import warnings

from fedllm.models.language import settle_network


def quiet_libraries() -> None:
    """Keeps the libraries' advice to their own developers off the screen, and their retries off a dead network."""
    settle_network()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft")
    for library in ("transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets"):
        logging.getLogger(library).setLevel(logging.ERROR)
