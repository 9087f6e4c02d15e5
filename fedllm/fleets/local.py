"""All clients in this process, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedllm.core import Algorithm, ClientResult, Display, Job, Round, Worker
from fedllm.fleets.train_client import attempt


@dataclass(frozen=True)
class Local:
    """The fleet of one process."""

    display: Display
    tolerant: bool = True

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        for job in jobs:
            self.display.client(job.client.id)
            yield attempt(algorithm, worker, job, rnd, tolerant=self.tolerant)
