"""Flower's programs as children: restarted when they end, gone when this process is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PAUSE = 5.0
"""Seconds between an end and the next start: a SuperNode is let in again only when its old session has lapsed."""

_TIED = (
    "import ctypes, os, signal, sys\n"
    "try: ctypes.CDLL(None).prctl(1, signal.SIGTERM)\n"  # PR_SET_PDEATHSIG: Linux alone
    "except (OSError, AttributeError): pass\n"
    "os.execv(sys.argv[1], sys.argv[1:])\n"
)


@dataclass
class Child:
    """A program that is started again for as long as its context lasts.

    Args:
        command: its path and arguments.
        environment: all of its variables.
        log: the file that its output goes to; cut when it is too long.
        ended: is told the last lines when it ends by itself; what it returns is said to the operator.
    """

    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    ended: Callable[[str], None] = lambda tail: None
    pause: float = PAUSE
    _process: subprocess.Popen[bytes] | None = None
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Child:
        self._thread = threading.Thread(target=self._keep, daemon=True, name=Path(self.command[0]).name)
        self._thread.start()
        return self

    def __exit__(self, *ended: object) -> None:
        self._stop.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5.0)
            except subprocess.TimeoutExpired:
                self._process.kill()
        if self._thread is not None:
            self._thread.join(5.0)

    @property
    def pid(self) -> int | None:
        """The process that runs now."""
        return None if self._process is None else self._process.pid

    def _keep(self) -> None:
        """Runs in a thread that lives as long as the process: the kernel ends a child with the thread that made it."""
        while not self._stop.is_set():
            with open(self.log, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
                if out.tell() > 10 << 20:
                    out.truncate(0)
                begin = out.tell()
                self._process = subprocess.Popen(
                    [sys.executable, "-c", _TIED, *self.command],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    env=dict(self.environment),
                    start_new_session=True,  # Ctrl-C is this process's to answer
                )
                self._process.wait()
            if not self._stop.is_set():
                self.ended(self.log.read_bytes()[begin:][-4000:].decode(errors="replace"))
                self._stop.wait(self.pause)


def terminated_as_interrupt() -> None:
    """SIGTERM is Ctrl-C: contexts are left, children end."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: signal.raise_signal(signal.SIGINT))


def said(who: str) -> Callable[[str], None]:
    """Prints a line with the time before it."""

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {who}: {text}", flush=True)

    return say
