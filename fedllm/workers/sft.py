"""A client that fine-tunes LoRA adapters with TRL's ``SFTTrainer``. The only place that knows ``lora_alpha``.

One trainer and one base model per process serve every client of the whole run: a second ``SFTTrainer`` on the same
model would nest another forward and reset the global generator. A client's rank is the rank of the factors hung
into PEFT's layers for the time it trains, so each pays for its own rank only.
"""

from __future__ import annotations

import gc
import math
import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from fedllm.config.types import Count, NonNegative, PartShare, Positive, needs
from fedllm.core import Client, FedError, Model, Round, Tensors, within
from fedllm.data.encoding import Encoded
from fedllm.lowrank import LowRank, as_lowrank
from fedllm.models.language import LanguageModel
from fedllm.storage import peft_folder as adapters
from fedllm.tasks.task import Task
from fedllm.wire import serialization as ledger

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of the logits ``(N, V)``, float32, and the tokens ``(N,)`` of a batch's completions: the mean, in nats a token."""

TRAINED, FROZEN = "client", "global"
"""The two adapters in the model: the one a client trains, and a frozen float32 one for all that came before."""

ALPHA = "a number above 0, or a multiple of the rank such as 2r"
"""What ``worker.alpha`` is."""


@dataclass(frozen=True)
class SFT:
    """How a client trains.

    Args:
        targets: names of the linear modules that get an adapter, matched as PEFT matches them.
        alpha: LoRA's alpha: a number, or ``2r`` for twice the client's rank. The update is scaled by alpha / r.
        rslora: scale by alpha / sqrt(r) instead.
        dropout: on the adapter's input.
        epochs: passes over the client's rows in a round, ``K``.
        steps: optimizer steps in a round instead of ``epochs``.
        batch_size: rows a forward pass.
        accumulation: forward passes an optimizer step.
        learning_rate: AdamW's, constant inside a round.
        schedule: of the learning rate across rounds; ``cosine`` and ``linear`` end at 0 after the last.
        weight_decay: AdamW's.
        max_grad_norm: the gradient is clipped to this norm; 0 for never.
        optimizer: ``fresh`` in every round, or ``kept``: each client's moments wait for its next round.
        max_length: tokens a row is cut to.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
    """

    targets: tuple[str, ...] = ("q_proj", "v_proj")
    alpha: Annotated[Positive | str, needs(ALPHA)] = "2r"
    rslora: bool = False
    dropout: PartShare = 0.0
    epochs: Positive = 1.0
    steps: Count | None = None
    batch_size: Count = 1
    accumulation: Count = 1
    learning_rate: NonNegative = 2e-4
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    weight_decay: NonNegative = 0.0
    max_grad_norm: NonNegative = 1.0
    optimizer: Literal["fresh", "kept"] = "fresh"
    max_length: Count = 512
    gradient_checkpointing: bool = False

    model_section: ClassVar[type] = LanguageModel
    task_kind: ClassVar[type] = Task
    exported: ClassVar[str] = "adapter"
    whole: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.alpha, str) and not re.fullmatch(r"(?=.*[1-9])\d+(\.\d+)?r?", self.alpha):
            raise FedError(f"worker.alpha={self.alpha!r}: give {ALPHA}.")

    def federation(self, recipe: Any) -> Any:
        """Rows, clients and plan of a recipe whose worker this is."""
        from fedllm.federation.text import TextFederation

        return TextFederation(recipe)

    def export(self, place: Path, update: Tensors, recipe: Any, model: Model) -> None:
        """Writes a PEFT folder; what clients share that is no adapter, as it is."""
        if shared := within("shared", update):
            place.mkdir(parents=True, exist_ok=True)
            save_file(ledger.flatten(shared), place / "shared.safetensors")
            return
        adapters.write(place, update, base_model=recipe.model.name, targets=self.targets, overwrite=True)

    def alpha_of(self, rank: int) -> float:
        """LoRA's alpha for a client of this rank."""
        text = str(self.alpha)
        return float(text[:-1]) * rank if text.endswith("r") else float(text)

    def scale(self, rank: int) -> float:
        """``s_i``: what ``B A`` is multiplied by. alpha / r, or alpha / sqrt(r) with rsLoRA."""
        return self.alpha_of(rank) / (math.sqrt(rank) if self.rslora else rank)

    def steps_for(self, rows: int) -> int:
        """Optimizer steps in a round for a client with this many rows."""
        return math.ceil(self.epochs * self.steps_in_epoch(rows)) if self.steps is None else self.steps

    def steps_in_epoch(self, rows: int) -> int:
        """Optimizer steps that see each of this many rows once; the last may be of fewer than the others."""
        return math.ceil(math.ceil(rows / self.batch_size) / self.accumulation)

    def shared(self, processes: int) -> tuple[int, int]:
        """Rows a forward pass and passes a step of each of so many processes that train one client together.

        A step's rows stay as many: each process takes its part of the passes, or else of every pass.

        Raises:
            FedError: where neither can be divided.
        """
        if self.accumulation % processes == 0:
            return self.batch_size, self.accumulation // processes
        if self.batch_size % processes == 0:
            return self.batch_size // processes, self.accumulation
        raise FedError(
            f"{processes} processes cannot share the rows of a step, worker.batch_size={self.batch_size} x "
            f"worker.accumulation={self.accumulation}: make one of the two a multiple of {processes}."
        )

    def learning_rate_in(self, index: int, rounds: int) -> float:
        """The learning rate of round ``index`` (from 1) of ``rounds``."""
        done = (index - 1) / max(rounds, 1)
        shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": (1.0 + math.cos(math.pi * done)) / 2}
        return self.learning_rate * shape[self.schedule]


