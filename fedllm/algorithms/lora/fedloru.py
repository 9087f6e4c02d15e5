"""FedLoRU (federated low-rank updates): the adapters of many rounds add up, so that the sum outgrows their rank.

And FedLoRA, the baseline of its paper, which never adds anything up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedllm.algorithms.lora.fedit import FedIT, of_one_rank, started
from fedllm.config.types import Count
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, cheapest, fill, plus
from fedllm.mean import mean_values


@dataclass(frozen=True)
class FedLoRAAvg(FedIT):
    """FedLoRA as the FedLoRU paper compares with it: one adapter for the whole run, its factors averaged."""

    plain_mean: ClassVar[bool] = True

    network: ClassVar[str] = "plain"
    low_rank: ClassVar[bool] = True
    summed: ClassVar[bool] = True


@dataclass(frozen=True)
class FedLoRU(Algorithm):
    """``B = sum p_i B_i``, ``A = sum p_i A_i`` with ``p_i = n_i / n``; every tau rounds ``W <- W + B A`` (Algorithm 1).

    LoRA's scale is folded into B, so it is alpha / r here as everywhere; the paper writes a fixed alpha = 16 that is
    not divided by r: ``worker.alpha`` = 16 r is that.

    W is frozen and hardly travels: a client is sent it once, later only the increments that it lacks, and remembers
    their sum. An accumulation falls due at the start of round ``k tau + 1``, so what is served after any round is what
    its clients trained, and no run ends on one. All that a client lacks of W then is the last adapter. It is sent in
    place of the new one, whose rows are drawn from a seed, so that no round sends more than an adapter.

    State: ``adapter/name``; ``W/name``, a stack of increments until dense is smaller, then beside ``last/name``, the
    newest; ``held/client``, the accumulations that it has; and ``r``, the adapters' rank. A ``Tensor`` among the
    adapters (a network's stem, norms and classes) is trained as it is, averaged and never accumulated.

    Args:
        tau: rounds between accumulations (section 4.2: 15 for the language model).
        reset: after an accumulation, ``random``: fresh rows in A, drawn as PEFT draws them, and B = 0, so the function
            stays as it is; or ``momentum``: B and A stay, so the model steps once more by what it has just added.
    """

    tau: Count = 15
    reset: Literal["random", "momentum"] = "random"

    network: ClassVar[str] = "plain"
    low_rank: ClassVar[bool] = True
    summed: ClassVar[bool] = True
    averages_factors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.tau < 1:
            raise FedError(f"tau={self.tau}: at least 1 round between two accumulations.")

    def validate(self, clients: Sequence[Client]) -> None:
        of_one_rank(clients, "mfedloru")

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        r = self.adapter_rank(clients)
        state: dict[str, Any] = {"r": torch.tensor(r)}
        for name, start in model.adapters(r).items():
            if isinstance(start, LowRank):
                state[f"adapter/{name}"] = start
                state[f"W/{name}"] = model.update.get(name, LowRank.zeros(*start.shape))
            else:
                state[f"adapter/{name}"] = model.update.get(name, start)
        return state

    def adapter_rank(self, clients: Sequence[Client]) -> int:
        """r."""
        return max(client.rank for client in clients)

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        state, r = self.accumulated(state, rnd), int(state["r"])
        adapters = within("adapter", state)
        if not self.accumulations(rnd):
            return under("adapter", started(adapters, r, rnd)) | self._lacking(state, client, rnd)
        drawn = {
            name: torch.tensor([rnd.rng("fresh", name).initial_seed(), r])
            for name, update in adapters.items()
            if isinstance(update, LowRank) and update.rank < r
        }
        return under("adapter", adapters) | under("drawn", drawn) | self._lacking(state, client, rnd)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        W = self.remembered(sent, memory, rnd)
        returned, moments, metrics = worker.train(arrived(sent), self.moments("worker", memory, rnd), rnd, frozen=W)
        return LocalResult(returned, self.memory(W, rnd) | under("worker", moments), metrics)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        p = self.shares(state, replies)
        weights = [p[reply.client.id] for reply in replies]
        updates = [self.trained(reply) for reply in replies]
        after = dict(self.accumulated(state, rnd))
        for name in within("adapter", state):
            after[f"adapter/{name}"] = mean_values([update[name] for update in updates], weights)
        held = torch.tensor(self.accumulations(rnd))
        return after | {f"held/{reply.client.id}": held.clone() for reply in replies}

    def served(self, state: Tensors) -> Tensors:
        return added(within("W", state), within("adapter", state))

    def expected(self, reply: Reply) -> Tensors:
        return arrived(reply.sent)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return added(within("W", memory), self.trained(reply))

    def accumulations(self, rnd: Round) -> int:
        """How many there have been by the time this round's clients train."""
        return (rnd.index - 1) // self.tau

    def accumulates(self, rnd: Round) -> bool:
        """Whether this round begins with one."""
        return rnd.index > 1 and (rnd.index - 1) % self.tau == 0

    def accumulated(self, state: Tensors, rnd: Round) -> Tensors:
        """``W <- W + B A`` and the reset, where this round begins with them; else the state as it is."""
        if not self.accumulates(rnd):
            return state
        after = dict(state)
        for name, update in within("adapter", state).items():
            if not isinstance(update, LowRank):
                continue
            W = cheapest(plus(state[f"W/{name}"], update))
            after[f"W/{name}"] = W
            if isinstance(W, Tensor):
                after[f"last/{name}"] = update
            if self.reset == "random":
                after[f"adapter/{name}"] = LowRank.zeros(*update.shape)
        return after

    def _lacking(self, state: Tensors, client: Client, rnd: Round) -> dict[str, Any]:
        """What the client lacks of W: ``increment/k/name``, or all of it as ``W/name``.

        With momentum the adapter that is sent as an accumulation falls due is the newest increment.
        """
        now, r = self.accumulations(rnd), int(state["r"])
        known = now - (self.reset == "momentum" and self.accumulates(rnd))
        held = int(state[f"held/{client.id}"]) if f"held/{client.id}" in state else -1
        news: dict[str, Any] = {}
        for name, W in within("W", state).items():
            if held < 0:
                news |= {f"W/{name}": W} if isinstance(W, Tensor) or W.rank else {}
            elif isinstance(W, LowRank):
                for k in range(held + 1, known + 1):
                    end = W.rank - (now - k) * r  # each accumulation added r columns
                    news[f"increment/{k}/{name}"] = LowRank(W.B[:, end - r : end], W.A[end - r : end])
            elif now - 1 == held < known and state[f"last/{name}"].rank * sum(W.shape) < W.numel():
                news[f"increment/{now}/{name}"] = state[f"last/{name}"]
            elif held < known:
                news[f"W/{name}"] = W
        return news

    def remembered(self, sent: Tensors, memory: Tensors, rnd: Round) -> dict[str, Any]:
        """W on the client's side. An increment that comes again, its last reply having been lost, counts once."""
        whole, W, trained = within("W", sent), within("W", memory), within("adapter", sent)
        counts = dict.fromkeys(trained, int(memory.get("held", 0)))
        news = within("increment", sent)
        if self.reset == "momentum" and self.accumulates(rnd):
            news |= {f"{self.accumulations(rnd)}/{name}": M for name, M in trained.items() if isinstance(M, LowRank)}
        for key, update in sorted(news.items(), key=lambda item: int(item[0].partition("/")[0])):
            k, _, name = key.partition("/")
            if name not in whole and int(k) == counts[name] + 1:
                W[name] = cheapest(plus(W.get(name, LowRank.zeros(*update.shape)), update))
                counts[name] += 1
        behind = [
            name
            for name, update in trained.items()
            if isinstance(update, LowRank) and name not in whole and counts[name] != self.accumulations(rnd)
        ]
        if behind:
            raise FedError(
                f"this client holds {counts[behind[0]]} of {self.accumulations(rnd)} accumulations of {behind[0]} and "
                "was sent no more: its memory was lost. Bring it back, or let it join under a new name."
            )
        return W | whole

    def moments(self, group: str, memory: Tensors, rnd: Round) -> Tensors:
        """The optimizer's moments of this client's last round; none where the adapters they belong to are gone."""
        stale = self.reset == "random" and int(memory.get("held", 0)) != self.accumulations(rnd)
        return {} if stale else within(group, memory)

    def memory(self, W: Tensors, rnd: Round) -> dict[str, Any]:
        """What a client keeps of W."""
        return {"held": torch.tensor(self.accumulations(rnd)), **under("W", W)}


def arrived(sent: Tensors) -> dict[str, Any]:
    """What a client trains: the adapters that it was sent, their rows drawn where a seed and a rank came instead."""
    drawn = {name: tensor.tolist() for name, tensor in within("drawn", sent).items()}
    return {
        name: fill(M, drawn[name][1], torch.Generator().manual_seed(drawn[name][0])) if name in drawn else M
        for name, M in within("adapter", sent).items()
    }


def added(W: Tensors, adapters: Tensors) -> dict[str, Any]:
    """``W + B A`` for every name; what is no product is as it is."""
    return {
        name: plus(W[name], update) if isinstance(update, LowRank) and name in W else update
        for name, update in adapters.items()
    }
