"""One reply of four is hostile: is it refused, remarked on, or does it not matter?

    OMP_NUM_THREADS=1 python benchmarks/admission.py

Two honest rounds, then one with a liar, for every rule and every kind of reply. Clients take random steps instead of
training, so that a run takes milliseconds. A reply counts as silent where it is neither refused nor remarked on and
moves what is served by three honest rounds or more, changes the state's dtype, or spoils the round's record.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fedllm.algorithms import ALGORITHMS, LOW_RANK
from fedllm.core import Algorithm, Client, ClientResult, Job, Model, Reply, Round, Tensors, Worker
from fedllm.federation.build import build_federation
from fedllm.lowrank import LowRank
from fedllm.progress import Silent
from fedllm.recipe import page as recipes
from fedllm.rounds import Outcome, federate

RULES = (
    "fedit", "zero_padding", "flexlora", "flora", "fedhl", "fedlora_avg", "fedloru", "pfedloru", "mfedloru",
    "fedavg", "fedlmt", "fedhm", "heterofl", "lg_fedavg",
)  # fmt: skip

LIAR, LAST = "c1", 3

Change = Callable[[Tensors, Tensors], Any]
"""What the liar returns, of what it was to return without training and of an honest update."""


def each(change: Callable[[Any, Any], Any]) -> Change:
    """The same for every name, of the start and the honest end."""
    return lambda begun, honest: {name: change(begun[name], honest[name]) for name in honest}


def factors(change: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor] | None = None) -> Change:
    """Changes B (or a plain floating tensor), and A."""
    other = other or change

    def of(begun: Any, M: Any) -> Any:
        return LowRank(change(M.B), other(M.A)) if isinstance(M, LowRank) else change(M) if M.is_floating_point() else M

    return each(of)


def stepped(times: float) -> Change:
    """The honest step so many times."""

    def along(begun: Tensor, end: Tensor) -> Tensor:
        return begun + times * (end - begun) if end.is_floating_point() else end

    def of(begun: Any, end: Any) -> Any:
        if isinstance(end, LowRank):
            return LowRank(along(begun.B, end.B), along(begun.A, end.A))
        return along(begun, end)

    return each(of)


def regauged(gauge: float, modules: int | None = None) -> Change:
    """Factors of the same products, of other sizes; with ``modules`` of the first ones alone.

    Of a rule whose factors travel under names of their own, ``B/name`` and ``A/name``, those.
    """

    def of(begun: Tensors, honest: Tensors) -> dict[str, Any]:
        changed = dict(honest)
        for name in list(honest)[:modules]:
            M = honest[name]
            if isinstance(M, LowRank):
                changed[name] = LowRank(M.B * gauge, M.A / gauge)
            elif name.startswith(("B/", "A/")):
                changed[name] = M * gauge if name.startswith("B/") else M / gauge
        return changed

    return of


def first(change: Callable[[Any], Any]) -> Change:
    """One module alone."""
    return lambda begun, honest: {**honest, next(iter(honest)): change(honest[next(iter(honest))])}


def spoiled(value: float) -> Change:
    def one(tensor: Tensor) -> Tensor:
        flat = tensor.clone().reshape(-1)
        flat[0] = value
        return flat.reshape(tensor.shape)

    return first(lambda M: LowRank(one(M.B), M.A) if isinstance(M, LowRank) else one(M))


def renamed(names: Callable[[Sequence[str]], Sequence[str]]) -> Change:
    return lambda begun, honest: dict(zip(names(list(honest)), honest.values(), strict=True))


def _wider(M: Any) -> Any:
    if isinstance(M, LowRank):
        return LowRank(torch.cat([M.B, M.B[:, :1]], dim=1), torch.cat([M.A, M.A[:1]]))
    return torch.cat([M, M[:1]])


def _cut(M: Any) -> Any:
    return LowRank(M.B[:, :0], M.A[:0]) if isinstance(M, LowRank) else M[:0]


def _last_bit(begun: Any, M: Any) -> Any:
    return LowRank(M.B * (1 + 2**-23), M.A) if isinstance(M, LowRank) else M


UPDATES: dict[str, Change] = {
    **{f"times {t:g}": stepped(t) for t in (0, -1, 2, 4, 9, 12, 30, 100, 1e3, 1e6, 1e12, 1e18, 1e30, -4, -100)},
    **{f"regauged {g:g}": regauged(g) for g in (0.1, 2, 10, 30, 100, 1e3, 1e6, 1e9, 1e15, 1e-6)},
    "regauged 1e6, one module": regauged(1e6, 1),
    "regauged 1e18": regauged(1e18),
    "A of 1e15 beside B of 0": factors(torch.zeros_like, lambda A: A * 1e15),
    "B of 1e15 beside A of 0": factors(lambda B: B * 1e15, torch.zeros_like),
    "B of 1e6": factors(lambda B: B * 1e6, lambda A: A),
    "A of 1e3": factors(lambda B: B, lambda A: A * 1e3),
    "signs turned": factors(torch.neg),
    "columns turned": factors(lambda B: B.flip(-1), lambda A: A.flip(0)),
    **{f"one {v}": spoiled(v) for v in (math.nan, math.inf, -math.inf, 3e38)},
    "all nan": factors(lambda F: F * math.nan),
    **{f"dtype {str(d)[6:]}": factors(lambda F, d=d: F.to(d)) for d in (
        torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64,
        torch.int64, torch.int8, torch.bool,
    )},
    "B of float64 beside A of float16": factors(torch.Tensor.double, torch.Tensor.half),
    "sparse": factors(lambda F: F.to_sparse()),
    "meta": factors(lambda F: F.to("meta")),
    "graph": factors(lambda F: F.clone().requires_grad_()),
    "a row more": each(lambda begun, M: _wider(M)),
    "one row more": first(_wider),
    "rank 0": each(lambda begun, M: _cut(M)),
    "nothing": lambda begun, honest: {},
    "one missing": lambda begun, honest: dict(list(honest.items())[1:]),
    "one extra": lambda begun, honest: {**honest, "extra": torch.ones(2)},
    "path as a name": renamed(lambda names: ["../../evil", *names[1:]]),
    "names permuted": renamed(lambda names: [*names[1:], names[0]]),
    "none": lambda begun, honest: None,
    "a list": lambda begun, honest: list(honest.values()),
    "arrays": lambda begun, honest: {name: [1.0] for name in honest},
    "texts": lambda begun, honest: dict.fromkeys(honest, "x"),
    "zeros": factors(torch.zeros_like),
    "minus zeros": factors(lambda F: -torch.zeros_like(F)),
    "denormals": factors(lambda F: F * 0 + 1e-42),
    "as sent": stepped(0.0),
    "last bit moved": each(_last_bit),
    "noise of the same size": factors(lambda F: F[torch.randperm(len(F), generator=torch.Generator().manual_seed(0))]),
}  # fmt: skip

TOLD: dict[str, Callable[[Reply], Reply]] = {
    **{
        f"metric {name}": functools.partial(lambda reply, metrics: replace(reply, metrics=metrics), metrics=metrics)
        for name, metrics in {
            "nan": {"train_loss": math.nan},
            "1e308": {"train_loss": 1e308},
            "text": {"train_loss": "low"},
            "none": {"train_loss": None},
            "tensor": {"train_loss": torch.ones(2)},
            "object": {"train_loss": object()},
            "of 20 MB": {"note": "x" * 20_000_000},
            "seconds nan": {"train_loss": 1.0, "seconds": math.nan},
            "rank and rows": {"train_loss": 1.0, "rank": 10**9, "rows": -5, "digest": 7, "bytes_up": 0},
            "bool": {"train_loss": True},
            "number as a name": {3: 1.0},
        }.items()
    },
    "rows of 1e18": lambda reply: replace(reply, client=replace(reply.client, num_samples=10**18)),
    "rows below 0": lambda reply: replace(
        reply, client=replace(reply.client, num_samples=-3 * reply.client.num_samples)
    ),
    "no rows": lambda reply: replace(reply, client=replace(reply.client, num_samples=0)),
    "another rank": lambda reply: replace(reply, client=replace(reply.client, rank=64)),
    "another's id": lambda reply: replace(reply, client=replace(reply.client, id="c2")),
    "an unknown id": lambda reply: replace(reply, client=replace(reply.client, id="../../evil")),
    "something else as sent": lambda reply: replace(reply, sent={}),
}

KINDS = (*UPDATES, *TOLD)


@dataclass(frozen=True)
class Steps:
    """A fleet whose clients take a random step each; one of them lies in the last round."""

    kind: str | None
    last: int

    def run(self, algorithm: Algorithm, worker: Worker, jobs: Sequence[Job], rnd: Round) -> Iterator[ClientResult]:
        for job in jobs:
            reply = Reply(job.client, job.sent, {}, {"train_loss": 1.0, "seconds": 1.0, "steps": 1.0})
            begun = algorithm.expected(reply)
            reply = replace(reply, returned=_trained(begun, rnd, job.client.id))
            if job.client.id == LIAR and rnd.index == self.last and self.kind is not None:
                if self.kind in UPDATES:
                    reply = replace(reply, returned=UPDATES[self.kind](begun, reply.returned))
                else:
                    reply = TOLD[self.kind](reply)
            yield ClientResult(reply, {})


def _trained(begun: Tensors, rnd: Round, id: str) -> dict[str, Any]:
    """Steps that all clients share in half, as those of one task do."""

    def step(value: Tensor, key: str, size: float) -> Tensor:
        if not value.is_floating_point():
            return value.clone()
        common = torch.randn(value.shape, generator=rnd.rng("common", key))
        return value + size * (common + torch.randn(value.shape, generator=rnd.rng(id, key)))

    return {
        name: LowRank(step(M.B, f"B{name}", 0.02), step(M.A, f"A{name}", 0.01))
        if isinstance(M, LowRank)
        else step(M, name, 0.01)
        for name, M in begun.items()
    }


@dataclass(frozen=True)
class Idle:
    """A worker of which nothing is asked."""

    steps: int = 1

    def of(self, client: Client) -> Idle:
        return self


@functools.cache
def setting(rule: str) -> tuple[Algorithm, Model, tuple[Client, ...]]:
    """The rule, a small model for it, and four clients."""
    if rule in LOW_RANK:
        shapes = {"q": (24, 16), "k": (16, 16), "v": (16, 24)}
        model = Model({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
        return LOW_RANK[rule](), model, tuple(Client(f"c{i}", 10 + i, 4) for i in range(4))
    options = {
        "fedhm": ["algorithm.rho=1", "algorithm.alpha=0.4"],
        "fedlmt": ["algorithm.rho=1", "algorithm.alpha=0.4"],
    }
    recipe = recipes.load(["recipe=vision_smoke", f"algorithm.name={rule}", *options.get(rule, [])])
    return (
        recipe.algorithm,
        build_federation(recipe).model,
        tuple(Client(f"c{i}", 10 + i, level="b4") for i in range(4)),
    )


@functools.cache
def beginning(rule: str) -> Sequence[Outcome]:
    """Two honest rounds."""
    algorithm, model, clients = setting(rule)
    return list(_rounds(rule, None, 1, algorithm.init(model, clients), []))


def _rounds(rule: str, kind: str | None, first: int, state: Tensors, records: Sequence[Any]) -> Iterator[Outcome]:
    algorithm, _, clients = setting(rule)
    return federate(
        algorithm, clients, Idle(), Steps(kind, LAST), Silent(),
        state=state, memories={}, first=first, rounds=max(first, LAST - 1), seed=0, records=records,
    )  # type: ignore[arg-type]  # fmt: skip


@functools.cache
def third(rule: str, kind: str | None) -> Outcome:
    """The round after those."""
    before = beginning(rule)
    (outcome,) = _rounds(rule, kind, LAST, before[-1].state, [each.record for each in before])
    return outcome


@dataclass(frozen=True)
class Found:
    """What became of one hostile reply.

    Args:
        noticed: refused or remarked on.
        moved: what is served, in honest rounds, from where it would be without the lie.
        broken: what is wrong with the state or the record.
        ended: the exception that ended the run.
    """

    noticed: bool = False
    moved: float = 0.0
    broken: str = ""
    ended: str = ""

    @property
    def silent(self) -> bool:
        return bool(self.broken) or not self.noticed and not self.moved < 3


def attacked(rule: str, kind: str) -> Found:
    served, before, good = setting(rule)[0].served, beginning(rule)[-1], third(rule, None)
    try:
        last = third(rule, kind)
    except Exception as error:
        return Found(ended=f"{type(error).__name__}: {error}")
    honest_round = _distance(served(before.state), served(good.state))
    moved = _distance(served(good.state), served(last.state)) / honest_round
    record = last.record
    noticed = bool(record["refused"] or record["suspect"])
    return Found(noticed, moved, _broken(record, good.state, last.state, setting(rule)[2]))


def _broken(record: Mapping[str, Any], good: Tensors, state: Tensors, clients: Sequence[Client]) -> str:
    try:
        text = json.dumps(record, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"the record: {error}"
    if len(text) > 100_000:
        return f"the record takes {len(text)} characters"
    rows = {client.id: (client.num_samples, client.rank) for client in clients}
    if any(rows.get(id) != (each["rows"], each["rank"]) for id, each in record["clients"].items()):
        return "the record's ids, rows or ranks are the client's own"
    usual = {tensor.dtype for value in good.values() for tensor in _parts(value)}
    for name, value in state.items():
        if any(tensor.dtype not in usual or tensor.requires_grad for tensor in _parts(value)):
            return f"the state: {name} is of another dtype, or has a graph"
    return "" if state.keys() == good.keys() else "the state's names"


def _parts(value: Any) -> tuple[Tensor, ...]:
    return (value.B, value.A) if isinstance(value, LowRank) else (value,)


def _distance(left: Tensors, right: Tensors) -> float:
    squares = 0.0
    for name, value in left.items():
        a, b = (each.dense() if isinstance(each, LowRank) else each for each in (value, right[name]))
        if a.is_floating_point():
            squares += float((a.double() - b.double()).square().sum())
    return math.sqrt(squares)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", default=RULES)
    rules = parser.parse_args().rules
    totals: Counter[str] = Counter()
    for rule in rules:
        assert rule in ALGORITHMS, rule
        found = {kind: attacked(rule, kind) for kind in KINDS}
        counts = Counter(
            "ended" if f.ended else "silent" if f.silent else "noticed" if f.noticed else "harmless"
            for f in found.values()
        )
        totals += counts
        worst = max((f.moved for f in found.values() if not f.noticed), default=0.0)
        print(f"{rule:12} {len(found):3} replies: {dict(counts)}; the most in silence: {worst:.2f} honest rounds")
        for kind, f in found.items():
            if f.ended or f.silent:
                print(f"   {kind}: {f.ended or f.broken or f'moved {f.moved:.3g} honest rounds in silence'}")
    print(f"{len(rules)} rules x {len(KINDS)} replies: {dict(totals)}")


if __name__ == "__main__":
    main()
