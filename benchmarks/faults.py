"""What each rule does about each fault: the tables of docs/faults.md.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --write docs/faults.md

One of five clients is faulty in every round: the one with the largest rank but one. The language model is the random
two-layer ``pico`` of the tests, the networks are a few thousand weights wide and the rows are generated, so a score
says only how far a fault pushes a run away from the run without faults; it says nothing about how good a rule is.
"""

from __future__ import annotations

import argparse
import functools
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm.algorithms import ALGORITHMS, LOW_RANK, PRIVATE, WHOLE
from fedllm.core import Algorithm, Tensors
from fedllm.errors import FedError
from fedllm.federation.build import build_federation
from fedllm.fleets.faults import Faults
from fedllm.fleets.local import Local
from fedllm.lowrank import LowRank
from fedllm.models.libraries import quiet_libraries
from fedllm.progress import Silent
from fedllm.recipe import page as recipes
from fedllm.rounds import Policy, federate, own_scores
from fedllm.server.robust import Clip, Krum, Median, TrimmedMean

RULES = ("fedit", "zero_padding", "flexlora", "flora", "fedhl")
"""Those of the table of guards."""

ONE_RANK = {"fedit", "fedlora_avg", "fedloru", "pfedloru"}
FAULTS = ("none", "drop", "straggle", "nan", "zeros", "huge", "stale", "wrong_rank")
GUARDS: dict[str, Policy] = {
    "none": Policy(),
    "norm_bound 5": Policy(norm_bound=5.0),
    "clip": Policy(robust=Clip()),
    "krum": Policy(robust=Krum(keep=3)),
    "median": Policy(robust=Median()),
    "trimmed mean": Policy(robust=TrimmedMean(0.25)),
}
FAULTY, ROUNDS = "c1", 2  # the second round is the first in which an update can be stale
BASE = [
    "recipe=smoke", f"run.rounds={ROUNDS}", "run.threads=1", "data.difficulty=[easy]", "data.train_rows=80",
    "data.test_rows=16", "worker.steps=3", "worker.batch_size=2", "eval.generate=false",
]  # fmt: skip


NETWORKS = [
    "recipe=vision_smoke", f"run.rounds={ROUNDS}", "run.threads=1", "data.side=8", "data.train_rows=320",
    "data.test_rows=100", "clients.count=5", "clients.participation=1.0", "worker.score=pooled",
    "worker.learning_rate=0.05",
]  # fmt: skip
WIDE = ["model={name: resnet18, widths: [8, 8, 8, 8]}"]  # has every rule's variant
OWN = ["model={name: cnn5, own: [cnn5, cnn4]}", "clients.levels=[]"]


@dataclass(frozen=True)
class Result:
    """How a run ended: its score, whether every state was finite, and what was said of the faulty client."""

    score: float
    finite: bool
    said: str
    bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="put the tables between this page's markers")
    given = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    texts = {rule: adapters(rule) for rule in LOW_RANK}
    nets = {rule: networks(rule, WIDE) for rule in WHOLE} | {rule: networks(rule, OWN) for rule in PRIVATE}
    tables = {
        "rules": by_rule(texts),
        "networks": by_rule(nets),
        "words": in_words(texts["fedhl"]),
        "guards": by_guard(texts),
    }
    for name, table in tables.items():
        print(table, end="\n\n")
        if given.write:
            page = given.write.read_text()
            marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
            part = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
            given.write.write_text(part.sub(lambda _, t=table, m=marks: f"{m[0]}\n{t}\n{m[1]}", page))
    return 0


