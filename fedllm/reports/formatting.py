"""Numbers, sizes and durations as words for a person."""

from __future__ import annotations

from typing import Any


def number(value: Any) -> float | None:
    """A number that can be told and drawn (finite, below 1e100), or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        known = float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None
    return known if abs(known) < 1e100 else None


def is_fraction(name: str) -> bool:
    """Whether a metric is a share of 1, shown in percent."""
    return any(word in name.lower() for word in ("exact_match", "accuracy", "pass@", "pass_at", "rouge"))


def metric(name: str, value: float) -> str:
    """A metric's value for a person: ``43.8%`` for a fraction, three digits or more for a number."""
    if is_fraction(name):
        return f"{100 * value:.1f}%"
    if value == int(value) and abs(value) < 1e15 and "loss" not in name:
        return f"{int(value):,}"
    return f"{value:.3f}" if 0.01 <= abs(value) < 1e4 or value == 0 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes in decimal units: ``1.2 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def operations(count: float) -> str:
    """FLOPs in decimal units: ``1.2 T``; a dash where none were counted."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}".strip() if count else "–"
        count /= 1000
    return f"{count:,.3g} P"


def span(seconds: float) -> str:
    """``42 s``, ``7:05``, ``2:07:05``."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
