"""Keywords of public calls: a wrong one is an error that names the call and the nearest keyword it has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from typing import ParamSpec, TypeVar

from .errors import InputTypeError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_NAMED = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def keywords(
    options: type | None = None, *, call: str | None = None
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Return a decorator that checks the keywords of a public call before it runs.

    Args:
        options: The typed dict that `**options` of the call stands for, where it has some.
        call: How messages name the call; by default as the function is named.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        parameters = inspect.signature(function).parameters.values()
        named = [p.name for p in parameters if p.kind in _NAMED and p.name != "self"]
        known = frozenset([*named, *_keys(options)])

        @wraps(function)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            for name in kwargs:
                if name not in known:
                    raise unknown(call or function.__name__, name, known)
            return function(*args, **kwargs)

        return checked

    return decorate


def _keys(options: type | None) -> frozenset[str]:
    return frozenset[str]() if options is None else options.__optional_keys__ | options.__required_keys__  # pyright: ignore


def unknown(call: str, name: str, known: Iterable[str]) -> InputTypeError:
    """Return the error for a keyword that a call does not have."""
    names = sorted(known)
    within = [known for known in names if name in known.split("_")]  # `method`: `inversion_method`
    near = within if len(within) == 1 else get_close_matches(name, names, 1, 0.5)
    hint = f"Did you mean `{near[0]}`?" if near else f"It has {', '.join(f'`{one}`' for one in names)}."
    return InputTypeError(f"{call}() has no keyword `{name}`. {hint}")
