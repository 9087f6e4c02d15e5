"""Generation and loss by transformers, batch by batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fedllm.data.encoding import Encoded
from fedllm.evaluation.batches import (
    LARGEST_PART,
    Batch,
    Processes,
    seed_of,
)
from fedllm.evaluation.settings import Settings
from fedllm.evaluation.subject import Subject, loaded
from fedllm.evaluation.vllm_backend import vllm_records
from fedllm.models.inference import Sampling, continue_batch, row_losses
from fedllm.storage import files
from fedllm.storage import run_folder as folder
from fedllm.tasks.task import Task


def run_batches(
    settings: Settings,
    task: Task,
    subject: Subject,
    tokenizer: Any,
    rows: Sequence[Any],
    prompts: Sequence[list[int]],
    encoded: Sequence[Encoded],
    pending: Sequence[Batch],
    out: Path,
    processes: Processes,
) -> None:
    """Loads the model and does this process's batches, each on the disk before the next begins."""
    part = out / "parts" / f"{processes.rank}.jsonl"
    if part.is_file() and not files.read_bytes(part, LARGEST_PART).endswith(b"\n"):
        files.append(part, "\n")
    limit = settings.max_new_tokens or task.max_new_tokens
    if settings.backend == "vllm":
        for record in vllm_records(settings, task, subject, [task.prompt(row) for row in rows], pending, limit):
            folder.append_line(part, record)
        return
    model = loaded(subject)
    console = Console(stderr=True)
    with torch.no_grad(), console.status("loading") as status:
        for number, batch in enumerate(pending, start=1):
            status.update(f"batch {number} of {len(pending)}")
            if batch.sample < 0:
                sums = row_losses(model, [encoded[i] for i in batch.rows], tokenizer.pad_token_id)
                folder.append_line(part, {"batch": batch.index, "losses": sums})
                continue
            sampling = None
            if settings.samples > 1:
                sampling = Sampling(settings.temperature, settings.top_p, seed_of(settings.seed, batch))
            found = continue_batch(
                model, tokenizer, [prompts[i] for i in batch.rows], limit, task.ends_near, sampling, task.finished
            )
            folder.append_line(
                part, {"batch": batch.index, "texts": [a.text for a in found], "cut": [a.cut for a in found]}
            )
