"""The FedLoRU family: what adds up, what travels, what a client remembers, and what its models compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fedllm.algorithms.lora.fedloru import FedLoRAAvg, FedLoRU, added, arrived
from fedllm.algorithms.lora.mfedloru import MFedLoRU
from fedllm.algorithms.lora.pfedloru import PFedLoRU
from fedllm.core import Client, Model, Reply, Round, Tensors, under, within
from fedllm.data.encoding import encode
from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.models.language import LanguageModel, load, skeleton, source, tokenizer
from fedllm.wire.serialization import canonical, flatten, size, unflatten
from fedllm.workers.lora import target_shapes
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker

SHAPES = {"q": (40, 30), "v": (24, 30)}
CLIENTS = [Client("a", 30, 3), Client("b", 10, 3), Client("c", 20, 3)]
SEED = 5


class Drift:
    """A worker that adds its own noise to what it is given, and notes on what base it did so."""

    def __init__(self, client: Client, log: dict[str, Any] | None = None) -> None:
        self.client, self.log = client, {} if log is None else log

    def train(
        self,
        adapter: Tensors,
        memory: Tensors,
        rnd: Round,
        frozen: Tensors | None = None,
        nested: Tensors | None = None,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> tuple[Tensors, Tensors, dict[str, float]]:
        self.log.setdefault(self.client.id, []).append({"frozen": frozen, "adapter": adapter, "memory": memory})
        rng = rnd.rng("drift", self.client.num_samples, part)
        moved = {
            name: LowRank(
                M.B + 0.1 * torch.randn(M.B.shape, generator=rng), M.A + 0.1 * torch.randn(M.A.shape, generator=rng)
            )
            for name, M in (nested or adapter).items()
        }
        return moved, {"moment": torch.tensor(float(rnd.index))}, {"train_loss": 1.0, "steps": 2.0}

    def score(self, update: Tensors) -> dict[str, float]:
        return {"norm": sum(float(M.norm()) for M in update.values())}


def model(update: Tensors | None = None) -> Model:
    return Model({name: torch.empty(*shape, device="meta") for name, shape in SHAPES.items()}, update or {})


class Run:
    """A federation that keeps what a run keeps: state, memories, and every reply of the last round."""

    def __init__(self, rule: FedLoRU, clients: list[Client] = CLIENTS, update: Tensors | None = None) -> None:
        self.rule, self.clients = rule, clients
        self.state: Tensors = canonical(rule.init(model(update), clients))
        self.memories: dict[str, Tensors] = {}
        self.replies: list[Reply] = []
        self.log: dict[str, Any] = {}
        self.index = 0

    def round(self, *ids: str, lost: tuple[str, ...] = ()) -> Run:
        """One round of these clients, or of all; replies of ``lost`` never arrive, though those clients trained."""
        self.index += 1
        rnd = Round(self.index, SEED)
        self.replies = []
        for client in self.clients:
            if ids and client.id not in ids:
                continue
            sent = canonical(self.rule.download(self.state, client, rnd))
            worker = Drift(client, self.log)
            returned, memory, metrics = self.rule.local(worker, sent, self.memories.get(client.id, {}), rnd)
            self.memories[client.id] = canonical(memory)
            if client.id not in lost:
                self.replies.append(Reply(client, sent, canonical(returned), metrics))
        self.state = canonical(self.rule.aggregate(self.state, self.replies, rnd))
        return self

    def rounds(self, count: int) -> Run:
        for _ in range(count):
            self.round()
        return self

    def served(self) -> dict[str, Tensor]:
        return dense(self.rule.served(self.state))


def dense(tensors: Tensors) -> dict[str, Tensor]:
    return {name: M.dense() if isinstance(M, LowRank) else M for name, M in tensors.items()}


def close(given: Tensors, wanted: Tensors, relative: float = 1e-5) -> None:
    given, wanted = dense(given), dense(wanted)
    assert given.keys() == wanted.keys()
    for name, matrix in wanted.items():
        assert float((given[name] - matrix).norm()) <= relative * float(matrix.norm()), name


# --- what adds up


def test_without_an_accumulation_it_is_fedlora() -> None:
    """tau beyond the run's end: to the bit what FedLoRA serves, through four rounds."""
    fedlora = FedLoRAAvg()
    state = canonical(fedlora.init(model(), CLIENTS))
    run = Run(FedLoRU(tau=99))
    for index in range(1, 5):
        rnd = Round(index, SEED)
        replies = []
        for client in CLIENTS:
            sent = canonical(fedlora.download(state, client, rnd))
            returned, _, _ = Drift(client).train(sent, {}, rnd)
            replies.append(Reply(client, sent, canonical(returned)))
        state = canonical(fedlora.aggregate(state, replies, rnd))
        run.round()
        served = run.served()
        assert all(torch.equal(served[name], M.dense()) for name, M in state.items())


