"""A JAX model with its loss, and its derivatives as compiled functions.

Compiled functions depend on `apply`, `loss` and the structure of the parameters only; values are arguments. So one
model serves many parameters (retraining) and one compilation many batches of a shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._ladder.protocol import SweepOptions
from .._runtime.agreement import difference_tolerance, tolerance
from ..errors import NotDifferentiableError
from .crossing import is_floating, torch_dtype
from .jaxpr import READS, has_custom_vjp, is_reached, refuse_broadcast
from .parameters import Same, Structure
from .points import Point, alone, floating, joined, one_number, replaced, size_of, split
from .rounding import rounding_error
from .samples import Sharing
from .sweeps import Each, Kernel, Sweep, leave, reading, shapes

_REMEMBERED = 64  # compiled programs: three a problem, of the outputs, of the loss, and of the loss at the outputs


def model_of(apply: Callable[..., Any], loss: Callable[..., Any] | None, structure: Structure | Sharing) -> Model:
    """Return the model of these functions, the same one for a while."""
    return _model_of(Same(apply), Same(loss), structure)


@lru_cache(maxsize=_REMEMBERED)
def _model_of(apply: Same, loss: Same, structure: Structure | Sharing) -> Model:
    return Model(apply.of, loss.of, structure)


def weighted_loss(loss: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return `loss(output, (y, weights))`, the sum of the rows' own losses times their weights."""
    return _weighted_loss(Same(loss))


@lru_cache(maxsize=_REMEMBERED)
def _weighted_loss(loss: Same) -> Callable[[Any, Any], Any]:
    def one_row(output: Any, y: Any) -> Any:
        return one_number(loss.of(*jax.tree.map(lambda leaf: leaf[None], (output, y))))

    def weighted(output: Any, target: tuple[Any, Any]) -> Any:
        y, weights = target
        return (jax.vmap(one_row)(output, y) * weights).sum()

    return weighted


