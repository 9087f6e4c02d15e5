"""The nouns: who takes part, what travels, and the four hooks that make an algorithm.

A round goes one way: ``download`` (server), ``local`` (client), ``aggregate`` (server), report. Every hook takes values
and returns values, so that resuming is loading the values, N processes run the same code as one, and a deployment
across machines calls the same two functions.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Concatenate, Literal, NamedTuple, Never, ParamSpec, Protocol, Self

import torch
from torch import Tensor, nn

from fedllm.errors import FedError as FedError
from fedllm.errors import Unreachable as Unreachable
from fedllm.lowrank import LowRank
from fedllm.structure import Anatomy, FedModel

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


def _no_network(*described: object, **size: object) -> Never:
    raise FedError("this rule builds networks of its own, and the model is not a network: take worker.name=vision.")


@dataclass(frozen=True)
class Model:
    """What the server knows of the model.

    Args:
        weights: the weights an algorithm may touch, by name. A frozen language model's are meta tensors: the server
            needs their shapes ``(d_out, d_in)`` and never their values.
        update: what has been learned so far on top of them, by the same names; empty at the start of a run.
        anatomy: where a network may be cut or factorised; empty of a language model.
        make: describes the network on the meta device, as ``make(width=0.5)`` at another size; a language model cannot.
        draw: values for such a description, from the run's seed: ``draw(make(width=0.5))``.
        classes: how many answers there are: classes of images, tokens of a vocabulary; 0 where nobody asks.
        frozen: the weights that rules on low-rank updates freeze, as matrices ``(d_out, the rest)``, each with the
            product of a given rank that its update starts from. None: all of them, from zero (a language model's).
    """

    weights: Tensors
    update: Tensors = field(default_factory=dict)
    anatomy: Anatomy = Anatomy()
    make: Callable[..., FedModel] = _no_network
    draw: Callable[[FedModel], dict[str, Tensor]] = _no_network
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


Loss = Callable[..., Tensor]
"""The mean loss of a batch, from what the forward pass gives and the targets ``(N,)``. Of a language model: from the
logits ``(N, V)``, float32, and the tokens of a batch's completions, in nats a token."""

Phase = tuple[float, Callable[[str], bool]]
"""A share of a round's steps, and which weights train in it, by name."""


Penalty = Callable[[nn.Module], Tensor]
"""A term that is added to the loss, from the network."""

ProductPenalty = Callable[[Tensors], Tensor]
"""A term that is added to the loss, from the products that train, by name, LoRA's scale folded in."""


@dataclass(frozen=True)
class LocalTraining:
    """A rule's request to one client: train these weights on your data.

    A worker refuses what it cannot do (``only``) and never ignores it.

    Args:
        weights: what trains, by name; integer buffers among them come back as they end. A product has LoRA's scale
            folded in and may have any rank; it trains beside the frozen weight of its name.
        memory: what training returned for this client last time.
        rnd: the round, whose generators decide the order of the rows and what dropout draws.
        frozen: further weights, or updates of them, that are added to the model and do not train.
        nested: train these products instead, ``B/name (d_out, r)`` and ``A/name (r, d_in)``, each added to that factor
            of the product ``name`` before LoRA's scale; ``name`` stays as it is. The scale is folded into the first
            factor of B's when they are returned.
        part: from which to which part of the round's steps this is: (0, 0.4) are the first two of five; one step at
            least where it has any width.
        factors: which factors of the products train; the other comes back as it was sent.
        loss: instead of the worker's own.
        penalty: added to the loss.
        product_penalty: added to the loss.
        proximal: ``mu``; ``mu / 2 |theta - theta_start|^2`` over all that trains is added to the loss. Of a product
            theta are the factors, B before LoRA's scale.
        drift: of the kinds and names of ``weights``: ``theta <- theta - rate * drift`` after every optimizer step.
        phases: one after the other, their shares sum to 1; momentum goes on from one to the next. None: all weights.
        scale: HeteroFL's scaler rate.
        alphas: low-rank pairs among the weights -> LoRA's alpha.
        network: describes the network that the weights belong to; by default the client's own.
        forward: what the loss is of, from the network and a batch of inputs; by default the network's output.
    """

    weights: Tensors
    memory: Tensors
    rnd: Round
    frozen: Tensors = field(default_factory=dict)
    nested: Tensors = field(default_factory=dict)
    part: tuple[float, float] = (0.0, 1.0)
    factors: Literal["BA", "B", "A"] = "BA"
    loss: Loss | None = None
    penalty: Penalty | None = None
    product_penalty: ProductPenalty | None = None
    proximal: float = 0.0
    drift: Tensors = field(default_factory=dict)
    phases: Sequence[Phase] = ()
    scale: float = 1.0
    alphas: Mapping[str, float] = field(default_factory=dict)
    network: Callable[[], FedModel] | None = None
    forward: Callable[..., object] | None = None

    def only(self, worker: str, *options: str) -> None:
        """Raises FedError where something is asked for beyond the first three fields and these options."""
        plain = LocalTraining(self.weights, self.memory, self.rnd)
        asked = [f.name for f in fields(self) if getattr(self, f.name) != getattr(plain, f.name)]
        if beyond := [name for name in asked if name not in options]:
            raise FedError(
                f"this rule asks for {', '.join(beyond)}, which {worker} cannot do: it has {', '.join(options)}."
            )


class LocalResult(NamedTuple):
    """What local training leaves behind: what returns to the server, what the client keeps, and measurements.

    Args:
        returned: by the names that the server expects.
        memory: stays with the client until its next round.
        metrics: such as ``train_loss`` (the mean over steps), ``steps``, ``seconds``, ``flops`` or ``tokens``.
    """

    returned: Tensors
    memory: Tensors
    metrics: dict[str, float]


P = ParamSpec("P")


def _of_fields(request: Callable[P, LocalTraining]) -> Callable[Concatenate[ClientWorker, P], LocalResult]:
    """A method that takes the fields of a request."""

    def train(self: ClientWorker, *args: P.args, **options: P.kwargs) -> LocalResult:
        return self.fit(request(*args, **options))

    return train


class ClientWorker(ABC):
    """One client's view of the worker: all that a rule may ask of a client.

    A subclass says what ``steps`` and ``fit`` are; rules on networks also need ``model``, ``labels`` and ``outputs``.
    """

    client: Client

    @property
    @abstractmethod
    def steps(self) -> int:
        """Optimizer steps of a round."""

    def rate(self, rnd: Round) -> float:
        """The learning rate of this round's steps."""
        raise FedError(f"{type(self).__name__} has no one learning rate for a round: this rule needs one.")

    @property
    def model(self) -> Model:
        """The client's model with the values that it draws from the run's seed, at no cost in bytes."""
        raise FedError(f"{type(self).__name__} has no model of its own: this rule needs a worker on networks.")

    @property
    def shared(self) -> Model:
        """The server's model, which is another one where clients have their own."""
        return self.model

    @property
    def labels(self) -> Tensor:
        """The classes that this client has examples of, ascending; tokens, of a text."""
        raise FedError(f"{type(self).__name__} does not tell classes: this rule needs a worker on networks.")

    @abstractmethod
    def fit(self, request: LocalTraining) -> LocalResult:
        """Trains as the request says: the one method that a new kind of training has to write.

        Returns:
            The trained weights under the names of ``request.weights`` (those of ``nested`` where given), the memory to
            keep, and the metrics.
        """

    train = _of_fields(LocalTraining)
    """``train(weights, memory, rnd, ...)`` is ``fit(LocalTraining(weights, memory, rnd, ...))``."""

    def score(
        self, weights: Tensors, alphas: Mapping[str, float] | None = None, forward: Callable[..., object] | None = None
    ) -> dict[str, float]:
        """The task's scores of a model with these weights on the client's own test examples; empty without any."""
        return {}

    def outputs(
        self, weights: Tensors, forward: Callable[..., object] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """``forward(net, x)`` and the targets of the client's training examples, a batch at a time."""
        raise FedError(f"{type(self).__name__} shows no outputs: this rule needs a worker on networks.")


@dataclass(frozen=True)
class Score:
    """Metrics of one evaluation, and the raw generations they were computed from."""

    metrics: dict[str, float]
    generations: Sequence[Mapping[str, object]] = ()


class Worker(Protocol):
    """The client's side: trains what it is given, on the client it stands for. Built once per process."""

    def of(self, client: Client) -> ClientWorker:
        """This worker, standing for one client: the object that ``Algorithm.local`` is called with."""
        ...

    def evaluate(self, update: Tensors) -> Score:
        """The scores of the model with ``update`` on the held-out data; of the untouched model without any."""
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
        plain_mean: ``aggregate`` is the entrywise mean of what returns, in the coordinates of what was sent, so that
            steps entry by entry can go around it. A subclass does not inherit it.
        at_most: why a plan's bytes are the most that can travel, where the values decide how much does.
        differs: from its paper in what, beyond the worker and the data. Not inherited either.
        summed: all that it does with replies is add them up, so that one reply can stand for a noisy sum of them. A
            subclass does not inherit it: it has to be shown for each rule.
        averages_factors: ``aggregate`` averages B and A each for itself, so that a product's factors must have the size
            of the others', and not the product alone; the factors are those of ``trained``.
        own_entries: why one client's update has no entries in common with another's, so that nothing can compare them
            entry by entry; empty where it has them, as far as the clients hold the same parts of the model.
    """

    network: ClassVar[str] = ""
    low_rank: ClassVar[bool] = False
    any_rank: ClassVar[bool] = False
    any_model: ClassVar[bool] = False
    plain_mean: ClassVar[bool] = False
    at_most: ClassVar[str] = ""
    differs: ClassVar[str] = ""
    summed: ClassVar[bool] = False
    averages_factors: ClassVar[bool] = False
    own_entries: ClassVar[str] = ""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name, value in (("summed", False), ("plain_mean", False), ("differs", "")):
            if name not in cls.__dict__:
                setattr(cls, name, value)

    def validate(self, clients: Sequence[Client]) -> None:
        """Raises FedError where these clients cannot take part in this algorithm; called before anything is loaded."""

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        """The server's state before round 1."""
        raise NotImplementedError

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        """What the server sends to ``client``."""
        raise NotImplementedError

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
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
class Around(Algorithm):
    """A rule around a rule: what a subclass does not change is the inner rule's."""

    inner: Algorithm

    def __post_init__(self) -> None:
        own = ("network", "low_rank", "any_rank", "any_model", "at_most", "averages_factors", "own_entries")
        for name in own:  # the rule's
            object.__setattr__(self, name, getattr(self.inner, name))

    def validate(self, clients: Sequence[Client]) -> None:
        self.inner.validate(clients)

    def init(self, model: Model, clients: Sequence[Client]) -> Tensors:
        return self.inner.init(model, clients)

    def download(self, state: Tensors, client: Client, rnd: Round) -> Tensors:
        return self.inner.download(state, client, rnd)

    def local(self, worker: ClientWorker, sent: Tensors, memory: Tensors, rnd: Round) -> LocalResult:
        return self.inner.local(worker, sent, memory, rnd)

    def aggregate(self, state: Tensors, replies: Sequence[Reply], rnd: Round) -> Tensors:
        return self.inner.aggregate(state, replies, rnd)

    def served(self, state: Tensors) -> Tensors:
        return self.inner.served(state)

    def personal(self, reply: Reply, memory: Tensors) -> Tensors:
        return self.inner.personal(reply, memory)

    def expected(self, reply: Reply) -> Tensors:
        return self.inner.expected(reply)

    def trained(self, reply: Reply) -> Tensors:
        return self.inner.trained(reply)

    def shares(self, state: Tensors, replies: Sequence[Reply]) -> dict[str, float]:
        return self.inner.shares(state, replies)

    def phases(self, rounds: int) -> tuple[int, ...]:
        return self.inner.phases(rounds)

    def truncated(self, state: Tensors, client: Client) -> float:
        return self.inner.truncated(state, client)


def innermost(rule: Algorithm) -> Algorithm:
    """The rule that a page names, without what its other sections put around it."""
    return innermost(rule.inner) if isinstance(rule, Around) else rule


def described(rule: Algorithm) -> str:
    """Its class, with those inside: ``Prox(FedIT)``."""
    name = type(rule).__name__
    return f"{name}({described(rule.inner)})" if isinstance(rule, Around) else name


@dataclass(frozen=True)
class Job:
    """One client's part of a round, ready to run anywhere."""

    client: Client
    sent: Tensors
    memory: Tensors


class StopAsked(Exception):
    """A fleet was asked to stop while it waited for a client."""


class ClientResult(NamedTuple):
    """How a client's part of a round ended, and what it remembers from now on."""

    outcome: Reply | Failed
    memory: Tensors


class Fleet(Protocol):
    """Where the clients of a round run."""

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        """Yields each job's reply, or why there is none, and the client's new memory, in the order of ``jobs``."""
        ...


class Federation(Protocol):
    """All of a run that is known before a weight is loaded: who takes part, on what, and how they train.

    Attributes:
        clients: in a fixed order; a name stands for the same client in every round.
        model: what the server knows of the model.
        partition: who holds which rows, as plain JSON values for the run's folder.
        alone: the rule by which a client trains without the others, for comparison.
        notes: what the summary's numbers were computed from, a sentence each.
    """

    @property
    def clients(self) -> Sequence[Client]: ...

    @property
    def model(self) -> Model: ...

    @property
    def partition(self) -> Mapping[str, object]: ...

    @property
    def alone(self) -> Algorithm: ...

    @property
    def notes(self) -> Sequence[str]: ...

    def worker(self, on_step: Callable[[float | None], None]) -> Worker:
        """Loads the model and the data, and builds what trains in this process.

        Args:
            on_step: called with the loss after every optimizer step, None where that would wait for a GPU.
        """
        ...

    def plan(self) -> dict[str, object]:
        """Who would train what and what would travel, as plain JSON values."""
        ...

    def export(self, place: Path, update: Tensors, client: Client | None = None) -> None:
        """Writes a model with ``update`` into a folder; with ``client``, on that client's own base model."""
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