@pytest.mark.parametrize("reset", ["random", "momentum"])
def test_what_is_served_is_added_up_every_tau_rounds(reset: Any) -> None:
    """tau = 2: W changes as rounds 3 and 5 begin, by the adapters of rounds 2 and 4, and by nothing else."""
    run = Run(FedLoRU(tau=2, reset=reset))
    wanted = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for index in range(1, 6):
        before = dense(within("adapter", run.state))
        run.round()
        if index in (3, 5):
            wanted = {name: W + before[name] for name, W in wanted.items()}
        close(within("W", run.state), wanted, 1e-6)
        adapters = dense(within("adapter", run.state))
        close(run.rule.served(run.state), {name: W + adapters[name] for name, W in wanted.items()}, 1e-6)
    assert all(int(torch.linalg.matrix_rank(W)) == 6 for W in wanted.values()), "two adapters of rank 3 add up to 6"


def test_a_reset_is_random_or_keeps_the_adapters() -> None:
    run = Run(FedLoRU(tau=2)).rounds(2)
    rnd = Round(3, SEED)
    before = within("adapter", run.state)
    fresh = arrived(run.rule.download(run.state, CLIENTS[0], rnd))
    kept = arrived(FedLoRU(tau=2, reset="momentum").download(run.state, CLIENTS[0], rnd))
    for name, M in before.items():
        assert not fresh[name].B.any() and fresh[name].rank == 3 and bool((fresh[name].A != 0).any(dim=1).all())
        assert not torch.equal(fresh[name].A, M.A)
        assert torch.equal(kept[name].B, M.B) and torch.equal(kept[name].A, M.A)


def test_by_hand() -> None:
    """Rank 1, tau = 1, rows 1 and 3. Round 1 returns (1, 0)(2, 0) and (0, 1)(0, 4): B = (1/4, 3/4), A = (1/2, 3).

    Served: B A = [[1/8, 3/4], [3/8, 9/4]]. Round 2 starts from W = B A and a new adapter, both clients return
    (1, 1)(1, 1), so [[9/8, 7/4], [11/8, 13/4]] is served.
    """
    rule, clients = FedLoRU(tau=1), [Client("a", 1, 1), Client("b", 3, 1)]
    state = rule.init(Model({"w": torch.empty(2, 2, device="meta")}), clients)
    rounds = [
        [([1.0, 0.0], [2.0, 0.0]), ([0.0, 1.0], [0.0, 4.0])],
        [([1.0, 1.0], [1.0, 1.0])] * 2,
    ]
    for index, factors in enumerate(rounds, 1):
        rnd = Round(index, SEED)
        returned = [{"w": LowRank(torch.tensor([b]).T, torch.tensor([a]))} for b, a in factors]
        replies = [Reply(c, rule.download(state, c, rnd), r) for c, r in zip(clients, returned, strict=True)]
        state = rule.aggregate(state, replies, rnd)
    torch.testing.assert_close(
        dense(rule.served(state))["w"], torch.tensor([[9 / 8, 7 / 4], [11 / 8, 13 / 4]]), rtol=1e-6, atol=0
    )


def test_other_tensors_are_averaged_and_never_added_up() -> None:
    """A norm's weight beside the products, as a network's would be: p = (1/4, 3/4) of (0, 4) is 3, in every round."""
    rule, clients = FedLoRU(tau=1), [Client("a", 1, 1), Client("b", 3, 1)]
    state = {**rule.init(Model({"w": torch.empty(2, 2, device="meta")}), clients), "adapter/norm": torch.zeros(1)}
    for index in (1, 2, 3):
        rnd = Round(index, SEED)
        replies = []
        for client, value in zip(clients, (0.0, 4.0), strict=True):
            sent = rule.download(state, client, rnd)
            assert float(sent["adapter/norm"]) == (0.0 if index == 1 else 3.0)
            returned = {**arrived(sent), "norm": torch.tensor([value])}
            replies.append(Reply(client, sent, returned))
        state = rule.aggregate(state, replies, rnd)
        assert float(rule.served(state)["norm"]) == 3.0


