"""A base model with a PEFT adapter on it: the whole adapter, or a sentence."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fedllm.errors import FedError
from fedllm.models.loading_checks import check_adapter

TENSORS = "adapter_model.safetensors"


def with_adapter(base: Any, folder: Path, base_name: str) -> Any:
    """``base`` as plain PEFT serves it with the adapter in ``folder``, in eval mode.

    Raises:
        FedError: where the adapter is not read in full.
    """
    from peft import PeftModel, get_peft_model_state_dict

    where = f"adapter={folder}"
    if not (folder / TENSORS).is_file():
        raise FedError(f"{where} has no {TENSORS}: save the adapter with PEFT's save_pretrained. Pickles are not read.")
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            names = set(file.keys())
        with warnings.catch_warnings():  # of missing keys: check_adapter says it in a sentence
            warnings.simplefilter("ignore", UserWarning)
            loaded = PeftModel.from_pretrained(base, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FedError(f"{where} does not fit {base_name}: {reason}") from error
    expected = set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    check_adapter(names, expected, set(loaded.state_dict()), where)
    return loaded
