"""Evaluates a language model on held-out rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fedllm.core import Score
from fedllm.models.inference import answers, held_out_loss


def measured(model: nn.Module, federation: Any) -> Score:
    """Held-out loss of a model as it is, and the task's scores of its generated answers.

    Args:
        federation: the ``TextFederation`` that has the held-out rows.
    """
    recipe, task, test = federation.recipe, federation.recipe.data.task, federation.test
    tokenizer, size = federation.tokenizer, recipe.eval.batch_size
    metrics = {"loss": held_out_loss(model, federation.scored, tokenizer.pad_token_id, size)}
    if not recipe.eval.generate:
        return Score(metrics, [])
    prompts = [task.prompt(row) for row in test]
    limit = recipe.eval.max_new_tokens or task.max_new_tokens
    found = answers(
        model,
        tokenizer,
        prompts,
        max_new_tokens=limit,
        batch_size=size,
        stop=task.ends_near,
        finished=task.finished,
    )
    scored = task.score_all([answer.text for answer in found], test, recipe.eval.accept_missing)
    metrics |= task.summary(scored)
    generations = [
        {"prompt": prompt, "generated": answer.text, "cut": answer.cut, "target": task.target(row), **score}
        for prompt, answer, row, score in zip(prompts, found, test, scored, strict=True)
    ]
    return Score(metrics, generations)


def device() -> torch.device:
    """This process's: its GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
