"""Standalone (Yi et al., 2023, as the baseline of FedLoRA): every client trains its own network, nothing is sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedllm.algorithms.personal import COSTS, own, scored
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within


@dataclass(frozen=True)
class Standalone(Algorithm):
    """``min f_k(omega_k)``: what the other rules must be better than. The server knows how many rounds there were.

    Args:
        trains: in the rounds that the client is ``drawn`` for, or ``always``: it then does what it missed when it is
            drawn, with the data order and learning rate of each round, so its network is the one of a run where
            everybody takes part in every round. Those missed since it was last drawn are not done at a run's end.
    """

    trains: Literal["drawn", "always"] = "drawn"

    network: ClassVar[str] = "plain"
    any_model: ClassVar[bool] = True

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return {"rounds": torch.zeros(1)}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {}

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        omega, done = own(worker, within("own", memory)), int(memory.get("done", 0))
        missed = range(done + 1, rnd.index) if self.trains == "always" else ()
        spent: Counter[str] = Counter()
        for each in [*(Round(index, rnd.seed, rounds=rnd.rounds) for index in missed), rnd]:
            omega, _, metrics = worker.train(omega, {}, each)
            spent.update({key: metrics[key] for key in COSTS if key in metrics})
        kept = {**under("own", omega), "done": torch.tensor(rnd.index)}
        return LocalResult({}, kept, scored(worker, omega, {**metrics, **spent}))

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return {"rounds": state["rounds"] + 1}

    def served(self, state: Tensors) -> Tensors:
        """No model: there is none but the clients'."""
        return under("shared", state)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return within("own", memory)
