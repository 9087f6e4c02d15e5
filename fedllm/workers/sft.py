"""A client that fine-tunes LoRA adapters with TRL's ``SFTTrainer``. The only place that knows ``lora_alpha``.

One trainer and one base model per process serve every client of the whole run: a second ``SFTTrainer`` on the same
model would nest another forward and reset the global generator. A client's rank is the rank of the factors hung
into PEFT's layers for the time it trains, so each pays for its own rank only.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fedllm.core import Client, ClientWorker, LocalResult, LocalTraining, Round, Tensors
from fedllm.data.encoding import Encoded
from fedllm.workers.dp_sgd import DPSGD
from fedllm.workers.lora import FROZEN, TRAINED, LoRALayers
from fedllm.workers.settings import SFT


@dataclass(frozen=True)
class SFTClient(ClientWorker):
    """One client's view of the worker."""

    worker: SFTWorker
    client: Client

    @property
    def steps(self) -> int:
        return self.worker.settings.steps_for(len(self.worker.rows[self.client.id]))

    def rate(self, rnd: Round) -> float:
        return self.worker.settings.learning_rate_in(rnd.index, self.worker.rounds)

    def fit(self, request: LocalTraining) -> LocalResult:
        """Trains products on this client's rows, on top of the base model plus ``request.frozen``.

        Metrics: ``train_loss`` (nats a token, mean over steps), ``steps``, ``tokens``, ``seconds``.
        """
        request.only("worker.name=sft", *OPTIONS)
        if request.part[0] == request.part[1]:
            return LocalResult(request.weights, request.memory, {})
        return self.worker.fit(self.client, request)

    # ``score`` stays empty: held-out rows are the server's, and ``eval.clients`` scores clients' own models on them.


