"""The nouns: who takes part, what travels, and the four hooks that make an algorithm.

A round goes one way: ``download`` (server), ``local`` (client), ``aggregate`` (server), report. Every hook takes values
and returns values, so that resuming is loading the values, N processes run the same code as one, and a deployment
across machines calls the same two functions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, ClassVar, Protocol, Self

import torch
from torch import Tensor

from fedllm.errors import FedError as FedError
from fedllm.errors import Unreachable as Unreachable
from fedllm.lowrank import LowRank

Tensors = Mapping[str, Any]
"""What travels, what the server keeps and what a client remembers: a ``Tensor`` or a ``LowRank`` for each name.

The names are the model's own parameter names, or groups of them (``under``); each hook knows what it put there.
"""


@dataclass(frozen=True)
class Client:
    """One participant.

    Args:
        id: its name in every report, unique in a run.
        num_samples: rows it trains on, ``n_i``.
        rank: LoRA rank ``r_i`` its hardware can train.
        width: share of each layer's channels it holds, in (0, 1] (sub-model algorithms).
        depth: number of blocks it holds, ``None`` for all of them (sub-model algorithms).
        level: name of its capacity, ``b1`` (the weakest) to ``b4``; rules on whole networks have a constant for each.
    """

    id: str
    num_samples: int
    rank: int = 0
    width: float = 1.0
    depth: int | None = None
    level: str = ""


@dataclass(frozen=True)
class Round:
    """Round ``index`` (the first is 1) of a run with ``seed``; ``attempt`` counts from 0 where it had to be repeated.

    ``rounds`` is how many the run has, 0 where nobody knows.
    """

    index: int
    seed: int
    attempt: int = 0
    rounds: int = 0

    def rng(self, *key: object) -> torch.Generator:
        """A CPU generator of its own for every key: nobody's draws depend on who drew before."""
        again = ("attempt", self.attempt) if self.attempt else ()
        text = repr((self.seed, self.index, *again, *key)).encode()
        digest = hashlib.blake2b(text, digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class Reply:
    """What came back from a client, next to what it was sent."""

    client: Client
    sent: Tensors
    returned: Tensors
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Failed:
    """A client that was sent something and did not come back with an update, and why."""

    client: Client
    reason: str


@dataclass(frozen=True)
class Model:
    """What the server knows of the model.

    Args:
        weights: the weights an algorithm may touch, by name. A frozen language model's are meta tensors: the server
            needs their shapes ``(d_out, d_in)`` and never their values.
        update: what has been learned so far on top of them, by the same names; empty at the start of a run.
        anatomy: where a network may be cut or factorised (``fedllm.models.submodel.Anatomy``); a language model has
            none.
        make: describes the network on the meta device, as ``make(width=0.5)`` at another size; None likewise.
        draw: values for such a description, from the run's seed: ``draw(make(width=0.5))``.
        classes: how many answers there are: classes of images, tokens of a vocabulary; 0 where nobody asks.
        frozen: the weights that rules on low-rank updates freeze, as matrices ``(d_out, the rest)``, each with the
            product of a given rank that its update starts from. None: all of them, from zero (a language model's).
    """

    weights: Tensors
    update: Tensors = field(default_factory=dict)
    anatomy: Any = None
    make: Callable[..., Any] | None = None
    draw: Callable[[Any], dict[str, Tensor]] | None = None
    classes: int = 0
    frozen: Mapping[str, Callable[[int], LowRank]] | None = None

    def adapters(self, r: int) -> dict[str, Tensor | LowRank]:
        """What rules on low-rank updates train: a product for every frozen weight, the other weights themselves.

        Args:
            r: the products' rank; those that start from zero have rank 0, and the rules draw their directions.
        """
        if self.frozen is None:
            return {name: LowRank.zeros(*W.shape) for name, W in self.weights.items()}
        return {name: self.frozen[name](r) if name in self.frozen else W for name, W in self.weights.items()}


class Worker(Protocol):
    """The client's side: trains what it is given, on the client it stands for. Built once per process."""

    def of(self, client: Client) -> Any:
        """This worker, standing for one client: the object that ``Algorithm.local`` is called with."""
        ...


@dataclass(frozen=True)
class Algorithm:
    """A paper: four hooks, and three questions the report asks. The fields of a subclass are the paper's constants.

    Attributes:
        network: which variant of a network this rule trains (``plain``, or one of its paper's own); empty where it
            learns low-rank updates of frozen language models alone.
        low_rank: of a network too it learns low-rank updates of frozen weights, ``Model.adapters``.
        any_rank: ``aggregate`` takes products of any rank from a client, not only of the rank that it was sent.
        any_model: no weight travels, and nothing is asked of a client's model but its answers: it may be a network that
            is trained whole, of any shape, or an adapter of any language model.
        at_most: why a plan's bytes are the most that can travel, where the values decide how much does.
    """

    network: ClassVar[str] = ""
    low_rank: ClassVar[bool] = False
    any_rank: ClassVar[bool] = False
    any_model: ClassVar[bool] = False
    at_most: ClassVar[str] = ""

    def validate(self, clients: Sequence[Client]) -> None:
        """Raises FedError where these clients cannot take part in this algorithm; called before anything is loaded."""

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        """The server's state before round 1."""
        raise NotImplementedError

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        """What the server sends to ``client``."""
        raise NotImplementedError

    def local(
        self, worker: Any, sent: Tensors, memory: Tensors, rnd: Round
    ) -> tuple[Tensors, Tensors, dict[str, float]]:
        """Runs on the client. By default: train all that was sent, send all of it back."""
        return worker.train(sent, memory, rnd)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        """The server's next state. ``replies`` is the admitted cohort, never empty."""
        raise NotImplementedError

    def served(self, state: Tensors) -> Tensors:
        """The global update that is evaluated and exported, by weight name."""
        return state

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        """The update a client itself would use, given what it now remembers; by default what it returned."""
        return reply.returned

    def expected(self, reply: Reply) -> Tensors:
        """What would return from a client that did not train; by default the ``adapter/`` group it was sent, or all."""
        return within("adapter", reply.sent) or reply.sent

    def trained(self, reply: Reply) -> Tensors:
        """What was returned, as updates by weight name; by default that is what it is."""
        return reply.returned

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        """Each reply's share in the average, ``p_i``, by client id; they sum to 1. By default ``n_i / n`` (FedAvg)."""
        total = sum(reply.client.num_samples for reply in replies)
        return {reply.client.id: reply.client.num_samples / total for reply in replies}

    def phases(self, rounds: int) -> tuple[int, ...]:
        """Lengths of the stretches of a run in which clients of a level are sent networks of one shape."""
        return (rounds,)

    def truncated(self, state: Tensors, client: Client) -> float:
        """``|| W_t - W_t^(r_i) ||_F`` over the whole model: how much of the served update this client cannot hold."""
        return 0.0


@dataclass(frozen=True)
class Job:
    """One client's part of a round, ready to run anywhere."""

    client: Client
    sent: Tensors
    memory: Tensors


class StopAsked(Exception):
    """A fleet was asked to stop while it waited for a client."""


class Fleet(Protocol):
    """Where the clients of a round run."""

    def run(
        self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round
    ) -> Iterator[tuple[Reply | Failed, Tensors]]:
        """Yields each job's reply, or why there is none, and the client's new memory, in the order of ``jobs``."""
        ...


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor | LowRank]:
    """``{name: t}`` as ``{prefix/name: t}``: two groups of the same weights in one mapping."""
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def within(prefix: str, tensors: Tensors) -> dict[str, Any]:
    """The group that ``under(prefix, ...)`` put there, without its prefix."""
    start = f"{prefix}/"
    return {name[len(start) :]: tensor for name, tensor in tensors.items() if name.startswith(start)}


def names_of(replies: Iterable[Reply]) -> list[str]:
    """Every name that any reply returned, in the order of first appearance."""
    return list(dict.fromkeys(name for reply in replies for name in reply.returned))


CohortEntry = tuple[str, int, int]
"""A client's place in a round: its id, its rank, the steps it will take."""


class Display(Protocol):
    """What the loop tells whoever watches. Every method returns at once and raises nothing of its own."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def round(self, index: int, cohort: Sequence[CohortEntry]) -> None:
        """Round ``index`` (the first is 1) begins with these clients."""

    def client(self, id: str) -> None:
        """This client of the cohort trains now; the one before it is done."""

    def step(self, loss: float | None = None) -> None:
        """One optimizer step of the current client, with its loss where it is known."""

    def evaluating(self, name: str) -> None:
        """``name`` is being evaluated: "base model", "round 3", "client c0 alone"."""

    def finish_round(self, record: Mapping[str, Any]) -> None:
        """The round's record, as ``rounds.jsonl`` gets it."""
