"""What a round costs the server at Llama-2-7B size, against dense SVD and against PEFT, in one process.

    python benchmarks/server.py --modules 64 --threads 2 --spectrum decaying --out results/server.json

All 64 target modules of Llama-2-7B (q_proj and v_proj, 32 layers) are 4096 x 4096, and a round treats them one after
the other. The cohort is FedHL's, ten clients of the high profile. Timed are aggregating and re-ranking for all ten:

- round 1, from W = 0: every module by FedHL's own hooks; the alternatives on ``--sample`` modules, scaled to all;
- round 20: ``--sample`` modules that have lived through all the rounds before, scaled to all.

The alternatives: (a) rebuild every client's update densely, sum, one ``torch.linalg.svd``, cut for every rank;
(b) PEFT's ``add_weighted_adapter(combination_type="svd")`` at the largest rank, cut for the others (round 1 only: from
round 2 on FedHL's W is no adapter of PEFT's). Both get one SVD for all ten clients; code that runs one for each client
pays ten. The server's third part, the round's telemetry, is timed by itself.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fedllm.algorithms.lora.fedhl import FedHL
from fedllm.core import Client, Model, Reply, Round, Tensors
from fedllm.lowrank import LowRank
from fedllm.server.telemetry import MODULES, measure

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
CLIENTS = [Client(f"client{i}", 100, r) for i, r in enumerate(RANKS)]
SERVED = sorted(set(RANKS), reverse=True)
NAME = "proj"


@dataclass
class Cost:
    """Wall time in seconds, and the most memory in bytes that was held beyond what was there at the start."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured(every: float = 0.002) -> Iterator[Cost]:
    """Fills the cost it yields; memory is the process's resident set, looked at ``every`` so many seconds."""
    process, cost, over = psutil.Process(), Cost(), threading.Event()
    before = process.memory_info().rss

    def watch() -> None:
        while not over.wait(every):
            cost.peak_bytes = max(cost.peak_bytes, process.memory_info().rss - before)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        over.set()
        watcher.join()


def trained(sent: LowRank, spectrum: str, generator: torch.Generator) -> LowRank:
    """What a client makes of what it was sent: both factors move, in direction ``j`` by ``1/j`` or by 1."""
    (d_out, d_in), r = sent.shape, sent.rank
    move = 1 / torch.arange(1, r + 1) if spectrum == "decaying" else torch.ones(r)
    B = sent.B + torch.randn(d_out, r, generator=generator) * move * d_out**-0.5
    A = sent.A + torch.randn(r, d_in, generator=generator) * move[:, None] * d_in**-0.5
    return LowRank(B, A)


def cohort(rule: FedHL, state: Tensors, rnd: Round, spectrum: str) -> list[Reply]:
    """A reply from each client, trained on this state's download."""
    replies = []
    for client in CLIENTS:
        sent = rule.download(state, client, rnd)
        returned = trained(factors(sent), spectrum, rnd.rng("trained", client.id))
        replies.append(Reply(client, sent, {NAME: returned}))
    return replies


def by_hooks(rule: FedHL, state: Tensors, replies: Sequence[Reply], rnd: Round) -> tuple[Tensors, dict[int, LowRank]]:
    """Our server: the next state, and what each rank is sent of it."""
    after = rule.aggregate(state, replies, rnd)
    return after, {r: factors(rule.download(after, Client("", 1, r), rnd)) for r in SERVED}


def by_dense(W: Tensor, replies: Sequence[Reply], p: Mapping[str, float]) -> dict[int, LowRank]:
    """(a): every update rebuilt, one full SVD, cut for every rank."""
    for reply in replies:
        W = W + p[reply.client.id] * (factors(reply.returned).dense() - factors(reply.sent).dense())
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    root = S.sqrt()
    return {r: LowRank(U[:, :r] * root[:r], root[:r, None] * Vh[:r]) for r in SERVED}


