"""A JAX model with its loss, and its derivatives as compiled functions.

Compiled functions depend on `apply`, `loss` and the structure of the parameters only; values are arguments. So one
model serves many parameters (retraining) and one compilation many batches of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._runtime.agreement import difference_tolerance, tolerance
from ..errors import InputError, NotDifferentiableError, explain, warn
from .crossing import is_floating, torch_dtype
from .jaxpr import READS, has_custom_vjp, is_reached, refuse_broadcast
from .parameters import Structure
from .rounding import rounding_error
from .sweeps import Each, Kernel, Sweep, reading, shapes

_REMEMBERED = 16


class Point(NamedTuple):
    """Where a derivative is taken: parameters, other arrays of the model, and one batch."""

    leaves: tuple[Any, ...]
    frozen: tuple[Any, ...]
    x: Any
    y: Any


class _Same:
    """A callable compared by identity, also where it has no hash of its own."""

    def __init__(self, of: Callable[..., Any]) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.of is self.of

    def __hash__(self) -> int:
        return id(self.of)


def model_of(apply: Callable[..., Any], loss: Callable[..., Any], structure: Structure) -> Model:
    """Return the model of these functions, the same one for a while."""
    return _model_of(_Same(apply), _Same(loss), structure)


@lru_cache(maxsize=_REMEMBERED)
def _model_of(apply: _Same, loss: _Same, structure: Structure) -> Model:
    return Model(apply.of, loss.of, structure)


def weighted_loss(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return `loss(output, (y, weights))`, the sum of the rows' own losses times their weights."""
    return _weighted_loss(_Same(loss))


@lru_cache(maxsize=_REMEMBERED)
def _weighted_loss(loss: _Same) -> Callable[[Any, Any], Any]:
    def alone(output: Any, y: Any) -> Any:
        return _one_number(loss.of(*jax.tree.map(lambda leaf: leaf[None], (output, y))))

    def weighted(output: Any, target: tuple[Any, Any]) -> Any:
        y, weights = target
        return (jax.vmap(alone)(output, y) * weights).sum()

    return weighted


