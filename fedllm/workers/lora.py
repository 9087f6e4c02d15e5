"""LoRA layers of PEFT inside one base model, for clients of any rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from fedllm.core import Tensors
from fedllm.errors import FedError
from fedllm.lowrank import LowRank, as_lowrank

TRAINED, FROZEN = "client", "global"
"""The two adapters in the model: the one a client trains, and a frozen float32 one for all that came before."""


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


class LoRALayers:
    """A base model with two adapters of PEFT in every target module: a client's, which trains, and a frozen one.

    A client's rank is the rank of the factors that are loaded for the time it trains, so each pays for its own only.

    Args:
        base: the frozen model; PEFT's layers go into it.
        targets: names of its linear modules, matched as PEFT matches them.
        dropout: on the trained adapter's input.
        scale: ``s``, by which LoRA multiplies ``B A``, of a rank: alpha / r, or alpha / sqrt(r) with rsLoRA.
    """

    def __init__(self, base: nn.Module, targets: Sequence[str], dropout: float, scale: Callable[[int], float]) -> None:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora import LoraLayer

        self.scale = scale
        names = list(target_shapes(base, targets))
        lora = LoraConfig(r=1, lora_alpha=1, target_modules=names, lora_dropout=dropout, task_type="CAUSAL_LM")
        self.model = get_peft_model(base, lora, adapter_name=TRAINED)
        self.model.add_adapter(FROZEN, LoraConfig(r=1, lora_alpha=1, target_modules=names, task_type="CAUSAL_LM"))
        layers = {n: m for n, m in self.model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
        self.layers: dict[str, Any] = {name: layers[name] for name in names}

    @contextmanager
    def serving(self, update: Tensors) -> Iterator[nn.Module]:
        """The base model plus ``update`` (any rank, or dense), in eval mode, for as long as the context lasts."""
        self.load(FROZEN, update)
        self.activate([FROZEN] if update else [])
        self.model.eval()
        try:
            yield self.model
        finally:
            self.activate([])

    def load(self, adapter: str, update: Tensors) -> None:
        """Puts ``B A`` into PEFT's layers as ``scale (B / scale) A``: any rank, float32, on the layer's device.

        Layers that ``update`` does not name get a zero, whatever an earlier client left there.
        """
        for name, layer in self.layers.items():
            product = as_lowrank(update[name]) if name in update else _nothing(layer)
            scale = self.scale(product.rank) if adapter == TRAINED else 1.0
            device = layer.get_base_layer().weight.device
            layer.lora_A[adapter].weight = nn.Parameter(product.A.detach().to(device, torch.float32, copy=True))
            layer.lora_B[adapter].weight = nn.Parameter((product.B.detach() / scale).to(device, torch.float32))
            layer.lora_A[adapter].out_features = layer.lora_B[adapter].in_features = product.rank
            layer.r[adapter], layer.scaling[adapter] = product.rank, scale

    def product(self, name: str) -> LowRank:
        """The product that trains in this layer, the scale folded into B, with its gradient."""
        layer = self.layers[name]
        return LowRank(layer.lora_B[TRAINED].weight * layer.scaling[TRAINED], layer.lora_A[TRAINED].weight)

    def read(self, layer: Any) -> LowRank:
        """The trained product, on the CPU, the scale folded into B."""
        B, A = layer.lora_B[TRAINED].weight.detach(), layer.lora_A[TRAINED].weight.detach()
        return LowRank((B * layer.scaling[TRAINED]).cpu(), A.to("cpu", copy=True))

    @contextmanager
    def nested(self, products: Tensors, factors: str) -> Iterator[dict[str, nn.Parameter]]:
        """Adds ``D U`` to factors of the trained adapter, which freezes; the new parameters, by product and place.

        Args:
            factors: which of the new ones train: ``B`` is D, and ``A`` is U.
        """
        inner: dict[str, nn.Parameter] = {}
        modules = []
        for key, product in products.items():
            linear, _ = self.factor(key)
            linear.weight.requires_grad_(False)
            nest = _Nested(product.B.detach(), product.A.detach()).to(linear.weight)
            register_parametrization(linear, "weight", nest)
            modules.append(linear)
            inner |= {f"{key}/down": nest.down, f"{key}/up": nest.up}
            nest.down.requires_grad_("B" in factors)
            nest.up.requires_grad_("A" in factors)
        try:
            yield inner
        finally:
            for linear in modules:
                remove_parametrizations(linear, "weight", leave_parametrized=False)

    def factor(self, key: str) -> tuple[Any, float]:
        """The linear map that holds ``B/name`` or ``A/name`` of the trained adapter, and the scale of its products."""
        factor, _, name = key.partition("/")
        layer = self.layers[name]
        return getattr(layer, f"lora_{factor}")[TRAINED], layer.scaling[TRAINED] if factor == "B" else 1.0

    def read_nested(self, inner: Mapping[str, nn.Parameter], products: Tensors) -> dict[str, LowRank]:
        """The trained inner products, on the CPU, the scale folded in where it belongs to B."""
        held = {}
        for key in products:
            down, up = inner[f"{key}/down"].detach(), inner[f"{key}/up"].detach()
            held[key] = LowRank((down * self.factor(key)[1]).cpu(), up.to("cpu", copy=True))
        return held

    def activate(self, adapters: list[str], *, train: str = "") -> None:
        for layer in self.layers.values():
            layer.set_adapter(adapters, inference_mode=True)
            layer.lora_A[TRAINED].weight.requires_grad_("A" in train)
            layer.lora_B[TRAINED].weight.requires_grad_("B" in train)

    def parameters(self, which: str) -> dict[str, nn.Parameter]:
        return {
            f"{name}/{factor}": getattr(layer, f"lora_{factor}")[TRAINED].weight
            for name, layer in self.layers.items()
            for factor in which
        }
