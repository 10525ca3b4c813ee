"""Which parameters: by name patterns, or by a function of name and parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from .errors import InputError, InputTypeError

Picks = str | Sequence[str] | Callable[[str, Tensor], bool] | None


def picked(parameters: Picks, names: Sequence[str]) -> Callable[[str, Any], bool] | None:
    """Return a function of name and parameter that picks some of those with these names; None for the usual ones.

    Raises:
        InputError: A pattern fits no name.
        InputTypeError: `parameters` is of the wrong kind.
    """
    if parameters is None or callable(parameters):
        return parameters
    patterns = [parameters] if isinstance(parameters, str) else parameters
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        needed = "name patterns or a function of name and parameter are needed"
        raise InputTypeError.of("parameters", f"a {type(parameters).__name__}", needed)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            near = get_close_matches(pattern, names, 3, 0.4) or names[:3]
            raise InputError.of("parameters", repr(pattern), f"no parameter fits; near are {', '.join(near)}")
    return lambda name, _: any(fnmatchcase(name, pattern) for pattern in patterns)
