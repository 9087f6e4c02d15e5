"""Checks that a base model is the one that was asked for: a weight that is drawn at random gives a score of nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedllm.errors import FedError

WRAPPERS = ("module.", "_orig_mod.", "model.module.", "_fsdp_wrapped_module.", "base_model.model.")
"""What data parallelism, a compiler, FSDP and PEFT put before a name."""

POINTER = b"version https://git-lfs"
BUFFERS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Tables that older libraries saved and newer ones compute."""

SHOWN = 3


def check_architecture(config: Any, name: str) -> None:
    """Raises:
    FedError: where no causal language model has this configuration.
    """
    from transformers import AutoModelForCausalLM

    kind = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False) or type(config) not in AutoModelForCausalLM._model_mapping:
        raise FedError(
            f"model.name={name}: {kind} is no causal language model, and clients train those. Give a decoder such as "
            "Llama, Mistral, Qwen or GPT-2."
        )


def check_files(folder: Path, name: str) -> None:
    """Raises:
    FedError: where a weights file is a pointer of Git LFS, or empty.
    """
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), *folder.glob("*.gguf")]):
        with file.open("rb") as opened:
            head = opened.read(len(POINTER))
        if head == POINTER:
            raise FedError(
                f"model.name={name}: {file.name} is a pointer of Git LFS, a text of a few lines and not the weights. "
                "Fetch the file itself: git lfs pull."
            )
        if not head:
            raise FedError(f"model.name={name}: {file.name} is empty. Fetch it again.")


def check_names(told: Mapping[str, Any], name: str) -> None:
    """Checks the loading info of ``transformers``.

    Args:
        told: ``missing_keys``, ``unexpected_keys``, and ``mismatched_keys`` as (name, found shape, wanted shape).

    Raises:
        FedError: where a weight of the model has no tensor in the files, or a tensor no weight.
    """
    missing = sorted(told.get("missing_keys", ()))
    unexpected = sorted(key for key in told.get("unexpected_keys", ()) if not key.endswith(BUFFERS))
    other_shape = sorted(told.get("mismatched_keys", ()))
    if not missing and not unexpected and not other_shape:
        return
    found = []
    if missing:
        found.append(f"{len(missing)} weights of the model are not in its files ({_some(missing)})")
    if unexpected:
        found.append(f"{len(unexpected)} tensors of its files are no weights of the model ({_some(unexpected)})")
    if other_shape:
        shapes = [f"{key}: {tuple(has)} instead of {tuple(wants)}" for key, has, wants in other_shape]
        found.append(f"{len(other_shape)} have another shape ({_some(shapes)})")
    wrapper = next((prefix for prefix in WRAPPERS if unexpected and unexpected[0].startswith(prefix)), None)
    cause = f" The names begin with {wrapper!r}: save the model that is inside the wrapper." if wrapper else ""
    raise FedError(f"model.name={name}: {'; '.join(found)}. Missing ones would be drawn at random.{cause}")


def check_values(net: nn.Module, name: str) -> None:
    """Raises:
    FedError: where a weight is not finite.
    """
    for key, weight in net.named_parameters():
        here = weight.to_local() if hasattr(weight, "to_local") else weight
        if here.is_floating_point() and not bool(torch.isfinite(here.detach().sum(dtype=torch.float64))):
            raise FedError(f"model.name={name}: {key} has entries that are no finite numbers. The file is damaged.")


def check_tokenizer(tokenizer: Any, config: Any, name: str) -> None:
    """Raises:
    FedError: where a token has no row in the model's embedding.
    """
    rows = getattr(config.get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values(), default=0)
    if isinstance(rows, int) and largest >= rows:
        raise FedError(
            f"model.name={name}: the tokenizer has ids up to {largest}, and the model embeds {rows} tokens "
            f"(0 to {rows - 1}). Resize the embedding and save again, or take the tokenizer that it came with."
        )


def check_adapter(tensors: set[str], expected: set[str], weights: set[str], where: str) -> None:
    """Checks that each tensor of an adapter finds its module, and each module its tensor.

    Args:
        tensors: the names in the adapter's file.
        expected: those that PEFT would save of the model that carries the adapter.
        weights: the names of that model's weights, for embeddings that are saved beside an adapter.

    Raises:
        FedError: where one is left over.
    """
    given = {name.replace(".default.", ".") for name in tensors}
    homeless = sorted(name for name in given - expected if name not in weights)
    missing = sorted(expected - given)
    if not homeless and not missing:
        return
    found = []
    if homeless:
        found.append(f"{len(homeless)} of its {len(given)} tensors fit no module of the model ({_some(homeless)})")
    if missing:
        found.append(f"{len(missing)} factors that its adapter_config.json asks for are not in it ({_some(missing)})")
    bare = homeless and not homeless[0].startswith("base_model.model.")
    cause = " PEFT's names begin with 'base_model.model.': save the adapter with save_pretrained." if bare else ""
    raise FedError(f"{where}: {'; '.join(found)}. Half an adapter is none.{cause}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
