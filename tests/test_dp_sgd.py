"""DP-SGD in TRL's trainer: gradients of single rows, batches that may be empty, and steps that really move."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("opacus")

from fedllm.core import Client, LocalTraining, Round
from fedllm.data.encoding import encode
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, fill
from fedllm.models.language import LanguageModel, load, tokenizer
from fedllm.workers.dp_sgd import DPSGD, Steps, mean_over_rows
from fedllm.workers.settings import SFT
from fedllm.workers.sft import SFTWorker

CLIENT = Client("a", 6, 2)
PRIVATE = DPSGD(1e-9, 1e6, 3, seeded=True)


def made(private: DPSGD | None = PRIVATE, steps: int = 2, rows: int = 6, **options) -> SFTWorker:
    pico = LanguageModel(name="pico")
    tok = tokenizer(pico)
    texts = ["one and two", "a", "three hundred and some", "b c", "zz top", "nine"][:rows]
    encoded = encode(tok, texts, [text[::-1] for text in texts], 64)
    settings = SFT(steps=steps, batch_size=3, learning_rate=1e-2, **options)
    return SFTWorker(settings, load(pico, torch.device("cpu"), 0), tok, {"a": encoded}, 1, private=private)


def start(worker: SFTWorker, rank: int = 2) -> dict[str, LowRank]:
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in worker.lora.layers.items()}
    return {n: fill(LowRank.zeros(*s), rank, Round(0, 0).rng(n)) for n, s in shapes.items()}


def fit(worker: SFTWorker, **asked):
    request = LocalTraining(start(worker), {}, Round(1, 0), **asked)
    return worker.fit(CLIENT, request)


def test_no_row_s_loss_depends_on_another_s_length():
    logits = torch.randn(2, 6, 11)
    labels = torch.tensor([[-100, 1, 2, 3, -100, -100], [-100, 5, -100, -100, -100, -100]])
    cut = labels.clone()
    cut[1, 1] = -100
    both, one = mean_over_rows(logits, labels), mean_over_rows(logits, cut)
    alone = mean_over_rows(logits[:1], labels[:1])
    assert float(one * 2) == pytest.approx(float(alone))
    assert float(both * 2 - alone) == pytest.approx(float(mean_over_rows(logits[1:], labels[1:])))
    assert float(mean_over_rows(logits[:1], torch.full_like(labels[:1], -100))) == 0.0


def test_gradients_are_those_of_single_rows():
    """A batch of three, no power of two, against one row at a time."""
    worker = made()
    worker.lora.load("client", start(worker))
    worker.lora.activate(["client"], train="BA")
    rows, collate, model = worker.rows["a"][:3], worker.trainer.data_collator, worker.trainer.model
    with PRIVATE.on(worker.trainer, torch.Generator()):
        batch = collate(rows)
        labels = batch.pop("labels")
        mean_over_rows(model(**batch, use_cache=False).logits, labels).backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        together = [p.grad_sample.clone() for p in trained]
        model.zero_grad()
    for i, row in enumerate(rows):
        batch = collate([row])
        labels = batch.pop("labels")
        model.zero_grad()
        mean_over_rows(model(**batch, use_cache=False).logits, labels).backward()
        for p, of in zip(trained, together, strict=True):
            assert torch.allclose(of[i], p.grad, rtol=1e-4, atol=1e-6)
    assert any(float(of.abs().max()) > 1e-4 for of in together)


def test_private_steps_move_and_B_only_keeps_A():
    worker = made()
    sent = start(worker)
    returned = fit(worker, factors="B").returned
    assert all(torch.equal(returned[n].A, sent[n].A) for n in sent)
    assert max(float((returned[n].B - sent[n].B).norm()) for n in sent) > 1e-3
    again = fit(worker, factors="B").returned  # the hooks of the first training are gone, those of this one see
    assert all(torch.equal(again[n].B, returned[n].B) for n in sent)


def test_noise_comes_from_the_system_unless_asked_otherwise():
    worker = made(replace(PRIVATE, noise_multiplier=1.0, clip=0.1, seeded=False))
    first, second = fit(worker).returned, fit(worker).returned
    assert any(not torch.equal(first[n].B, second[n].B) for n in first)


def test_a_step_without_a_row_is_a_step_of_noise(monkeypatch):
    monkeypatch.setattr(Steps, "_coin", lambda self, q: False)
    noisy = made(replace(PRIVATE, noise_multiplier=1.0, clip=0.5))
    sent, returned = start(noisy), fit(noisy, factors="B").returned
    assert all(float((returned[n].B - sent[n].B).norm()) > 1e-3 for n in sent)
    noisy.private = replace(PRIVATE, noise_multiplier=0.0)
    returned = fit(noisy, factors="B").returned
    assert all(torch.equal(returned[n].B, sent[n].B) for n in sent)


def test_batches_are_poisson():
    worker = made()
    steps = Steps(PRIVATE, lambda shape: torch.zeros(shape), torch.Generator().manual_seed(3))
    sizes = [len(batch["labels"]) for batch in steps.batches(worker.rows["a"], 40, worker.trainer.data_collator)]
    assert len(set(sizes)) > 3
    assert 2 < sum(sizes) / 40 < 4


def test_the_clip_bounds_a_row_and_the_denominator_is_fixed():
    """Without noise no sum of clipped rows, over three expected ones, is longer than rows times C / 3."""
    worker = made(replace(PRIVATE, clip=1e-3), steps=1)
    seen = []

    class Watched(Steps):
        def optimizer(self, plain):
            optimizer = super().optimizer(plain)
            step = plain.step
            plain.step = lambda *a, **k: (
                seen.append(sum(float(p.grad.square().sum()) for g in plain.param_groups for p in g["params"]) ** 0.5),
                step(*a, **k),
            )[1]
            return optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedllm.workers.dp_sgd.Steps", Watched)
        fit(worker)
    assert len(seen) == 1
    assert 0 < seen[0] <= 6 * 1e-3 / 3 * (1 + 1e-4)


def test_steps_that_pass_the_noise_by_are_refused():
    worker = made()
    with pytest.raises(FedError, match="cannot do"):
        fit(worker, loss=lambda z, y: z.sum() * 0)
