"""Ctrl-C: once, and the client that trains is finished and everything saved; twice, and the run ends at once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ECHO = 1.0
"""Seconds within which a second signal is the first one again: a launcher passes on what the terminal sent to all."""


@contextmanager
def once() -> Iterator[Callable[[], bool]]:
    """For as long as the context lasts, the first Ctrl-C only makes what it yields true, and the second interrupts.

    In any thread but the main one, where Python takes no signals, it yields what is never true.
    """
    pressed: list[float] = []

    def press(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if pressed and now - pressed[0] > ECHO:
            raise KeyboardInterrupt
        if not pressed:
            pressed.append(now)
            print("fedllm: stopping after this client. Ctrl-C again leaves at once.", file=sys.stderr, flush=True)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
