"""FD (Jeong et al., 2018): clients share their networks' mean answer to each class, and learn from the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, pad

from fedllm.algorithms.own_models.class_means import ClassMeans, class_means, table
from fedllm.algorithms.personal import own, scored
from fedllm.config.types import NonNegative, needs
from fedllm.core import Client, ClientWorker, LocalResult, Model, Reply, Round, Tensors, under, within


@dataclass(frozen=True)
class FD(ClassMeans):
    """``CE(z, y) + coefficient KL(p_y || softmax(z))``, ``p_y`` the mean answer to class y, where there is one.

    A client's means run over all its steps in the round. A language model's classes are the tokens of its vocabulary,
    its examples the tokens of completions.

    Args:
        coefficient: lambda.
        answers: means of ``soft`` maxes; ``raw`` ones of logits, as targets of a cross-entropy that has no lower bound.
        groups: of more classes than this, such as a vocabulary's, answers are told by group; see ``grouped``.
        teachers: whose answers a client is sent the mean of: ``all`` clients', or those of the ``others``, as in the
            paper, which the server can leave its own out of where it keeps what each contributed to the rows.
    """

    any_model: ClassVar[bool] = True

    coefficient: NonNegative = 1.0
    answers: Literal["soft", "raw"] = "soft"
    groups: Annotated[int, Field(ge=2), needs("a whole number from 2 up, for one group says nothing")] = 512
    teachers: Literal["all", "others"] = "all"

    def length(self, model: Model) -> int:
        return min(model.classes, self.groups)

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        state = super().init(model, clients)
        kept = [client.id for client in clients if self.teachers == "others"]
        counts, parts = (dict.fromkeys(kept, state[name]) for name in ("known", "rows"))
        return {**state, **under("counts", counts), **under("part", parts)}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        if self.teachers == "all":
            return super().download(state, client, rnd)
        others = {id: counts for id, counts in within("counts", state).items() if id != client.id}
        total, sums = torch.zeros(len(state["known"])).double(), torch.zeros_like(state["rows"]).double()
        for id, counts in others.items():
            total += counts
            sums += state[f"part/{id}"]
        known = total > 0
        return {"known": known, "rows": (sums[known] / total[known, None]).to(state["rows"].dtype)}

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        """The rows; and where they are kept apart, who contributed what to the row that a class now has."""
        came = {reply.client.id: reply.returned for reply in replies}
        fresh = torch.stack([returned["seen"] for returned in came.values()]).any(dim=0)
        parts: dict[str, Tensor] = {}
        for id, counts in within("counts", state).items():
            nothing = {"seen": torch.zeros_like(counts), "rows": state["rows"][:0]}
            seen, rows = (came.get(id, nothing)[name] for name in ("seen", "rows"))
            parts[f"counts/{id}"] = torch.where(fresh, seen, counts)
            parts[f"part/{id}"] = torch.where(fresh[:, None], table(seen, rows), state[f"part/{id}"])
        return {**super().aggregate(state, replies, rnd), **parts}

    def served(self, state: Tensors) -> Tensors:
        return super().served({name: state[name] for name in ("known", "rows")})

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        met: list[tuple[Tensor, Tensor]] = []
        known = sent["known"]

        @cache  # a vocabulary's table is large
        def teacher(device: torch.device) -> tuple[Tensor, Tensor]:
            return table(known, sent["rows"]).to(device), known.to(device)

        def loss(z: Tensor, y: Tensor) -> Tensor:
            told, (rows, has) = grouped(z, self.groups), teacher(z.device)
            met.append((self.answer(told.detach()), y))
            return cross_entropy(z, y) + self.coefficient * self.distance(told, rows[y], has[y])

        omega, _, metrics = worker.train(own(worker, memory), {}, rnd, loss=loss)
        told = met or ((grouped(z, self.groups), y) for z, y in worker.outputs(omega))  # a plan trains nothing
        seen, rows = class_means(told, len(known))
        return LocalResult({"seen": seen > 0, "rows": rows}, omega, scored(worker, omega, metrics))

    def answer(self, z: Tensor) -> Tensor:
        return z.softmax(dim=1) if self.answers == "soft" else z

    def distance(self, z: Tensor, p: Tensor, known: Tensor) -> Tensor:
        """Of logits from their classes' rows, (B, C), over the whole batch; a class without a row adds nothing."""
        each = -(p * log_softmax(z, dim=1)).sum(1)
        if self.answers == "soft":
            each = each + torch.xlogy(p, p).sum(1)
        return (each * known).sum() / len(z)


def grouped(z: Tensor, groups: int) -> Tensor:
    """Logits ``(B, C)`` of classes as those ``(B, groups)`` of groups, class c in group ``c mod groups``; few C stay.

    ``log sum exp`` over a group is the logit of its probability, so a mean of answers is still their mean by group, and
    a KL divergence between grouped answers is at most that between the answers themselves.
    """
    classes = z.shape[1]
    if classes <= groups:
        return z
    return pad(z, (0, -classes % groups), value=-torch.inf).unflatten(1, (-1, groups)).logsumexp(1)
