"""The client's side, by the kind of training: the table name -> settings of a worker."""

from fedllm.workers.settings import SFT, Vision

WORKERS: dict[str, type] = {"sft": SFT, "vision": Vision}
"""What ``worker.name`` takes."""
