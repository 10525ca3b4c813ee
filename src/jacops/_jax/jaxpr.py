"""What a trace of a model and its loss shows before anything runs: broadcast targets, parameters without a path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from ..errors import InputError
from .rules import CUSTOM_VJP, PAIRING

# What JAX raises where a function reads a value that is not there yet while it is traced.
READS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class _Origin(NamedTuple):
    """What an intermediate value is entry by entry: the model's output or the target, and the shape that one had."""

    target: bool
    shape: tuple[int, ...]


_Origins = dict[Var, _Origin]


def is_reached(jaxpr: Jaxpr, sources: Sequence[Var]) -> bool:
    """Return whether any result of a traced function is computed from any of some arguments."""
    known = set(sources)
    for equation in jaxpr.eqns:
        if any(isinstance(v, Var) and v in known for v in equation.invars):
            known.update(equation.outvars)
    return any(isinstance(v, Var) and v in known for v in jaxpr.outvars)


def has_custom_vjp(jaxpr: Jaxpr) -> bool:
    """Return whether a traced function holds a backward pass that somebody wrote by hand, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(CUSTOM_VJP):
            return True
        parts = [
            part for value in equation.params.values() for part in (value if isinstance(value, tuple) else [value])
        ]
        inner = [part.jaxpr if isinstance(part, ClosedJaxpr) else part for part in parts]
        if any(has_custom_vjp(part) for part in inner if isinstance(part, Jaxpr)):
            return True
    return False


def refuse_broadcast(loss: ClosedJaxpr, output_leaves: int) -> None:
    """Refuse a target whose rows meet all rows of the output, as `(n, 1)` and `(n,)` do in an elementwise loss.

    Args:
        loss: The loss, traced: leaves of the output first, leaves of the target after them.
        output_leaves: How many of them belong to the output.

    Raises:
        InputError: Both are spread over a larger array; the message gives both shapes.
    """
    arguments = loss.jaxpr.invars
    origins = {v: _Origin(i >= output_leaves, _shape(v)) for i, v in enumerate(arguments)}
    found = _spread(loss.jaxpr, origins)
    if found is not None:
        raise InputError.of(
            "y",
            f"of shape {found[1].shape}",
            f"the model's output has shape {found[0].shape} and the loss would pair every row of one with "
            "every row of the other",
            "Give both the same shape, e.g. `y[:, None]`.",
        )


def _spread(jaxpr: Jaxpr, origins: _Origins) -> tuple[_Origin, _Origin] | None:
    """Return output and target of the first operation that spreads both, following values row by row."""
    for equation in jaxpr.eqns:
        known = [origins[v] for v in equation.invars if isinstance(v, Var) and v in origins]
        if not known:
            continue
        result = equation.outvars[0]
        inner = next((p for p in equation.params.values() if isinstance(p, ClosedJaxpr)), None)
        if inner is not None and len(inner.jaxpr.invars) == len(equation.invars):
            found = _inside(inner.jaxpr, equation, origins)
            if found is not None:
                return found
        elif len(known) == 2 and equation.primitive.name in PAIRING:
            output, target = sorted(known)
            if output.target != target.target and _is_larger(_shape(result), output.shape, target.shape):
                return output, target
        elif len(set(known)) == 1 and _keeps_rows(_shape(result), equation, origins):
            origins[result] = known[0]
    return None


def _inside(jaxpr: Jaxpr, equation: Any, origins: _Origins) -> tuple[_Origin, _Origin] | None:
    """Look into a function called by the traced one, and carry what its results are back out."""
    pairs = zip(jaxpr.invars, equation.invars, strict=True)
    within = {inner: origins[v] for inner, v in pairs if isinstance(v, Var) and v in origins}
    found = _spread(jaxpr, within)
    for inner, outer in zip(jaxpr.outvars, equation.outvars, strict=True):
        if isinstance(inner, Var) and inner in within:
            origins[outer] = within[inner]
    return found


def _is_larger(result: Sequence[int], output: Sequence[int], target: Sequence[int]) -> bool:
    size = _size(result)
    return len(output) != len(target) and size > _size(output) and size > _size(target)


def _size(shape: Sequence[int]) -> int:
    total = 1
    for length in shape:
        total *= length
    return total


def _keeps_rows(gives: tuple[int, ...], equation: Any, origins: _Origins) -> bool:
    """Return whether a result has the entries of the value it follows, perhaps with axes of length one in front."""
    came = next(_shape(v) for v in equation.invars if isinstance(v, Var) and v in origins)
    return gives[len(gives) - len(came) :] == came and _size(gives) == _size(came)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.aval.shape)
