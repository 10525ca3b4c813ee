"""What arguments must be: one check a kind, with one wording."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .errors import InputError, explain


def check_positive(name: str, value: Any) -> int:
    """Return a positive whole number.

    Raises:
        InputError: It is not one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(explain(name, repr(value), "a positive whole number is needed"))
    return value


def check_choice(name: str, value: Any, known: Collection[Any]) -> Any:
    """Return a value that is among the known ones.

    Raises:
        InputError: It is not.
    """
    if value not in known:
        raise InputError(explain(name, repr(value), f"one of {known} is needed"))
    return value
