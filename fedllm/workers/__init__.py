"""The client's side, by the kind of training: the table name -> settings of a worker."""

from fedllm.workers.sft import SFT

WORKERS: dict[str, type] = {"sft": SFT}
"""What ``worker.name`` takes."""
