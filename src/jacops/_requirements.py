"""What arguments must be: one check a kind, with one wording."""

from __future__ import annotations

from typing import Any

from .errors import InputError, explain


def check_positive(name: str, value: Any) -> None:
    """Refuse what is not a positive whole number.

    Raises:
        InputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(explain(name, repr(value), "a positive whole number is needed"))
