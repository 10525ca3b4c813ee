"""The size of rounding errors in what JAX computes, measured as in `_torch.rounding`: every operand is perturbed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from .crossing import is_floating
from .jaxpr import READS
from .rules import LOOPS, bound

_SAFETY = 8.0  # as in `_torch.rounding`
_DRAWS = 3  # the largest of three counts: one random draw of rounding may be small by chance


def rounding_error(function: Callable[..., Any], *args: Any) -> float:
    """Return how far rounding may move an array that a function returns, as a Euclidean norm.

    A function that reads values out of its arrays cannot be traced; for it only the arguments are perturbed.
    """
    exact = np.asarray(function(*args), np.float64)
    norms = []
    for seed in range(_DRAWS):
        noise = _Noise(seed)
        try:
            traced = jax.make_jaxpr(function)(*args)
            (moved,) = noise.run(traced, jax.tree.leaves(args))
        except READS:
            moved = function(*jax.tree.map(noise.moved, args))
        norms.append(float(np.linalg.norm(np.asarray(moved, np.float64) - exact)))
    return _SAFETY * max((norm for norm in norms if math.isfinite(norm)), default=0.0)


class _Noise:
    """Runs traced functions, operation by operation, on operands that are off by one unit in their last place."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)

    def moved(self, value: Any) -> Any:
        """Return an array with its entries off by their rounding; whole numbers stay as they are."""
        if not is_floating(value):
            return value
        kind = jnp.result_type(value)
        noise = self._random.uniform(-1, 1, jnp.shape(value)) * float(jnp.finfo(kind).eps)
        return (value * (1 + jnp.asarray(noise, kind))).astype(kind)

    def run(self, traced: ClosedJaxpr, args: list[Any]) -> list[Any]:
        """Return what a traced function gives for these arguments."""
        known = dict(zip([*traced.jaxpr.constvars, *traced.jaxpr.invars], [*traced.consts, *args], strict=True))

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        for equation in traced.jaxpr.eqns:
            results = self._equation(equation, [read(atom) for atom in equation.invars])
            known.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in traced.jaxpr.outvars]

    def _equation(self, equation: Any, values: list[Any]) -> list[Any]:
        inner = next((part for part in equation.params.values() if isinstance(part, ClosedJaxpr | Jaxpr)), None)
        if inner is not None and _is_call(inner, equation):
            return self.run(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), values)
        if all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in equation.outvars):
            values = [self.moved(value) for value in values]
        return bound(equation, values)


def _is_call(inner: ClosedJaxpr | Jaxpr, equation: Any) -> bool:
    """Return whether an operation only calls a traced function: loops and branches do more than that."""
    jaxpr = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    return (
        equation.primitive.name not in LOOPS
        and len(jaxpr.invars) == len(equation.invars)
        and len(jaxpr.outvars) == len(equation.outvars)
    )
