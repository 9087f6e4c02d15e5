"""The newer rules on low-rank updates: numbers by hand, reductions, and three rounds written again from the papers.

The second writing shares no code with the rules: float64, dense products, gradients by formula, plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from fedllm.algorithms import LOW_RANK
from fedllm.algorithms.compositions.local_step import Prox, Scaffold
from fedllm.algorithms.compositions.server_step import Server, ServerStep
from fedllm.algorithms.lora.fed_plora import FedPLoRA
from fedllm.algorithms.lora.fed_sb import FedSB
from fedllm.algorithms.lora.fedalt import FedALT
from fedllm.algorithms.lora.feddpa import FedDPA
from fedllm.algorithms.lora.fedex_lora import FedExLoRA
from fedllm.algorithms.lora.fedit import FedIT
from fedllm.algorithms.lora.fedloru import FedLoRAAvg
from fedllm.algorithms.lora.fedmomentum import FedMomentum
from fedllm.algorithms.lora.fedrot_lora import FedRotLoRA
from fedllm.algorithms.lora.fedsa_lora import FedSALoRA
from fedllm.algorithms.lora.fedsvd import FedSVD
from fedllm.algorithms.lora.ffa_lora import FFALoRA
from fedllm.algorithms.lora.flexlora import FlexLoRA
from fedllm.algorithms.lora.flora import FLoRA
from fedllm.algorithms.lora.florist import FLoRIST
from fedllm.algorithms.lora.hetlora import HetLoRA
from fedllm.algorithms.lora.lora_fair import LoRAFAIR
from fedllm.algorithms.lora.raflora import RaFLoRA
from fedllm.algorithms.lora.rbla import RBLA
from fedllm.algorithms.lora.rolora import RoLoRA
from fedllm.algorithms.lora.zero_padding import ZeroPadding
from fedllm.algorithms.networks.fedavg import FedAvg
from fedllm.core import Algorithm, Client, ClientWorker, LocalResult, LocalTraining, Model, Reply, Round, Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank

D_OUT, D_IN, STEPS, RATE = 6, 5, 3, 0.2
MIXED = [Client("a", 30, 2), Client("b", 10, 3), Client("c", 25, 4)]
EQUAL = [replace(client, rank=3) for client in MIXED]


# --- a linear model, trained by SGD: once as a worker with autograd, once by formula


def rows_of(client: Client) -> tuple[Tensor, Tensor]:
    """``X (n, d_in)`` and ``Y (n, d_out)``: a task of each client's own."""
    generator = torch.Generator().manual_seed(client.num_samples)
    X = torch.randn(client.num_samples, D_IN, generator=generator, dtype=torch.float64)
    W = torch.randn(D_OUT, D_IN, generator=generator, dtype=torch.float64)
    return X, X @ W.T


def whole(W: Tensor | LowRank) -> Tensor:
    return W.B.double() @ W.A.double() if isinstance(W, LowRank) else W.double()


@dataclass(frozen=True)
class Linear(ClientWorker):
    """A worker for one matrix that is zero before anything is learned: SGD on half the squared error, all rows."""

    client: Client

    @property
    def steps(self) -> int:
        return STEPS

    def rate(self, rnd: Round) -> float:
        return RATE

    def fit(self, request: LocalTraining) -> LocalResult:
        request.only("linear", "frozen", "part", "factors", "nested", "proximal", "drift", "product_penalty")
        X, Y = rows_of(self.client)
        base = whole(request.frozen.get("w", torch.zeros(D_OUT, D_IN)))
        outer_ = request.weights["w"]
        start = request.nested.get("A/w", outer_)
        B, A = (t.double().clone().requires_grad_() for t in (start.B, start.A))
        begun = {"B": B.detach().clone(), "A": A.detach().clone()}
        count = round(request.part[1] * STEPS) - round(request.part[0] * STEPS)
        for _ in range(count):
            M = outer_.B.double() @ (outer_.A.double() + B @ A) if request.nested else B @ A
            loss = 0.5 * (X @ (base + M).T - Y).square().sum() / len(X)
            moving = {name: t for name, t in (("B", B), ("A", A)) if name in request.factors}
            for name, t in moving.items():
                loss = loss + request.proximal / 2 * (t - begun[name]).square().sum()
            if request.product_penalty is not None:
                loss = loss + request.product_penalty({"w": LowRank(B, A)})
            gradients = torch.autograd.grad(loss, list(moving.values()))
            for (name, t), gradient in zip(moving.items(), gradients, strict=True):
                t.data -= RATE * gradient
                if request.drift:
                    t.data -= RATE * getattr(request.drift["w"], name)
        name = "A/w" if request.nested else "w"
        metrics = {"train_loss": 0.0, "steps": float(count)}
        return LocalResult({name: LowRank(B.detach(), A.detach())}, {"moments": torch.ones(1)}, metrics)


