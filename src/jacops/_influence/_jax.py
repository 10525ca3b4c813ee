"""JAX models that can be differentiated twice, and JAX's tensor utilities (extra `jax`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.protocol import (
    Apply,
    GradientOrigin,
    JaxFunction,
    JaxLoss,
    check_rows,
    directions_of,
    finite_gradient,
    origin_of,
    remember,
    to_numpy,
)
from .._keywords import check_methods
from .._ladder.protocol import SweepOptions
from .._objective import Objective
from ..errors import InputTypeError, NotDifferentiableError
from ._twice_differentiable import ArrayUtilities, TwiceDifferentiable, joined_rows


class JaxTwiceDifferentiable(TwiceDifferentiable[jax.Array]):  # pyright: ignore[reportInvalidTypeArguments]
    """A JAX model with its loss; `loss(apply(params, x), y)` is called just so, everywhere.

    Both functions must be pure, as JAX requires of compiled functions; a model that branches on values runs uncompiled.
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
        self.model = JaxFunction(apply, params)
        self.objective = Objective(self.model, loss)
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
        options = SweepOptions(call)
        own, model, point = self.model.loss_at(self.loss, x, y, options)
        gradient = jnp.asarray(to_numpy(finite_gradient(model, point, own.space, call)))
        if create_graph:
            model.check_twice(point, options)
            remember(gradient, GradientOrigin(own, model, point, tuple(jax.tree.leaves(x))))
        return gradient

    def hessian(self, x: Any, y: Any) -> jax.Array:
        """Return the Hessian `[P, P]` of the loss by the parameters, for one batch.

        Raises:
            InputError: The loss is not one number, or `y` would broadcast.
            NonFiniteError: The loss or its Hessian is NaN or Inf.
            NotDifferentiableError: The second derivative that JAX gives is not symmetric.
        """
        matrix = self.objective.hessian(x, y).dense(check_finite=False)
        check_rows("hessian", matrix, self.model.space())
        return jnp.asarray(to_numpy(matrix))

    @staticmethod
    def mvp(grad_xy: jax.Array, v: Any, backprop_on: Any, *, progress: bool = False) -> jax.Array:
        """Return the derivative of `grad_xy` by `backprop_on`, along directions: `[D, P]` gives `[D, M]`.

        Directions go through one compiled pass in chunks, compared with one at a time the first time.

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
            NotDifferentiableError: `grad_xy` does not come from `grad`; pass `create_graph=True` to it.
        """
        if not isinstance(grad_xy, jax.Array) or grad_xy.ndim != 1:
            raise InputTypeError.of("grad_xy", f"a {type(grad_xy).__name__}", "a gradient `[P]` from `grad` is needed")
        origin = origin_of(grad_xy)
        if origin is None:
            raise NotDifferentiableError(
                "`grad_xy` has no graph. Make it with `grad(x, y, create_graph=True)`, and pass that very array: "
                "what is computed from it is not followed."
            )
        return jnp.asarray(origin.product(directions_of(v, grad_xy), backprop_on, progress))


class JaxTensorUtilities(ArrayUtilities):
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
    def cat_gen(
        a: Iterator[jax.Array] | Iterable[jax.Array], resulting_shape: tuple[int, ...], model: JaxTwiceDifferentiable
    ) -> jax.Array:
        """Join arrays from a generator along the first axis, in the dtype of the model.

        Raises:
            InputError: The generator gives fewer or more rows than promised, or rows of another shape.
        """
        result = np.empty(resulting_shape, model.parameters[0].dtype)
        return jnp.asarray(joined_rows(result, a, np.asarray, "an array"))


def _axis(options: dict[str, Any]) -> int:
    """Return the axis among keyword arguments.

    Raises:
        TypeError: There are others.
    """
    axis = options.pop("dim", options.pop("axis", 0))
    if options:
        raise InputTypeError.of(next(iter(options)), "given", "`dim=` or `axis=` is needed")
    return axis


check_methods(JaxFunction, JaxTensorUtilities, JaxTwiceDifferentiable)
__all__ = ["JaxFunction", "JaxTensorUtilities", "JaxTwiceDifferentiable"]