# --- what travels, and what clients remember


@pytest.mark.parametrize(
    "rule", [FedLoRU(tau=2), PFedLoRU(tau=2), MFedLoRU(tau=2)], ids=lambda rule: type(rule).__name__
)
def test_every_client_trains_on_the_server_s_w_whoever_came_when(rule: FedLoRU) -> None:
    """Clients come and go, miss accumulations, join late: what they hold is the server's W, also once it is dense."""
    run = Run(rule)
    cohorts = ["ab", "a", "abc", "b", "a", "a", "ac", "b", "abc", "c", "abc", "a", "abc"] + ["abc"] * 6
    kinds = set()
    for cohort in cohorts:
        run.round(*cohort)
        W = within("W", run.state)
        kinds |= {type(M) for M in W.values()}
        for id in cohort:
            held = within("W", run.memories[id])
            if run.index > 2:
                close(held, W, 1e-5)
            assert run.memories[id]["held"] == (run.index - 1) // 2
    assert kinds == {LowRank, Tensor}


def test_the_worker_trains_on_top_of_w() -> None:
    run = Run(FedLoRU(tau=2)).rounds(2)
    first = run.served()
    run.round()
    assert run.log["a"][0]["frozen"] == {} and run.log["a"][1]["frozen"] == {}
    close(run.log["a"][2]["frozen"], first, 1e-6)


@pytest.mark.parametrize("reset", ["random", "momentum"])
def test_bytes_are_the_adapters_alone(reset: Any) -> None:
    """To the byte, safetensors' own header included: W itself never travels to a client that has been there.

    As a round begins with an accumulation the last adapter is sent: as what the client lacks of W, with a seed and a
    rank for the new one (two numbers a module), or as what it goes on from too.
    """
    run = Run(FedLoRU(tau=3, reset=reset))
    for index in range(1, 11):
        run.round()
        for reply in run.replies:
            adapters = under("adapter", arrived(reply.sent))
            assert size(reply.returned) == size(arrived(reply.sent))
            if reset == "random" and index in (4, 7, 10):
                sent = flatten(reply.sent)
                assert {key.rpartition("/")[0] for key in sent} == {"adapter", "drawn", f"increment/{index // 3}"}
                floats = sum(t.numel() for t in sent.values() if t.is_floating_point())
                assert floats == sum(t.numel() for t in flatten(adapters).values())
                assert sum(t.numel() for key, t in sent.items() if key.startswith("drawn/")) == 2 * len(adapters)
            else:
                assert size(reply.sent) == size(adapters)


def test_a_lost_reply_does_not_count_an_increment_twice() -> None:
    """b is sent an increment and remembers it, its reply is lost, so the server sends it again."""
    run = Run(FedLoRU(tau=1)).round().round(lost=("b",)).round()
    again = [key for key in run.replies[1].sent if key.startswith("increment/")]
    assert run.replies[1].client.id == "b" and sorted(again) == [
        f"increment/{k}/{n}" for k in (1, 2) for n in ("q", "v")
    ]
    close(within("W", run.memories["b"]), within("W", run.state), 1e-6)


def test_a_client_whose_memory_is_lost_says_so() -> None:
    """It would otherwise train on the base model alone, and nobody would know."""
    for ran in (3, 4):  # with an increment on its way, and without one
        run = Run(FedLoRU(tau=2)).rounds(ran)
        run.memories.pop("b")
        with pytest.raises(FedError, match=r"0 of \d accumulations of q .*memory was lost"):
            run.rounds(2)


def test_an_update_of_an_earlier_run_travels_once() -> None:
    earlier = {name: LowRank(torch.ones(d, 5), torch.ones(5, k)) for name, (d, k) in SHAPES.items()}
    run = Run(FedLoRU(tau=9), update=earlier).round()
    assert [key for key in run.replies[0].sent if key.startswith("W/")] == ["W/q", "W/v"]
    close(run.log["a"][0]["frozen"], earlier, 0)
    assert not [key for key in run.round().replies[0].sent if not key.startswith("adapter/")]
    close(run.log["a"][1]["frozen"], earlier, 0)