@dataclass(frozen=True)
class Bench:
    """A rule with its clients and a model in memory, and the metric to tell."""

    algorithm: Algorithm
    federation: Any
    worker: Any
    metric: str

    def run(self, kind: str, policy: Policy) -> Result:
        faults = Faults() if kind == "none" else Faults(**{kind: 1.0}, clients=(FAULTY,))  # type: ignore[arg-type]
        state, said = self.algorithm.init(self.federation.model, self.federation.clients), ""
        loop = federate(
            self.algorithm, self.federation.clients, self.worker, faults.around(Local(Silent())), Silent(),
            state=state, memories={}, first=1, rounds=ROUNDS, seed=0, policy=policy,
        )  # fmt: skip
        good, records = True, []
        try:
            for outcome in loop:
                state, records = outcome.state, [*records, outcome.record]
                said, good = heard(outcome.record) or said, good and finite(state)
        except FedError as error:
            said = f"the run ended: {error}"
        print(".", end="", file=sys.stderr, flush=True)
        metrics = self.worker.evaluate(self.algorithm.served(state)).metrics | own_scores(records)
        return Result(
            metrics.get(self.metric, metrics.get(f"own_{self.metric}", math.nan)),
            good,
            said,
            sum(r["bytes_up"] for r in records),
        )


@functools.cache
def loaded(*arguments: str) -> tuple[Any, Any]:
    """The federation of a page and its worker; rules that need the same share them."""
    recipe = recipes.load(arguments)
    federation = build_federation(recipe)
    return federation, federation.worker(lambda loss: None)


def adapters(rule: str) -> Bench:
    """A rule on adapters of the pico model."""
    mixed = rule not in ONE_RANK
    ranks = "[16,8,8,4,2]" if mixed else "[8,8,8,8,8]"
    federation, worker = loaded(*BASE, f"algorithm.name={'fedhl' if mixed else 'fedit'}", f"clients.rank={ranks}")
    return Bench(ALGORITHMS[rule](), federation, worker, "loss")


def networks(rule: str, model: Sequence[str]) -> Bench:
    """A rule on small networks."""
    algorithm = ALGORITHMS[rule]()
    federation, worker = loaded(*NETWORKS, *model, f"algorithm={{name: {rule}}}")
    return Bench(algorithm, federation, worker, "loss")


def heard(record: dict[str, Any]) -> str:
    """What the last round's record says of the faulty client."""
    parts = [(key, record[key].get(FAULTY)) for key in ("refused", "suspect", "robust")]
    return " ".join(f"{key}: {sentence}" for key, sentence in parts if sentence)


def finite(state: Tensors) -> bool:
    tensors = [t for value in state.values() for t in ((value.B, value.A) if isinstance(value, LowRank) else (value,))]
    return all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors)


def by_rule(benches: dict[str, Bench]) -> str:
    """Every rule and every fault, without a guard; a deadline of half an hour, which only a straggler misses."""
    rows = [["rule", *FAULTS, "finite", "remarks"]]
    for rule, bench in benches.items():
        results = {kind: bench.run(kind, Policy(deadline=1800.0)) for kind in FAULTS}
        silent = [kind for kind in FAULTS if kind != "none" and not results[kind].said]
        finite = "yes" if all(result.finite for result in results.values()) else "NO"
        words = "nothing travels that could be spoilt" if silent else ""
        if silent and results["none"].bytes:
            raise SystemExit(f"{rule}: {', '.join(silent)} goes unnoticed")
        rows.append([f"`{rule}`", *(number(results[kind]) for kind in FAULTS), finite, words])
    return table(rows)


def in_words(bench: Bench) -> str:
    """What is said of the faulty client."""
    said = {kind: bench.run(kind, Policy(deadline=1800.0)).said for kind in FAULTS if kind != "none"}
    return table([["fault", "word"], *([kind, words] for kind, words in said.items())])


def by_guard(benches: dict[str, Bench]) -> str:
    """A huge update against each guard."""
    rows = [["guard", *RULES]]
    for name, policy in GUARDS.items():
        rows.append([name, *(number(benches[rule].run("huge", policy)) for rule in RULES)])
    return table(rows)


def number(result: Result) -> str:
    return f"{result.score:.3f}" if math.isfinite(result.score) and result.score < 100 else f"{result.score:.2g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    sys.exit(main())
