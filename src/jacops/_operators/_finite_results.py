"""Operators do not return NaN or Inf: a result is checked once, where it is returned, and its origin is named."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor

from .._finite import is_finite, row_in_data, where_first
from .._runtime.ranks import ALONE, Ranks
from ..errors import NonFiniteError
from ._naming import named

if TYPE_CHECKING:
    from ._base import Operator

Arguments = ParamSpec("Arguments")
Made = TypeVar("Made")
_TODO = " Correct the model or the data, or pass `check_finite=False` where the operator is made."


@dataclass(frozen=True)
class Source:
    """What an operator was made from.

    Attributes:
        call: The public call.
        data: Its data, by the names of the arguments.
    """

    call: str
    data: Mapping[str, Any]


def made_from(*names: str) -> Callable[[Callable[Arguments, Made]], Callable[Arguments, Made]]:
    """Decorate a call that returns an operator: its `check_finite` is kept there, and messages name a row of its data.

    Args:
        names: The arguments that hold data with a leading axis of samples.
    """

    def decorate(function: Callable[Arguments, Made]) -> Callable[Arguments, Made]:
        places = {name: i for i, name in enumerate(inspect.signature(function).parameters) if name in names}

        @wraps(function)
        def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Made:
            check_finite = bool(kwargs.pop("check_finite", True))
            operator = function(*args, **kwargs)
            data = {name: args[i] if i < len(args) else kwargs.get(name) for name, i in places.items()}
            return with_source(operator, Source(function.__name__, data), check_finite)

        return call

    return decorate


def with_source(operator: Made, source: Source, check_finite: bool = True) -> Made:
    """Return an operator with what it was made from, and whether its results are checked.

    Raises:
        NonFiniteError: It is checked, and the loss that it is of is NaN or Inf.
    """
    object.__setattr__(operator, "source", source)
    object.__setattr__(operator, "check_finite", check_finite)
    named(operator, source.call)
    if check_finite:
        _check_losses(operator)
    return operator


def check_result(operator: Operator, result: Tensor, what: str) -> Tensor:
    """Return a result of an operator.

    Raises:
        NonFiniteError: It holds NaN or Inf and the operator was not made with `check_finite=False`.
    """
    if is_finite(result) or not is_checked(operator):
        return result
    raise NonFiniteError(f"{_name(operator)}: {what} is not finite: {where_first(result)}{_origin_in_words(operator)}")


def is_checked(operator: Operator) -> bool:
    """Return whether neither the operator nor one that it is made of was made with `check_finite=False`."""
    return operator.check_finite and all(is_checked(part) for part in parts_of(operator))


def _origin_in_words(operator: Operator) -> str:
    """Return where NaN or Inf come from, batch and row of the data or of the model's output, and what to do."""
    origin = _origin(operator)
    if origin is None and not any(_sources(operator)):
        return "."
    return f"; {origin or 'the data are finite, so that it arises in the computation'}.{_TODO}"


def _origin(operator: Operator) -> str | None:
    if operator.source is not None and (row := row_in_data(operator.source.data)) is not None:
        return row
    output = getattr(operator, "value", None)
    if isinstance(output, Tensor) and output.ndim and (row := row_in_data({"the output": output})) is not None:
        return row
    passes: Any = getattr(operator, "parts", None)
    if callable(passes):
        for number, (*_, part) in enumerate(passes()):  # pyright: ignore[reportArgumentType]
            if (row := _origin(part)) is not None:
                return f"batch {number}: {row}"
    return next((row for part in parts_of(operator) if (row := _origin(part)) is not None), None)


def _name(operator: Operator) -> str:
    return next((source.call for source in _sources(operator)), operator.name)


def _sources(operator: Operator) -> Iterator[Source]:
    if operator.source is not None:
        yield operator.source
    for part in parts_of(operator):
        yield from _sources(part)


def parts_of(operator: Operator) -> list[Operator]:
    """Return the operators that one is made of."""
    if not operator.has_parts:
        return []
    values = vars(operator).values()
    return [part for value in values for part in (value if isinstance(value, tuple) else (value,)) if _acts(type(part))]


@lru_cache(maxsize=256)  # called for every attribute in every product, with few types
def _acts(kind: type) -> bool:
    return hasattr(kind, "_apply_transpose")


def ranks_in(operator: Operator) -> Ranks:
    """Return the ranks that share the sums in an operator, or in one that it is made of."""
    own: Ranks = getattr(operator, "ranks", ALONE)
    shared = (found for part in parts_of(operator) if (found := ranks_in(part)).shared)
    return own if own.shared else next(shared, ALONE)


def leaves_of(operator: Operator) -> dict[int, Operator]:
    """Return the operators that one is made of in the end, itself where there are none, by identity."""
    parts = parts_of(operator)
    found = {} if parts else {id(operator): operator}
    for part in parts:
        found |= leaves_of(part)
    return found


def _check_losses(operator: Any) -> None:
    """Refuse a loss that is NaN or Inf, of which a finite derivative would mislead.

    Raises:
        NonFiniteError: It is.
    """
    value = vars(operator).get("value")
    if isinstance(value, Tensor) and value.ndim == 0 and not math.isfinite(value.item()):
        raise NonFiniteError(f"{_name(operator)}: the loss is {value.item()}{_origin_in_words(operator)}")
    for part in parts_of(operator):
        if part.source is None:
            object.__setattr__(part, "source", operator.source)
        _check_losses(part)
