"""Errors that a user can mend."""

from __future__ import annotations


class FedError(Exception):
    """Something a user can mend. The message says what was given, what was needed and what to do; no traceback."""


class Unreachable(FedError):
    """The Hub cannot be reached, or does not have it: a run must stop, a plan can go on with what is known."""