class Model:
    """Derivatives of `loss(apply(params, x), y)`, one sweep for each kind, each compiled once per shape.

    Args:
        apply: `apply(params, x)`, pure.
        loss: `loss(output, y)`, one number, pure.
        structure: How leaves make `params`.
    """

    def __init__(self, apply: Callable[..., Any], loss: Callable[..., Any], structure: Structure) -> None:
        self.apply, self.loss, self.structure = apply, loss, structure
        self.compiled, self.custom = True, False
        self._surveyed: set[Any] = set()
        self._twice: set[Any] = set()
        self._value, self._gradient = jax.jit(self._loss), jax.jit(self._value_and_gradient)
        self._sweeps: dict[Any, Sweep] = {}

    # Values

    def output(self, point: Point) -> Any:
        """Return what the model gives."""
        return self.apply(self.structure.build(point.leaves, point.frozen), point.x)

    def value(self, point: Point) -> Any:
        """Return the loss of the batch.

        Raises:
            InputError: It is not one number.
            NotDifferentiableError: It is not of floating point.
        """
        return self._value(point) if self.compiled else self._loss(point)

    def _loss(self, point: Point) -> Any:
        return _one_number(self.loss(self.output(point), point.y))

    def survey(self, point: Point, call: str) -> None:
        """Trace the model once for these shapes and refuse what cannot be meant.

        Raises:
            InputError: The loss is not one number, or the target would broadcast against the output.
            NotDifferentiableError: No path leads from the loss to any parameter.
        """
        key = shapes(point)
        if not self.compiled or key in self._surveyed:
            return
        try:
            model, output = jax.make_jaxpr(self.output, return_shape=True)(point)
            outputs = len(jax.tree.leaves(output))
            loss = jax.make_jaxpr(lambda output, y: _one_number(self.loss(output, y)))(output, point.y)
        except READS:
            self.compiled = False
            warn(
                f"{call}: the model or its loss reads values out of its arrays, so it cannot be compiled or batched. "
                "Everything is computed one row at a time."
            )
            return
        refuse_broadcast(loss, outputs)
        met = is_reached(model.jaxpr, model.jaxpr.invars[: len(point.leaves)])
        if not (met and is_reached(loss.jaxpr, loss.jaxpr.invars[:outputs])):
            raise NotDifferentiableError(
                f"{call}: no path leads from the loss to any of the parameters; its derivative is zero everywhere."
            )
        self.custom = self.custom or has_custom_vjp(model.jaxpr) or has_custom_vjp(loss.jaxpr)
        self._surveyed.add(key)

    # First derivatives

    def gradient(self, point: Point, call: str) -> tuple[Any, Any]:
        """Return the loss and its gradient `(P,)`.

        Raises:
            NotDifferentiableError: A value is read that depends on the parameters.
        """
        if self.compiled:
            return self._gradient(point)
        try:
            return self._value_and_gradient(point)
        except READS as error:
            raise reading(call, error) from None

    def _value_and_gradient(self, point: Point) -> tuple[Any, Any]:
        value, parts = jax.value_and_grad(lambda leaves: self._loss(point._replace(leaves=leaves)))(point.leaves)
        return value, _joined(parts, point.leaves)

    def sample_gradients(self, point: Point, width: int) -> list[np.ndarray]:
        """Return the gradients of every sample as a batch of one, `(n, P)` in chunks."""

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            return each(lambda row: self._value_and_gradient(_alone(shared, row))[1], rows)

        sweep = self._sweep(("sample_gradients",), kernel, linear=False)
        return sweep(point._replace(x=None, y=None), (point.x, point.y), width, compiled=self.compiled)

    # Second derivatives

    def second(
        self, point: Point, rows: Any, width: int, *, by_inputs: bool = False, progress: bool | None = False
    ) -> list[np.ndarray]:
        """Return the derivative of `rows @ gradient` by the parameters, or by the input, `(k, width)` in chunks.

        One forward sweep over the gradient for each row (Pearlmutter, 1994).
        """
        slope = self._slope_by_inputs if by_inputs else self._slope_by_parameters

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            return each(lambda row: _along(slope, shared, row), rows)

        sweep = self._sweep(("second derivative", by_inputs), kernel, linear=True)
        return sweep(point, rows, width, compiled=self.compiled, progress=progress)

    def mixed(self, point: Point, rows: Any, width: int) -> list[np.ndarray]:
        """Return the derivatives of `rows @ gradient` of every sample by its own input, `(n, k, M)` in chunks."""

        def kernel(each: Each, shared: tuple[Point, Any], samples: Any) -> Any:
            rest, directions = shared

            def one(sample: Any) -> Any:
                here = _alone(rest, sample)
                return each(lambda row: _along(self._slope_by_inputs, here, row), directions)

            return each(one, samples)

        sweep = self._sweep(("mixed",), kernel, linear=False)
        shared = point._replace(x=None, y=None), jnp.asarray(rows)
        return sweep(shared, (point.x, point.y), width, compiled=self.compiled)

    def ggn(self, point: Point, rows: Any, width: int) -> list[np.ndarray]:
        r"""Return rows of $J^\top H_{loss} J$, `(k, P)` in chunks."""

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            return each(lambda row: self._ggn(shared, row), rows)

        return self._sweep(("ggn",), kernel, linear=True)(point, rows, width, compiled=self.compiled)

    def check_twice(self, point: Point, call: str) -> None:
        """Hold products with the Hessian against each other, and against gradients, once per shape.

        Raises:
            NotDifferentiableError: The Hessian that JAX gives is not symmetric, or a backward pass written by hand
                drops a part of it.
        """
        key, size = shapes(point), sum(leaf.size for leaf in point.leaves)
        if key in self._twice:
            return
        dtype = jnp.result_type(*point.leaves)
        u, v = np.random.default_rng(0).standard_normal((2, 1, size)).astype(dtype)
        u /= np.linalg.norm(u.astype(np.float64)).astype(dtype)
        along_u, along_v = (self.second(point, w, size)[0].astype(np.float64) for w in (u, v))
        if not (np.isfinite(along_u).all() and np.isfinite(along_v).all()):
            return  # proves nothing; products are checked, and name the parameter
        gap = abs(float((along_u * v).sum()) - float((along_v * u).sum()))
        scale = float(np.hypot(np.linalg.norm(along_u) * np.linalg.norm(v), np.linalg.norm(along_v)))
        proved = gap <= tolerance([torch_dtype(dtype, call)]) * scale
        if not proved and not gap <= self._rounding(point, u[0], v[0]):
            raise NotDifferentiableError(
                f"{call}: the second derivative that JAX gives is not symmetric (off by {gap / scale:.1e}), so it is "
                "wrong for some operation of this model, perhaps a custom_jvp or custom_vjp whose rule is not "
                "differentiable itself. Write it out."
            )
        if self.custom:
            self._check_differences(point, u[0], along_u[0], call)
        if proved and scale:
            self._twice.add(key)

    def _rounding(self, point: Point, u: Any, v: Any) -> float:
        """Return how far rounding may move `<v, H u> - <u, H v>`, of which both products are within their size."""

        def product(point: Point, row: Any) -> Any:
            return _along(self._slope_by_parameters, point, row)

        along_u, along_v = (rounding_error(product, point, row) for row in (u, v))
        return float(np.hypot(along_u * np.linalg.norm(v), along_v * np.linalg.norm(u)))

    def _check_differences(self, point: Point, direction: np.ndarray, product: np.ndarray, call: str) -> None:
        """Compare one product with central differences of gradients: a dropped part may well be symmetric."""
        size = math.hypot(*(float(np.linalg.norm(np.asarray(leaf, np.float64))) for leaf in point.leaves))
        step = float(jnp.finfo(direction.dtype).eps) ** (1 / 3) * max(1.0, size)
        tolerated = difference_tolerance(torch_dtype(direction.dtype, call))

        def central(point: Point, step: float) -> Any:
            ends = [
                point._replace(
                    leaves=tuple(
                        leaf + part
                        for leaf, part in zip(point.leaves, _split(sign * step * direction, point.leaves), strict=True)
                    )
                )
                for sign in (1, -1)
            ]
            ahead, behind = (self._value_and_gradient(end)[1] for end in ends)
            return (ahead - behind) / (2 * step)

        wide = np.asarray(central(point, step), np.float64)
        error = _relative(product, wide)
        if not error > tolerated:
            return
        narrow = np.asarray(central(point, step / 4), np.float64)
        error, distance = _relative(product, narrow), float(np.linalg.norm(product - narrow))
        explained = float(np.linalg.norm(wide - narrow)) + rounding_error(lambda p: central(p, step / 4), point)
        if error > tolerated and not distance <= tolerated * float(np.linalg.norm(product)) + explained:
            raise NotDifferentiableError(
                f"{call}: a product with the Hessian and a central difference of gradients disagree by {error:.1e}, "
                "probably because the backward of a custom_vjp drops a second derivative. Write it with "
                "differentiable operations."
            )

    def _slope_by_parameters(self, point: Point) -> Any:
        return jax.grad(lambda leaves: self._loss(point._replace(leaves=leaves)))(point.leaves)

    def _slope_by_inputs(self, point: Point) -> Any:
        def value(floating: Sequence[Any]) -> Any:
            return self._loss(point._replace(x=jax.tree.unflatten(spec, _replaced(inputs, floating))))

        inputs, spec = jax.tree.flatten(point.x)
        return jax.grad(value)([leaf for leaf in inputs if is_floating(leaf)])

    def _ggn(self, point: Point, row: Any) -> Any:
        def outputs(leaves: tuple[Any, ...]) -> Any:
            return _floating(self.output(point._replace(leaves=leaves)))

        output, pull = jax.vjp(outputs, point.leaves)
        direction = _split(row, point.leaves)
        if self.custom:  # a custom_vjp has no forward rule: push by the transpose of the pull
            tangent = jax.vjp(lambda cotangent: pull(cotangent)[0], output)[1](direction)[0]
        else:
            tangent = jax.jvp(outputs, (point.leaves,), (direction,))[1]
        bent = jax.jvp(jax.grad(lambda o: _one_number(self.loss(o, point.y))), (output,), (tangent,))[1]
        return _joined(pull(bent)[0], point.leaves)

    def _sweep(self, key: tuple[Any, ...], kernel: Kernel, *, linear: bool) -> Sweep:
        if key not in self._sweeps:
            self._sweeps[key] = Sweep(kernel, key[0], linear=linear)
        return self._sweeps[key]


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return the distance of two vectors over the length of the longer one."""
    scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
    return float(np.linalg.norm(a - b)) / scale if scale else 0.0


def _along(slope: Callable[[Point], Any], point: Point, row: Any) -> Any:
    """Return how a gradient changes along a direction of the parameters."""
    tangent = _split(row, point.leaves)
    slopes, changes = jax.jvp(lambda leaves: slope(point._replace(leaves=leaves)), (point.leaves,), (tangent,))
    return _joined(changes, slopes)


def _replaced(leaves: Sequence[Any], floating: Sequence[Any]) -> list[Any]:
    """Return the leaves with these in place of those of floating point."""
    others = iter(floating)
    return [next(others) if is_floating(leaf) else leaf for leaf in leaves]


def _alone(point: Point, sample: Any) -> Point:
    x, y = jax.tree.map(lambda leaf: leaf[None], sample)
    return point._replace(x=x, y=y)


def _split(row: Any, like: Sequence[Any]) -> tuple[Any, ...]:
    parts, start = [], 0
    for leaf in like:
        parts.append(row[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return tuple(parts)


def _joined(parts: Sequence[Any], like: Sequence[Any]) -> Any:
    dtype = jnp.result_type(*like)
    return jnp.concatenate([part.reshape(-1).astype(dtype) for part in parts])


def _floating(output: Any) -> Any:
    for path, leaf in jax.tree_util.tree_flatten_with_path(output)[0]:
        if not is_floating(leaf):
            name = "output" + jax.tree_util.keystr(path)
            came = f"of dtype {leaf.dtype}" if hasattr(leaf, "dtype") else f"a {type(leaf).__name__}"
            raise NotDifferentiableError(explain(name, came, "a derivative needs a floating-point output"))
    return output


def _one_number(value: Any) -> Any:
    if not isinstance(value, jax.Array):
        todo = "Return one array of shape (), without `float()` or auxiliary results."
        raise NotDifferentiableError(explain("the loss", f"a {type(value).__name__}", "an array is needed", todo))
    if value.ndim > 0:
        raise InputError(
            explain(
                "the loss",
                f"of shape {tuple(value.shape)}",
                "one number, shape (), is needed",
                "Take its mean or sum, as the objective's reduction says.",
            )
        )
    if not is_floating(value):
        todo = "Take scores rather than labels or counts."
        raise NotDifferentiableError(
            explain("the loss", f"of dtype {value.dtype}", "a floating-point number is needed", todo)
        )
    return value
