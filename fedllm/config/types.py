"""Numbers and their ranges as types: a field of a recipe's dataclass says by its type what it takes.

Pydantic reads them where a recipe is loaded (`schema.parse_section`), which also refuses NaN and infinity; to all
else they are plain ``int`` and ``float``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError, WrapValidator


def needs(words: str) -> WrapValidator:
    """What a value must be, as it follows "give" in an error. Here ``true`` is no number; in Python it is 1."""

    def check(value: Any, inner: Callable[[Any], Any]) -> Any:
        if not isinstance(value, bool):
            with suppress(ValidationError):
                return inner(value)
        raise ValueError(words)

    return WrapValidator(check)


Real = Annotated[float, needs("a finite number")]
"""Any number."""

Positive = Annotated[float, Field(gt=0), needs("a finite number above 0")]
"""A divisor, a temperature, a time."""

NonNegative = Annotated[float, Field(ge=0), needs("a finite number from 0 up")]
"""A coefficient, which 0 turns off."""

Share = Annotated[float, Field(ge=0, le=1), needs("a number from 0 to 1")]
"""A part of something, all and nothing included; a probability."""

SomeShare = Annotated[float, Field(gt=0, le=1), needs("a number above 0, up to 1")]
"""A part that may be all, and is not nothing."""

PartShare = Annotated[float, Field(ge=0, lt=1), needs("a number from 0 to below 1")]
"""A part that may be nothing, and is not all."""

Between = Annotated[float, Field(gt=0, lt=1), needs("a number between 0 and 1")]
"""A part that is neither."""


def _at_most(value: int) -> int:
    if value > MOST:
        raise ValueError(f"a whole number up to {MOST}")
    return value


MOST = 2**31 - 1
"""The largest count: of rounds, rows, steps and so on. Every library below takes it."""

Whole = Annotated[int, Field(ge=0), needs("a whole number from 0 up"), AfterValidator(_at_most)]
"""How many, where there may be none."""

Count = Annotated[int, Field(ge=1), needs("a whole number from 1 up"), AfterValidator(_at_most)]
"""How many, at least one."""

Seed = Annotated[int, Field(ge=0, lt=2**32), needs("a whole number from 0 to 4294967295")]
"""What every generator in use takes: NumPy's old ones have 32 bits."""