class SFTWorker:
    """One base model with PEFT's layers in it, and one trainer, for every client that this process stands for.

    Args:
        settings: how clients train.
        base: the frozen model.
        tokenizer: its tokenizer.
        rows: every client's encoded training rows, by client id.
        rounds: rounds of the run, for the schedule.
        on_step: called with the loss after every optimizer step.
        private: makes every step private.
    """

    def __init__(
        self,
        settings: SFT,
        base: nn.Module,
        tokenizer: Any,
        rows: Mapping[str, Sequence[Encoded]],
        rounds: int,
        on_step: Callable[[float | None], None] = lambda loss: None,
        private: DPSGD | None = None,
    ) -> None:
        self.settings, self.rounds, self.private = settings, rounds, private
        if processes() > 1:  # the Trainer then averages the adapters' gradients itself, and wraps no model in DDP
            setattr(base, "_is_distributed_loading_by_transformers", True)  # noqa: B010
        self.rows = {id: [{"input_ids": r.input_ids, "labels": r.labels} for r in of] for id, of in rows.items()}
        with _own_randomness(0):  # PEFT draws factors that are replaced before they are used, and TRL sets a seed
            self.lora = LoRALayers(base, settings.targets, settings.dropout, settings.scale)
            self.model = self.lora.model
            self.trainer = _trainer(settings, self.model, tokenizer, next(iter(self.rows.values())), on_step)
        gc.collect()
        gc.freeze()  # train() collects garbage: 0.2 s a call with a whole model in view

    def of(self, client: Client) -> SFTClient:
        """This worker, standing for ``client``."""
        return SFTClient(self, client)

    def fit(self, client: Client, request: LocalTraining) -> LocalResult:
        """See ``SFTClient.fit``."""
        memory, nested, part, factors = request.memory, request.nested, request.part, request.factors
        if self.private is not None:
            self.private.check(request)
        started = time.perf_counter()
        whole = self.settings.steps_for(len(self.rows[client.id]))
        self.lora.load(TRAINED, request.weights)
        self.lora.load(FROZEN, request.frozen)
        self.lora.activate([FROZEN, TRAINED] if request.frozen else [TRAINED], train="" if nested else factors)
        trainer = self.trainer
        trainer.train_dataset = self.rows[client.id]
        trainer.args.max_steps = max(1, round(part[1] * whole) - round(part[0] * whole))
        trainer.args.learning_rate = self.settings.learning_rate_in(request.rnd.index, self.rounds)
        trainer.optimizer, trainer.lr_scheduler = None, None
        trainer._total_train_tokens = 0
        trainer.loss = request.loss
        draws = ("local", client.id) if part[0] == 0.0 else ("local", client.id, part[0])
        private = (
            nullcontext() if self.private is None else self.private.on(trainer, request.rnd.rng("rows", client.id))
        )
        randomness = _own_randomness(request.rnd.rng(*draws).initial_seed())
        with randomness, self.lora.nested(nested, factors) as inner, private:
            trained = {n: p for n, p in inner.items() if p.requires_grad} or self.lora.parameters(factors)
            trainer.extra, trainer.drift = self._extra(request, trained), self._drift(request, factors)
            if self.settings.optimizer == "kept" and memory:
                self._restore(trainer.create_optimizer(), memory, trained)
            result = trainer.train()
            kept = self._moments(trainer.optimizer, trained) if self.settings.optimizer == "kept" else {}
            trainer.optimizer, trainer.lr_scheduler = None, None  # one client's moments are not held for the next
            trainer.loss, trainer.extra, trainer.drift = None, None, ()
            returned = (
                self.lora.read_nested(inner, nested)
                if nested
                else {n: self.lora.read(self.lora.layers[n]) for n in request.weights}
            )
        metrics = {
            "train_loss": float(result.training_loss),
            "steps": result.global_step,
            "tokens": int(trainer._total_train_tokens),
            "seconds": time.perf_counter() - started,
        }
        return LocalResult(returned, kept, metrics)

    def serving(self, update: Tensors) -> AbstractContextManager[nn.Module]:
        """The base model plus ``update`` (any rank, or dense), in eval mode, for as long as the context lasts."""
        return self.lora.serving(update)

    def _extra(self, request: LocalTraining, trained: Mapping[str, nn.Parameter]) -> Callable[[], Tensor] | None:
        """What joins the loss of every optimizer step."""
        terms: list[Callable[[], Tensor]] = []
        if request.proximal:
            pairs = [(weight, weight.detach().clone()) for weight in trained.values()]
            terms.append(lambda: request.proximal / 2 * sum_of([(p - start).square().sum() for p, start in pairs]))
        if request.product_penalty is not None:
            penalty = request.product_penalty
            terms.append(lambda: penalty({name: self.lora.product(name) for name in request.weights}))
        return (lambda: sum_of([term() for term in terms])) if terms else None

    def _drift(self, request: LocalTraining, factors: str) -> list[tuple[nn.Parameter, Tensor]]:
        """What every optimizer step is corrected by, next to the parameters, in PEFT's coordinates."""
        moved = []
        for name, step in request.drift.items():
            for factor, value in (("B", step.B), ("A", step.A)):
                linear, scale = self.lora.factor(f"{factor}/{name}")
                if factor in factors:
                    moved.append((linear.weight, (value / scale).to(linear.weight)))
        return moved

    def _moments(self, optimizer: Any, trained: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """AdamW's state by parameter and field, on the CPU."""
        state = optimizer.optimizer.state  # inside accelerate's wrapper
        return {
            f"{name}/{key}": value.detach().to("cpu", copy=True)
            for name, weight in trained.items()
            for key, value in state[weight].items()
        }

    def _restore(self, optimizer: torch.optim.Optimizer, memory: Tensors, trained: Mapping[str, nn.Parameter]) -> None:
        fields = ("step", "exp_avg", "exp_avg_sq")
        for name, weight in trained.items():
            if f"{name}/step" not in memory:  # it had no gradient: an expert that no token was sent to
                continue
            values = {field: memory[f"{name}/{field}"].clone() for field in fields}
            optimizer.state[weight] = {k: v if k == "step" else v.to(weight) for k, v in values.items()}


OPTIONS = ("frozen", "nested", "part", "factors", "loss", "product_penalty", "proximal", "drift")
"""What a request may ask for."""


def sum_of(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """The libraries inside draw from the global generators: seeded for this block, and put back after it."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def processes() -> int:
    """How many train every client together."""
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _trainer(settings: SFT, model: Any, tokenizer: Any, sample: Sequence[dict[str, Any]], on_step: Any) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig

    from fedllm.workers.sft_trainer import Trainer

    class Steps(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs and "loss" in logs:
                on_step(float(logs["loss"]))

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                for weight, drift in trainer.drift:
                    weight.sub_(drift, alpha=args.learning_rate)

    device = next(model.parameters()).device
    batch_size, accumulation = settings.shared(processes())
    args = SFTConfig(
        output_dir=tempfile.gettempdir(),  # never written to: nothing is saved from a client's trainer
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_length=None,  # rows come encoded and cut
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=device.type == "cuda",
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        logging_nan_inf_filter=False,  # a client whose loss is NaN must say so
        disable_tqdm=True,
        max_steps=1,
        router_aux_loss_coef=0.0,  # of a mixture of experts: it would be counted as loss, and break generation
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(list(sample[:1])),
        processing_class=tokenizer,
        callbacks=[Steps()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
