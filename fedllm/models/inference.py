"""Held-out loss and generation, in batches sorted by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.data.encoding import Encoded, decode_answer, tokens


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; without one, generation is greedy.

    Args:
        temperature: the logits are divided by it.
        top_p: tokens are drawn from the smallest set that holds this much probability.
        seed: of this batch's draws.
        top_k: tokens are drawn from this many of the likeliest; 0 for all.
    """

    temperature: float
    top_p: float
    seed: int
    top_k: int = 0


class Answer(NamedTuple):
    """A generated text, and whether ``max_new_tokens`` cut it off before it ended by itself."""

    text: str
    cut: bool


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
    """The text of `answers`, greedy."""
    found = answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, stop=stop)
    return [answer.text for answer in found]


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    stop: Sequence[str] = (),
    finished: Callable[[str], bool] | None = None,
    sampling: Sampling | None = None,
) -> list[Answer]:
    """The continuation of every prompt, in the order given, without special tokens.

    Args:
        stop: an answer may end where one of these has been written; what follows in it is not to be relied on.
        finished: whether an answer in which one of ``stop`` was written is done; any is by default.
        sampling: how tokens are drawn, its seed that of the first batch; greedy without.
    """
    ids = tokens(tokenizer, prompts)
    found: dict[int, Answer] = {}
    for number, chosen in enumerate(batches([len(prompt) for prompt in ids], batch_size)):
        drawn = sampling and replace(sampling, seed=sampling.seed + number)
        made = continue_batch(model, tokenizer, [ids[i] for i in chosen], max_new_tokens, stop, drawn, finished)
        found.update(zip(chosen, made, strict=True))
    return [found[i] for i in range(len(prompts))]


@torch.no_grad()
def continue_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Sequence[str] = (),
    sampling: Sampling | None = None,
    finished: Callable[[str], bool] | None = None,
) -> list[Answer]:
    """One batch of token ids, continued; see `answers`. ``sampling`` leaves the global generators as they were."""
    batch = _padded(prompts, tokenizer.pad_token_id, left=True).to(_device(model))
    mask = _padded([[1] * len(ids) for ids in prompts], 0, left=True).to(batch)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if sampling:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    done = finished or (lambda text: any(part in text for part in stop))
    if stop:
        how["stopping_criteria"] = _stopping(tokenizer, stop, prompts, batch.shape[1], done)
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
    return [
        _answer(tokenizer, prompt, ids, max_new_tokens, done)
        for prompt, ids in zip(prompts, made[:, batch.shape[1] :].tolist(), strict=True)
    ]


def _answer(
    tokenizer: Any, prompt: Sequence[int], ids: Sequence[int], limit: int, done: Callable[[str], bool]
) -> Answer:
    ended = tokenizer.eos_token_id in ids
    text = decode_answer(tokenizer, prompt, ids[: ids.index(tokenizer.eos_token_id)] if ended else ids)
    return Answer(text, not ended and len(ids) >= limit and not done(text))


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


def _stopping(
    tokenizer: Any,
    stop: Sequence[str],
    prompts: Sequence[Sequence[int]],
    width: int,
    finished: Callable[[str], bool],
) -> Any:
    """A row is done when one of ``stop`` is in its last tokens (as many as it has bytes, and one) and it is finished.

    Args:
        width: tokens of a prompt with its padding.
    """
    from transformers import StoppingCriteriaList

    reach = max(len(text.encode()) for text in stop) + 1

    def ends(prompt: Sequence[int], made: list[int]) -> bool:
        before = [*prompt, *made[:-reach]][-reach:]  # so that no first space is lost
        tail = decode_answer(tokenizer, before, made[-reach:])
        return any(text in tail for text in stop) and finished(decode_answer(tokenizer, prompt, made))

    def done(input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        rows = zip(prompts, input_ids[:, width:].tolist(), strict=True)
        return torch.tensor([ends(prompt, made) for prompt, made in rows], device=input_ids.device)

    return StoppingCriteriaList([done])


def _padded(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> Tensor:
    """``(len(rows), longest)``."""
    width = max(len(row) for row in rows)
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*f, *row] if left else [*row, *f] for f, row in zip(fill, rows, strict=True)])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