class Model:
    """Derivatives of `loss(apply(params, x), y)`, one sweep for each kind, each compiled once per shape.

    Args:
        apply: `apply(params, x)`, pure.
        loss: `loss(output, y)`, one number, pure; None where the output itself is differentiated.
        structure: How leaves make `params`.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        loss: Callable[[Any, Any], Any] | None,
        structure: Structure | Sharing,
    ) -> None:
        self.apply, self.structure, self.measured = apply, structure, loss is not None
        self.loss = _no_loss if loss is None else loss
        self.compiled, self.custom = True, False
        self.confirmed: set[Any] = set()
        self._surveyed: dict[Any, bool] = {}
        self._twice: set[Any] = set()
        self._output, self._value = jax.jit(self.output), jax.jit(self._loss)
        self._gradient = jax.jit(self._value_and_gradient)
        self._sweeps: dict[Any, Sweep] = {}

    # Values

    def output(self, point: Point) -> Any:
        """Return what the model gives, at values or while it is traced."""
        return self.apply(self.structure.build(point.leaves, point.frozen), point.x)

    def computed_output(self, point: Point) -> Any:
        """Return what the model gives, compiled where it can be."""
        return self._output(point) if self.compiled else self.output(point)

    def value(self, point: Point) -> Any:
        """Return the loss of the batch.

        Raises:
            InputError: It is not one number.
            NotDifferentiableError: It is not of floating point.
        """
        return self._value(point) if self.compiled else self._loss(point)

    def _loss(self, point: Point) -> Any:
        return one_number(self.loss(self.output(point), point.y))

    def survey(self, point: Point, options: SweepOptions) -> bool:
        """Trace the model once for these shapes, refuse what is ill-posed, and return whether a path leads through it.

        Raises:
            InputError: The loss is not one number, or the target would broadcast against the output.
            NotDifferentiableError: No path leads from the loss to anything it is differentiated by.
        """
        key, call = shapes(point), options.call
        if not self.compiled:
            self._leave_compilation(options, news=False)
            return True
        if key in self._surveyed:
            return self._surveyed[key]
        try:
            model, output = jax.make_jaxpr(self.output, return_shape=True)(point)
            outputs = len(jax.tree.leaves(output))
            loss = jax.make_jaxpr(lambda output, y: one_number(self.loss(output, y)))(output, point.y)
        except READS:
            self._leave_compilation(options, news=True)
            return True
        met = is_reached(model.jaxpr, model.jaxpr.invars[: len(point.leaves)])
        if self.measured:
            refuse_broadcast(loss, outputs)
            if not (met and is_reached(loss.jaxpr, loss.jaxpr.invars[:outputs])):
                places = "inputs" if options.parameters is None else "parameters"
                raise NotDifferentiableError(
                    f"{call}: no path leads from the loss to any of the {places}; its derivative is zero everywhere."
                )
        self.custom = self.custom or has_custom_vjp(model.jaxpr) or has_custom_vjp(loss.jaxpr)
        return self._surveyed.setdefault(key, met)

    def _leave_compilation(self, options: SweepOptions, news: bool) -> None:
        """Compute everything one row at a time from now on."""
        self.compiled = False
        reason = "the model or its loss reads values out of its arrays, so it cannot be compiled or batched"
        leave(options, reason, "Everything is computed one row at a time", news)

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
        return value, joined(parts)

    def push(self, point: Point, rows: Any, width: int, options: SweepOptions) -> list[np.ndarray]:
        """Return changes of the output along rows of changes of the parameters, `(k, width)` in chunks."""

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            pushed = self._pushed(*self._outputs(shared, by_inputs=False))
            return each(pushed, rows)

        return self.sweep(("push",), kernel, linear=True)(point, rows, width, options, compiled=self.compiled)

    def pull(self, point: Point, rows: Any, width: int, options: SweepOptions) -> list[np.ndarray]:
        """Return gradients by the parameters of rows of weights on the output, `(k, width)` in chunks."""

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            return each(_pulled(*self._outputs(shared, by_inputs=False))[0], rows)

        return self.sweep(("pull",), kernel, linear=True)(point, rows, width, options, compiled=self.compiled)

    def sample_gradients(self, point: Point, width: int, options: SweepOptions) -> list[np.ndarray]:
        """Return the gradients of every sample as a batch of one, `(n, P)` in chunks."""

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            return each(lambda row: self._value_and_gradient(alone(shared, row))[1], rows)

        return self._by_samples(("sample_gradients",), kernel, point, width, options)

    def sample_jacobians(self, point: Point, width: int, options: SweepOptions, *, forward: bool) -> list[np.ndarray]:
        """Return the Jacobian of every sample as a batch of one, by the parameters or by its input, in chunks.

        Args:
            point: All samples.
            width: Entries of one sample's Jacobian, `(outputs, what it is differentiated by)`.
            options: Of the public call.
            forward: Sweep once for each entry that it is differentiated by, not for each output.
        """
        by_inputs = options.parameters is None

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            def one(row: Any) -> Any:
                function, at = self._outputs(alone(shared, row), by_inputs)
                if forward:
                    return each(self._pushed(function, at), jnp.eye(size_of(at), dtype=jnp.result_type(*at))).T
                pulled, output = _pulled(function, at)
                return each(pulled, jnp.eye(size_of(output), dtype=jnp.result_type(*output)))

            return each(one, rows)

        return self._by_samples(("sample_jacobians", by_inputs, forward), kernel, point, width, options)

    def _by_samples(
        self, key: tuple[Any, ...], kernel: Kernel, point: Point, width: int, options: SweepOptions
    ) -> list[np.ndarray]:
        sweep, samples = self.sweep(key, kernel, linear=False), (point.x, point.y)
        return sweep(point._replace(x=None, y=None), samples, width, options, compiled=self.compiled)

    def _outputs(self, point: Point, by_inputs: bool) -> tuple[Callable[[Any], Any], tuple[Any, ...]]:
        """Return the output as a function of the parameters, or of the input, and where that one is."""
        if not by_inputs:
            return lambda leaves: floating(self.output(point._replace(leaves=leaves))), point.leaves
        inputs, spec = jax.tree.flatten(point.x)

        def function(leaves: Any) -> Any:
            return floating(self.output(point._replace(x=jax.tree.unflatten(spec, replaced(inputs, leaves)))))

        return function, tuple(leaf for leaf in inputs if is_floating(leaf))

    def _pushed(self, function: Callable[[Any], Any], at: tuple[Any, ...]) -> Callable[[Any], Any]:
        """Return how a function changes along a row."""

        def pushed(row: Any) -> Any:
            tangent = split(row, at)
            if self.custom:  # a custom_vjp has no forward rule: push by the transpose of the pull
                output, pull = jax.vjp(function, at)
                found = jax.vjp(lambda cotangent: pull(cotangent)[0], output)[1](tangent)[0]
            else:
                found = jax.jvp(function, (at,), (tangent,))[1]
            return joined(jax.tree.leaves(found))

        return pushed

    # Second derivatives

    def second(
        self, point: Point, rows: Any, width: int, options: SweepOptions, *, by_inputs: bool = False
    ) -> list[np.ndarray]:
        """Return the derivative of `rows @ gradient` by the parameters, or by the input, `(k, width)` in chunks.

        One forward sweep over the gradient for each row (Pearlmutter, 1994).
        """
        slope = self._slope_by_inputs if by_inputs else self._slope_by_parameters

        def kernel(each: Each, shared: Point, rows: Any) -> Any:
            return each(lambda row: _along(slope, shared, row), rows)

        sweep = self.sweep(("second derivative", by_inputs), kernel, linear=True)
        return sweep(point, rows, width, options, compiled=self.compiled)

    def mixed(self, point: Point, rows: Any, width: int, options: SweepOptions) -> list[np.ndarray]:
        """Return the derivatives of `rows @ gradient` of every sample by its own input, `(n, k, M)` in chunks."""

        def kernel(each: Each, shared: tuple[Point, Any], samples: Any) -> Any:
            rest, directions = shared

            def one(sample: Any) -> Any:
                here = alone(rest, sample)
                return each(lambda row: _along(self._slope_by_inputs, here, row), directions)

            return each(one, samples)

        sweep = self.sweep(("mixed",), kernel, linear=False)
        shared = point._replace(x=None, y=None), jnp.asarray(rows)
        return sweep(shared, (point.x, point.y), width, options, compiled=self.compiled)

    def check_twice(self, point: Point, options: SweepOptions) -> None:
        """Compare products of the Hessian with each other and with gradients, once per shape.

        Raises:
            NotDifferentiableError: The Hessian that JAX gives is not symmetric, or a backward pass written by hand
                drops a part of it.
        """
        key, size, call = shapes(point), size_of(point.leaves), options.call
        if key in self._twice:
            return
        dtype = jnp.result_type(*point.leaves)
        u, v = np.random.default_rng(0).standard_normal((2, 1, size)).astype(dtype)
        u /= np.linalg.norm(u.astype(np.float64)).astype(dtype)
        along_u, along_v = (self.second(point, w, size, options)[0].astype(np.float64) for w in (u, v))
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
                        for leaf, part in zip(point.leaves, split(sign * step * direction, point.leaves), strict=True)
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
        # A quarter of the step has a sixteenth of its error: the rest has another cause.
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
        def value(leaves: Sequence[Any]) -> Any:
            return self._loss(point._replace(x=jax.tree.unflatten(spec, replaced(inputs, leaves))))

        inputs, spec = jax.tree.flatten(point.x)
        return jax.grad(value)([leaf for leaf in inputs if is_floating(leaf)])

    def sweep(self, key: tuple[Any, ...], kernel: Kernel, *, linear: bool) -> Sweep:
        """Return the sweep of a kernel, the same one for a key."""
        if key not in self._sweeps:
            self._sweeps[key] = Sweep(kernel, key[0], linear=linear)
        return self._sweeps[key]


def _pulled(function: Callable[[Any], Any], at: tuple[Any, ...]) -> tuple[Callable[[Any], Any], list[Any]]:
    """Return how a row of weights on a function's output is pulled back, and the leaves of the output."""
    output, pull = jax.vjp(function, at)
    leaves, spec = jax.tree.flatten(output)
    return lambda row: joined(pull(jax.tree.unflatten(spec, split(row, leaves)))[0]), leaves


def _no_loss(output: Any, y: Any) -> Any:
    """Return one number, for models whose output itself is differentiated."""
    return jnp.zeros(())


def _relative(a: np.ndarray, b: np.ndarray) -> float:
    """Return the distance of two vectors over the length of the longer one."""
    scale = max(float(np.linalg.norm(a)), float(np.linalg.norm(b)))
    return float(np.linalg.norm(a - b)) / scale if scale else 0.0


def _along(slope: Callable[[Point], Any], point: Point, row: Any) -> Any:
    """Return how a gradient changes along a direction of the parameters."""
    tangent = split(row, point.leaves)
    slopes, changes = jax.jvp(lambda leaves: slope(point._replace(leaves=leaves)), (point.leaves,), (tangent,))
    return joined(changes)
