"""FedALT (Bian, Wang, Zhang, Xu, AAAI 2026): a client trains its own adapter beside the mean of the others', frozen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from fedllm.algorithms.lora.fedit import of_one_rank, started
from fedllm.config.types import SomeShare
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within
from fedllm.lowrank import LowRank
from fedllm.mean import mean_factors


@dataclass(frozen=True)
class FedALT(Algorithm):
    """Client k's model is ``mix B_k A_k + (1 - mix) B A``, ``B`` and ``A`` the plain means of all others' factors.

    Nobody sets out from an average: ``B_k, A_k`` go on from where they were. The server keeps everyone's newest, also
    of those who sat a round out, and sends a client its own as well, so that none has to remember it. Served, for the
    report alone, are the means over all.

    State: ``own/name/client``; those who have not taken part yet have rank 0.

    Args:
        mix: the own adapter's weight. In the paper a softmax of the layer's input gives it; a fixed half is its
            ablation. 1 is training alone.
    """

    differs: ClassVar[str] = "a fixed mix, the paper's ablation, in place of a learned one"

    mix: SomeShare = 0.5

    averages_factors: ClassVar[bool] = True
    own_entries: ClassVar[str] = "every client's adapter stays its own, beside the mean of the others'"

    def validate(self, clients: Sequence[Client]) -> None:
        of_one_rank(clients, "zero_padding, rbla, flexlora, raflora, flora or fedhl")

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        start = {name: model.update.get(name, zero) for name, zero in model.adapters(0).items()}
        return {f"own/{name}/{client.id}": M for name, M in start.items() for client in clients}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        sent: dict[str, Any] = {}
        for name, own in _by_module(state).items():
            others = [M for id, M in own.items() if id != client.id and M.rank]
            mine = own[client.id]
            sent[f"frozen/{name}"] = _plain_mean(others) if others else LowRank.zeros(*mine.shape)
            sent |= under("adapter", started({name: mine}, client.rank, rnd))
        return sent

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        own = {name: M * self.mix for name, M in within("adapter", sent).items()}
        trained, moments, metrics = worker.train(own, memory, rnd, frozen=self._others(sent))
        return LocalResult({name: M * (1 / self.mix) for name, M in trained.items()}, moments, metrics)

    def _others(self, sent: Tensors) -> dict[str, LowRank]:
        return {name: M * (1 - self.mix) for name, M in within("frozen", sent).items()}

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return {**state, **{f"own/{n}/{reply.client.id}": M for reply in replies for n, M in reply.returned.items()}}

    def served(self, state: Tensors) -> Tensors:
        means = {}
        for name, own in _by_module(state).items():
            held = [M for M in own.values() if M.rank]
            means[name] = _plain_mean(held) if held else next(iter(own.values()))
        return means

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        others = self._others(reply.sent)
        return {name: M * self.mix + others[name] for name, M in reply.returned.items()}


def _by_module(state: Tensors) -> dict[str, dict[str, LowRank]]:
    """Every client's own adapter, by module and client id; ids may hold a slash, names of modules do not."""
    modules: dict[str, dict[str, LowRank]] = {}
    for key, M in within("own", state).items():
        name, _, id = key.partition("/")
        modules.setdefault(name, {})[id] = M
    return modules


def _plain_mean(updates: Sequence[LowRank]) -> LowRank:
    return mean_factors(updates, [1 / len(updates)] * len(updates))
