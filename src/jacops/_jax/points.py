"""Points at which a JAX model is differentiated, and rows of numbers as leaves there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..errors import InputError, NotDifferentiableError
from .crossing import is_floating


class Point(NamedTuple):
    """Where a derivative is taken: parameters, other arrays of the model, and one batch."""

    leaves: tuple[Any, ...]
    frozen: tuple[Any, ...]
    x: Any
    y: Any


def replaced(leaves: Sequence[Any], floating: Sequence[Any]) -> list[Any]:
    """Return the leaves with these in place of those of floating point."""
    others = iter(floating)
    return [next(others) if is_floating(leaf) else leaf for leaf in leaves]


def alone(point: Point, sample: Any) -> Point:
    """Return the point at one sample as a batch of one."""
    x, y = jax.tree.map(lambda leaf: leaf[None], sample)
    return point._replace(x=x, y=y)


def split(row: Any, like: Sequence[Any]) -> tuple[Any, ...]:
    """Return a row as leaves of the shapes and dtypes of some others."""
    parts, start = [], 0
    for leaf in like:
        parts.append(row[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return tuple(parts)


def joined(parts: Sequence[Any]) -> Any:
    """Return leaves as one row, in their widest dtype."""
    dtype = jnp.result_type(*parts)
    return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])


def size_of(leaves: Sequence[Any]) -> int:
    """Return the number of entries of all of them."""
    return sum(leaf.size for leaf in leaves)


def floating(output: Any) -> Any:
    """Return an output all of whose leaves have derivatives.

    Raises:
        NotDifferentiableError: One is not of floating point.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if not is_floating(leaf):
            name = "output" + jax.tree_util.keystr(path)
            came = f"of dtype {leaf.dtype}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
            raise NotDifferentiableError.of(name, came, "a derivative needs a floating-point output")
    return output


def one_number(value: Any) -> Any:
    """Return a loss that is one number.

    Raises:
        NotDifferentiableError: It is no array, or not of floating point.
        InputError: It has axes.
    """
    if not isinstance(value, jax.Array):
        todo = "Return one array of shape (), without `float()` or auxiliary results."
        raise NotDifferentiableError.of("the loss", f"a {type(value).__name__}", "an array is needed", todo)
    if value.ndim > 0:
        todo = "Take its mean or sum, like the reduction of the objective."
        raise InputError.of("the loss", f"of shape {tuple(value.shape)}", "one number, shape (), is needed", todo)
    if not is_floating(value):
        todo = "Take scores rather than labels or counts."
        came = f"of dtype {value.dtype}"
        raise NotDifferentiableError.of("the loss", came, "a floating-point number is needed", todo)
    return value
