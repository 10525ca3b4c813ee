"""Results of JAX models: they are finite or say where they are not, and models are distinguished by a digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from torch import Tensor

from .._finite import check_outputs, require_finite
from .._space import Space
from ..errors import NonFiniteError
from .crossing import to_torch
from .model import Model
from .points import Point

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of functions in the repr of a tree


def check_rows(call: str, rows: Tensor, space: Space) -> None:
    """Refuse rows of derivatives that hold NaN or Inf.

    Raises:
        NonFiniteError: Some do; the message names the parameter.
    """
    for name, part in zip(space.names, space.split(rows), strict=True):
        require_finite(part, f"{call}: in the derivative's part for {name}", " (first axis: row of the result).")


def finite_loss(model: Model, value: Any, point: Point, call: str) -> float:
    """Return a loss as a number.

    Raises:
        NonFiniteError: It is NaN or Inf; the message names the output that is.
    """
    if not np.isfinite(value):
        leaves = jax.tree.leaves(model.output(point))
        check_outputs(call, [to_torch(leaf) for leaf in leaves], [f"output {i}" for i in range(len(leaves))])
        raise NonFiniteError(f"{call}: the loss is {float(value)}; the model's output is finite.")
    return float(value)


def finite_gradient(model: Model, point: Point, space: Space, call: str) -> Tensor:
    """Return the gradient `(P,)` at a point.

    Raises:
        NonFiniteError: The loss or its gradient is NaN or Inf.
    """
    value, flat = model.gradient(point, call)
    finite_loss(model, value, point, call)
    gradient = to_torch(flat)
    check_rows(call, gradient.unsqueeze(0), space)
    return gradient


def digest_of(params: Any, functions: Sequence[Callable[..., Any]], more: str) -> str:
    """Return a digest of a tree of parameters, of the names of some functions and of a text."""
    digest = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        digest.update(jax.tree_util.keystr(path).encode() + _bytes_of(leaf))
    tree = _ADDRESS.sub("", str(jax.tree_util.tree_structure(params)))
    digest.update(f"{tree} {' '.join(map(_named, functions))} {more}".encode())
    return digest.hexdigest()


def _bytes_of(leaf: Any) -> bytes:
    """Return a leaf of the parameters in a form that is unique and the same in every process."""
    if not isinstance(leaf, jax.Array):
        return f"{type(leaf)} {_named(leaf) if callable(leaf) else _ADDRESS.sub('', repr(leaf))}".encode()
    random = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    array = np.ascontiguousarray(jax.random.key_data(leaf) if random else leaf)
    return f" {array.dtype} {array.shape} ".encode() + array.tobytes()


def _named(function: Any) -> str:
    named = getattr(function, "func", function)  # functools.partial
    return f"{getattr(named, '__module__', '')}.{getattr(named, '__qualname__', type(named).__qualname__)}"
