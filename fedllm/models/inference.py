"""Held-out loss and generation, in batches sorted by length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.data.encoding import Encoded, tokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without one, generation is greedy.

    Args:
        temperature: the logits are divided by it.
        top_p: tokens are drawn from the smallest set that holds this much probability.
        seed: of this batch's draws.
    """

    temperature: float
    top_p: float
    seed: int


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Places in ``lengths``, the longest first: memory peaks in the first batch, and few tokens are padding."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True)
    return [order[start : start + size] for start in range(0, len(order), size)]


def held_out_loss(model: Any, rows: Sequence[Encoded], pad: int, batch_size: int) -> float:
    """Mean cross-entropy in nats per completion token, over all tokens of all rows."""
    plan = batches([len(row.input_ids) for row in rows], batch_size)
    sums = [pair for chosen in plan for pair in row_losses(model, [rows[i] for i in chosen], pad)]
    return sum(nats for nats, _ in sums) / max(sum(tokens for _, tokens in sums), 1)


@torch.no_grad()
def row_losses(model: Any, rows: Sequence[Encoded], pad: int) -> list[tuple[float, int]]:
    """One batch: each row's cross-entropy summed over its completion, in nats, and the number of those tokens."""
    ids = _padded([row.input_ids for row in rows], pad, left=False).to(_device(model))
    mask = _padded([[1] * len(row.input_ids) for row in rows], 0, left=False).to(ids)
    labels = _padded([row.labels for row in rows], -100, left=False).to(ids)[:, 1:]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    scored = labels != -100
    nats = torch.zeros(labels.shape, dtype=torch.float64)
    nats[scored.cpu()] = (
        nn.functional.cross_entropy(logits[scored].float(), labels[scored], reduction="none").double().cpu()
    )
    return list(zip(nats.sum(1).tolist(), scored.sum(1).tolist(), strict=True))


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
) -> list[str]:
    """The greedy continuation of every prompt, in the order given, without special tokens.

    Args:
        stop: an answer may end where one of these has been written; what follows in it is not to be relied on.
    """
    ids = tokens(tokenizer, prompts)
    answers: dict[int, str] = {}
    for chosen in batches([len(prompt) for prompt in ids], batch_size):
        texts = continue_batch(model, tokenizer, [ids[i] for i in chosen], max_new_tokens, stop)
        answers.update(zip(chosen, texts, strict=True))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def continue_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
) -> list[str]:
    """One batch of token ids, continued. ``sampling`` leaves the global generators as they were."""
    batch = _padded(prompts, tokenizer.pad_token_id, left=True).to(_device(model))
    mask = _padded([[1] * len(ids) for ids in prompts], 0, left=True).to(batch)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    if stop:
        how["stopping_criteria"] = _stopping(tokenizer, stop, batch.shape[1])
    with _plainly(model), torch.random.fork_rng():
        torch.manual_seed(sampling.seed if sampling else 0)
        made = model.generate(
            input_ids=batch,
            attention_mask=mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **how,
        )
    return tokenizer.batch_decode(made[:, batch.shape[1] :], skip_special_tokens=True)


@contextmanager
def _plainly(model: Any) -> Iterator[None]:
    """Without the generation settings that a model was published with.

    A repetition penalty among them would change greedy answers, and what is passed to ``generate`` is filled up from
    them. PEFT's wrapper hands its own to the model inside.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    published = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, settings in zip(owners, published, strict=True):
            owner.generation_config = settings


def _stopping(tokenizer: Any, stop: Sequence[str], prompt: int) -> Any:
    """A row is done when one of ``stop`` is in its last tokens: as many as it has bytes, and one."""
    from transformers import StoppingCriteriaList

    reach = max(len(text.encode()) for text in stop) + 1

    def done(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = tokenizer.batch_decode(
            input_ids[:, max(prompt, input_ids.shape[1] - reach) :], skip_special_tokens=True
        )
        return torch.tensor([any(text in tail for text in stop) for tail in tails], device=input_ids.device)

    return StoppingCriteriaList([done])


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    """``(len(rows), longest)``."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
