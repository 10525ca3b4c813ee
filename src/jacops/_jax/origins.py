"""Where a gradient comes from: JAX records no graphs, so that it is kept beside the array, by identity."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from .._finite import check_vector
from .._ladder.protocol import SweepOptions
from .._space import Space
from ..errors import InputError, InputTypeError
from .crossing import filled, is_floating, to_numpy, to_torch
from .model import Model
from .parameters import Parameters
from .points import Point
from .results import check_rows


@dataclass(frozen=True, eq=False)
class GradientOrigin:
    """Where a gradient comes from.

    Attributes:
        own: The parameters.
        model: The compiled loss.
        point: Parameters and batch.
        given: The arrays of `x` as the caller gave them, held so that they can be recognised by identity.
    """

    own: Parameters
    model: Model
    point: Point
    given: tuple[Any, ...]

    def product(self, directions: np.ndarray, backprop_on: Any, progress: bool) -> np.ndarray:
        """Return the derivative of the gradient along directions by some arrays, `(D, M)`.

        Raises:
            InputTypeError: Something is not an array.
            InputError: Something was not part of the computation, or nothing is given.
            NonFiniteError: There is NaN or Inf in it.
        """
        places = self._places(backprop_on)
        swept = {kind: self._swept(directions, kind, progress) for kind in {by_inputs for by_inputs, _ in places}}
        return to_numpy(torch.cat([swept[by_inputs][i] for by_inputs, i in places], 1))

    def _places(self, backprop_on: Any) -> list[tuple[bool, int]]:
        """Return for each array whether it is an input, and its number among those, or among the parameters."""
        places = [self._place(array, name) for array, name in _listed(backprop_on)]
        if not places:
            raise InputError.of("backprop_on", "empty", "at least one array is needed")
        return places

    def _swept(self, directions: np.ndarray, by_inputs: bool, progress: bool) -> tuple[Tensor, ...]:
        """Return the derivative along directions by each parameter, or by each input, `(D, entries)`."""
        arrays = [held for _, held in self._inputs()] if by_inputs else self.point.leaves
        sizes = [array.size for array in arrays]
        like = to_torch(jnp.zeros(0, jnp.result_type(*arrays)))
        width, options = sum(sizes), SweepOptions("mvp", progress=progress)
        found = (
            self.model.second(self.point, directions, width, options, by_inputs=by_inputs) if len(directions) else []
        )
        result = filled(found, (len(directions), width), like.dtype)
        check_rows("mvp", result, Space.flat(width, "x", like) if by_inputs else self.own.space)
        return result.split(sizes, 1)

    def _inputs(self) -> list[tuple[Any, jax.Array]]:
        """Return what the caller gave and what the model takes, for inputs of floating point."""
        pairs = zip(self.given, jax.tree.leaves(self.point.x), strict=True)
        return [(given, held) for given, held in pairs if is_floating(held)]

    def _place(self, array: Any, name: str) -> tuple[bool, int]:
        if not hasattr(array, "shape"):
            raise InputTypeError.of(name, f"a {type(array).__name__}", "an array is needed")
        parameters = self.own
        owned = {i for own in (parameters.leaves, parameters.given) for i, leaf in enumerate(own) if leaf is array}
        if len(owned) > 1:
            names = " and ".join(parameters.names[i] for i in sorted(owned))
            raise InputError.of(name, f"the array of {names}", "one is needed", "Take it from `.parameters`.")
        fed = [i for i, (given, held) in enumerate(self._inputs()) if given is array or held is array]
        if not owned and not fed:
            came = "neither a parameter that is differentiated nor an input of floating point of `grad`"
            raise InputError.of(name, came, "the gradient must have been computed from it")
        return (False, owned.pop()) if owned else (True, fed[0])


_ORIGINS: dict[
    int, tuple[weakref.ref[Any], GradientOrigin]
] = {}  # by identity: arrays of JAX have no attributes and no hash


def remember(gradient: jax.Array, origin: GradientOrigin) -> None:
    """Keep where a gradient comes from for as long as it lives."""
    key = id(gradient)
    _ORIGINS[key] = (weakref.ref(gradient, lambda _: _ORIGINS.pop(key, None)), origin)


def origin_of(gradient: jax.Array) -> GradientOrigin | None:
    """Return where a gradient comes from, None where that is not known."""
    held, origin = _ORIGINS.get(id(gradient), (lambda: None, None))
    return origin if held() is gradient else None


def _listed(backprop_on: Any) -> list[tuple[Any, str]]:
    if isinstance(backprop_on, Iterator):
        backprop_on = list(backprop_on)
    paths, _ = jax.tree_util.tree_flatten_with_path(backprop_on)
    if not paths:
        paths, _ = jax.tree_util.tree_flatten_with_path(backprop_on, is_leaf=lambda node: node is None)
    return [(leaf, "backprop_on" + jax.tree_util.keystr(path)) for path, leaf in paths]


def directions_of(v: Any, grad_xy: jax.Array) -> np.ndarray:
    """Return directions `[D, P]` in the dtype of a gradient.

    Raises:
        InputTypeError: They are no numbers.
        InputError: Their shape or dtype does not match exactly.
        NonFiniteError: They hold NaN or Inf.
    """
    try:
        rows = to_numpy(v) if isinstance(v, Tensor) else np.asarray(v)
    except (TypeError, ValueError, RuntimeError):
        rows = np.asarray(None)
    if rows.dtype.kind not in "fiubV":
        raise InputTypeError.of("v", f"a {type(v).__name__}", "directions as an array `[D, P]` are needed")
    P = grad_xy.shape[0]  # noqa: N806
    matrix = rows[None] if rows.ndim == 1 else rows
    if matrix.ndim != 2 or matrix.shape[1] != P:
        raise InputError.of("v", f"of shape {rows.shape}", f"shape [D, {P}] or [{P}] is needed; nothing is broadcast")
    if matrix.dtype != grad_xy.dtype:
        raise InputError.of("v", f"of dtype {matrix.dtype}", f"the gradient is of {grad_xy.dtype}; nothing is cast")
    check_vector("mvp", "v", [to_torch(matrix)])
    return matrix
