"""Generation by vLLM."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from typing import Any

from fedllm.errors import FedError
from fedllm.evaluation.batches import (
    Batch,
    seed_of,
)
from fedllm.evaluation.settings import Settings
from fedllm.evaluation.subject import Subject
from fedllm.tasks.task import Task


def vllm_records(
    settings: Settings, task: Task, subject: Subject, prompts: Sequence[str], pending: Sequence[Batch], limit: int
) -> Iterator[dict[str, Any]]:
    """The same batches by vLLM, which is imported here and nowhere else."""
    try:
        vllm, lora = importlib.import_module("vllm"), importlib.import_module("vllm.lora.request")
    except ImportError as error:
        raise FedError(
            "backend=vllm: vLLM is not installed here. pip install vllm, or backend=transformers."
        ) from error
    options: dict[str, Any] = {"model": subject.base.name, "revision": subject.base.revision, "seed": settings.seed}
    options["dtype"] = subject.base.dtype
    request = None
    if subject.adapter is not None:
        rank = int(json.loads((subject.adapter / "adapter_config.json").read_text())["r"])
        options |= {"enable_lora": True, "max_lora_rank": max(8, 1 << (rank - 1).bit_length())}
        request = lora.LoRARequest("adapter", 1, str(subject.adapter))
    engine = vllm.LLM(**options)
    for batch in pending:
        drawn = settings.samples > 1
        how = vllm.SamplingParams(
            temperature=settings.temperature if drawn else 0.0,
            top_p=settings.top_p if drawn else 1.0,
            max_tokens=limit,
            stop=list(task.stop) if task.ends_near == task.stop else [],  # else only `finished` can tell
            include_stop_str_in_output=True,
            seed=seed_of(settings.seed, batch) if drawn else None,
        )
        made = engine.generate([prompts[i] for i in batch.rows], how, lora_request=request, use_tqdm=False)
        found = [answer.outputs[0] for answer in made]
        cut = [getattr(one, "finish_reason", None) == "length" for one in found]
        yield {"batch": batch.index, "texts": [one.text for one in found], "cut": cut}