def by_peft(replies: Sequence[Reply], p: Mapping[str, float]) -> Callable[[], dict[int, LowRank]]:
    """(b): a model of one linear layer that holds all the adapters; the merge is what the callable does."""
    d_out, d_in = factors(replies[0].returned).shape
    base = torch.nn.Module()
    base.add_module(NAME, torch.nn.Linear(d_in, d_out, bias=False))
    ids = [reply.client.id for reply in replies]
    configs = [LoraConfig(r=x.client.rank, lora_alpha=x.client.rank, target_modules=[NAME]) for x in replies]
    model: Any = get_peft_model(base, configs[0], adapter_name=ids[0])
    for name, config in zip(ids[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model.get_submodule(NAME)
    with torch.no_grad():
        for reply in replies:
            layer.lora_A[reply.client.id].weight.copy_(factors(reply.returned).A)
            layer.lora_B[reply.client.id].weight.copy_(factors(reply.returned).B)

    def merge() -> dict[int, LowRank]:
        weights = [p[name] for name in ids]
        model.add_weighted_adapter(ids, weights, "sum", "svd", svd_rank=SERVED[0], svd_full_matrices=False)
        B, A = layer.lora_B["sum"].weight.detach(), layer.lora_A["sum"].weight.detach()
        B = B * layer.scaling["sum"]
        return {r: LowRank(B[:, :r], A[:r]) for r in SERVED}

    return merge


def factors(tensors: Tensors) -> LowRank:
    """The module's update; clients never hold a dense one."""
    M = tensors[NAME]
    if not isinstance(M, LowRank):
        raise TypeError(f"an adapter is a product, and this is {type(M).__name__}.")
    return M


def exact(W: Tensor | LowRank, replies: Sequence[Reply], p: Mapping[str, float]) -> dict[int, Tensor]:
    """The best approximations, in float64; by a stack and QR where W is 0, by a full SVD where it is dense."""
    terms = [(w * p[x.client.id], factors(M)) for x in replies for w, M in ((1.0, x.returned), (-1.0, x.sent))]
    B = torch.cat([w * M.B.double() for w, M in terms], dim=1)
    A = torch.cat([M.A.double() for _, M in terms])
    if isinstance(W, LowRank) and W.rank == 0 and B.shape[1] < B.shape[0]:
        (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(B), torch.linalg.qr(A.T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        U, Vh = Q_B @ U, Vh @ Q_A.T
    else:
        U, S, Vh = torch.linalg.svd(as_dense(W).double() + B @ A, full_matrices=False)
    return {r: (U[:, :r] * S[:r]) @ Vh[:r] for r in SERVED}


def as_dense(W: Tensor | LowRank) -> Tensor:
    return W.dense() if isinstance(W, LowRank) else W


def worst(served: Mapping[int, LowRank], truth: Mapping[int, Tensor]) -> float:
    """The largest relative error, in the Frobenius norm, over the served ranks."""
    return max(float((served[r].dense().double() - W).norm() / W.norm()) for r, W in truth.items())


def flops(d: int, k: int, rank: int, kept: int, dense: bool) -> float:
    """The least a server must do for a module.

    As a product: two thin QRs (``2 m r^2 - 2/3 r^3`` each, and as much for Q), ``22 r^3`` for the core's SVD, and two
    products with the core's vectors. Dense: adding the update, and one pass of W and of its transpose over ``kept``
    vectors: a warm start that was already right would still have to be looked at.
    """
    if dense:
        return 2.0 * d * k * rank + 4.0 * d * k * kept
    qr = sum(2 * (2 * m * rank**2 - 2 / 3 * rank**3) for m in (d, k))
    return qr + 22 * rank**3 + 2.0 * (d + k) * rank * rank


def rates(size: int) -> tuple[float, float]:
    """What this machine does here: float32 multiply-adds of a matrix product in flop/s, and a copy in bytes/s."""
    X, Y = torch.randn(size, size), torch.randn(size, 160)
    Z = torch.empty_like(X)

    def best(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return 2 * X.numel() * 160 / best(lambda: X @ Y), 2 * X.nbytes / best(lambda: Z.copy_(X))


@dataclass
class Result:
    """One line of the table. ``seconds`` are of all modules; ``measured`` of them were run, the rest is arithmetic.

    ``telemetry_seconds`` come on top: the round's telemetry, which looks at ``MODULES`` modules at most.
    """

    round: int
    who: str
    seconds: float
    modules: int
    measured: int
    peak_bytes: int
    error: float
    floor_seconds: float | None = None
    ratio: float | None = None
    telemetry_seconds: float | None = None
    note: str = ""

    def line(self) -> str:
        ratio = "" if self.ratio is None else f"{self.ratio:9.1f} x ours"
        floor = "" if self.floor_seconds is None else f"floor {self.floor_seconds:.3g} s"
        sampled = "" if self.measured == self.modules else f"[{self.measured} of {self.modules} modules run, scaled]"
        return (
            f"round {self.round:2d}  {self.who:18s} {self.seconds:10.2f} s  peak {self.peak_bytes / 2**20:7.0f} MiB  "
            f"error {self.error:.1e}  {ratio}{floor} {self.note} {sampled}"
        )


@dataclass
class Setting:
    """What was asked for."""

    modules: int
    sample: int
    size: int
    rounds: int
    threads: int
    spectrum: str
    rates: tuple[float, float] = field(default=(0.0, 0.0))

    def floor(self, rank: int, dense: bool) -> float:
        """Seconds for all modules: the larger of the arithmetic and the traffic at the rates measured here."""
        d = k = self.size
        numbers = 2 * d * k + d * k if dense else 2 * (d + k) * rank  # read twice and written; read and written
        return self.modules * max(flops(d, k, rank, SERVED[0], dense) / self.rates[0], 4 * numbers / self.rates[1])

    def result(self, index: int, who: str, costs: Sequence[Cost], error: float, **rest: Any) -> Result:
        seconds = sum(cost.seconds for cost in costs) * self.modules / len(costs)
        peak = max(cost.peak_bytes for cost in costs)
        return Result(index, who, seconds, self.modules, len(costs), peak, error, **rest)


def beginning(rule: FedHL, size: int) -> Tensors:
    """The state before round 1 of one module."""
    return rule.init(Model({NAME: torch.empty(size, size, device="meta")}), CLIENTS)


def compared(ask: Setting, index: int, lives: Sequence[Tensors], ours_on: int, peft: bool) -> list[Result]:
    """Round ``index`` from each module's state in ``lives``; the alternatives take the first ``ask.sample`` of them."""
    rule, ours, telemetry, dense, merged = FedHL(), [], [], [], []
    errors: dict[str, float] = {"ours": 0.0, "dense": 0.0, "peft": 0.0}
    stored = rank = 0
    for module in range(ours_on):
        state, rnd = lives[module % len(lives)], Round(index, seed=module)
        replies = cohort(rule, state, rnd, ask.spectrum)
        with measured() as cost:
            after, served = by_hooks(rule, state, replies, rnd)
        ours.append(cost)
        with measured() as cost:
            measure(rule, state, after, replies)
        telemetry.append(cost)
        stored = sum(T.B.nbytes + T.A.nbytes if isinstance(T, LowRank) else T.nbytes for T in after.values())
        if module >= ask.sample:
            continue
        p, W = rule.shares(state, replies), state[f"W/{NAME}"]
        truth = exact(W, replies, p)
        errors["ours"] = max(errors["ours"], worst(served, truth))
        start = as_dense(W)
        with measured() as cost:
            served = by_dense(start, replies, p)
        dense.append(cost)
        errors["dense"] = max(errors["dense"], worst(served, truth))
        if peft:
            merge = by_peft(replies, p)
            with measured() as cost:
                served = merge()
            merged.append(cost)
            errors["peft"] = max(errors["peft"], worst(served, truth))
        rank = sum(RANKS)
    is_dense = isinstance(lives[0][f"W/{NAME}"], Tensor)
    note = f"state {stored / 2**20:.0f} MiB a module"
    lines = [ask.result(index, "ours", ours, errors["ours"], floor_seconds=ask.floor(rank, is_dense), note=note)]
    lines.append(ask.result(index, "(a) dense svd", dense, errors["dense"]))
    if peft:
        lines.append(ask.result(index, "(b) peft svd", merged, errors["peft"]))
    for line in lines[1:]:
        line.ratio = line.seconds / lines[0].seconds
    lines[0].note += f", {lines[0].seconds / (lines[0].floor_seconds or 1):.1f} x the floor"
    looked_at = min(ask.modules, MODULES) / len(telemetry)
    lines[0].telemetry_seconds = looked_at * sum(cost.seconds for cost in telemetry)
    lines[0].note += f", telemetry {lines[0].telemetry_seconds:.2g} s more"
    return lines


def lived(ask: Setting, module: int) -> tuple[Tensors, list[dict[str, float]]]:
    """One module's state before the last round, and what each round before it took."""
    rule, life = FedHL(), []
    state = beginning(rule, ask.size)
    for index in range(1, ask.rounds):
        rnd = Round(index, seed=module)
        replies = cohort(rule, state, rnd, ask.spectrum)
        with measured() as cost:
            state, _ = by_hooks(rule, state, replies, rnd)
        W = state[f"W/{NAME}"]
        rank = W.rank if isinstance(W, LowRank) else -1
        life.append({"round": index, "seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "rank": rank})
    return state, life


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", type=int, default=64, help="target modules of the model")
    parser.add_argument("--sample", type=int, default=1, help="modules on which the alternatives and round 20 are run")
    parser.add_argument("--size", type=int, default=4096, help="d_out = d_in of a module")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--spectrum", choices=["decaying", "flat"], default="decaying")
    parser.add_argument("--out", type=Path, help="where to write the same as JSON")
    args = vars(parser.parse_args())
    out = args.pop("out")
    ask = Setting(**args)
    torch.set_num_threads(ask.threads)
    torch.linalg.svd(torch.linalg.qr(torch.randn(640, 160)).R)  # LAPACK's first call is slow, for whoever makes it
    ask.rates = rates(ask.size)
    print(
        f"{ask.modules} modules {ask.size} x {ask.size}, ranks {RANKS}, {ask.spectrum} spectrum, {ask.threads} threads,"
    )
    print(f"here {ask.rates[0] / 1e9:.0f} Gflop/s in a matrix product, {ask.rates[1] / 1e9:.1f} GB/s in a copy")

    results = compared(ask, 1, [beginning(FedHL(), ask.size)], ask.modules, peft=True)
    print("\n".join(line.line() for line in results), flush=True)
    lives = [lived(ask, module) for module in range(ask.sample)]
    for row in lives[0][1]:
        stored = "dense" if row["rank"] < 0 else f"rank {row['rank']}"
        print(f"  round {row['round']:2.0f} of module 0: {row['seconds']:6.2f} s, then {stored}")
    late = compared(ask, ask.rounds, [state for state, _ in lives], ask.sample, peft=False)
    print("\n".join(line.line() for line in late), flush=True)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        lines = [vars(line) for line in results + late]
        out.write_text(
            json.dumps({"setting": vars(ask), "results": lines, "life": [life for _, life in lives]}, indent=1)
        )


if __name__ == "__main__":
    main()
