"""All clients in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedllm.core import Algorithm, Job, Reply, Round, Tensors, Worker
from fedllm.ledger import canonical
from fedllm.progress import Display


@dataclass(frozen=True)
class Local:
    """The fleet of one process."""

    display: Display

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[tuple[Reply, Tensors]]:
        for job in jobs:
            self.display.client(job.client.id)
            returned, memory, metrics = algorithm.local(worker.of(job.client), job.sent, job.memory, rnd)
            yield Reply(job.client, job.sent, canonical(returned), metrics), memory
