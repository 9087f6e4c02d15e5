"""What a node keeps on its disk, and the server too: replies by their job's key, memories by their digest."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fedllm.fleets.flower.notes import is_digest


@dataclass(frozen=True)
class Store:
    """Files named by 32 hex digits, each written whole or not at all, of which the newest are kept.

    Args:
        folder: theirs alone.
        most: how many are kept.
    """

    folder: Path
    most: int

    def put(self, name: str, content: bytes) -> None:
        """On disk when it returns."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        scratch = self.folder / f".{name}.writing"
        with open(scratch, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        scratch.replace(self.folder / name)
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._trim()

    def get(self, name: str) -> bytes | None:
        """The content, None where there is none of that name."""
        path = self.folder / name
        if not is_digest(name) or path.is_symlink() or not path.is_file():
            return None
        os.utime(path)  # in use: it is not the oldest
        return path.read_bytes()

    def _trim(self) -> None:
        held = sorted(
            (path for path in self.folder.iterdir() if is_digest(path.name)), key=lambda path: path.stat().st_mtime_ns
        )
        for old in held[: -self.most]:
            old.unlink(missing_ok=True)