def test_moments_go_with_the_adapters_they_belong_to() -> None:
    """A random reset leaves nothing that AdamW's moments would fit; with momentum they stay."""
    for reset, kept in (("random", {}), ("momentum", {"moment": torch.tensor(2.0)})):
        run = Run(FedLoRU(tau=2, reset=reset)).rounds(3)  # type: ignore[arg-type]
        memories = [call["memory"] for call in run.log["a"]]
        assert memories == [{}, {"moment": torch.tensor(1.0)}, kept]


def test_state_and_memories_survive_a_file() -> None:
    """Saved and loaded between any two rounds, the run is the same to the bit."""
    for rule in (FedLoRU(tau=2), PFedLoRU(tau=2), MFedLoRU(tau=2)):
        straight, broken = Run(rule), Run(rule)
        for _ in range(7):
            straight.round()
            broken.state = unflatten(flatten(broken.state))
            broken.memories = {id: unflatten(flatten(memory)) for id, memory in broken.memories.items()}
            broken.round()
        first, second = flatten(straight.state), flatten(broken.state)
        assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_mixed_ranks_and_wrong_constants() -> None:
    mixed = [Client("a", 1, 2), Client("b", 1, 4)]
    for rule in (FedLoRU(), PFedLoRU()):
        with pytest.raises(FedError, match=r"\[2, 4\].*mfedloru"):
            rule.validate(mixed)
    MFedLoRU().validate(mixed)
    with pytest.raises(FedError, match="below a client's, 4"):
        MFedLoRU(rank=3).validate(mixed)
    for wrong in (lambda: FedLoRU(tau=0), lambda: PFedLoRU(personal_share=1.0), lambda: PFedLoRU(personal_rank=0)):
        with pytest.raises(FedError, match="tau=0|personal_share=1.0|personal_rank=0"):
            wrong()


# --- pFedLoRU


def test_personal_factors_train_first_stay_at_home_and_survive_accumulations() -> None:
    run = Run(PFedLoRU(tau=2, personal_rank=2)).rounds(5)
    assert not any("personal" in key for key in [*run.state, *run.replies[0].sent, *run.replies[0].returned])
    own, shared = run.log["a"][-2], run.log["a"][-1]
    last = run.memories["a"]
    W, sent = within("W", last), within("adapter", run.replies[0].sent)
    assert all(M.rank == 2 for M in own["adapter"].values()) and all(M.rank == 3 for M in shared["adapter"].values())
    close(own["frozen"], {name: M.dense() + sent[name].dense() for name, M in W.items()})
    mine = dense(within("personal", last))
    close(shared["frozen"], {name: M.dense() + mine[name] for name, M in W.items()})
    close(own["adapter"], within("personal", Run(run.rule).rounds(4).memories["a"]), 0)
    returned = dense(run.replies[0].returned)
    close(run.rule.personal(run.replies[0], last), {n: M.dense() + returned[n] + mine[n] for n, M in W.items()})
    assert float((mine["q"] - dense(within("personal", run.memories["b"]))["q"]).norm()) > 0.1


def test_pfedloru_s_server_is_fedloru_s() -> None:
    """The same replies, the same state, to the bit; and both phases' steps are counted."""
    ours, theirs = PFedLoRU(tau=2), FedLoRU(tau=2)
    run = Run(ours).rounds(5)
    rnd = Round(6, SEED)
    first, second = (flatten(rule.aggregate(run.state, run.replies, rnd)) for rule in (ours, theirs))
    assert all(torch.equal(first[key], second[key]) for key in first)
    mine = ours.personal(run.replies[0], run.memories["a"])
    norm = pytest.approx(sum(float(M.norm()) for M in mine.values()), rel=1e-5)
    assert run.replies[0].metrics == {"train_loss": 1.0, "steps": 4.0, "personal_loss": 1.0, "own_norm": norm}


# --- mFedLoRU

MIXED = [Client("a", 30, 1), Client("b", 10, 4), Client("c", 20, 8), Client("d", 5, 2)]


