"""What lies beside an adapter's two files: tokenizer and chat template, a record of how it was made, a card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.reports.markdown import safe, table
from fedllm.storage import files
from fedllm.storage.peft_folder import CONFIG, TOKENIZER

RECORD = "aggregate.json"

LARGEST = 64 << 20
"""Bytes of a tokenizer's file that are copied; the largest in use have a third of it."""


def copy_tokenizer(folders: Sequence[Path], out: Path) -> list[str]:
    """Copies each tokenizer file that all folders have, byte for byte the same; remarks on those that differ."""
    copied, differing = [], []
    for name in TOKENIZER:
        held = [_content(folder / name) for folder in folders]
        if not any(held):
            continue
        if held[0] is not None and all(content == held[0] for content in held):
            files.write(out / name, held[0])
            copied.append(name)
        else:
            differing.append(name)
    if not differing:
        return []
    for name in copied:  # half a tokenizer would load, and be another one
        (out / name).unlink()
    return [f"No tokenizer was written: the adapters' {', '.join(differing)} are not the same in all folders."]


def _content(file: Path) -> bytes | None:
    if file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST:
        return None
    return file.read_bytes()


def describe(out: Path, record: Mapping[str, Any]) -> None:
    """Writes the record of an aggregate and a card made of it."""
    files.write(out / RECORD, json.dumps(record, indent=1) + "\n")
    files.write(out / "README.md", card(out, record))


def card(folder: Path, record: Mapping[str, Any], licence: str | None = None) -> str:
    """A model card in Markdown of an adapter folder, from its record and config alone."""
    from fedllm.export.model_card import HUB_ID, shareable

    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    base = shareable(config.get("base_model_name_or_path") or "") or "BASE_MODEL"
    on_hub = bool(HUB_ID.fullmatch(base))
    data = ["library_name: peft", "tags:", "- federated-learning", "- lora", "- fedllm"]
    if on_hub:
        data = [f"base_model: {base}", *data]
    if licence:
        data = [f"license: {json.dumps(licence)}", *data]
    rows = [
        [safe(str(row["folder"])), str(row["rank"]), str(row["samples"]), f"{row['share'] or 0.0:.4f}"]
        for row in record.get("clients", [])
    ]
    made = f", aggregated from {len(rows)} adapters by **{safe(str(record['rule']))}**" if rows else ""
    tokenizer = "THIS_FOLDER" if (folder / "tokenizer_config.json").is_file() else base
    parts = [
        "---\n" + "\n".join(data) + "\n---",
        f"# {safe(folder.name)}",
        f"A LoRA adapter of `{base}`{made}.",
        USAGE.format(base=base, tokenizer=tokenizer),
    ]
    if rows:
        parts.append(table(["adapter", "rank", "rows", "share"], rows))
        constants = ", ".join(f"`{key}={value}`" for key, value in record.get("constants", {}).items())
        parts.append(f"Constants: {constants}." if constants else "")
        parts += [f"- {safe(remark)}" for remark in record.get("remarks", [])]
    parts.append("This card was written by a program; nobody has read it.")
    return "\n\n".join(part for part in parts if part) + "\n"


USAGE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("{tokenizer}")
```"""
