"""What arguments must be: one check a kind, with one wording."""

from __future__ import annotations

from difflib import get_close_matches
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from .errors import InputError, InputTypeError


def check_whole(name: str, value: Any, least: int) -> None:
    """Refuse what is not a whole number from `least` on.

    Raises:
        InputError: It is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        usual = {0: "a whole number that is not negative is needed", 1: "a positive whole number is needed"}
        raise InputError.of(name, repr(value), usual.get(least, f"a whole number from {least} on is needed"))


def check_positive(name: str, value: Any) -> int:
    """Return a positive whole number.

    Raises:
        InputError: It is not one.
    """
    check_whole(name, value, 1)
    return value


def check_dense(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose entries are not laid out by strides: a sparse one, a nested one, one of another library.

    Raises:
        InputError: It is one.
    """
    if tensor.layout is not torch.strided or tensor.is_nested:
        came = "nested" if tensor.is_nested else f"of layout {tensor.layout}"
        todo = "Call `.to_padded_tensor(0.0)` on it." if tensor.is_nested else "Call `.to_dense()` on it."
        raise InputError.of(name, came, "it must be dense", todo)


def check_number(name: str, value: Any) -> None:
    """Refuse what is not a positive finite number.

    Raises:
        InputTypeError: It is no number.
        InputError: It is out of range.
    """
    if isinstance(value, bool) or not isinstance(value, float | int):
        raise InputTypeError.of(name, repr(value), "a number is needed")
    check_range(name, value)


def check_range(name: str, value: Any, *, zero: bool = False) -> float:
    """Return a positive finite number, or 0 where `zero` allows that; anything else is out of range.

    Raises:
        InputError: It is out of range.
    """
    number = isinstance(value, float | int) and not isinstance(value, bool)
    if not number or not isfinite(value) or value < 0 or (value == 0 and not zero):
        needed = "a finite number that is not negative is needed" if zero else "a positive number is needed"
        raise InputError.of(name, repr(value), needed)
    return float(value)


def check_choice(name: str, value: Any, known: Any, more: str = "") -> Any:
    """Return what is one of the known words.

    Args:
        name: The argument.
        value: What came.
        known: The words, as their `Literal` type.
        more: What else may be given, such as `" or a Solver"`, or a remark after a semicolon.

    Raises:
        InputError: It is none of them.
    """
    words: tuple[str, ...] = known.__args__  # what `get_args` returns, with three calls more
    if not isinstance(value, str) or value not in words:
        needed = f"one of {', '.join(map(repr, words))}"
        remark = more.startswith(";")
        near = get_close_matches(value.lower(), words, 1) if isinstance(value, str) else []
        todo = f"Did you mean {near[0]!r}?" if near else ""
        needed = f"{needed} is needed{more}" if remark else f"{needed}{more} is needed"
        came = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InputError.of(name, came, needed, todo)
    return value


def check_kind(name: str, value: Any, kind: type | tuple[type, ...], needed: str) -> None:
    """Refuse what is of another kind; a flag is no number.

    Raises:
        InputTypeError: It is.
    """
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputTypeError.of(name, f"a {type(value).__name__}", needed)


def check_flag(name: str, value: Any) -> None:
    """Refuse what is neither True nor False.

    Raises:
        InputTypeError: It is.
    """
    if not isinstance(value, bool):
        raise InputTypeError.of(name, repr(value), "True or False is needed")


def check_precision(name: str, dtype: torch.dtype, needs: str) -> None:
    """Refuse half precision, in which sums over data lose all digits.

    Raises:
        InputError: It is half precision, or no floating point.
    """
    if dtype not in (torch.float32, torch.float64):
        todo = "Convert the model first, by `model.float()`."
        raise InputError.of(name, f"of {dtype}", f"{needs} float32 or float64", todo)
