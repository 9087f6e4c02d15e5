"""Fed-PLoRA (Zhang, Hu, Xu, ICLR 2026): a client trains some columns of the adapter, on top of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fedllm.algorithms.lora.fedit import started
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank, plus
from fedllm.mean import mean_columns


@dataclass(frozen=True)
class FedPLoRA(Algorithm):
    """Client i draws ``r_i`` of the R columns every round; column j is averaged over ``Q_j``, those that drew it.

    ``b_j = sum_(i in Q_j) n_i b_ij / sum_(i in Q_j) n_i`` and ``a_j`` likewise; what nobody drew stays. The other
    columns are sent frozen, so that a client of any rank starts from the function that is served. R is the largest rank
    of all clients, and one draw counts for all modules.

    State: ``adapter/name``, the B and A of rank R, and R itself, ``r``.
    """

    averages_factors: ClassVar[bool] = True
    differs: ClassVar[str] = "weights n_i, not equal ones; one draw a client and round for all modules"

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        start = model.adapters(max(client.rank for client in clients))
        adapter = {name: model.update.get(name, value) for name, value in start.items()}
        return under("adapter", adapter) | {"r": torch.tensor(max(client.rank for client in clients))}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        r = int(state["r"])
        order = torch.randperm(r, generator=rnd.rng("chosen", client.id))
        chosen, others = order[: client.rank].sort().values, order[client.rank :].sort().values
        full = started(within("adapter", state), r, rnd)
        sent: dict[str, Any] = {"chosen": chosen}
        for name, M in full.items():
            sent[f"adapter/{name}"] = LowRank(M.B[:, chosen], M.A[chosen])
            sent[f"frozen/{name}"] = LowRank(M.B[:, others], M.A[others])
        return sent

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        frozen = {name: M for name, M in within("frozen", sent).items() if M.rank}
        returned, _, metrics = worker.train(within("adapter", sent), {}, rnd, frozen=frozen)
        return LocalResult(returned, {}, metrics)  # old moments are of other columns

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        places = [reply.sent["chosen"] for reply in replies]
        after: dict[str, Any] = {"r": state["r"]}
        for name, start in started(within("adapter", state), int(state["r"]), rnd).items():
            updates = [reply.returned[name] for reply in replies]
            after[f"adapter/{name}"] = mean_columns(start, updates, places, weights)
        return after

    def served(self, state: Tensors) -> Tensors:
        return within("adapter", state)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        frozen = within("frozen", reply.sent)
        return {name: plus(frozen[name], update) for name, update in reply.returned.items()}
