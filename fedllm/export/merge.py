"""The base model with an adapter added into its weights, and the proof that it is the same model as base + adapter.

The sum is taken in float32, from the base as it was published: never from a quantised or bfloat16 copy, which would
round most of a small update away.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.errors import FedError
from fedllm.lowrank import LowRank
from fedllm.models import language
from fedllm.models.language import LanguageModel
from fedllm.models.peft_adapter import with_adapter
from fedllm.storage import peft_folder as adapters

CPU = torch.device("cpu")

LOST, NOISE = 0.01, 1e-5
"""A merge counts where no logit is off by more than 1 % of the update's own effect, or than float32's rounding."""


@dataclass(frozen=True)
class Merged:
    """What was measured of a merged model. Logits are float32, over the probe's tokens; W, BA over all merged weights.

    Args:
        dtype: of the weights on disk.
        modules: weights that were merged.
        merge_error: ``||W' - (W + BA)|| / ||BA||``, W' the float32 sum and the other one in float64.
        effect: the largest change of a logit that the update makes.
        logits_error: the largest difference of a logit between the float32 sum, reloaded, and base + adapter in PEFT.
        cast_error: ``||cast(W') - (W + BA)|| / ||BA||``: what rounding to ``dtype`` costs of the update.
        cast_logits_error: as ``logits_error``, of the weights on disk.
        same_token: share of the probe's places where the weights on disk find the same token likeliest.
    """

    dtype: str
    modules: int
    merge_error: float
    effect: float
    logits_error: float
    cast_error: float
    cast_logits_error: float
    same_token: float


def merge(
    model: LanguageModel, adapter: Path, out: Path, *, dtype: str = "auto", seed: int = 0, texts: Sequence[str] = ()
) -> Merged:
    """Writes the merged model and its tokenizer to ``out``, which plain ``transformers`` loads.

    Memory: the base in float32, once. Disk: the same beside ``out`` while it is checked.

    Args:
        model: the base; its own quantization and dtype are not used.
        adapter: a PEFT folder.
        dtype: of the weights written; ``auto`` is the one the base was published in.
        seed: of a random base (``pico``).
        texts: what the logits are compared on; random tokens without any.

    Raises:
        FedError: ``out`` is taken, the adapter does not fit, or the merged model is not the served one.
    """
    if out.exists():
        raise FedError(f"{out} exists: give the merged model a new folder, or remove that one.")
    plain = dataclasses.replace(model, dtype="float32", quantization="none")
    base: Any = language.load(plain, CPU, seed)
    tokenizer = language.tokenizer(plain)
    batch = probe(tokenizer, base.config.vocab_size, texts, seed)
    untouched = logits(base, batch)
    with served(base, adapter) as whole:
        expected = logits(whole, batch)
    updates = adapters.read(adapter).updates
    target = published(model) if dtype == "auto" else getattr(torch, dtype)
    merge_error, cast_error = add(base, updates, target)
    scratch, final = (out.with_name(f".{out.name}.{part}") for part in ("float32", target_name(target)))
    try:
        save(base, tokenizer, scratch)
        del base, whole
        error = difference(reloaded(scratch, batch), expected)
        effect = difference(expected, untouched)
        if not error <= max(LOST * effect, NOISE * float(expected.abs().max())):
            raise FedError(
                f"the merged model is not the one that was trained: its logits are off by up to {error:.2g}, where the "
                f"update changes them by {effect:.2g}. It was not kept. Serve {adapter} with PEFT instead."
            )
        if target != torch.float32:
            cast(scratch, tokenizer, final, target)
            shutil.rmtree(scratch)
        else:
            final = scratch
        found = reloaded(final, batch)
        agreeing = float((found.argmax(-1) == expected.argmax(-1)).float().mean())
        final.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        shutil.rmtree(final, ignore_errors=True)
    return Merged(
        target_name(target), len(updates), merge_error, effect, error, cast_error, difference(found, expected), agreeing
    )


def add(base: Any, updates: dict[str, LowRank], target: torch.dtype) -> tuple[float, float]:
    """Adds every ``B A`` to its weight, in place; the errors of the sum and of its cast, as in ``Merged``."""
    from transformers.pytorch_utils import Conv1D

    modules = dict(base.named_modules())
    shared = base.get_input_embeddings().weight
    off, rounded, total = 0.0, 0.0, 0.0
    for name, update in updates.items():
        module: Any = modules.get(name)
        if not isinstance(module, nn.Linear | Conv1D):
            raise FedError(f"the adapter changes {name}, and the base model has no linear module of that name.")
        if module.weight is shared:
            raise FedError(
                f"{name} shares its weight with the input embedding, so merging would change both: serve the adapter."
            )
        weight = module.weight.data  # (d_out, d_in), or its transpose in Conv1D
        change = update.B.double() @ update.A.double()
        exact = weight.double() + (change.T if isinstance(module, Conv1D) else change)
        weight.copy_(exact)
        off += float((weight.double() - exact).square().sum())
        rounded += float((exact.to(torch.float32).to(target).double() - exact).square().sum())
        total += float(change.square().sum())
    return (math.sqrt(off / total), math.sqrt(rounded / total)) if total else (0.0, 0.0)


def probe(tokenizer: Any, vocabulary: int, texts: Sequence[str], seed: int) -> list[Tensor]:
    """Up to eight rows of tokens, ``(1, T)`` each, 128 of them at most."""
    if texts:
        rows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :128] for text in texts[:8]]
        return [row for row in rows if row.shape[1]]
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocabulary, (1, 64), generator=generator) for _ in range(8)]


@torch.no_grad()
def logits(model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    """``(tokens of all rows, vocabulary)``."""
    return torch.cat([model(input_ids=row, use_cache=False).logits[0].float() for row in batch])


@contextmanager
def served(base: nn.Module, adapter: Path) -> Iterator[nn.Module]:
    """Base + adapter as plain PEFT serves them; afterwards the base is as it was."""
    whole = with_adapter(base, adapter, "the base model")
    yield whole
    whole.unload()


def published(model: LanguageModel) -> torch.dtype:
    """The dtype that the base's own config names; float32 where it names none."""
    named = getattr(language.config(model), "dtype", None)
    return named if isinstance(named, torch.dtype) else torch.float32


def target_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """As ``from_pretrained`` reads it, with nothing in it of where the base lay."""
    shutil.rmtree(folder, ignore_errors=True)
    model.config.name_or_path = ""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def cast(folder: Path, tokenizer: Any, out: Path, dtype: torch.dtype) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save(model.to(dtype), tokenizer, out)


def reloaded(folder: Path, batch: Sequence[Tensor]) -> Tensor:
    """The logits of what is on disk: its weights, with float32's arithmetic."""
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), batch)


def difference(one: Tensor, other: Tensor) -> float:
    """The largest of any entry; infinite where one is no number."""
    worst = float((one - other).abs().max())
    return worst if math.isfinite(worst) else math.inf
