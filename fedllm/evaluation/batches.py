"""The batches of an evaluation, which is finished over several processes or after an interruption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedllm.data.encoding import Encoded
from fedllm.errors import FedError
from fedllm.evaluation.settings import SCORING, Settings, plain_value
from fedllm.evaluation.subject import Subject
from fedllm.models.inference import batches
from fedllm.reports import run_record as story
from fedllm.storage import files
from fedllm.storage import run_folder as folder
from fedllm.tasks.task import Task

LARGEST_PART = 8 << 30
"""Bytes of one process's answers that are read."""


@dataclass(frozen=True)
class Batch:
    """One unit of work. ``sample`` is -1 for the held-out loss of these rows."""

    index: int
    sample: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Processes:
    """This process among those of the launch."""

    rank: int
    world: int
    wait: Callable[[], None]


def chosen(rows: Sequence[dict[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """All rows, or the first of a shuffle: those that a run with this seed and ``data.test_rows`` scores."""
    if settings.rows is None or settings.rows >= len(rows):
        return list(rows)
    order = np.random.default_rng([settings.seed, 1]).permutation(len(rows))
    return [rows[i] for i in order[: settings.rows]]


def settings_of(
    settings: Settings, name: str, task: Task, subject: Subject, path: str | None, rows: Sequence[Any], of: int
) -> dict[str, Any]:
    """Everything that a generation depends on; the same settings may resume."""
    generation = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    for key in (*SCORING, "run", "adapter", "model", "revision", "dtype", "quantization", "data", "rows", "seed"):
        generation.pop(key)
    generation["max_new_tokens"] = settings.max_new_tokens or task.max_new_tokens
    if settings.samples == 1:
        generation |= {"temperature": None, "top_p": None}  # greedy
    weights = subject.adapter / "adapter_model.safetensors" if subject.adapter else None
    if weights is not None and not weights.is_file():
        raise FedError(f"{subject.adapter} has no adapter_model.safetensors.")
    model = dataclasses.asdict(subject.base)
    del model["own"]  # one model is scored
    text = json.dumps(list(rows), sort_keys=True, ensure_ascii=True, default=str)
    return {
        "model": model,
        "adapter": {"path": str(subject.adapter), "sha256": digest(weights.read_bytes())} if weights else None,
        "task": {"name": name, "extraction": task.extraction} | {k: plain_value(v) for k, v in vars(task).items()},
        "rows": {"path": path, "scored": len(rows), "of": of, "sha256": digest(text.encode())},
        "seed": {"rows": settings.seed, "weights": subject.seed},
        "generation": {key: plain_value(value) for key, value in generation.items()},
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def prepare(out: Path, receipts: Mapping[str, Any], overwrite: bool, processes: Processes) -> None:
    """The output folder, with the settings in it; what was generated there with others is in the way."""
    kept, problem = out / "settings.json", None
    if kept.is_file() and not overwrite:
        before = story.json_in(kept)
        other = sorted(key for key in receipts if before.get(key) != receipts[key])
        problem = other and f"output={out} holds answers that were generated with another {' and '.join(other)}"
    elif out.is_dir() and any(out.iterdir()) and not kept.is_file():
        problem = f"output={out} holds files that are not an evaluation's"
    processes.wait()
    if problem:
        raise FedError(f"{problem}: give another output=FOLDER, or overwrite=true where it is an evaluation's.")
    if processes.rank == 0:
        files.make_folder(out / "parts")
        if overwrite:
            for part in (out / "parts").glob("*.jsonl"):
                part.unlink()
        folder.write(kept, json.dumps(receipts, indent=1))
    processes.wait()


def launch(settings: Settings) -> Processes:
    """This process's place in the launch, and its threads."""
    from accelerate import PartialState  # type: ignore[import-untyped]

    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(settings.threads or max(1, len(os.sched_getaffinity(0)) // here))
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))  # the slowest is waited for
    if settings.backend == "vllm" and state.num_processes > 1:
        raise FedError("backend=vllm spreads the work itself: launch one process.")
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone)


def planned(settings: Settings, lengths: Sequence[int], encoded: Sequence[Encoded]) -> list[Batch]:
    """All batches of an evaluation, numbered: the same on every process and in every resumption."""
    plan: list[tuple[int, list[int]]] = []
    if settings.backend == "transformers":
        scorable = [i for i, row in enumerate(encoded) if row.trained]
        found = batches([len(encoded[i].input_ids) for i in scorable], settings.batch_size)
        plan += [(-1, [scorable[i] for i in batch]) for batch in found]
    if settings.generate:
        plan += [(s, b) for s in range(settings.samples) for b in batches(lengths, settings.batch_size)]
    return [Batch(index, sample, tuple(rows)) for index, (sample, rows) in enumerate(plan)]


def done_before(out: Path) -> dict[int, dict[str, Any]]:
    """Finished batches by number, from every process's part; a line that a crash cut off does not count."""
    found: dict[int, dict[str, Any]] = {}
    for part in sorted((out / "parts").glob("*.jsonl")):
        for line in files.read_bytes(part, LARGEST_PART).split(b"\n"):
            try:
                record = json.loads(line)
                found[int(record["batch"])] = record
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
    return found


def seed_of(seed: int, batch: Batch) -> int:
    """A seed of its own for every batch: who draws it, and when, changes nothing."""
    return int.from_bytes(hashlib.blake2b(repr((seed, batch.index)).encode(), digest_size=7).digest(), "big")
