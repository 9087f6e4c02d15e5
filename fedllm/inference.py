"""Held-out loss and greedy generation, in batches sorted by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.rows import Encoded


@torch.no_grad()
def held_out_loss(model: Any, rows: Sequence[Encoded], pad: int, batch_size: int) -> float:
    """Mean cross-entropy in nats per completion token, over all tokens of all rows."""
    total, count = 0.0, 0
    for batch in _batches(rows, [len(row.input_ids) for row in rows], batch_size):
        ids = _padded([row.input_ids for row in batch], pad, left=False).to(_device(model))
        mask = _padded([[1] * len(row.input_ids) for row in batch], 0, left=False).to(ids)
        labels = _padded([row.labels for row in batch], -100, left=False).to(ids)[:, 1:]
        hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        scored = labels != -100
        total += float(nn.functional.cross_entropy(hidden[scored].float(), labels[scored], reduction="sum"))
        count += int(scored.sum())
    return total / max(count, 1)


@torch.no_grad()
def generate(model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int) -> list[str]:
    """The greedy continuation of every prompt, in the order given, without special tokens."""
    ids = tokenizer(list(prompts))["input_ids"]
    order = sorted(
        range(len(prompts)), key=lambda i: len(ids[i]), reverse=True
    )  # the longest first: memory peaks early
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = _padded([ids[i] for i in chosen], tokenizer.pad_token_id, left=True).to(_device(model))
        mask = _padded([[1] * len(ids[i]) for i in chosen], 0, left=True).to(batch)
        made = model.generate(
            input_ids=batch,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        texts = tokenizer.batch_decode(made[:, batch.shape[1] :], skip_special_tokens=True)
        answers.update(zip(chosen, texts, strict=True))
    return [answers[i] for i in range(len(prompts))]


def _batches(rows: Sequence[Encoded], lengths: Sequence[int], size: int) -> Iterator[list[Encoded]]:
    order = sorted(range(len(rows)), key=lambda i: lengths[i], reverse=True)
    for start in range(0, len(order), size):
        yield [rows[i] for i in order[start : start + size]]


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    """``(len(rows), longest)``."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
