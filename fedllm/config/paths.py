"""Paths that people write."""

from __future__ import annotations

from pathlib import Path


def absolute(name: str) -> str:
    """The absolute path where ``name`` is a file or folder of this machine, else the name as it is."""
    try:
        path = Path(name).expanduser()
        return str(path.absolute()) if path.exists() else name
    except (OSError, RuntimeError, ValueError):  # too long, a home of nobody's, a null character
        return name
