"""Where parameters enter a traced function: a rule for each operation by which a weight multiplies its input.

A traced function is run operation by operation. Parameters are followed through operations that only move entries, by
the numbers of their entries; where one meets an operation of the table, `z = W a`, the rule gives what it multiplies
there, and the gradient by z is that by a zero added to it. Gradients of W are then cotangent outer operand.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from ..errors import NotDifferentiableError


class WeightEntry(NamedTuple):
    """A weight at an operation that multiplies it.

    Attributes:
        weight: Numbers of the weight's entries, `(out, in)`.
        operand: What multiplies it, `(positions, in)`.
        rows: Maps the operation's result, or a cotangent of it, to `(positions, out)`.
    """

    weight: np.ndarray
    operand: Any
    rows: Callable[[Any], Any]


class NoRuleError(Exception):
    """An operation's rule does not cover this use of it, which the message states."""


def _by_dot_general(place: int, weight: np.ndarray, values: Sequence[Any], params: dict[str, Any]) -> WeightEntry:
    contracted, batched = params["dimension_numbers"]
    if batched[0]:
        raise NoRuleError("with batch axes of the weight")
    other = values[1 - place]
    summed, met = contracted[place], contracted[1 - place]
    free, kept = ([i for i in range(v.ndim) if i not in axes] for v, axes in ((weight, summed), (other, met)))
    wide, out = math.prod(weight.shape[i] for i in summed), math.prod(weight.shape[i] for i in free)
    matrix = weight.transpose(*free, *summed).reshape(out, wide)
    operand = other.transpose(*kept, *met).reshape(-1, wide)

    def rows(result: Any) -> Any:
        return result.reshape(-1, out) if place else result.reshape(out, -1).T

    return WeightEntry(matrix, operand, rows)


def _by_convolution(place: int, weight: np.ndarray, values: Sequence[Any], params: dict[str, Any]) -> WeightEntry:
    if place == 0:
        raise NoRuleError("as its input")
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise NoRuleError("in groups")
    numbers = params["dimension_numbers"]
    kernel = weight.transpose(numbers.rhs_spec)  # out, in, and the positions of the kernel
    patches = jax.lax.conv_general_dilated_patches(
        values[0],
        kernel.shape[2:],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        numbers,
    )

    def rows(result: Any) -> Any:
        batch, channel, *rest = numbers.out_spec
        return result.transpose(batch, *rest, channel).reshape(-1, result.shape[channel])

    return WeightEntry(kernel.reshape(kernel.shape[0], -1), rows(patches), rows)


