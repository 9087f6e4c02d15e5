"""From a recipe to a federation of text clients: what is counted, and what is said of it."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from fedllm.core import Client, Round
from fedllm.data.partition import PARTITIONS, Partition
from fedllm.errors import FedError
from fedllm.federation.text import TextFederation
from fedllm.models import language
from fedllm.models.language import LanguageModel
from fedllm.recipe import load

QUICK = ["recipe=smoke", "data.train_rows=24", "data.test_rows=8", "eval.generate=false"]


def test_held_out_rows_that_are_cut_are_counted():
    """Cut where the fourth shortest of eight prompts ends: the loss is that of three."""
    prompts = sorted(row.labels.index(next(label for label in row.labels if label != -100))
                     for row in TextFederation(load(QUICK)).scored)  # fmt: skip
    federation = TextFederation(load([*QUICK, f"worker.max_length={prompts[3]}", "clients.rank=[4]"]))
    assert len(federation.test) == 8 and len(federation.scored) == sum(length < prompts[3] for length in prompts) > 0
    cut = 8 - len(federation.scored)
    said = f"{cut} held-out rows lost their completion to max_length: the loss is that of the others."
    assert said in federation.notes


def test_no_held_out_row_left_is_no_loss_of_zero(monkeypatch):
    encoded = TextFederation._encode

    def cut(self, rows):
        return [
            row if len(rows) > 8 else type(row)(row.input_ids, [-100] * len(row.labels)) for row in encoded(self, rows)
        ]

    monkeypatch.setattr(TextFederation, "_encode", cut)
    with pytest.raises(FedError, match=r"none of the 8 held-out rows.*worker\.max_length=400: raise it"):
        TextFederation(load(QUICK))


def test_rows_that_the_partition_deals_to_nobody_are_not_called_cut():
    partition = "data.partition={name: classes_per_client, column: template, classes: 6, repeats: dropped}"
    federation = TextFederation(load([*QUICK, "data.train_rows=120", partition]))
    told = federation.partition
    dealt = sum(client["rows"] for client in told["clients"].values())
    assert told["dropped_rows"] == 0 and told["undealt_rows"] == 120 - dealt > 0
    assert f"{120 - dealt} training rows were dealt to nobody by the partition." in federation.notes
    totals = federation.plan()["totals"]
    assert (totals["dropped_rows"], totals["undealt_rows"]) == (0, 120 - dealt)


@pytest.mark.parametrize(
    ("generate", "message"),
    [("false", r"longest row has \d+ tokens.*max_length=100"), ("true", r"eval\.max_new_tokens=")],
)
def test_rows_longer_than_learned_positions_are_told_before_a_weight_is_loaded(generate, message, tmp_path):
    """GPT-2 has a vector for each of its positions and none beyond."""
    from transformers import GPT2Config, GPT2LMHeadModel

    most = 100 if generate == "false" else 400
    config = GPT2Config(vocab_size=259, n_positions=most, n_embd=16, n_layer=1, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    language.tokenizer(LanguageModel("pico")).save_pretrained(tmp_path)
    asked = [*QUICK, f"eval.generate={generate}", f"model.name={tmp_path}", "worker.targets=[c_attn]"]
    with pytest.raises(FedError, match=message):
        TextFederation(load([*asked, "eval.max_new_tokens=390"]))
    assert language.positions(language.skeleton(LanguageModel("pico"))) is None


@pytest.mark.parametrize("shape", [(8, 4, 1.0), (4, 2, 3.0), (5, 1, 2.0)])
def test_planned_tokens_are_those_that_are_trained(shape):
    """Whole epochs, the last step of each smaller than the others."""
    batch, accumulation, epochs = shape
    asked = [f"worker.batch_size={batch}", f"worker.accumulation={accumulation}", f"worker.epochs={epochs}"]
    recipe = load([*QUICK, *asked, "worker.steps=null", "clients.rank=[2]", "worker.learning_rate=1e-4"])
    federation = TextFederation(recipe)
    (planned,), (client,) = federation.plan()["clients"], federation.clients
    state = recipe.algorithm.init(federation.model, [client])
    sent = recipe.algorithm.download(state, client, Round(1, 0))
    _, _, metrics = federation.worker(lambda loss: None).of(client).train(sent, {}, Round(1, 0))
    assert (planned["tokens"], planned["steps"]) == (metrics["tokens"], metrics["steps"])


@dataclass(frozen=True)
class ByKind(Partition):
    """Every kind of problem is a client of that name."""

    names_clients: ClassVar[bool] = True

    def clients(self, labels: Sequence[Hashable]) -> list[str]:
        return sorted({f"kind-{label}" for label in labels})

    def _parts(self, labels: Sequence[Hashable], n: int, clients: Sequence[Client], seed: int) -> list[list[int]]:
        return [[i for i, label in enumerate(labels) if f"kind-{label}" == client.id] for client in clients]


def test_clients_have_the_names_that_the_data_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows are read before the clients are made: their number and names come from a column."""
    monkeypatch.setitem(PARTITIONS, "by_kind", ByKind)
    asked = [*QUICK, "data.partition.name=by_kind", "data.partition.column=template", "clients.rank=4"]
    federation = TextFederation(load(asked))
    assert len(federation.clients) > 1
    assert all(client.id.startswith("kind-") and client.rank == 4 for client in federation.clients)
    assert sum(client.num_samples for client in federation.clients) + federation.partition["dropped_rows"] == 24
    with pytest.raises(FedError, match="the data names"):
        TextFederation(load([*asked, "clients.count=999"]))
