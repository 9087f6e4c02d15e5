"""What it costs to reach a score: rounds, bytes and FLOPs until the first evaluated round that is as good."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from fedllm.errors import FedError
from fedllm.reports.compare.runs import Entry, methods_in, settings_in
from fedllm.reports.formatting import is_fraction, operations, size
from fedllm.reports.markdown import safe, said, table
from fedllm.reports.run_record import course_of, lower_is_better


@dataclass(frozen=True)
class Cost:
    """What a run had spent at the end of a round."""

    rounds: int
    bytes: float
    flops: float


def goals(entries: Sequence[Entry], keys: Sequence[str], target: str | None) -> tuple[str, dict[str, float]]:
    """The metric that is to be reached and its value in each setting.

    By default the held-out loss that every federated run of the setting reached, or the first score without one.
    """
    settings = settings_in(e for e in entries if not e.pooled)
    if target is not None:
        key, _, value = target.partition("=")
        try:
            wanted = float(value)
        except ValueError:
            wanted = math.nan
        if key not in keys or not math.isfinite(wanted):
            raise FedError(f"--target {target}: give METRIC=VALUE, a metric of {', '.join(keys)}.")
        return key, dict.fromkeys(settings, wanted)
    key = course_of(keys) or keys[0]
    reached: dict[str, list[float]] = {}
    for entry in (e for e in entries if not e.pooled):
        values = [value for _, value in entry.story.curve("eval", key)]
        reached.setdefault(entry.setting, []).append(min(values) if lower_is_better(key) else max(values))
    return key, {s: max(values) if lower_is_better(key) else min(values) for s, values in reached.items()}


def cost_of(entry: Entry, key: str, target: float) -> Cost | None:
    """Until the first evaluated round that is at least as good; None where none is."""
    for index, value in entry.story.curve("eval", key):
        if value <= target if lower_is_better(key) else value >= target:
            return Cost(index, entry.moved()[index], entry.computed()[index])
    return None


def cost_tables(entries: Sequence[Entry], key: str, targets: Mapping[str, float]) -> list[str]:
    """One a setting: rounds, bytes both ways and FLOPs until the target, means over the seeds that reached it."""
    sign = "at most" if lower_is_better(key) else "at least"
    scale, unit = (100, " %") if is_fraction(key) else (1, "")
    found = []
    for setting, target in targets.items():
        ours = [e for e in entries if e.setting == setting and not e.pooled]
        counted = any(max(e.computed().values()) for e in ours)
        head = f"{safe(setting)}: " * bool(setting) + f"{said(key)} {sign} {scale * target:.4g}{unit}"
        lines = [
            [safe(method), *cost_cells([cost_of(e, key, target) for e in ours if e.method == method], counted)]
            for method in methods_in(ours)
        ]
        found.append(table([head, "rounds", "bytes", *(["FLOPs"] if counted else [])], lines))
    return found


def cost_cells(costs: Sequence[Cost | None], counted: bool) -> list[str]:
    known = [cost for cost in costs if cost is not None]
    if not known:
        return ["never", *(["–"] * (1 + counted))]
    part = f" ({len(known)} of {len(costs)} seeds)" if len(known) < len(costs) else ""
    cells = [f"{fmean(c.rounds for c in known):.4g}{part}", size(fmean(c.bytes for c in known))]
    return [*cells, *([operations(fmean(c.flops for c in known))] if counted else [])]