RULES = {"dot_general": _by_dot_general, "conv_general_dilated": _by_convolution}
# Entry by entry: a parameter that enters so is kept as rows, its whole gradient for every sample.
ENTRYWISE = frozenset(
    {"add", "sub", "mul", "div", "max", "min", "pow", "neg", "abs", "exp", "log", "log1p", "tanh", "logistic", "sqrt"}
    | {"rsqrt", "square", "integer_pow", "select_n"}
)
MOVES: dict[str, Callable[[np.ndarray, dict[str, Any]], np.ndarray]] = {
    "transpose": lambda v, params: v.transpose(params["permutation"]),
    "reshape": lambda v, params: v.reshape(params["new_sizes"]),
    "squeeze": lambda v, params: v.squeeze(tuple(params["dimensions"])),
    "expand_dims": lambda v, params: np.expand_dims(v, tuple(params["dimensions"])),
    "broadcast_in_dim": lambda v, params: _broadcast(v, params["shape"], params["broadcast_dimensions"]),
    "convert_element_type": lambda v, params: v,
    "copy": lambda v, params: v,
}
PAIRING = frozenset({"add", "sub", "mul", "div", "max", "min", "pow", "atan2"})  # of two values entry by entry
LOOPS = frozenset({"scan", "while", "cond"})  # they do more than call the function that they hold
CUSTOM_VJP = "custom_vjp"  # how operations with a backward written by hand begin
CALLS = frozenset({"pjit", "jit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})


@dataclass(frozen=True)
class Weight:
    """A parameter where it meets an operation of the table.

    Attributes:
        leaf: Which parameter.
        turned: It is stored as `(in, out)`.
        rows: Positions of a sample and outputs of the weight, `(positions, out)`.
        dtype: Of the operation's result.
    """

    leaf: int
    turned: bool
    rows: tuple[int, int]
    dtype: Any


@dataclass
class Entries:
    """Where the parameters of a traced function enter.

    Attributes:
        weights: Uses by operations of the table, in order.
        operands: What multiplies each of them, `(positions, in)`.
        biases: The parameter that is added at a use's own result, by the number of the use.
        others: Parameters that enter entry by entry, as often as they do.
    """

    weights: list[Weight] = field(default_factory=list)
    operands: list[Any] = field(default_factory=list)
    biases: dict[int, int] = field(default_factory=dict)
    others: list[int] = field(default_factory=list)


class _Parameter(NamedTuple):
    """A value that is a parameter, with the numbers of its entries."""

    leaf: int
    numbers: np.ndarray


class _Result(NamedTuple):
    """A value with the cotangent of a use's result, with the numbers of its entries in `(positions, out)`."""

    use: int
    numbers: np.ndarray


_Followed = _Parameter | _Result


class Follower:
    """Runs a traced function and notes where its first arguments, the parameters, enter.

    Args:
        names: Of the parameters, for messages.
        call: The public call.
        taps: Zeros `(positions, out)` to be added at the uses, in order; None on the run that finds those.
    """

    def __init__(self, names: Sequence[str], call: str, taps: Sequence[Any] | None = None) -> None:
        self.names, self.call, self.taps, self.found = names, call, taps, Entries()

    def run(self, traced: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
        """Return what the function gives for these arguments.

        Raises:
            NotDifferentiableError: A parameter enters by an operation without a rule; the message names both.
        """
        followed = [_Parameter(i, _numbered(np.shape(args[i]))) for i in range(len(self.names))]
        return self._run(traced.jaxpr, traced.consts, args, [*followed, *[None] * (len(args) - len(followed))])[0]

    def _run(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], followed: Sequence[_Followed | None]
    ) -> tuple[list[Any], list[_Followed | None]]:
        known: dict[Any, Any] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
        marks: dict[Any, _Followed] = {v: m for v, m in zip(jaxpr.invars, followed, strict=True) if m is not None}

        def read(atom: Any) -> Any:
            return atom.val if isinstance(atom, Literal) else known[atom]

        read_by = Counter[Any](v for equation in jaxpr.eqns for v in equation.invars if isinstance(v, Var))
        read_by.update(v for v in jaxpr.outvars if isinstance(v, Var))

        def mark_of(atom: Any) -> _Followed | None:
            if isinstance(atom, Literal):
                return None
            # A result that is read twice has another cotangent than each of its readers.
            return None if isinstance(marks.get(atom), _Result) and read_by[atom] > 1 else marks.get(atom)

        for equation in jaxpr.eqns:
            values, own = [read(v) for v in equation.invars], [mark_of(v) for v in equation.invars]
            results, made = self._equation(equation, values, own)
            known.update(zip(equation.outvars, results, strict=True))
            marks.update({v: m for v, m in zip(equation.outvars, made, strict=True) if m is not None})
        return [read(v) for v in jaxpr.outvars], [mark_of(v) for v in jaxpr.outvars]

    def _equation(
        self, equation: Any, values: list[Any], own: list[_Followed | None]
    ) -> tuple[list[Any], list[_Followed | None]]:
        name = equation.primitive.name
        unknown: list[_Followed | None] = [None] * len(equation.outvars)
        if not any(own):
            return bound(equation, values), unknown
        if name in CALLS:
            inner = next(p for p in equation.params.values() if isinstance(p, ClosedJaxpr | Jaxpr))
            closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
            return self._run(closed.jaxpr, closed.consts, values, own)
        if name in MOVES and own[0] is not None:
            moved = own[0]._replace(numbers=MOVES[name](own[0].numbers, equation.params))
            spread = isinstance(moved, _Result) and moved.numbers.size > own[0].numbers.size
            return bound(equation, values), [None if spread else moved]
        parameters = [(i, mark) for i, mark in enumerate(own) if isinstance(mark, _Parameter)]
        if name not in RULES:
            for i, mark in parameters:
                self._entrywise(name, mark, own[1 - i] if len(own) == 2 else None)
            results = bound(equation, values)
            return results, [self._sum(own, np.shape(results[0])), *unknown[1:]] if name == "add" else unknown
        (result,), made = bound(equation, values), None
        for place, mark in parameters:
            result, made = self._used(equation, place, mark, values, result)
        return [result], [made]

    def _sum(self, own: Sequence[_Followed | None], shape: tuple[int, ...]) -> _Result | None:
        """Return the use whose cotangent is that of a sum, of several that of the first parameter."""
        fitting = [m for m in own if isinstance(m, _Result) and m.numbers.shape == shape]
        return min(fitting, key=lambda m: self.found.weights[m.use].leaf, default=None)

    def _used(self, equation: Any, place: int, own: _Parameter, values: list[Any], result: Any) -> tuple[Any, _Result]:
        """Note a use, and return the operation's result with the use's tap on it."""
        leaf, name = own.leaf, equation.primitive.name
        try:
            entry = RULES[name](place, own.numbers, values, equation.params)
            order, turned = _orientation(entry.weight)
        except NoRuleError as error:
            raise self._refused(leaf, f"{name} {error}") from None
        shape = jax.eval_shape(entry.rows, result).shape
        use = len(self.found.weights)
        self.found.weights.append(Weight(leaf, turned, shape, np.dtype(result.dtype)))
        self.found.operands.append(entry.operand[:, order])
        if self.taps is not None:
            result = result + jax.linear_transpose(entry.rows, result)(self.taps[use])[0]
        numbers = np.empty(result.shape, np.int64)
        numbers.flat[_moved(entry.rows, result.shape).ravel()] = np.arange(result.size)
        return result, _Result(use, numbers)

    def _entrywise(self, name: str, own: _Parameter, other: _Followed | None) -> None:
        leaf, numbers = own
        if name == "add" and isinstance(other, _Result) and numbers.ndim == other.numbers.ndim:
            added = numbers == other.numbers % self.found.weights[other.use].rows[1]
            if bool(added.all()):
                self.found.biases[other.use] = leaf
        if name not in ENTRYWISE:
            raise self._refused(leaf, name)
        self.found.others.append(leaf)

    def _refused(self, leaf: int, operation: str) -> NotDifferentiableError:
        return NotDifferentiableError(
            f"{self.call}: {self.names[leaf]} enters by {operation}, which has no rule for JAX; {', '.join(RULES)} and "
            "operations entry by entry have one. Leave it out with `parameters=`, or use `CG()`."
        )


def bound(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Return the results of an operation of a traced function."""
    params = equation.primitive.get_bind_params(equation.params)
    functions, params = params if isinstance(params, tuple) else ((), params)  # JAX before 0.10 gives functions too
    found = equation.primitive.bind(*functions, *values, **params)
    return list(found) if equation.primitive.multiple_results else [found]


def _orientation(weight: np.ndarray) -> tuple[np.ndarray, bool]:
    """Return the order of the inputs in which a weight is stored row by row, and whether as `(in, out)`.

    Raises:
        NoRuleError: It is stored neither way.
    """
    order = np.argsort(weight[0], kind="stable")
    weight = weight[:, order]
    for turned in (False, True):
        stored = weight.T if turned else weight
        if np.array_equal(stored.ravel(), np.arange(weight.size)):
            return order, turned
    raise NoRuleError("in part, repeated, or in another order than it is stored in")


def _numbered(shape: Sequence[int]) -> np.ndarray:
    return np.arange(math.prod(shape)).reshape(shape)


def _moved(rows: Callable[[Any], Any], shape: Sequence[int]) -> np.ndarray:
    """Return which entries of an operation's result stand where in `(positions, out)`."""
    return np.asarray(rows(_numbered(shape)))


def _broadcast(value: np.ndarray, shape: Sequence[int], axes: Sequence[int]) -> np.ndarray:
    lengths = [1] * len(shape)
    for axis, length in zip(axes, value.shape, strict=True):
        lengths[axis] = length
    return np.broadcast_to(value.reshape(lengths), shape)