def test_what_small_clients_send_is_small_and_rebuilt_exactly() -> None:
    """r = 8. Rank 1: B (40 x 8) as 1 (40 + 8) = 48 numbers for 320. Rank 4 of v's B: 4 (24 + 8) = 128 of 192, nested.

    Rank 8 trains B and A themselves.
    """
    rule = MFedLoRU()
    run = Run(rule, MIXED).rounds(2)
    for reply in run.replies:
        r_i, sent = reply.client.rank, arrived(reply.sent)
        assert {M.rank for M in sent.values()} == {8}
        whole = rule.trained(reply)
        for name, (d, k) in SHAPES.items():
            B, A = reply.returned[f"B/{name}"], reply.returned[f"A/{name}"]
            if r_i == 8:
                assert torch.equal(whole[name].B, B) and torch.equal(whole[name].A, A)
            else:
                assert (B.B.shape, B.A.shape, A.B.shape, A.A.shape) == ((d, r_i), (r_i, 8), (8, r_i), (r_i, k))
                torch.testing.assert_close(whole[name].B, sent[name].B + B.B @ B.A)
                torch.testing.assert_close(whole[name].A, sent[name].A + A.B @ A.A)
    p = {c.id: c.num_samples / 65 for c in MIXED}
    for name in SHAPES:
        parts = {r.client.id: rule.trained(r)[name] for r in run.replies}
        mean = LowRank(sum(p[i] * M.B for i, M in parts.items()), sum(p[i] * M.A for i, M in parts.items()))
        close({"x": within("adapter", run.state)[name]}, {"x": mean})


def test_a_factor_that_is_smaller_whole_is_sent_whole() -> None:
    """Rank 6 of 8: B of v is 24 x 8 = 192 numbers, nested it would be 6 (24 + 8) = 192: not fewer."""
    run = Run(MFedLoRU(rank=8), [Client("a", 1, 6)]).round()
    reply = run.replies[0]
    assert isinstance(reply.returned["B/q"], LowRank) and isinstance(reply.returned["B/v"], Tensor)
    assert {n: type(t) for n, t in run.rule.expected(reply).items()} == {n: type(t) for n, t in reply.returned.items()}


def test_nested_factors_start_at_zero_products() -> None:
    """What a small client starts from computes what was sent; its first factors are random, its second zero."""
    run = Run(MFedLoRU(tau=2, a=0.5), MIXED)
    starts: dict[str, Any] = {}

    class Look(Drift):
        def train(self, adapter: Tensors, memory: Tensors, rnd: Round, **others: Any) -> Any:
            starts[self.client.id] = others.get("nested")
            return others.get("nested") or adapter, {}, {}

    rnd = Round(1, SEED)
    for client in MIXED:
        sent = run.rule.download(run.state, client, rnd)
        returned, _, _ = run.rule.local(Look(client), sent, {}, rnd)
        close(run.rule.trained(Reply(client, sent, returned)), arrived(sent), 0)
    assert starts["c"] is None
    for key, product in starts["a"].items():
        assert not product.A.any() and bool((product.B != 0).all()) and float(product.B.abs().max()) <= 0.5, key


def test_all_at_full_rank_mfedloru_is_fedloru() -> None:
    """To the bit, through seven rounds."""
    first, second = (Run(rule).rounds(7).served() for rule in (MFedLoRU(tau=2), FedLoRU(tau=2)))
    assert all(torch.equal(first[name], second[name]) for name in second)


# --- a model that really trains

PICO = LanguageModel("pico")
REAL = LanguageModel("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")


@pytest.fixture(scope="module")
def pico() -> SFTWorker:
    return sums(PICO, SFT(steps=4, batch_size=4, learning_rate=2e-2, optimizer="kept"))


def sums(model: LanguageModel, settings: SFT) -> SFTWorker:
    """Three clients who learn to add 1."""
    tok = tokenizer(model)
    rows = encode(tok, [f"Question: {i} + 1?\nAnswer:" for i in range(24)], [f" {i + 1}" for i in range(24)], 64)
    parts = {"a": rows[:12], "b": rows[12:20], "c": rows[20:]}
    return SFTWorker(settings, load(model, torch.device("cpu"), seed=0), tok, parts, rounds=4)


def logits(worker: SFTWorker, update: Tensors) -> Tensor:
    ids = torch.arange(40).view(2, 20) + 40
    with worker.serving(update) as served, torch.no_grad():
        return served(input_ids=ids).logits


