"""What rules share that share a row for each class (FD, FedProto): the server's mean of them, and a client's own."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedllm.core import Algorithm, Client, Model, Reply, Round, Tensors, under


@dataclass(frozen=True)
class ClassMeans(Algorithm):
    """What travels is a row per class: down those that are known, up those of the classes that a client has.

    ``known`` (C,), ``rows`` (K, d) -> ``seen`` (C,), ``rows`` (S, d). The server's row of a class is the mean over the
    clients that have it, with ``seen`` as weights; a class that nobody in the cohort has keeps its row.
    """

    network: ClassVar[str] = "plain"
    own_entries: ClassVar[str] = "a client returns a row for each class that it has"

    def length(self, model: Model) -> int:
        """d."""
        raise NotImplementedError

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        known = torch.zeros(model.classes, dtype=torch.bool)
        return {"known": known, "rows": torch.zeros(len(known), self.length(model))}

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return {"known": state["known"], "rows": state["rows"][state["known"]]}

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        total, sums = torch.zeros(len(state["known"])).double(), torch.zeros_like(state["rows"]).double()
        for reply in replies:
            seen = reply.returned["seen"]
            total += seen.double()
            sums += seen.double()[:, None] * table(seen, reply.returned["rows"]).double()
        fresh = total > 0
        means = (sums / total.clamp(min=1)[:, None]).to(state["rows"].dtype)
        return {"known": state["known"] | fresh, "rows": torch.where(fresh[:, None], means, state["rows"])}

    def expected(self, reply: Reply) -> Tensors:
        """The rows that it was sent, for whichever classes it has."""
        known, seen = reply.sent["known"], reply.returned.get("seen")
        has = torch.zeros_like(known)
        if isinstance(seen, Tensor) and seen.shape == known.shape and seen.dtype in (torch.bool, torch.int64):
            has = seen.clamp(min=0) if seen.dtype == torch.int64 else seen
        return {"seen": has, "rows": table(known, reply.sent["rows"])[has > 0]}

    def served(self, state: Tensors) -> Tensors:
        """The rows, which are no model that could be scored."""
        return under("shared", state)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return memory


def table(has: Tensor, rows: Tensor) -> Tensor:
    """``(C, d)``: the rows of the classes that ``has`` (C,) holds, zeros for the others."""
    full = rows.new_zeros(len(has), rows.shape[1])
    full[has > 0] = rows
    return full


def class_means(outputs: Iterable[tuple[Tensor, Tensor]], classes: int) -> tuple[Tensor, Tensor]:
    """How many examples of each class there were, ``(C,)``, and the mean row of those that there were, ``(S, d)``."""
    pairs = [(row.cpu(), y.cpu()) for row, y in outputs]
    rows, y = torch.cat([row for row, _ in pairs]), torch.cat([y for _, y in pairs])
    counts = torch.bincount(y, minlength=classes)
    sums = torch.zeros(classes, rows.shape[1], dtype=torch.float64).index_add_(0, y, rows.double())
    return counts, (sums[counts > 0] / counts[counts > 0, None]).float()
