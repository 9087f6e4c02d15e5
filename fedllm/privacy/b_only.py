"""A client that trains B alone, below the rows of A that the server drew."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from fedllm.core import Client, ClientWorker, LocalResult, LocalTraining, Model, Tensors
from fedllm.errors import FedError


class BOnly(ClientWorker):
    """``worker``, whose products keep their A.

    Args:
        worker: of one client.
    """

    def __init__(self, worker: ClientWorker) -> None:
        self.worker = worker

    @property
    def client(self) -> Client:  # type: ignore[override]
        return self.worker.client

    @property
    def steps(self) -> int:
        return self.worker.steps

    @property
    def model(self) -> Model:
        return self.worker.model

    @property
    def shared(self) -> Model:
        return self.worker.shared

    @property
    def labels(self) -> Tensor:
        return self.worker.labels

    def fit(self, request: LocalTraining) -> LocalResult:
        if request.nested:
            raise FedError("privacy.unit=client trains B alone, and this rule trains inside both factors.")
        return self.worker.fit(replace(request, factors="B"))

    def score(
        self, weights: Tensors, alphas: Mapping[str, float] | None = None, forward: Callable[..., object] | None = None
    ) -> dict[str, float]:
        return self.worker.score(weights, alphas, forward)

    def outputs(
        self, weights: Tensors, forward: Callable[..., object] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return self.worker.outputs(weights, forward)
