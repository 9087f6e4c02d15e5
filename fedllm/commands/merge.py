"""``fedllm merge``: an adapter added into the weights of its base model, without a run."""

from __future__ import annotations

from pathlib import Path

from fedllm.errors import FedError
from fedllm.export.merge import merge
from fedllm.models.language import LanguageModel
from fedllm.storage import peft_folder


def merge_adapter(adapter: Path, base: str | None, out: Path, dtype: str) -> str:
    """Writes the merged model to ``out``; a line that says what was measured.

    Raises:
        FedError: neither ``base`` nor the adapter names a model, or as ``fedllm.export.merge.merge``.
    """
    name = base or peft_folder.read(adapter).base_model
    if not name:
        raise FedError(f"{adapter} names no base model: give --base ID, a Hub id or a folder.")
    done = merge(LanguageModel(name=name), adapter, out, dtype=dtype)
    return (
        f"{done.modules} weights of {name} merged into {out} ({done.dtype}): logits are off from base + adapter by "
        f"{done.cast_logits_error:.2g} at most, where the adapter changes them by up to {done.effect:.2g}."
    )