def target_shapes(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """``(d_out, d_in)`` of every linear module whose name ends in one of ``targets``; the model may be on meta.

    Raises:
        FedError: where a target names no linear module.
    """
    from transformers import PreTrainedModel
    from transformers.pytorch_utils import Conv1D

    if not targets:
        raise FedError("worker.targets is empty: name linear modules that get an adapter, such as [q_proj, v_proj].")
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # TRL adapts all but this one
    linear: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    hit: set[str] = set()
    for target in targets:
        found = {name for name in linear if name == target or name.endswith(f".{target}")}
        if not found:
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise FedError(f"worker.targets: the model has no linear module {target!r}. It has: {known}.")
        hit |= found
    return {
        name: tuple(module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape)
        for name, module in linear.items()
        if name in hit
    }


@dataclass(frozen=True)
class Seat:
    """The worker, standing for one client."""

    worker: SFTWorker
    client: Client

    @property
    def steps(self) -> int:
        """Optimizer steps in a round."""
        return self.worker.settings.steps_for(len(self.worker.rows[self.client.id]))

    def train(
        self,
        adapter: Tensors,
        memory: Tensors,
        rnd: Round,
        frozen: Tensors | None = None,
        nested: Tensors | None = None,
        part: tuple[float, float] = (0.0, 1.0),
        factors: Literal["BA", "B", "A"] = "BA",
        loss: Loss | None = None,
    ) -> tuple[dict[str, LowRank], dict[str, Tensor], dict[str, float]]:
        """Trains ``adapter`` on this client's rows, on top of the base model plus ``frozen``.

        Args:
            adapter: ``B A`` per target module, of any rank; the product with LoRA's scale folded in.
            memory: what this returned for the client last time.
            frozen: a further update per target module that is added to the base and not trained.
            nested: train these products instead, ``B/name (d_out, r)`` and ``A/name (r, d_in)``, each added to that
                factor of ``adapter`` as PEFT holds it, before LoRA's scale; ``adapter`` stays as it is. The scale is
                folded into the first factor of B's when they are returned.
            part: from which to which part of the round's steps this is: (0, 0.4) are the first two of five; one step at
                least where it has any width.
            factors: which of the adapter's train; the other comes back as it was sent.
            loss: of the logits and tokens of a batch's completions, instead of TRL's cross-entropy.

        Returns:
            The trained products (those of ``nested`` where given), the memory to keep, and ``train_loss`` (nats a
            token, mean over steps), ``steps``, ``tokens``, ``seconds``.
        """
        if part[0] == part[1]:
            return dict(adapter), dict(memory), {}
        return self.worker.train(self.client, adapter, memory, rnd, frozen or {}, nested or {}, part, factors, loss)

    def score(self, update: Tensors) -> dict[str, float]:
        """Nothing: held-out rows are the server's, and ``eval.clients`` scores clients' own models on them."""
        return {}


class SFTWorker:
    """One base model with PEFT's layers in it, and one trainer, for every client that this process stands for.

    Args:
        settings: how clients train.
        base: the frozen model.
        tokenizer: its tokenizer.
        rows: every client's encoded training rows, by client id.
        rounds: rounds of the run, for the schedule.
        on_step: called with the loss after every optimizer step.
    """

    def __init__(
        self,
        settings: SFT,
        base: nn.Module,
        tokenizer: Any,
        rows: Mapping[str, Sequence[Encoded]],
        rounds: int,
        on_step: Callable[[float | None], None] = lambda loss: None,
    ) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.settings, self.rounds = settings, rounds
        if processes() > 1:  # the Trainer then averages the adapters' gradients itself, and wraps no model in DDP
            setattr(base, "_is_distributed_loading_by_transformers", True)  # noqa: B010
        self.rows = {id: [{"input_ids": r.input_ids, "labels": r.labels} for r in of] for id, of in rows.items()}
        targets = list(target_shapes(base, settings.targets))
        with _own_randomness(0):  # PEFT draws factors that are replaced before they are used, and TRL sets a seed
            lora = LoraConfig(
                r=1, lora_alpha=1, target_modules=targets, lora_dropout=settings.dropout, task_type="CAUSAL_LM"
            )
            self.model = get_peft_model(base, lora, adapter_name=TRAINED)
            self.model.add_adapter(FROZEN, LoraConfig(r=1, lora_alpha=1, target_modules=targets, task_type="CAUSAL_LM"))
            self.trainer = _trainer(settings, self.model, tokenizer, next(iter(self.rows.values())), on_step)
        layers = {n: m for n, m in self.model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        self.layers: dict[str, Any] = {name: layers[name] for name in targets}
        gc.collect()
        gc.freeze()  # train() collects garbage: 0.2 s a call with a whole model in view

    def of(self, client: Client) -> Seat:
        """This worker, standing for ``client``."""
        return Seat(self, client)

    def train(
        self,
        client: Client,
        adapter: Tensors,
        memory: Tensors,
        rnd: Round,
        frozen: Tensors,
        nested: Tensors,
        part: tuple[float, float],
        factors: str,
        loss: Loss | None = None,
    ) -> tuple[dict[str, LowRank], dict[str, Tensor], dict[str, float]]:
        """See ``Seat.train``."""
        started = time.perf_counter()
        whole = self.settings.steps_for(len(self.rows[client.id]))
        self._hang(TRAINED, adapter)
        self._hang(FROZEN, frozen)
        self._activate([FROZEN, TRAINED] if frozen else [TRAINED], train=factors)
        trainer = self.trainer
        trainer.train_dataset = self.rows[client.id]
        trainer.args.max_steps = max(1, round(part[1] * whole) - round(part[0] * whole))
        trainer.args.learning_rate = self.settings.learning_rate_in(rnd.index, self.rounds)
        trainer.optimizer, trainer.lr_scheduler = None, None
        trainer._total_train_tokens = 0
        trainer.loss = loss
        draws = ("local", client.id) if part[0] == 0.0 else ("local", client.id, part[0])
        with _own_randomness(rnd.rng(*draws).initial_seed()), self._nested(nested) as inner:
            trained = inner or self._factors(factors)
            if self.settings.optimizer == "kept" and memory:
                self._restore(trainer.create_optimizer(), memory, trained)
            result = trainer.train()
            kept = self._moments(trainer.optimizer, trained) if self.settings.optimizer == "kept" else {}
            trainer.optimizer, trainer.lr_scheduler = None, None  # one client's moments are not held for the next
            trainer.loss = None
            returned = self._held_nested(inner, nested) if nested else {n: self._held(self.layers[n]) for n in adapter}
        metrics = {
            "train_loss": float(result.training_loss),
            "steps": result.global_step,
            "tokens": int(trainer._total_train_tokens),
            "seconds": time.perf_counter() - started,
        }
        return returned, kept, metrics

    @contextmanager
    def serving(self, update: Tensors) -> Iterator[nn.Module]:
        """The base model plus ``update`` (any rank, or dense), in eval mode, for as long as the context lasts."""
        self._hang(FROZEN, update)
        self._activate([FROZEN] if update else [])
        self.model.eval()
        try:
            yield self.model
        finally:
            self._activate([])

    def _hang(self, adapter: str, update: Tensors) -> None:
        """Puts ``B A`` into PEFT's layers as ``scale (B / scale) A``: any rank, float32, on the layer's device.

        Layers that ``update`` does not name get a zero, whatever an earlier client left there.
        """
        for name, layer in self.layers.items():
            product = as_lowrank(update[name]) if name in update else _nothing(layer)
            scale = self.settings.scale(product.rank) if adapter == TRAINED else 1.0
            device = layer.get_base_layer().weight.device
            layer.lora_A[adapter].weight = nn.Parameter(product.A.detach().to(device, torch.float32, copy=True))
            layer.lora_B[adapter].weight = nn.Parameter((product.B.detach() / scale).to(device, torch.float32))
            layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = product.rank
            layer.r[adapter], layer.scaling[adapter] = product.rank, scale

    def _held(self, layer: Any) -> LowRank:
        """The trained product, on the CPU, the scale folded into B."""
        B, A = layer.lora_B[TRAINED].weight.detach(), layer.lora_A[TRAINED].weight.detach()
        return LowRank((B * layer.scaling[TRAINED]).cpu(), A.to("cpu", copy=True))

    @contextmanager
    def _nested(self, products: Tensors) -> Iterator[dict[str, nn.Parameter]]:
        """Adds ``D U`` to factors of the trained adapter, which freezes; the new parameters, by product and place."""
        inner: dict[str, nn.Parameter] = {}
        modules = []
        for key, product in products.items():
            linear, _ = self._factor(key)
            linear.weight.requires_grad_(False)
            nest = _Nested(product.B.detach(), product.A.detach()).to(linear.weight)
            register_parametrization(linear, "weight", nest)
            modules.append(linear)
            inner |= {f"{key}/down": nest.down, f"{key}/up": nest.up}
        try:
            yield inner
        finally:
            for linear in modules:
                remove_parametrizations(linear, "weight", leave_parametrized=False)

    def _factor(self, key: str) -> tuple[Any, float]:
        """The linear map that holds ``B/name`` or ``A/name`` of the trained adapter, and the scale of its products."""
        factor, _, name = key.partition("/")
        layer = self.layers[name]
        return getattr(layer, f"lora_{factor}")[TRAINED], layer.scaling[TRAINED] if factor == "B" else 1.0

    def _held_nested(self, inner: Mapping[str, nn.Parameter], products: Tensors) -> dict[str, LowRank]:
        """The trained inner products, on the CPU, the scale folded in where it belongs to B."""
        held = {}
        for key in products:
            down, up = inner[f"{key}/down"].detach(), inner[f"{key}/up"].detach()
            held[key] = LowRank((down * self._factor(key)[1]).cpu(), up.to("cpu", copy=True))
        return held

    def _activate(self, adapters: list[str], *, train: str = "") -> None:
        for layer in self.layers.values():
            layer.set_adapter(adapters, inference_mode=True)
            layer.lora_A[TRAINED].weight.requires_grad_("A" in train)
            layer.lora_B[TRAINED].weight.requires_grad_("B" in train)

    def _factors(self, which: str) -> dict[str, nn.Parameter]:
        return {
            f"{name}/{factor}": getattr(layer, f"lora_{factor}")[TRAINED].weight
            for name, layer in self.layers.items()
            for factor in which
        }

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


def _nothing(layer: Any) -> LowRank:
    """Zero, as a product of rank 1 that does not train: PEFT's layers have no rank 0."""
    return LowRank(torch.zeros(layer.out_features, 1), torch.zeros(1, layer.in_features))


class _Nested(nn.Module):
    """``W -> W + D U``, D and U trained."""

    def __init__(self, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(up.clone())

    def forward(self, W: Tensor) -> Tensor:
        return W + self.down @ self.up


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
