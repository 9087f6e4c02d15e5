"""One client's training, which may fail without taking the run with it."""

from __future__ import annotations

import torch

from fedllm.core import Algorithm, ClientResult, Failed, Job, Reply, Round, Worker
from fedllm.wire.serialization import canonical


def attempt(algorithm: Algorithm, worker: Worker, job: Job, rnd: Round, *, tolerant: bool = True) -> ClientResult:
    """The client's reply and new memory; or, where its training raises, why it failed and the memory it had.

    Args:
        tolerant: ``False`` lets what was raised through: ``run.on_client_error=stop``, which shows the traceback.
    """
    try:
        returned, memory, metrics = algorithm.local(worker.of(job.client), job.sent, job.memory, rnd)
    except Exception as error:
        if not tolerant:
            raise
        reason = _reason(error)
    else:
        return ClientResult(Reply(job.client, job.sent, canonical(returned), metrics), memory)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # outside the handler: the traceback held the frames, and they the tensors
    return ClientResult(Failed(job.client, reason), job.memory)


def _reason(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return f"its training ended in {type(error).__name__}{': ' if first else ''}{first[:300]}"