def pico_model(base: LanguageModel = PICO) -> Model:
    shapes = target_shapes(skeleton(base), SFT().targets)
    return Model({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


FAMILY = pytest.mark.parametrize(
    ("rule", "ranks"),
    [(FedLoRU(tau=1), (4, 4, 4)), (PFedLoRU(tau=1), (4, 4, 4)), (MFedLoRU(tau=1), (8, 2, 1))],
    ids=lambda value: type(value).__name__,
)


@FAMILY
def test_it_trains_and_an_accumulation_leaves_the_function_alone(
    rule: FedLoRU, ranks: tuple[int, ...], pico: SFTWorker
) -> None:
    """The losses fall over rounds; W + a fresh adapter, as round t + 1 starts, computes what round t served: 1e-4."""
    losses = accumulating(rule, ranks, pico, pico_model(), rounds=4)
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.97 * losses[0], losses


@pytest.mark.slow
@FAMILY
def test_a_real_model_s_accumulations_leave_the_function_alone(rule: FedLoRU, ranks: tuple[int, ...]) -> None:
    """The same of SmolLM2-135M from the demo's wheel: 60 modules, four rounds of one step."""
    try:
        source(REAL.name)
    except FedError as error:
        pytest.skip(str(error))
    worker = sums(REAL, SFT(steps=1, batch_size=4, learning_rate=2e-3))
    losses = accumulating(rule, ranks, worker, pico_model(REAL), rounds=4)
    assert losses[-1] < losses[0], losses


def accumulating(rule: FedLoRU, ranks: Sequence[int], worker: SFTWorker, model: Model, rounds: int) -> list[float]:
    """Each round's loss; at every start the logits are what the round before served, to 1e-4, and then they move."""
    clients = [Client(id, len(worker.rows[id]), r) for id, r in zip("abc", ranks, strict=True)]
    state = canonical(rule.init(model, clients))
    memories: dict[str, Tensors] = {}
    losses = []
    for index in range(1, rounds + 1):
        rnd = Round(index, SEED)
        before = logits(worker, rule.served(state))
        replies = []
        for client in clients:
            sent = canonical(rule.download(state, client, rnd))
            memory = memories.get(client.id, {})
            start = added(rule.remembered(sent, memory, rnd), arrived(sent))
            assert float((logits(worker, start) - before).abs().max()) <= 1e-4
            returned, memory, metrics = rule.local(worker.of(client), sent, memory, rnd)
            memories[client.id] = canonical(memory)
            replies.append(Reply(client, sent, canonical(returned), metrics))
        losses.append(sum(reply.metrics["train_loss"] for reply in replies))
        state = canonical(rule.aggregate(state, replies, rnd))
        assert float((logits(worker, rule.served(state)) - before).abs().max()) > 1e-2, "training must show"
    return losses


def test_nested_training_touches_nothing_else(pico: SFTWorker) -> None:
    """B and A stay, PEFT's modules are as they were, and a step of 0 returns what was given, the scale folded in."""
    rule, client = MFedLoRU(rank=8), Client("a", 12, 2)
    rnd = Round(1, SEED)
    sent = rule.download(rule.init(pico_model(), [client]), client, rnd)
    modules = [type(module) for module in pico.model.modules()]
    returned, _, metrics = rule.local(pico.of(client), sent, {}, rnd)
    assert [type(module) for module in pico.model.modules()] == modules
    assert metrics["steps"] == 4 and all(M.rank == 2 for M in returned.values())
    assert all(bool(returned[f"B/{name}"].A.any()) for name in arrived(sent)), "B_u has left zero"
    adapters = arrived(sent)
    for name, M in adapters.items():
        held = pico.lora.read(pico.lora.layers[name])
        assert torch.equal(held.A, M.A) and torch.equal(held.B, M.B)
    still = SFTWorker(
        SFT(steps=1, learning_rate=0.0, alpha=7.0), load(PICO, torch.device("cpu"), seed=0), tokenizer(PICO),
        {"a": encode(tokenizer(PICO), ["a b c"] * 2, [" d"] * 2, 64)}, rounds=1,
    )  # fmt: skip
    starts = {f"{f}/{n}": LowRank(torch.randn(x.shape[0], 2), torch.randn(2, x.shape[1]))
              for n, M in adapters.items() for f, x in (("B", M.B), ("A", M.A))}  # fmt: skip
    back, _, _ = still.of(Client("a", 2, 2)).train(adapters, {}, rnd, nested=starts)
    close(back, {key: M * (7 / 8 if key.startswith("B/") else 1.0) for key, M in starts.items()}, 1e-6)


@pytest.mark.parametrize("alpha", ["1r", "16r"])
def test_nested_factors_start_at_one_size_whatever_the_scale(alpha: str) -> None:
    """B_d is drawn as Linear draws it, in the units that train: after a step of 0 it is that times the scale."""
    encoded = encode(tokenizer(PICO), ["a b c"] * 2, [" d"] * 2, 64)
    settings = SFT(steps=1, learning_rate=0.0, alpha=alpha)
    worker = SFTWorker(settings, load(PICO, torch.device("cpu"), 0), tokenizer(PICO), {"a": encoded}, 1)
    rule, client = MFedLoRU(rank=8), Client("a", 2, 2)
    sent = rule.download(rule.init(pico_model(), [client]), client, Round(1, SEED))
    returned, _, _ = rule.local(worker.of(client), sent, {}, Round(1, SEED))
    for name in arrived(sent):
        largest = float(returned[f"B/{name}"].B.abs().max())
        assert 0.9 * 2**-0.5 < largest / settings.scale(8) <= 2**-0.5  # uniform within r_i ** -0.5


def test_nested_training_computes_the_sum() -> None:
    """At a step of 0 the loss is that of adapters with ``B + s B_d B_u``, s = 2, and ``A + A_d A_u`` in place."""
    encoded = encode(tokenizer(PICO), ["Question: 7 + 1?\nAnswer:"] * 4, [" 8"] * 4, 64)
    still = SFTWorker(
        SFT(steps=1, learning_rate=0.0, batch_size=4),
        load(PICO, torch.device("cpu"), 0),
        tokenizer(PICO),
        {"a": encoded},
        1,
    )
    rnd, rng = Round(1, SEED), Round(1, SEED).rng("test")

    def drawn(d: int, r: int, k: int) -> LowRank:
        return LowRank(torch.randn(d, r, generator=rng) / 4, torch.randn(r, k, generator=rng) / 4)

    adapters = {name: drawn(W.shape[0], 4, W.shape[1]) for name, W in pico_model().weights.items()}
    nested = {f"B/{n}": drawn(M.shape[0], 2, 4) for n, M in adapters.items()}
    nested |= {f"A/{n}": drawn(4, 2, M.shape[1]) for n, M in adapters.items()}
    summed = {
        n: LowRank(M.B + 2 * nested[f"B/{n}"].dense(), M.A + nested[f"A/{n}"].dense()) for n, M in adapters.items()
    }
    seat = still.of(Client("a", 4, 2))
    whole, inner, plain = (
        seat.train(summed, {}, rnd)[2]["train_loss"],
        seat.train(adapters, {}, rnd, nested=nested)[2]["train_loss"],
        seat.train(adapters, {}, rnd)[2]["train_loss"],
    )
    assert inner == pytest.approx(whole, rel=1e-5) and abs(plain - whole) > 1e-3 * whole


def test_parts_of_a_round_are_its_steps() -> None:
    """Two fifths and three fifths of five steps are 2 and 3, on other draws; a part has one step at least."""
    encoded = encode(tokenizer(PICO), [f"{i} + 1 =" for i in range(8)], [f" {i + 1}" for i in range(8)], 64)
    for steps, wanted in ((5, (2, 3)), (1, (1, 1))):
        settings = SFT(steps=steps, batch_size=2)
        worker = SFTWorker(settings, load(PICO, torch.device("cpu"), 0), tokenizer(PICO), {"a": encoded}, 1)
        rule, client = PFedLoRU(), Client("a", 8, 4)
        state = rule.init(pico_model(), [client])
        sent = within("adapter", rule.download(state, client, Round(1, SEED)))
        seat = worker.of(client)
        metrics = [seat.train(sent, {}, Round(1, SEED), part=part)[2] for part in ((0.0, 0.4), (0.4, 1.0))]
        assert tuple(m["steps"] for m in metrics) == wanted
        assert metrics[0]["train_loss"] != metrics[1]["train_loss"]
        assert seat.train(sent, {}, Round(1, SEED), part=(0.4, 0.4)) == (sent, {}, {}), "no width, no step"
