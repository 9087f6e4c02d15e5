"""FedProto (Tan et al., 2022): clients share the mean representation of each class, and pull their own towards it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.algorithms.own_models.class_means import ClassMeans, class_means, table
from fedllm.algorithms.personal import head_shape, own, scored
from fedllm.config.types import NonNegative
from fedllm.core import ClientWorker, LocalResult, Model, Round, Tensors
from fedllm.structure import Features


@dataclass(frozen=True)
class FedProto(ClassMeans):
    """``CE(z, y) + coefficient mean((R - C_y)^2)``, ``C_y`` the class's prototype where there is one.

    A client's prototypes are means over its training examples after training; the server weights them by their number.
    Clients predict with their own last layer; ``own_prototype_accuracy`` is what they would score with the paper's
    answer, the class whose prototype is nearest: the one it was sent, or its own of a class that nobody had before.

    Args:
        coefficient: lambda; the mean is over the batch and the representation's entries.
    """

    coefficient: NonNegative = 1.0

    def length(self, model: Model) -> int:
        return head_shape(model)[1]

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        prototypes, known = table(sent["known"], sent["rows"]), sent["known"]

        def loss(seen: Features, y: Tensor) -> Tensor:
            R = seen.representation  # (B, d)
            apart = (R - prototypes.to(R)[y]).square().mean(1) * known.to(R.device)[y]
            return cross_entropy(seen.logits, y) + self.coefficient * apart.mean()

        omega, _, metrics = worker.train(
            own(worker, memory), {}, rnd, loss=loss, forward=lambda net, x: net.features(x)
        )
        outputs = worker.outputs(omega, lambda net, x: net.features(x).representation)
        seen, rows = class_means(outputs, len(known))
        near = torch.where(known[:, None], prototypes, table(seen, rows))
        answers = worker.score(omega, forward=lambda net, x: nearness(net, x, near, known | (seen > 0)))
        scores = {f"own_prototype_{key}": value for key, value in answers.items() if key == "accuracy"}
        return LocalResult({"seen": seen, "rows": rows}, omega, {**scored(worker, omega, metrics), **scores})


def nearness(net: Any, x: Tensor, prototypes: Tensor, has: Tensor) -> Tensor:
    """``-|| R - C_j ||^2``, ``(B, C)``; of a class without a prototype less than of any other."""
    R = net.features(x).representation
    apart = torch.cdist(R, prototypes.to(R)).square()
    return -apart.masked_fill(~has.to(R.device), float("inf"))
