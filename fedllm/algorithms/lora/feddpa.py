"""FedDPA (Yang, Long, Shen, Jiang, Blumenstein, NeurIPS 2024): a global adapter, and a personal one beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fedllm.algorithms.lora.fedit import FedIT
from fedllm.algorithms.personal import both
from fedllm.config.types import Share
from fedllm.core import ClientWorker, LocalResult, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank, fill


@dataclass(frozen=True)
class FedDPA(FedIT):
    """Client i's model is ``(1 - mix) B A + mix B_i A_i``: FedIT's adapter, and one that never leaves the client.

    From the second round that a client takes part in its own adapter trains first, with the received one frozen; then
    the global one trains alone, as in FedIT. Both take a whole round's steps. Inside a round this is the paper's T
    variant; its F trains the personal adapter once, after the run.

    Args:
        mix: the personal adapter's weight, a in the paper. The paper weighs each question by its likeness to a client's
            own rows when it answers; here the weight is fixed.
    """

    differs: ClassVar[str] = "a fixed mix; the paper's depends on the question"
    plain_mean: ClassVar[bool] = True

    mix: Share = 0.5

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        first: dict[str, float] = {}
        kept: dict[str, Any] = {}
        if memory and self.mix > 0:
            own: Tensors = {
                name: fill(memory.get(f"own/{name}", LowRank.zeros(*M.shape)), M.rank, rnd.rng("personal", name))
                for name, M in sent.items()
            }
            own, moments, first = worker.train(own, within("own_moments", memory), rnd, frozen=self._rest(sent))
            kept = under("own", own) | under("own_moments", moments)
        returned, moments, second = worker.train(sent, within("moments", memory), rnd)
        names = {"taken_part": next(iter(returned.values())).B.new_ones(1)}
        return LocalResult(returned, kept | under("moments", moments) | names, both(first, second))

    def _rest(self, adapters: Tensors) -> dict[str, LowRank]:
        return {name: M * (1 - self.mix) for name, M in adapters.items()}

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        """The personal adapter is remembered with its weight in it; before there is one, the global adapter alone."""
        own = within("own", memory)
        return {name: M + own[name] for name, M in self._rest(reply.returned).items()} if own else reply.returned