def sgd(
    client: Client,
    B: Tensor,
    A: Tensor,
    base: Tensor | float = 0.0,
    factors: str = "BA",
    more: Callable[[Tensor, Tensor], tuple[Tensor | float, Tensor | float]] = lambda B, A: (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """The same by formula: with ``G`` the gradient of the matrix, B's is ``G A^T`` and A's ``B^T G``, and ``more``."""
    X, Y = rows_of(client)
    for _ in range(STEPS):
        G = (X @ (base + B @ A).T - Y).T @ X / len(X)
        for_B, for_A = more(B, A)
        B, A = B - RATE * ("B" in factors) * (G @ A.T + for_B), A - RATE * ("A" in factors) * (B.T @ G + for_A)
    return B, A


def drawn(r: int, rnd: Round) -> Tensor:
    """A as PEFT draws it: uniform within the square root of 1 / d_in."""
    return ((torch.rand(r, D_IN, generator=rnd.rng("fresh", "w")) * 2 - 1) * D_IN**-0.5).double()


def ran(rule: Algorithm, clients: Sequence[Client], rounds: int = 3, personal: bool = False) -> list[Tensor]:
    """What the rule serves after each round; or every client's own model, one above the other."""
    rule.validate(clients)
    state = rule.init(Model({"w": torch.empty(D_OUT, D_IN, device="meta")}), clients)
    memories: dict[str, Tensors] = {client.id: {} for client in clients}
    served = []
    for index in range(1, rounds + 1):
        rnd, replies = Round(index, seed=3, rounds=rounds), []
        for client in clients:
            sent = rule.download(state, client, rnd)
            returned, memories[client.id], metrics = rule.local(Linear(client), sent, memories[client.id], rnd)
            replies.append(Reply(client, sent, returned, metrics))
        state = rule.aggregate(state, replies, rnd)
        if personal:
            own = [rule.personal(reply, memories[reply.client.id])["w"] for reply in replies]
            served.append(torch.cat([whole(W) for W in own]))
        else:
            served.append(whole(rule.served(state)["w"]))
    return served


def shares(clients: Sequence[Client]) -> list[float]:
    return [client.num_samples / sum(c.num_samples for c in clients) for client in clients]


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Of what EQUAL's clients return, or MIXED's, by their rows."""
    return sum((p * t for p, t in zip(shares(EQUAL), tensors, strict=True)), torch.zeros(()))


def best(W: Tensor, r: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(W)
    return (U[:, :r] * S[:r]) @ Vh[:r]


def balanced(W: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """``U sqrt(S)`` and ``sqrt(S) V^T``, each left vector's largest entry positive."""
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()[0]
    return (U * sign * S.sqrt())[:, :r], (S.sqrt()[:, None] * sign[:, None] * Vh)[:r]


Again = Callable[[], list[Tensor]]
AGAIN: dict[str, tuple[Algorithm, Sequence[Client], bool, Again]] = {}


def again(name: str, rule: Algorithm, clients: Sequence[Client], personal: bool = False) -> Callable[[Again], Again]:
    """Puts a second writing into the table: of what is served, or of the clients' own models."""

    def add(written: Again) -> Again:
        AGAIN[name] = (rule, clients, personal, written)
        return written

    return add


START = (torch.zeros(D_OUT, 3, dtype=torch.float64), drawn(3, Round(1, seed=3)))


@again("ffa_lora", FFALoRA(), EQUAL)
def ffa_lora() -> list[Tensor]:
    B, A = START
    served = []
    for _ in range(3):
        B = mean([sgd(client, B, A, factors="B")[0] for client in EQUAL])
        served.append(B @ A)
    return served


@again("rolora", RoLoRA(), EQUAL)
def rolora() -> list[Tensor]:
    B, A = START
    served = []
    for t in (1, 2, 3):
        if t % 2:
            B = mean([sgd(client, B, A, factors="B")[0] for client in EQUAL])
        else:
            A = mean([sgd(client, B, A, factors="A")[1] for client in EQUAL])
        served.append(B @ A)
    return served


@again("fedsvd", FedSVD(), EQUAL)
def fedsvd() -> list[Tensor]:
    B, A = START
    served = []
    for _ in range(3):
        B = mean([sgd(client, B, A, factors="B")[0] for client in EQUAL])
        served.append(B @ A)
        U, S, Vh = torch.linalg.svd(B @ A, full_matrices=False)
        B, A = (U * S)[:, :3], Vh[:3]
    return served


@again("fedex_lora", FedExLoRA(), EQUAL)
def fedex_lora() -> list[Tensor]:
    W, (B, A) = torch.zeros(D_OUT, D_IN, dtype=torch.float64), START
    served = []
    for _ in range(3):
        returned = [sgd(client, B, A, W) for client in EQUAL]
        B, A = mean([b for b, _ in returned]), mean([a for _, a in returned])
        served.append(W + mean([b @ a for b, a in returned]))
        W = served[-1] - B @ A
    return served


@again("fedmomentum", FedMomentum(energy=0.999), EQUAL)
def fedmomentum() -> list[Tensor]:
    W, (B, A) = torch.zeros(D_OUT, D_IN, dtype=torch.float64), START
    served = []
    for _ in range(3):
        M = mean([b @ a for b, a in (sgd(client, B, A, W) for client in EQUAL)])
        S2 = torch.linalg.svdvals(M) ** 2
        q = next(k for k in range(1, 6) if S2[:k].sum() >= 0.999 * S2.sum())
        B, A = balanced(M, 3)
        W = W + best(M, max(q, 3)) - best(M, 3)
        served.append(W + B @ A)
    return served


@again("florist", FLoRIST(threshold=0.9), MIXED)
def florist() -> list[Tensor]:
    W = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    served = []
    for t in (1, 2, 3):
        fresh = [(torch.zeros(D_OUT, c.rank, dtype=torch.float64), drawn(c.rank, Round(t, seed=3))) for c in MIXED]
        S = mean([b @ a for b, a in (sgd(c, *start, W) for c, start in zip(MIXED, fresh, strict=True))])
        S2 = torch.linalg.svdvals(S) ** 2
        W = W + best(S, next(k for k in range(1, 6) if S2[:k].sum() >= 0.9 * S2.sum()))
        served.append(W)
    return served


def column_mean(columns: dict[Client, Tensor]) -> Tensor:
    return sum(c.num_samples * column for c, column in columns.items()) / sum(c.num_samples for c in columns)  # type: ignore[return-value]


@again("rbla", RBLA(), MIXED)
def rbla() -> list[Tensor]:
    B, A = torch.zeros(D_OUT, 4, dtype=torch.float64), drawn(4, Round(1, seed=3))
    served = []
    for _ in range(3):
        returned = {c: sgd(c, B[:, : c.rank], A[: c.rank]) for c in MIXED}
        for j in range(4):
            B[:, j] = column_mean({c: b[:, j] for c, (b, _) in returned.items() if c.rank > j})
            A[j] = column_mean({c: a[j] for c, (_, a) in returned.items() if c.rank > j})
        served.append(B @ A)
    return served


@again("raflora", RaFLoRA(), MIXED)
def raflora() -> list[Tensor]:
    B, A = torch.zeros(D_OUT, 4, dtype=torch.float64), drawn(4, Round(1, seed=3))
    served = []
    for _ in range(3):
        returned = {c: sgd(c, B[:, : c.rank], A[: c.rank]) for c in MIXED}
        W = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
        for j in range(4):
            W += column_mean({c: torch.outer(b[:, j], a[j]) for c, (b, a) in returned.items() if c.rank > j})
        B, A = balanced(W, 4)
        served.append(W)
    return served


@again("lora_fair", LoRAFAIR(steps=30, learning_rate=0.5), EQUAL)
def lora_fair() -> list[Tensor]:
    B, A = START
    served = []
    for _ in range(3):
        returned = [sgd(client, B, A) for client in EQUAL]
        B, A = mean([b for b, _ in returned]), mean([a for _, a in returned])
        S = mean([b @ a for b, a in returned])
        D, seen = torch.zeros_like(B), []
        for _ in range(31):
            D.requires_grad_(True)
            cosine = torch.nn.functional.cosine_similarity(S.flatten(), ((B + D) @ A).flatten(), dim=0)
            f = 1 - cosine + 0.01 * D.square().sum()
            seen.append((float(f), D.detach().clone()))
            D = D.detach() - 0.5 * torch.autograd.grad(f, D)[0]
        B = B + min(seen, key=lambda pair: pair[0])[1]
        served.append(B @ A)
    return served


def rotation(M: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(M)
    return U @ torch.diag(torch.tensor([1.0] * (len(M) - 1) + [float(torch.linalg.det(U @ Vh))]).double()) @ Vh


@again("fedrot_lora", FedRotLoRA(amount=0.4), EQUAL)
def fedrot_lora() -> list[Tensor]:
    B, A = START
    served = []
    for t in (1, 2, 3):
        turned = []
        for client in EQUAL:
            b, a = sgd(client, B, A)
            R = torch.eye(3).double() if t == 1 else rotation(a @ A.T if t % 2 else b.T @ B)
            R = rotation(0.6 * torch.eye(3).double() + 0.4 * R)
            turned.append((b @ R, R.T @ a))
        B, A = mean([b for b, _ in turned]), mean([a for _, a in turned])
        served.append(B @ A)
    return served


@again("fed_plora", FedPLoRA(), MIXED)
def fed_plora() -> list[Tensor]:
    B, A = torch.zeros(D_OUT, 4, dtype=torch.float64), drawn(4, Round(1, seed=3))
    served = []
    for t in (1, 2, 3):
        returned, chosen = {}, {}
        for c in MIXED:
            K = sorted(torch.randperm(4, generator=Round(t, seed=3).rng("chosen", c.id))[: c.rank].tolist())
            rest = [j for j in range(4) if j not in K]
            returned[c], chosen[c] = sgd(c, B[:, K], A[K], B[:, rest] @ A[rest]), K
        B, A = B.clone(), A.clone()
        for j in range(4):
            if drew := [c for c in MIXED if j in chosen[c]]:
                B[:, j] = column_mean({c: returned[c][0][:, chosen[c].index(j)] for c in drew})
                A[j] = column_mean({c: returned[c][1][chosen[c].index(j)] for c in drew})
        served.append(B @ A)
    return served


@again("fedsa_lora", FedSALoRA(), EQUAL, personal=True)
def fedsa_lora() -> list[Tensor]:
    Bs, A = {c: START[0] for c in EQUAL}, START[1]
    own = []
    for _ in range(3):
        returned = {c: sgd(c, Bs[c], A) for c in EQUAL}
        Bs, A = {c: b for c, (b, _) in returned.items()}, mean([a for _, a in returned.values()])
        own.append(torch.cat([b @ a for b, a in returned.values()]))
    return own


def drawn_for(key: str, r: int, t: int) -> Tensor:
    return ((torch.rand(r, D_IN, generator=Round(t, seed=3).rng(key, "w")) * 2 - 1) * D_IN**-0.5).double()


@again("feddpa", FedDPA(mix=0.3), EQUAL, personal=True)
def feddpa() -> list[Tensor]:
    B, A = START
    own: dict[Client, tuple[Tensor, Tensor]] = {}
    models = []
    for t in (1, 2, 3):
        if t > 1:
            fresh = (START[0], drawn_for("personal", 3, t))
            own = {c: sgd(c, *own.get(c, fresh), 0.7 * B @ A) for c in EQUAL}
        returned = {c: sgd(c, B, A) for c in EQUAL}
        B, A = mean([b for b, _ in returned.values()]), mean([a for _, a in returned.values()])
        models.append(
            torch.cat([0.7 * b @ a + own[c][0] @ own[c][1] if own else b @ a for c, (b, a) in returned.items()])
        )
    return models


@again("fedalt", FedALT(mix=0.6), EQUAL, personal=True)
def fedalt() -> list[Tensor]:
    own = {c: START for c in EQUAL}
    models = []
    for t in (1, 2, 3):
        rows = {}
        for c in EQUAL:
            others = [own[o] for o in EQUAL if o is not c]
            rows[c] = sum(b for b, _ in others) / 2 @ sum(a for _, a in others) / 2 if t > 1 else torch.zeros(1)
        trained = {c: sgd(c, 0.6 * own[c][0], own[c][1], 0.4 * rows[c]) for c in EQUAL}
        models.append(torch.cat([b @ a + 0.4 * rows[c] for c, (b, a) in trained.items()]))
        own = {c: (b / 0.6, a) for c, (b, a) in trained.items()}
    return models


@again("hetlora", HetLoRA(gamma=0.5, regularization=3.0), MIXED)
def hetlora() -> list[Tensor]:
    B, A = torch.zeros(D_OUT, 4, dtype=torch.float64), drawn(4, Round(1, seed=3))
    ranks = {c: c.rank for c in MIXED}
    served = []
    for _ in range(3):
        returned = []
        for client in MIXED:
            r, c = ranks[client], max(1, ranks[client] // 2)

            def tail(b: Tensor, a: Tensor, c: int = c) -> tuple[Tensor, Tensor]:
                """The gradient of 3 |B_c| |A_c|, zero where a norm is."""
                b0, a0 = b.clone(), a.clone()
                b0[:, :c], a0[:c] = 0, 0
                nb, na = b0.norm(), a0.norm()
                return 3 * na * b0 / (nb or 1.0), 3 * nb * a0 / (na or 1.0)

            b, a = sgd(client, B[:, :r], A[:r], more=tail)
            if b[:, c:].norm() * a[c:].norm() < B[:, c:r].norm() * A[c:r].norm():
                b, a, ranks[client] = b[:, :c], a[:c], c
            pad = 4 - b.shape[1]
            returned.append((torch.nn.functional.pad(b, (0, pad)), torch.nn.functional.pad(a, (0, 0, 0, pad))))
        norms = [(b @ a).norm() for b, a in returned]
        B = sum(n * b for n, (b, _) in zip(norms, returned, strict=True)) / sum(norms)
        A = sum(n * a for n, (_, a) in zip(norms, returned, strict=True)) / sum(norms)
        served.append(B @ A)
    assert ranks != {c: c.rank for c in MIXED}, "somebody must have pruned"
    return served


@again("fed_sb", FedSB(), EQUAL)
def fed_sb() -> list[Tensor]:
    generator = Round(0, 3).rng("basis", "w")
    B, A = (torch.linalg.qr(torch.randn(d, 3, generator=generator)).Q.double() for d in (D_OUT, D_IN))
    R = torch.zeros(3, 3, dtype=torch.float64)
    served = []
    for _ in range(3):
        returned = []
        for client in EQUAL:
            X, Y = rows_of(client)
            mine = R
            for _ in range(STEPS):
                mine = mine - RATE * B.T @ ((X @ (B @ mine @ A.T).T - Y).T @ X / len(X)) @ A
            returned.append(mine)
        R = mean(returned)
        served.append(B @ R @ A.T)
    return served


@again("prox of fedit", Prox(FedIT(), 0.7), EQUAL)
def prox() -> list[Tensor]:
    B, A = START
    served = []
    for _ in range(3):
        B0, A0 = B, A
        returned = [sgd(c, B, A, more=lambda b, a, B0=B0, A0=A0: (0.7 * (b - B0), 0.7 * (a - A0))) for c in EQUAL]
        B, A = mean([b for b, _ in returned]), mean([a for _, a in returned])
        served.append(B @ A)
    return served


@again("scaffold of fedit", Scaffold(FedIT()), EQUAL)
def scaffold() -> list[Tensor]:
    x = START
    c: tuple[Tensor | float, ...] = (0.0, 0.0)
    own: dict[Client, tuple[Tensor | float, ...]] = {client: (0.0, 0.0) for client in EQUAL}
    served = []
    for _ in range(3):
        returned, change = {}, {}
        for client in EQUAL:
            drift = tuple(a - b for a, b in zip(c, own[client], strict=True))
            returned[client] = sgd(client, *x, more=lambda b, a, drift=drift: drift)
            after = tuple(
                mine - all_ + (start - end) / (STEPS * RATE)
                for mine, all_, start, end in zip(own[client], c, x, returned[client], strict=True)
            )
            change[client] = tuple(new - old for new, old in zip(after, own[client], strict=True))
            own[client] = after
        x = mean([b for b, _ in returned.values()]), mean([a for _, a in returned.values()])
        c = tuple(one + sum(d[i] for d in change.values()) / 3 for i, one in enumerate(c))
        served.append(x[0] @ x[1])
    return served


def optimized(step: Callable[[Tensor, dict[str, Tensor]], Tensor]) -> list[Tensor]:
    """FedIT whose server steps by ``step(Delta, memory)`` for B and for A."""
    x = list(START)
    memories: list[dict[str, Tensor]] = [{}, {}]
    served = []
    for _ in range(3):
        returned = [sgd(client, *x) for client in EQUAL]
        for i in (0, 1):
            x[i] = x[i] + step(mean([pair[i] - x[i] for pair in returned]), memories[i])
        served.append(x[0] @ x[1])
    return served


@again("avgm of fedit", ServerStep(FedIT(), Server("avgm", beta=0.5)), EQUAL)
def avgm() -> list[Tensor]:
    def step(delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        memory["m"] = 0.5 * memory.get("m", torch.zeros_like(delta)) + delta
        return memory["m"]

    return optimized(step)


@again("adagrad of fedit", ServerStep(FedIT(), Server("adagrad", learning_rate=0.1, tau=0.01)), EQUAL)
def adagrad() -> list[Tensor]:
    def step(delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        memory["v"] = memory.get("v", torch.full_like(delta, 1e-4)) + delta**2
        return 0.1 * delta / (memory["v"] ** 0.5 + 0.01)

    return optimized(step)


def _adam_like(yogi: bool) -> list[Tensor]:
    def step(delta: Tensor, memory: dict[str, Tensor]) -> Tensor:
        v = memory.get("v", torch.full_like(delta, 1e-4))
        memory["m"] = 0.9 * memory.get("m", torch.zeros_like(delta)) + 0.1 * delta
        memory["v"] = v - 0.01 * delta**2 * (v - delta**2).sign() if yogi else 0.99 * v + 0.01 * delta**2
        return 0.1 * memory["m"] / (memory["v"] ** 0.5 + 0.01)

    return optimized(step)


@again("adam of fedit", ServerStep(FedIT(), Server("adam", learning_rate=0.1, tau=0.01)), EQUAL)
def adam() -> list[Tensor]:
    return _adam_like(yogi=False)


@again("yogi of fedit", ServerStep(FedIT(), Server("yogi", learning_rate=0.1, tau=0.01)), EQUAL)
def yogi() -> list[Tensor]:
    return _adam_like(yogi=True)


TOLERANCES = {"fedrot_lora": 1e-5}
"""FedRot-LoRA adds a millionth of the identity before it looks for the rotation."""


@pytest.mark.parametrize("name", AGAIN)
def test_three_rounds_are_those_of_the_paper_s_equations(name: str) -> None:
    rule, clients, personal, written = AGAIN[name]
    given, wanted = ran(rule, clients, personal=personal), written()
    for index in range(3):
        within = TOLERANCES.get(name, 1e-9) * wanted[index].norm()
        assert (given[index] - wanted[index]).norm() <= within, f"round {index + 1}"
    assert (wanted[2] - wanted[1]).norm() > 1e-2 * wanted[2].norm(), "a round must show"


# --- numbers by hand, of one round on a 2 x 2 weight


def outer(b: Sequence[float], a: Sequence[float]) -> LowRank:
    return LowRank(torch.tensor([b]).T, torch.tensor([a]))


def tensor(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def replied(rule: Algorithm, state: Tensors, client: Client, returned: Tensors, rnd: Round) -> Reply:
    return Reply(client, rule.download(state, client, rnd), returned)


def by_hand(rule: Algorithm, returned: Sequence[LowRank], samples: Sequence[int]) -> tuple[Tensors, Tensor]:
    """The state, and what is served of it, after one round in which these products came back."""
    clients = [Client(str(i), n, M.rank) for i, (n, M) in enumerate(zip(samples, returned, strict=True))]
    state = rule.init(Model({"w": torch.empty(2, 2, device="meta")}), clients)
    rnd = Round(1, seed=0)
    replies = [replied(rule, state, c, {"w": M}, rnd) for c, M in zip(clients, returned, strict=True)]
    after = rule.aggregate(state, replies, rnd)
    return after, whole(rule.served(after)["w"]).float()


FIRST, SECOND = outer([4.0, 0.0], [1.0, 0.0]), outer([0.0, 8.0], [0.0, 1.0])
"""With 3 and 1 rows: B = (3, 2), A = (.75, .25), and the products' mean is diag(3, 2)."""


def near(given: Tensor, wanted: Sequence[Sequence[float]]) -> None:
    torch.testing.assert_close(given.float(), tensor(wanted), rtol=1e-5, atol=1e-5)


def one_factor_by_hand(
    rule: Algorithm, state: Tensors, factor: str, values: Sequence[Sequence[float]], index: int
) -> Tensors:
    """The state after a round in which clients with 3 rows and 1 row return these values of one factor."""
    clients = [Client("0", 3, 1), Client("1", 1, 1)]
    rnd = Round(index, seed=0)
    shaped = [torch.tensor([v]).T if factor == "B" else torch.tensor([v]) for v in values]
    replies = [replied(rule, state, c, {f"{factor}/w": v}, rnd) for c, v in zip(clients, shaped, strict=True)]
    return rule.aggregate(state, replies, rnd)


def test_ffa_lora_by_hand() -> None:
    """n = 3 and 1; B = (4, 0) and (0, 8), A = (1, 10): 3/4 (4, 0) + 1/4 (0, 8) = (3, 2), served [[3, 30], [2, 20]]."""
    rule = FFALoRA()
    state = one_factor_by_hand(rule, {"w": outer([0.0, 0.0], [1.0, 10.0])}, "B", [(4.0, 0.0), (0.0, 8.0)], 1)
    near(whole(rule.served(state)["w"]), [[3, 30], [2, 20]])


def test_rolora_by_hand() -> None:
    """Then A_1 = (5, 10) and A_2 = (1, 30): A = (4, 15), served (3, 2)^T (4, 15)."""
    rule = RoLoRA()
    state = one_factor_by_hand(rule, {"w": outer([0.0, 0.0], [1.0, 10.0])}, "B", [(4.0, 0.0), (0.0, 8.0)], 1)
    near(whole(rule.served(state)["w"]), [[3, 30], [2, 20]])
    state = one_factor_by_hand(rule, state, "A", [(5.0, 10.0), (1.0, 30.0)], 2)
    near(whole(rule.served(state)["w"]), [[12, 45], [8, 30]])


def test_fedsvd_by_hand() -> None:
    """B = (3, 4), A = (0, 2): the product [[0, 6], [0, 8]] has S = 10, so B = (6, 8) and A = (0, 1)."""
    state = one_factor_by_hand(FedSVD(), {"w": outer([0.0, 0.0], [0.0, 2.0])}, "B", [(3.0, 4.0), (3.0, 4.0)], 1)
    near(state["w"].B, [[6], [8]])
    near(state["w"].A, [[0, 1]])


def test_fedex_lora_by_hand() -> None:
    """B A = [[2.25, .75], [1.5, .5]] beside the mean diag(3, 2): E = 3/16 (4, -8)^T (1, -1)."""
    state, served = by_hand(FedExLoRA(), [FIRST, SECOND], [3, 1])
    near(whole(state["adapter/w"]), [[2.25, 0.75], [1.5, 0.5]])
    near(whole(state["W/w"]), [[0.75, -0.75], [-1.5, 1.5]])
    near(served, [[3, 0], [0, 2]])


def test_fedmomentum_by_hand() -> None:
    """Squared singular values 9 and 4: the adapter is 3 e1 e1^T, and 2 e2 e2^T joins W unless 9/13 = .692 is enough."""
    state, served = by_hand(FedMomentum(), [FIRST, SECOND], [3, 1])
    near(whole(state["adapter/w"]), [[3, 0], [0, 0]])
    near(whole(state["W/w"]), [[0, 0], [0, 2]])
    near(served, [[3, 0], [0, 2]])
    near(by_hand(FedMomentum(energy=0.69), [FIRST, SECOND], [3, 1])[1], [[3, 0], [0, 0]])


@pytest.mark.parametrize(("threshold", "kept"), [(0.69, 0.0), (0.7, 2.0), (1.0, 2.0)])
def test_florist_by_hand(threshold: float, kept: float) -> None:
    """9/13 = .692 of the energy is in the first direction of diag(3, 2)."""
    near(by_hand(FLoRIST(threshold=threshold), [FIRST, SECOND], [3, 1])[1], [[3, 0], [0, kept]])


TALL, SHORT = LowRank(torch.diag(torch.tensor([2.0, 6.0])), torch.eye(2)), outer([6.0, 0.0], [0.0, 1.0])


def test_rbla_and_raflora_by_hand() -> None:
    """Rank 2 with one row, rank 1 with three: column 2 has one owner, and is not diluted.

    b_1 = (5, 0), a_1 = (.25, .75), b_2 = (0, 6), a_2 = (0, 1); products: 1/4 2 e1 e1^T + 3/4 6 e1 e2^T + 6 e2 e2^T.
    """
    near(by_hand(RBLA(), [TALL, SHORT], [1, 3])[1], [[1.25, 3.75], [0, 6]])
    near(by_hand(RaFLoRA(), [TALL, SHORT], [1, 3])[1], [[0.5, 4.5], [0, 6]])
    near(by_hand(FlexLoRA(), [TALL, SHORT], [1, 3])[1], [[0.5, 4.5], [0, 1.5]])


def test_lora_fair_by_hand() -> None:
    """One step of length 1 from B = (3, 2), then many: cos(diag(3, 2), B' A) rises from .75408 to .79015."""
    one = by_hand(LoRAFAIR(steps=1, learning_rate=1.0), [FIRST, SECOND], [3, 1])[0]["w"]
    torch.testing.assert_close(one.B, torch.tensor([[3.044908], [1.932638]]))
    near(one.A, [[0.75, 0.25]])
    many = by_hand(LoRAFAIR(), [FIRST, SECOND], [3, 1])[0]["w"]
    torch.testing.assert_close(many.B, torch.tensor([[3.270207], [1.510708]]), rtol=1e-5, atol=1e-5)
    S = tensor([[3, 0], [0, 2]])
    cosine = torch.nn.functional.cosine_similarity(S.flatten(), whole(many).float().flatten(), dim=0)
    assert float(cosine) == pytest.approx(0.79015, abs=1e-5)


def test_lora_fair_never_makes_the_cosine_worse() -> None:
    """However long the steps: the best iterate is taken, at worst B itself. Of equal As that is the optimum."""
    rule = LoRAFAIR(steps=5, learning_rate=1e3, regularization=0.0)
    _, served = by_hand(rule, [FIRST, SECOND], [3, 1])
    cosine = torch.nn.functional.cosine_similarity(tensor([[3, 0], [0, 2]]).flatten(), served.flatten(), dim=0)
    assert float(cosine) >= 0.75408 - 1e-5
    near(
        by_hand(LoRAFAIR(), [outer([4.0, 0.0], [1.0, 2.0]), outer([0.0, 8.0], [1.0, 2.0])], [3, 1])[1], [[3, 6], [2, 4]]
    )


@pytest.mark.parametrize(("amount", "served"), [(0.0, (2, 1)), (1.0, (4, 2)), (0.5, (3.414214, 1.707107))])
def test_fedrot_lora_by_hand(amount: float, served: tuple[float, float]) -> None:
    """A_1 = I and A_2 a quarter turn of the same product diag(4, 2): averaged as they come they lose half of it."""
    rule, rnd = FedRotLoRA(amount=amount), Round(3, seed=0)
    clients = [Client("0", 1, 2), Client("1", 1, 2)]
    returned = [
        LowRank(tensor([[4, 0], [0, 2]]), torch.eye(2)),
        LowRank(tensor([[0, -4], [2, 0]]), tensor([[0, 1], [-1, 0]])),
    ]
    state = {"w": LowRank(torch.eye(2), torch.eye(2))}
    replies = [replied(rule, state, c, {"w": M}, rnd) for c, M in zip(clients, returned, strict=True)]
    near(whole(rule.aggregate(state, replies, rnd)["w"]), [[served[0], 0], [0, served[1]]])


def test_fedrot_lora_aligns_best_and_changes_no_product() -> None:
    """The turned A is nearer to what was sent than any other rotation of it, and a half turn does not stop it."""
    generator = torch.Generator().manual_seed(0)
    sent, M = (LowRank(torch.randn(6, 3, generator=generator), torch.randn(3, 5, generator=generator)) for _ in "ab")
    turned = FedRotLoRA(amount=1.0)._turned(M, sent, by_rows=True)
    torch.testing.assert_close(whole(turned), whole(M))
    least = (turned.A - sent.A).norm()
    for _ in range(200):
        R = rotation(torch.randn(3, 3, generator=generator).double()).float()
        assert (R.T @ M.A - sent.A).norm() >= least
    back, forth = LowRank(torch.eye(2), -torch.eye(2)), LowRank(torch.eye(2), torch.eye(2))
    half = FedRotLoRA(amount=0.5)._turned(back, forth, by_rows=True)
    near(half.A, [[1, 0], [0, 1]])


def test_fed_plora_by_hand() -> None:
    """R = 2, b_j = e_j, A = I. K_1 = {1, 2} with three rows and K_2 = {2} with one: b_2 = (3 * 2 + 10) / 4 = 4."""
    rule, clients = FedPLoRA(), [Client("0", 3, 2), Client("1", 1, 1)]
    start = Model({"w": torch.empty(2, 2, device="meta")}, {"w": LowRank(torch.eye(2), torch.eye(2))})
    state = rule.init(start, clients)
    rounds = (Round(index, 0) for index in range(1, 50))
    rnd = next(rnd for rnd in rounds if int(rule.download(state, clients[1], rnd)["chosen"]) == 1)
    returned = [LowRank(torch.diag(torch.tensor([4.0, 2.0])), torch.eye(2)), outer([0.0, 10.0], [0.0, 1.0])]
    replies = [replied(rule, state, c, {"w": M}, rnd) for c, M in zip(clients, returned, strict=True)]
    near(whole(replies[1].sent["frozen/w"]), [[1, 0], [0, 0]])
    near(whole(rule.served(rule.aggregate(state, replies, rnd))["w"]), [[4, 0], [0, 4]])
    alone = rule.aggregate(state, replies[1:], rnd)["adapter/w"]
    assert alone.B[:, 0].tolist() == [1.0, 0.0] and alone.A[0].tolist() == [1.0, 0.0], "nobody drew it"


def test_fedsa_lora_by_hand() -> None:
    """A_1 = (1, 0), A_2 = (0, 1): A = (3/4, 1/4). With B_1 = (4, 0) client 1 sets out from [[3, 1], [0, 0]]."""
    rule = FedSALoRA()
    state = one_factor_by_hand(rule, {"w": outer([0.0, 0.0], [1.0, 1.0])}, "A", [(1.0, 0.0), (0.0, 1.0)], 1)
    near(state["w"].A, [[0.75, 0.25]])
    assert not whole(rule.served(state)["w"]).any()
    reply = replied(rule, state, Client("0", 3, 1), {}, Round(2, 0))
    back = replace(reply, returned=rule.expected(reply))
    near(whole(rule.personal(back, {"B/w": torch.tensor([[4.0], [0.0]])})["w"]), [[3, 1], [0, 0]])
    assert not whole(rule.personal(back, {})["w"]).any(), "a client that never trained has the base model"


def test_fedsa_lora_of_one_client_is_fedit() -> None:
    alone = [Client("only", 7, 3)]
    for given, wanted in zip(ran(FedSALoRA(), alone, personal=True), ran(FedIT(), alone), strict=True):
        assert torch.equal(given, wanted)


def test_feddpa_by_hand() -> None:
    """Own diag(2, 0), global diag(0, 4), half of each: diag(1, 2). The own one is remembered with its half in it."""
    reply = Reply(Client("0", 1, 2), {}, {"w": LowRank(torch.diag(torch.tensor([0.0, 4.0])), torch.eye(2))})
    memory = {"own/w": LowRank(torch.diag(torch.tensor([2.0, 0.0])), torch.eye(2)) * 0.5}
    near(whole(FedDPA(mix=0.5).personal(reply, memory)["w"]), [[1, 0], [0, 2]])


def test_feddpa_serves_what_fedit_serves() -> None:
    """To the bit: the personal adapters touch nothing that travels. With mix 0 nobody has one."""
    for given, wanted in zip(ran(FedDPA(), EQUAL), ran(FedIT(), EQUAL), strict=True):
        assert torch.equal(given, wanted)
    client, sent = EQUAL[0], FedIT().download({"w": LowRank.zeros(D_OUT, D_IN)}, EQUAL[0], Round(1, 0))
    memory: Tensors = {"taken_part": torch.ones(1)}
    assert not any(
        key.startswith("own/") for key in FedDPA(mix=0.0).local(Linear(client), sent, memory, Round(2, 0))[1]
    )
    assert any(key.startswith("own/") for key in FedDPA().local(Linear(client), sent, memory, Round(2, 0))[1])


def test_fedalt_by_hand() -> None:
    """The others returned B (2, 0) and (0, 4), A (1, 0) and (0, 1): their row is (1, 2)^T (.5, .5)."""
    rule, clients = FedALT(), [Client(id, 1, 1) for id in ("x", "y/z", "z")]
    state = rule.init(Model({"w": torch.empty(2, 2, device="meta")}), clients)
    assert whole(rule.download(state, clients[0], Round(1, 0))["frozen/w"]).tolist() == [[0, 0], [0, 0]]
    back = [replied(rule, state, c, {"w": M}, Round(1, 0)) for c, M in zip(clients[1:], OTHERS, strict=True)]
    after = rule.aggregate(state, back, Round(1, 0))
    near(whole(rule.download(after, clients[0], Round(2, 0))["frozen/w"]), [[0.5, 0.5], [1, 1]])
    near(whole(rule.download(after, clients[1], Round(2, 0))["frozen/w"]), whole(OTHERS[1]).tolist())
    near(whole(rule.download(after, clients[1], Round(2, 0))["adapter/w"]), whole(OTHERS[0]).tolist())


OTHERS = [outer([2.0, 0.0], [1.0, 0.0]), outer([0.0, 4.0], [0.0, 1.0])]


def test_fedalt_with_all_weight_on_the_own_adapter_is_training_alone() -> None:
    for given, client in zip(ran(FedALT(mix=1.0), EQUAL, personal=True)[2].split(D_OUT), EQUAL, strict=True):
        alone = ran(FedIT(), [client])[2]
        assert (given - alone).norm() <= 1e-9 * alone.norm()


def test_hetlora_by_hand() -> None:
    """Rank 2, c = 1: a tail of 2 * 1 as received. 1 * 1.5 after training is less: it prunes; 2 * 1 is not."""
    rule, client = HetLoRA(gamma=0.5), Client("0", 4, 2)
    sent = {"w": LowRank(torch.diag(torch.tensor([3.0, 2.0])), torch.eye(2))}

    class Returns(Linear):
        tail = 1.5

        def fit(self, request: LocalTraining) -> LocalResult:
            assert request.product_penalty is not None
            assert float(request.product_penalty(sent)) == pytest.approx(0.01 * 2)
            B = torch.diag(torch.tensor([3.0, 1.0]))
            return LocalResult({"w": LowRank(B, torch.diag(torch.tensor([1.0, self.tail])))}, {}, {})

    pruned = rule.local(Returns(client), sent, {}, Round(1, 0)).returned["w"]
    near(pruned.B, [[3, 0], [0, 0]])
    Returns.tail = 2.0
    near(rule.local(Returns(client), sent, {}, Round(1, 0)).returned["w"].A, [[1, 0], [0, 2]])
    state = rule.aggregate(sent, [Reply(client, sent, {"w": pruned})], Round(1, 0))
    assert int(state["rank/0"]) == 1 and rule.download(state, client, Round(2, 0))["w"].rank == 1
    assert rule.download(state, Client("1", 4, 2), Round(2, 0))["w"].rank == 2
    assert rule.truncated(state, client) == 0.0
    assert int(rule.aggregate(state, [Reply(client, sent, sent)], Round(2, 0))["rank/0"]) == 1, "it never grows"


def test_fed_sb_by_hand() -> None:
    """n = 3 and 1, R_1 = [[4, 0], [0, 0]], R_2 = [[0, 0], [8, 0]]: R = [[3, 0], [2, 0]] between the seed's B and A."""
    rule, clients = FedSB(), [Client("0", 3, 2), Client("1", 1, 2)]
    start = rule.init(Model({"w": torch.empty(2, 2, device="meta")}), clients)
    values = [tensor([[4, 0], [0, 0]]), tensor([[0, 0], [8, 0]])]
    replies = [replied(rule, start, c, {"R/w": R}, Round(1, 5)) for c, R in zip(clients, values, strict=True)]
    after = rule.aggregate(start, replies, Round(1, 5))
    near(after["R/w"], [[3, 0], [2, 0]])
    one = {"R/w": torch.eye(2)}
    frames = rule.trained(replace(replies[0], returned=one))["w"]
    torch.testing.assert_close(frames.B.T @ frames.B, torch.eye(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(frames.A @ frames.A.T, torch.eye(2), atol=1e-6, rtol=0)
    near(whole(rule.served(after)["w"]), (frames.B @ tensor([[3, 0], [2, 0]]) @ frames.A).tolist())
    assert not whole(rule.served(start)["w"]).any()
    assert {key for key in replies[0].sent} == {"R/w", "shape/w", "seed"}


# --- compositions, by hand


def stepped(server: Server, x: float, ys: Sequence[Sequence[float]]) -> list[float]:
    """A network of one weight, after each round in which clients with equal rows returned these values."""
    rule = ServerStep(FedAvg(), server)
    clients = [Client(str(i), 1) for i in range(len(ys[0]))]
    state = rule.init(Model({"w": torch.tensor([x], dtype=torch.float64)}), clients)
    values = []
    for index, row in enumerate(ys, start=1):
        rnd = Round(index, 0)
        returned = [torch.tensor([y], dtype=torch.float64) for y in row]
        replies = [replied(rule, state, c, {"w": y}, rnd) for c, y in zip(clients, returned, strict=True)]
        state = rule.aggregate(state, replies, rnd)
        values.append(float(rule.served(state)["w"]))
    return values


def test_server_steps_by_hand() -> None:
    """x = 1, y = 1.4 and 1.2: Delta = .3. avgm: 1.3, then with Delta = .2 m = .47 and x = 1.77."""
    assert stepped(Server("avgm"), 1.0, [[1.4, 1.2], [1.5, 1.5]]) == pytest.approx([1.3, 1.77])
    assert stepped(Server("adam", 0.5, tau=0.1), 1.0, [[1.4, 1.2]]) == pytest.approx([1.073557], abs=1e-6)
    assert stepped(Server("adagrad", 0.5, tau=0.1), 1.0, [[1.4, 1.2]]) == pytest.approx([1.360380], abs=1e-6)
    v = 0.01 + 0.01 * 0.09  # .01 - .01 * .09 * sign(.01 - .09)
    after = 1 + 0.5 * 0.03 / (v**0.5 + 0.1)
    assert stepped(Server("yogi", 0.5, tau=0.1), 1.0, [[1.4, 1.2]]) == pytest.approx([after])


def test_statistics_of_norms_are_averaged_and_not_stepped() -> None:
    """An Adam step of a running variance could make it negative; a counter is nobody's update."""
    rule, client = ServerStep(FedAvg(), Server("adam", 10.0)), Client("0", 1)
    weights = {"n.running_var": torch.tensor([1.0]), "n.count": torch.tensor(3), "w": torch.tensor([1.0])}
    state = rule.init(Model(weights), [client])
    returned = {"n.running_var": torch.tensor([0.5]), "n.count": torch.tensor(4), "w": torch.tensor([0.5])}
    after = rule.served(rule.aggregate(state, [replied(rule, state, client, returned, Round(1, 0))], Round(1, 0)))
    assert (float(after["n.running_var"]), int(after["n.count"])) == (0.5, 4) and float(after["w"]) < -5


def test_scaffold_by_hand() -> None:
    """x = 1, g = 2, c = .5, c_i = 1, eta = .1, K = 2: y = .7, c_i' = 1 - .5 + .3 / .2 = 2; N = 4, alone: c = .75."""

    class Slope(ClientWorker):
        client = Client("0", 1)
        steps = 2  # type: ignore[assignment]

        def rate(self, rnd: Round) -> float:
            return 0.1

        def fit(self, request: LocalTraining) -> LocalResult:
            w = request.weights["w"]
            for _ in range(2):
                w = w - 0.1 * (2 + request.drift["w"])
            return LocalResult({"w": w}, {}, {"steps": 2.0})

    rule, clients = Scaffold(FedAvg()), [Client(str(i), 1) for i in range(4)]
    state = {**rule.init(Model({"w": torch.tensor([1.0])}), clients), "scaffold/w": torch.tensor([0.5])}
    sent = rule.download(state, clients[0], Round(2, 0))
    done = rule.local(Slope(), sent, {"scaffold/w": torch.tensor([1.0])}, Round(2, 0))
    assert done.returned["w"].item() == pytest.approx(0.7) and done.memory["scaffold/w"].item() == pytest.approx(2.0)
    reply = Reply(clients[0], sent, done.returned)
    assert rule.expected(reply).keys() == done.returned.keys()
    after = rule.aggregate(state, [reply], Round(2, 0))
    assert after["scaffold/w"].item() == pytest.approx(0.75) and rule.served(after)["w"].item() == pytest.approx(0.7)


def test_scaffold_s_variates_sum_up() -> None:
    """All take part: c is the mean of the c_i in every round."""
    rule = Scaffold(FedIT())
    state = rule.init(Model({"w": torch.empty(D_OUT, D_IN, device="meta")}), EQUAL)
    memories: dict[str, Tensors] = {client.id: {} for client in EQUAL}
    for index in (1, 2, 3):
        rnd, replies = Round(index, 3), []
        for client in EQUAL:
            sent = rule.download(state, client, rnd)
            done = rule.local(Linear(client), sent, memories[client.id], rnd)
            memories[client.id] = done.memory
            replies.append(Reply(client, sent, done.returned))
        state = rule.aggregate(state, replies, rnd)
        own = torch.stack([memories[client.id]["scaffold/B/w"] for client in EQUAL])
        torch.testing.assert_close(state["scaffold/B/w"], own.mean(0))
        assert own.norm() > 0


PLAIN = [FedIT(), FedLoRAAvg(), FFALoRA(), RoLoRA(), FedSB(), FedDPA()]


@pytest.mark.parametrize("rule", PLAIN, ids=lambda rule: type(rule).__name__)
def test_neutral_compositions_are_the_rule(rule: Algorithm) -> None:
    """avgm without momentum to rounding; prox with mu 0 to the bit; and scaffold's first round."""
    wanted = ran(rule, EQUAL)
    for given, want in zip(ran(ServerStep(rule, Server("avgm", beta=0.0)), EQUAL), wanted, strict=True):
        assert (given - want).norm() <= 1e-6 * want.norm()
    for given, want in zip(ran(Prox(rule, 0.0), EQUAL), wanted, strict=True):
        assert torch.equal(given, want)
    if not isinstance(rule, FedSB):  # whose worker trains a product of another name
        assert torch.equal(ran(Scaffold(rule), EQUAL, 1)[0], wanted[0])


@pytest.mark.parametrize(("name", "kind"), LOW_RANK.items())
def test_prox_goes_around_every_rule_and_the_others_around_plain_means(name: str, kind: type[Algorithm]) -> None:
    """What refactorises, rotates, stacks or resets is refused in one sentence, and so is one around the other."""
    rule = kind()
    assert rule.plain_mean is (type(rule) in {type(r) for r in [*PLAIN, FedSALoRA()]})
    Prox(rule).validate([Client("0", 1, 2)])
    for around in (ServerStep(rule, Server("adam")), Scaffold(rule), ServerStep(Prox(rule), Server("avgm"))):
        if rule.plain_mean:
            around.validate([Client("0", 1, 2)])
        else:
            with pytest.raises(FedError, match=rf"(server.step|local.name)=.*{kind.__name__}\)? is no entrywise mean"):
                around.validate([Client("0", 1, 2)])
    with pytest.raises(FedError, match=r"Scaffold\(FedIT\) is no entrywise mean"):
        ServerStep(Scaffold(FedIT()), Server("adam")).validate([Client("0", 1, 2)])


# --- reductions: constants under which a rule is another one


@pytest.mark.parametrize(
    ("rule", "base", "clients"),
    [
        (RBLA(), FedIT(), EQUAL),
        (RaFLoRA(), FlexLoRA(), EQUAL),
        (FLoRIST(threshold=1.0), FLoRA(), MIXED),
        (FedSVD(period=None), FFALoRA(), EQUAL),
        (LoRAFAIR(steps=0), FedIT(), EQUAL),
        (FedRotLoRA(amount=0.0), FedIT(), EQUAL),
        (FedPLoRA(), FedIT(), EQUAL),
        (HetLoRA(gamma=1.0, regularization=0.0), ZeroPadding(weights="norm"), MIXED),
        (FedSVD(period=9), FFALoRA(), EQUAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Algorithm) else "",
)
def test_a_neutral_constant_gives_the_base_rule(rule: Algorithm, base: Algorithm, clients: Sequence[Client]) -> None:
    for given, wanted in zip(ran(rule, clients), ran(base, clients), strict=True):
        assert (given - wanted).norm() <= 1e-6 * wanted.norm()


def test_one_client_alone_is_fedit() -> None:
    """Nothing is averaged, so nothing has to be put right."""
    alone = [Client("only", 7, 3)]
    for rule in (FedExLoRA(), RBLA()):
        for given, wanted in zip(ran(rule, alone), ran(FedIT(), alone), strict=True):
            assert (given - wanted).norm() <= 1e-9 * wanted.norm()


def test_the_first_round_of_rolora_is_ffa_lora_s() -> None:
    assert torch.equal(ran(RoLoRA(), EQUAL, 1)[0], ran(FFALoRA(), EQUAL, 1)[0])


def test_exact_rules_serve_the_mean_of_the_products_in_round_one() -> None:
    """FLoRA's sum, from nothing; FedEx-LoRA and FedMomentum by what joins the base."""
    wanted = ran(FLoRA(), EQUAL, 1)[0]
    for rule in (FedExLoRA(), FedMomentum(energy=1.0), FLoRIST(threshold=1.0), RaFLoRA(), FlexLoRA()):
        assert (ran(rule, EQUAL, 1)[0] - wanted).norm() <= 1e-6 * wanted.norm()


def test_a_stays_to_the_bit_in_ffa_lora_and_its_rows_are_orthonormal_in_fedsvd() -> None:
    for rule in (FFALoRA(), FedSVD()):
        state: Tensors = rule.init(Model({"w": torch.empty(D_OUT, D_IN, device="meta")}), EQUAL)
        for index in (1, 2, 3):
            rnd = Round(index, seed=3)
            replies = []
            for client in EQUAL:
                sent = rule.download(state, client, rnd)
                replies.append(Reply(client, sent, rule.local(Linear(client), sent, {}, rnd)[0]))
            state = rule.aggregate(state, replies, rnd)
            if isinstance(rule, FedSVD):
                torch.testing.assert_close(state["w"].A @ state["w"].A.T, torch.eye(3).to(state["w"].A))
            else:
                assert torch.equal(state["w"].A.double(), START[1])


def test_fedsvd_of_null_directions_keeps_them_trainable() -> None:
    """B = 0: rows of A are orthonormal all the same."""
    state = one_factor_by_hand(FedSVD(), {"w": outer([0.0, 0.0], [3.0, 4.0])}, "B", [(0.0, 0.0), (0.0, 0.0)], 1)
    torch.testing.assert_close(state["w"].A @ state["w"].A.T, torch.eye(1))
    assert not state["w"].B.any()


def test_fedex_lora_s_residual_may_be_cut() -> None:
    """E has rank 1 here, so rank 1 changes nothing and rank 0 is FedIT."""
    near(by_hand(FedExLoRA(residual_rank=1), [FIRST, SECOND], [3, 1])[1], [[3, 0], [0, 2]])
    near(by_hand(FedExLoRA(residual_rank=0), [FIRST, SECOND], [3, 1])[1], [[2.25, 0.75], [1.5, 0.5]])


@pytest.mark.parametrize(
    "rule", [FFALoRA(), RoLoRA(), FedSVD(), FedExLoRA(), FedMomentum()], ids=lambda r: type(r).__name__
)
def test_rules_of_one_rank_say_so(rule: Algorithm) -> None:
    with pytest.raises(FedError, match=r"one rank, and these have \[2, 3, 4\]"):
        rule.validate(MIXED)


@pytest.mark.parametrize("rule", [RBLA(), RaFLoRA()], ids=lambda r: type(r).__name__)
def test_a_column_that_nobody_of_the_cohort_has_stays(rule: Algorithm) -> None:
    """The client of rank 4 is not drawn: the fourth direction keeps what it had."""
    start = {"w": LowRank(torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 0.0, 0.0]))[:, :4], torch.eye(4, D_IN))}
    state = rule.init(Model({"w": torch.empty(D_OUT, D_IN, device="meta")}, start), MIXED)
    rnd = Round(1, seed=0)
    replies = []
    for client in MIXED[:2]:
        sent = rule.download(state, client, rnd)
        replies.append(Reply(client, sent, {"w": LowRank(sent["w"].B * 2, sent["w"].A)}))
    given = whole(rule.served(rule.aggregate(state, replies, rnd))["w"])
    near(given[:4, :4], torch.diag(torch.tensor([10.0, 8.0, 6.0, 2.0])).tolist())
