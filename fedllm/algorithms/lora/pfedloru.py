"""pFedLoRU: FedLoRU, and a low-rank update of its own for every client (FedLoRU paper, Algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

from fedllm.algorithms.lora.fedloru import FedLoRU, added, arrived
from fedllm.algorithms.personal import both, scored
from fedllm.config.types import Count, PartShare
from fedllm.core import ClientWorker, LocalResult, Reply, Round, Tensors, under, within
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, fill


@dataclass(frozen=True)
class PFedLoRU(FedLoRU):
    """Client i holds ``W + B A + L_i U_i``: first ``L_i, U_i`` are trained with B, A frozen, then the other way round.

    B and A alone travel and are averaged; ``L_i U_i`` stays where it is, and an accumulation does not touch it. It has
    LoRA's scale of its own rank. What else a network has is shared and trains with B and A. The server does what
    FedLoRU does.

    Args:
        personal_rank: of ``L_i U_i``; a quarter of the adapters' by default (the paper names none, at most theirs).
        personal_share: part of a round's steps that train ``L_i, U_i``: E_per / (E_per + E_global), two of five epochs
            by default. Not stated either; 0 is FedLoRU.
    """

    personal_rank: Count | None = None
    personal_share: PartShare = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.personal_share < 1:
            raise FedError(f"personal_share={self.personal_share}: at least 0, and less than 1 for the shared part.")
        if self.personal_rank is not None and self.personal_rank < 1:
            raise FedError(f"personal_rank={self.personal_rank}: at least 1, or null for a quarter of the adapters'.")

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        W, shared = self.remembered(sent, memory, rnd), arrived(sent)
        start = {
            name: fill(
                memory.get(f"personal/{name}", LowRank.zeros(*update.shape)),
                self.personal_rank or max(1, update.rank // 4),
                rnd.rng("personal", name),
            )
            for name, update in shared.items()
            if isinstance(update, LowRank)
        }
        own, own_moments, first = worker.train(
            start, within("worker_own", memory), rnd, frozen=added(W, shared), part=(0.0, self.personal_share)
        )
        base = added(W, own)
        returned, moments, second = worker.train(
            shared, self.moments("worker", memory, rnd), rnd, frozen=base, part=(self.personal_share, 1.0)
        )
        kept = under("personal", own) | under("worker_own", own_moments) | under("worker", moments)
        metrics = scored(worker, added(base, returned), both(first, second))
        return LocalResult(returned, self.memory(W, rnd) | kept, metrics)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        shared = dict(super().personal(reply, memory))
        return shared | added(shared, within("personal", memory))
