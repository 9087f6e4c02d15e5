"""What each rule does about each fault: the tables of docs/faults.md.

    OMP_NUM_THREADS=1 python benchmarks/faults.py --write docs/faults.md

One of five clients is faulty in every round: the one with the largest rank but one. The model is the random two-layer
``pico`` of the tests and the rows are generated, so a score says only how far a fault pushes a run away from the run
without faults; it says nothing about how good a rule is. Held-out loss, in nats a token.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedllm import recipe as recipes
from fedllm.core import Algorithm, FedError, Tensors
from fedllm.faults import Faults
from fedllm.fleets.local import Local
from fedllm.lowrank import LowRank
from fedllm.progress import Silent
from fedllm.robust import Clip, Krum, Median, TrimmedMean
from fedllm.rounds import Policy, federate
from fedllm.train import hush

RULES = ("fedit", "zero_padding", "flexlora", "flora", "fedhl")
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


@dataclass(frozen=True)
class Result:
    """How a run ended: its loss, whether every state was finite, and what was said of the faulty client."""

    loss: float
    finite: bool
    said: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="put the tables between this page's markers")
    given = parser.parse_args()
    hush()
    torch.set_num_threads(1)
    benches = {rule: Bench(rule) for rule in ("fedit", "fedhl")}  # a worker for equal ranks, and one for mixed ones
    tables = {"rules": by_rule(benches), "guards": by_guard(benches)}
    for name, table in tables.items():
        print(table, end="\n\n")
        if given.write:
            page = given.write.read_text()
            marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
            part = re.compile(f"{re.escape(marks[0])}.*?{re.escape(marks[1])}", re.DOTALL)
            given.write.write_text(part.sub(lambda _, t=table, m=marks: f"{m[0]}\n{t}\n{m[1]}", page))
    return 0


class Bench:
    """One model in memory, and any rule on it."""

    def __init__(self, rule: str) -> None:
        ranks = "[8,8,8,8,8]" if rule == "fedit" else "[16,8,8,4,2]"
        self.recipe = recipes.load([*BASE, f"algorithm={{name: {rule}}}", f"clients.rank={ranks}"])
        self.federation = self.recipe.worker.federation(self.recipe)
        self.worker = self.federation.worker(lambda loss: None)

    def run(self, rule: str, kind: str, policy: Policy) -> Result:
        algorithm: Algorithm = recipes.ALGORITHMS[rule]()
        faults = Faults() if kind == "none" else Faults(**{kind: 1.0}, clients=(FAULTY,))  # type: ignore[arg-type]
        state, said = algorithm.init(self.federation.model, self.federation.clients), ""
        loop = federate(
            algorithm, self.federation.clients, self.worker, faults.around(Local(Silent())), Silent(), state=state,
            memories={}, first=1, rounds=ROUNDS, seed=0, policy=policy,
        )  # fmt: skip
        good = True
        try:
            for outcome in loop:
                print(".", end="", file=sys.stderr, flush=True)
                state, said = outcome.state, heard(outcome.record)
                good = good and finite(state)
        except FedError as error:
            said = f"the run ended: {error}"
        score = self.worker.evaluate(algorithm.served(state))
        return Result(score.metrics["loss"], good, said)


def heard(record: dict[str, Any]) -> str:
    """What the last round's record says of the faulty client."""
    parts = [(key, record[key].get(FAULTY)) for key in ("refused", "suspect", "robust")]
    return " ".join(f"{key}: {sentence}" for key, sentence in parts if sentence)


def finite(state: Tensors) -> bool:
    tensors = [t for value in state.values() for t in ((value.B, value.A) if isinstance(value, LowRank) else (value,))]
    return all(bool(torch.isfinite(tensor.double()).all()) for tensor in tensors)


def bench_of(rule: str, benches: dict[str, Bench]) -> Bench:
    return benches.get(rule, benches["fedhl"])


def by_rule(benches: dict[str, Bench]) -> str:
    """Every rule and every fault, without a guard; a deadline of half an hour, which only a straggler misses."""
    rows = [["fault", *RULES, "finite", "what `rounds.jsonl` says of the client (fedhl)"]]
    for kind in FAULTS:
        results = [bench_of(rule, benches).run(rule, kind, Policy(deadline=1800.0)) for rule in RULES]
        said = {rule: result.said for rule, result in zip(RULES, results, strict=True)}
        silent = [rule for rule in RULES if not said[rule]]
        if kind != "none" and silent:
            raise SystemExit(f"{kind} goes unnoticed under {', '.join(silent)}")
        finite = "yes" if all(result.finite for result in results) else "NO"
        rows.append([kind, *(loss(result) for result in results), finite, said["fedhl"] or "nothing"])
    return table(rows)


def by_guard(benches: dict[str, Bench]) -> str:
    """A huge update against each guard."""
    rows = [["guard", *RULES]]
    for name, policy in GUARDS.items():
        rows.append([name, *(loss(bench_of(rule, benches).run(rule, "huge", policy)) for rule in RULES)])
    return table(rows)


def loss(result: Result) -> str:
    return f"{result.loss:.3f}" if math.isfinite(result.loss) and result.loss < 100 else f"{result.loss:.2g}"


def table(rows: Sequence[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


if __name__ == "__main__":
    sys.exit(main())
