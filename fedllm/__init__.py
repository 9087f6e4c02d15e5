"""Federated fine-tuning of language models whose clients train LoRA adapters of different ranks."""

__version__ = "0.1.0"
