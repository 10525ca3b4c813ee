"""JAX models that can be differentiated twice, and JAX's tensor utilities (extra `jax`)."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

from .._finite import check_vector
from .._framework_objective import FrameworkObjective
from .._jax.protocol import (
    Apply,
    JaxFunction,
    JaxLoss,
    Model,
    Parameters,
    Point,
    check_rows,
    filled,
    finite_gradient,
    is_floating,
    to_numpy,
    to_torch,
)
from ..errors import InputError, InputTypeError, NotDifferentiableError, explain
from ..objective import checked_loss
from ..space import Space
from ._twice_differentiable import TensorUtilities, TwiceDifferentiable


class JaxTwiceDifferentiable(TwiceDifferentiable[jax.Array]):  # pyright: ignore[reportInvalidTypeArguments]
    """A JAX model with its loss; `loss(apply(params, x), y)` is called just so, everywhere.

    Both functions must be pure, as JAX asks of what it compiles; a model that branches on values runs uncompiled.
    Arrays of whole numbers among the parameters are passed on and not differentiated. Float64 needs
    `jax_enable_x64`, which is the caller's to set: nothing is cast.

    Args:
        apply: `apply(params, x) -> output`; `x` and the output may be trees of arrays.
        params: A pytree with arrays of floating point, as in `JaxFunction`: what is no array is passed on.
        loss: `loss(output, y)`, one number.

    Raises:
        InputTypeError: `apply` or `loss` is not callable, or `params` has something else than arrays only.
        InputError: JAX as it is configured cannot hold a leaf's dtype.
        ModelStateError: There is nothing to differentiate.
    """

    def __init__(self, apply: Apply, params: Any, loss: JaxLoss) -> None:
        checked_loss(loss, None)
        self.model = JaxFunction(apply, params)
        self.objective = FrameworkObjective(self.model, loss)
        self.apply, self.params, self.loss = apply, params, loss

    @property
    def parameters(self) -> list[jax.Array]:
        """The arrays that are differentiated, in the order of the tree."""
        return list(self.model.picked().leaves)

    @property
    def num_params(self) -> int:
        """Number of entries of all of them."""
        return self.model.space().dim

    def grad(self, x: Any, y: Any, create_graph: bool = False) -> jax.Array:
        """Return the gradient `[P]` of the loss by the parameters.

        Args:
            x: The model's input: arrays of JAX or NumPy, or torch tensors, or a tree of them. Not changed.
            y: The target, passed to the loss.
            create_graph: Remember where the gradient comes from, for `mvp`; JAX records no graphs.

        Raises:
            InputError: The loss is not one number, a dtype does not fit, or `y` would broadcast against the output.
            NonFiniteError: The loss or its gradient is NaN or Inf.
            NotDifferentiableError: No path leads from the loss to any parameter; or with `create_graph`, the second
                derivative is wrong.
        """
        call = "grad(create_graph=True)" if create_graph else "grad"
        own, model, point = self.model.loss_at(self.loss, x, y, call=call)
        gradient = jnp.asarray(to_numpy(finite_gradient(model, point, own.space, call)))
        if create_graph:
            model.check_twice(point, call)
            _remember(gradient, _GradientOrigin(own, model, point, tuple(jax.tree.leaves(x))))
        return gradient

    def hessian(self, x: Any, y: Any) -> jax.Array:
        """Return the Hessian `[P, P]` of the loss by the parameters, for one batch.

        Raises:
            InputError: As in `grad`.
            NonFiniteError: The loss or its Hessian is NaN or Inf.
            NotDifferentiableError: The second derivative that JAX gives is not symmetric.
        """
        matrix = self.objective.hessian(x, y).dense(check_finite=False)
        check_rows("hessian", matrix, self.model.space())
        return jnp.asarray(to_numpy(matrix))

    @staticmethod
    def mvp(grad_xy: jax.Array, v: Any, backprop_on: Any, *, progress: bool = False) -> jax.Array:
        """Return the derivative of `grad_xy` by `backprop_on`, along directions: `[D, P]` gives `[D, M]`.

        Directions go through one compiled pass in chunks, held against one at a time the first time.

        Args:
            grad_xy: What `grad(x, y, create_graph=True)` returned, itself and not a copy.
            v: Directions `[D, P]`, or one `[P]`; of JAX, NumPy or torch, in the gradient's dtype.
            backprop_on: The model's parameters (an array, several, or the whole tree), or the `x` that went into
                `grad`.
            progress: Show a progress bar.

        Returns:
            `[D, M]`; `M` counts the entries of `backprop_on`. A zero second derivative gives zeros.

        Raises:
            InputError: Shapes or dtypes do not match exactly, or `backprop_on` was not part of the computation.
            NotDifferentiableError: Where `grad_xy` comes from is not known: `create_graph=True` was forgotten.
        """
        if not isinstance(grad_xy, jax.Array) or grad_xy.ndim != 1:
            raise InputTypeError(
                explain("grad_xy", f"a {type(grad_xy).__name__}", "a gradient `[P]` from `grad` is needed")
            )
        origin = _origin_of(grad_xy)
        if origin is None:
            raise NotDifferentiableError(
                "`grad_xy` has no graph. Make it with `grad(x, y, create_graph=True)`, and pass that very array: "
                "what is computed from it is not followed."
            )
        directions = _directions(v, grad_xy)
        places = origin.places(backprop_on)
        swept = {
            by_inputs: origin.swept(directions, by_inputs, progress) for by_inputs in {place[0] for place in places}
        }
        return jnp.asarray(to_numpy(torch.cat([swept[by_inputs][i] for by_inputs, i in places], 1)))


@dataclass(frozen=True, eq=False)
class _GradientOrigin:
    """Where a gradient comes from.

    Attributes:
        own: The parameters.
        model: The compiled loss.
        point: Parameters and batch.
        given: The arrays of `x` as the caller gave them, held so that they can be told by identity.
    """

    own: Parameters
    model: Model
    point: Point
    given: tuple[Any, ...]

    def places(self, backprop_on: Any) -> list[tuple[bool, int]]:
        """Return for each array whether it is an input, and its number among those, or among the parameters.

        Raises:
            InputTypeError: Something is not an array.
            InputError: Something was not part of the computation, or nothing is given.
        """
        places = [self._place(array, name) for array, name in _listed(backprop_on)]
        if not places:
            raise InputError(explain("backprop_on", "empty", "at least one array is needed"))
        return places

    def swept(self, directions: np.ndarray, by_inputs: bool, progress: bool) -> tuple[Tensor, ...]:
        """Return the derivative along directions by each parameter, or by each input, `(D, entries)`.

        Raises:
            NonFiniteError: There is NaN or Inf in it.
        """
        arrays = [held for _, held in self._inputs()] if by_inputs else self.point.leaves
        sizes = [array.size for array in arrays]
        like = to_torch(jnp.zeros(0, jnp.result_type(*arrays)))
        width = sum(sizes)
        found = (
            self.model.second(self.point, directions, width, by_inputs=by_inputs, progress=progress)
            if len(directions)
            else []
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
            raise InputTypeError(explain(name, f"a {type(array).__name__}", "an array is needed"))
        parameters = self.own
        owned = {i for own in (parameters.leaves, parameters.given) for i, leaf in enumerate(own) if leaf is array}
        if len(owned) > 1:
            names = " and ".join(parameters.names[i] for i in sorted(owned))
            raise InputError(explain(name, f"the array of {names}", "one is needed", "Take it from `.parameters`."))
        fed = [i for i, (given, held) in enumerate(self._inputs()) if given is array or held is array]
        if not owned and not fed:
            came = "neither a parameter that is differentiated nor an input of floating point of `grad`"
            raise InputError(explain(name, came, "the gradient must have been computed from it"))
        return (False, owned.pop()) if owned else (True, fed[0])


_ORIGINS: dict[
    int, tuple[weakref.ref[Any], _GradientOrigin]
] = {}  # by identity: arrays of JAX have no attributes and no hash


def _remember(gradient: jax.Array, origin: _GradientOrigin) -> None:
    key = id(gradient)
    _ORIGINS[key] = (weakref.ref(gradient, lambda _: _ORIGINS.pop(key, None)), origin)


def _origin_of(gradient: jax.Array) -> _GradientOrigin | None:
    held, origin = _ORIGINS.get(id(gradient), (lambda: None, None))
    return origin if held() is gradient else None


def _listed(backprop_on: Any) -> list[tuple[Any, str]]:
    if isinstance(backprop_on, Iterator):
        backprop_on = list(backprop_on)
    paths, _ = jax.tree_util.tree_flatten_with_path(backprop_on)
    if not paths:
        paths, _ = jax.tree_util.tree_flatten_with_path(backprop_on, is_leaf=lambda node: node is None)
    return [(leaf, "backprop_on" + jax.tree_util.keystr(path)) for path, leaf in paths]


def _directions(v: Any, grad_xy: jax.Array) -> np.ndarray:
    try:
        rows = to_numpy(v) if isinstance(v, Tensor) else np.asarray(v)
    except (TypeError, ValueError, RuntimeError):
        rows = np.asarray(None)
    if rows.dtype.kind not in "fiubV":
        raise InputTypeError(explain("v", f"a {type(v).__name__}", "directions as an array `[D, P]` are needed"))
    P = grad_xy.shape[0]  # noqa: N806
    matrix = rows[None] if rows.ndim == 1 else rows
    if matrix.ndim != 2 or matrix.shape[1] != P:
        raise InputError(
            explain("v", f"of shape {rows.shape}", f"shape [D, {P}] or [{P}] is needed; nothing is broadcast")
        )
    if matrix.dtype != grad_xy.dtype:
        raise InputError(
            explain("v", f"of dtype {matrix.dtype}", f"the gradient is of {grad_xy.dtype}; nothing is cast")
        )
    check_vector("mvp", "v", [to_torch(matrix)])
    return matrix


class JaxTensorUtilities(TensorUtilities[jax.Array, JaxTwiceDifferentiable]):  # pyright: ignore[reportInvalidTypeArguments]
    """JAX's tensor operations; an axis may be given as `dim=`, as torch's, or as `axis=`."""

    twice_differentiable_type = JaxTwiceDifferentiable

    @staticmethod
    def einsum(equation: str, *operands: jax.Array) -> jax.Array:
        """Sum products of entries, by Einstein's convention."""
        return jnp.einsum(equation, *operands)

    @staticmethod
    def cat(a: Sequence[jax.Array], **kwargs: Any) -> jax.Array:
        """Join arrays along an axis there is (`dim=`)."""
        return jnp.concatenate(list(a), axis=_axis(kwargs))

    @staticmethod
    def stack(a: Sequence[jax.Array], **kwargs: Any) -> jax.Array:
        """Join arrays along a new axis (`dim=`)."""
        return jnp.stack(list(a), axis=_axis(kwargs))

    @staticmethod
    def unsqueeze(x: jax.Array, dim: int) -> jax.Array:
        """Insert an axis of length one."""
        return jnp.expand_dims(x, dim)

    @staticmethod
    def get_element(x: jax.Array, idx: int) -> jax.Array:
        """Return an element along the first axis that is longer than one; axes before it are dropped.

        Raises:
            InputError: There is no such element.
        """
        while x.ndim > 1 and x.shape[0] == 1:
            x = x[0]
        if x.ndim == 0 or not -x.shape[0] <= idx < x.shape[0]:  # JAX would clamp the index
            length = x.shape[0] if x.ndim else 0
            raise InputError(explain("idx", idx, f"the first axis that is longer than one has {length} elements"))
        return x[idx]

    @staticmethod
    def slice(x: jax.Array, start: int, stop: int, axis: int = 0) -> jax.Array:
        """Return the entries from `start` to `stop` along an axis."""
        return x[(slice(None),) * (axis % x.ndim) + (slice(start, stop),)]

    @staticmethod
    def shape(x: jax.Array) -> tuple[int, ...]:
        """Return the shape."""
        return tuple(x.shape)

    @staticmethod
    def reshape(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Return the same entries in another shape."""
        return jnp.reshape(x, shape)

    @staticmethod
    def cat_gen(
        a: Iterator[jax.Array] | Iterable[jax.Array], resulting_shape: tuple[int, ...], model: JaxTwiceDifferentiable
    ) -> jax.Array:
        """Join arrays from a generator along the first axis, in the dtype of the model.

        Raises:
            InputError: The generator gives fewer or more rows than promised, or rows of another shape.
        """
        like = model.parameters[0]
        result = np.empty(resulting_shape, like.dtype)
        filled = 0
        for part in a:
            if tuple(part.shape[1:]) != tuple(resulting_shape[1:]) or filled + part.shape[0] > resulting_shape[0]:
                came = f"giving an array {tuple(part.shape)} at row {filled}"
                raise InputError(explain("a", came, f"{tuple(resulting_shape)} was promised"))
            result[filled : filled + part.shape[0]] = np.asarray(part)
            filled += part.shape[0]
        if filled != resulting_shape[0]:
            raise InputError(explain("a", f"giving {filled} rows", f"{tuple(resulting_shape)} was promised"))
        return jnp.asarray(result)


def _axis(options: dict[str, Any]) -> int:
    """Return the axis among keyword arguments.

    Raises:
        TypeError: There are others.
    """
    axis = options.pop("dim", options.pop("axis", 0))
    if options:
        raise InputTypeError(explain(next(iter(options)), "given", "`dim=` or `axis=` is needed"))
    return axis


__all__ = ["JaxFunction", "JaxTensorUtilities", "JaxTwiceDifferentiable"]
