"""A fleet some of whose clients are done already: those of a round that was interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedllm.core import Algorithm, ClientResult, Fleet, Job, Reply, Round, Worker


@dataclass(frozen=True)
class Waiting:
    """``fleet``, but in round ``rnd`` the clients in ``finished`` do not train again.

    Args:
        finished: what the fleet yielded for them before; a reply's ``sent`` is taken from the job.
    """

    fleet: Fleet
    rnd: Round | None
    finished: Sequence[ClientResult]

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        done = {result.outcome.client.id: result for result in self.finished} if rnd == self.rnd else {}
        rest = self.fleet.run(algorithm, worker, [job for job in jobs if job.client.id not in done], rnd)
        for job in jobs:
            if job.client.id not in done:
                yield next(rest)
                continue
            ended, memory = done[job.client.id]
            if isinstance(ended, Reply):
                ended = Reply(job.client, job.sent, ended.returned, ended.metrics)
            yield ClientResult(ended, memory)
