"""Many least-squares problems of one shape: their objectives, and where they are linearised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._runtime.restoring import NumericWarningsIgnored, restoring
from ..errors import InputError, InputTypeError, NotDifferentiableError
from ._batch_model import ProblemBatch
from ._batch_points import Points, by_column, column_norms
from ._bounds import Box, bounds_of, free_numbers
from ._implicit import Minima
from ._kernels import correction, kernel_of
from ._layout import Layout, Values, array, layout_of
from ._residuals import Term, corrected_left, paired, problem_root, spread, weighed
from ._scaling import scaling_of
from ._second_order import minima_and_saddles

CALL = "least_squares_batch"


@dataclass(eq=False)
class BatchProblem:
    """Problems with their data, targets, weights and bounds.

    Attributes:
        problems: Run the function.
        layout: The parameters of one problem.
        terms: One per output, of all problems.
        second_order: Correct kernels with their second derivative.
        bounds: The box of all problems, if any.
        scales: One over the scales that were given, (columns,); None for those of the Jacobian.
        many: How many problems there are.
        given: What the caller gave, for all problems there were at first.
        first: Those, where these are some of them.
        number: Which of them these are.
    """

    problems: ProblemBatch
    layout: Layout
    terms: tuple[Term, ...]
    second_order: bool
    bounds: Box | None
    scales: np.ndarray | None
    many: int
    given: dict[str, Any]
    first: BatchProblem | None = None
    number: np.ndarray | None = None

    def some(self, which: np.ndarray) -> BatchProblem:
        """Return some of the problems."""
        terms = tuple(t.of_problems(which, self.many) for t in self.terms)
        box = None if self.bounds is None else self._box(self.bounds, which)
        number = which if self.number is None else self.number[which]
        own = {"problems": self.problems.some(which), "terms": terms, "bounds": box, "many": len(which)}
        return replace(self, **own, first=self.first or self, number=number)

    def _box(self, box: Box, which: np.ndarray) -> Box:
        places = torch.from_numpy(which)
        lower, upper = ({n: v[places.to(v.device)] for n, v in side.items()} for side in (box.lower, box.upper))
        low, high = (self.flat(self.by_problem(side)[which]) for side in (box.low, box.high))
        return Box(self._whole(len(which)), lower, upper, low, high)

    def _whole(self, many: int) -> Layout:
        return Layout(tuple(part.of_problems(many) for part in self.layout.parts))

    def by_problem(self, flat: np.ndarray) -> np.ndarray:
        """Return numbers of the free columns, parameter by parameter, as one row per problem."""
        many = len(flat) // self.layout.columns
        cuts = np.cumsum([many * size for size in self.layout.sizes])[:-1]
        return np.concatenate([part.reshape(many, -1) for part in np.split(flat, cuts)], 1)

    def flat(self, rows: np.ndarray) -> np.ndarray:
        """Return rows, one per problem, as numbers parameter by parameter."""
        return np.concatenate([part.reshape(-1) for part in np.split(rows, np.cumsum(self.layout.sizes)[:-1], 1)])

    def moved(self, values: Values, step: np.ndarray) -> Values:
        """Return parameters moved by steps, (n, columns), within the bounds."""
        found = self._whole(self.many).moved(values, self.flat(step))
        return found if self.bounds is None else self.bounds.clamped(found)

    @restoring
    def objectives(self, values: Values) -> np.ndarray:
        """Return the objectives, (n,), by one forward pass; NaN or Inf where a residual is."""
        outputs, total = self.problems.residuals(values), np.zeros(self.many)
        with NumericWarningsIgnored("over", "invalid"):
            for term, output in paired(self.terms, outputs):
                total += term.values(output).reshape(self.many, -1).sum(1) / 2
        return total

    def minima(self, values: Values, success: np.ndarray) -> Minima:
        """Return problems, of all there were at first, that are or may be at minima.

        Args:
            values: The parameters of these.
            success: Which of them are examined.
        """
        first, asked = self.first or self, torch.from_numpy(success)
        if self.number is not None:
            number, picked = torch.from_numpy(self.number), asked.nonzero()[:, 0]
            asked = torch.zeros(first.many, dtype=torch.bool).index_put((number,), asked)
            places = torch.zeros(first.many, dtype=torch.int64).fill_(picked[0])  # what is there elsewhere has no part
            places[number] = torch.where(torch.from_numpy(success), torch.arange(len(number)), picked[0])
            values = {name: value[places.to(value.device)] for name, value in values.items()}
        active = None if first.bounds is None else first.bounds.active(values)
        return Minima(values, asked, first.layout, active, first.problems.connected, self.given, CALL)

    def minima_and_saddles(self, points: Points, asked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which problems are minima by second derivatives, and which saddles or maxima, among those `asked`."""
        if not asked.any():
            return asked, asked
        first, own = self.first or self, np.arange(self.many) if self.number is None else self.number
        cost, sizes = np.ones(first.many), np.ones((first.many, self.layout.columns))
        cost[own], sizes[own] = points.cost, points.magnitudes
        found = minima_and_saddles(self.minima(points.values, asked), cost, sizes, points.eps)
        return found[0][own] & asked, found[1][own] & asked

    def points(self, values: Values, largest: np.ndarray | None) -> tuple[Points, np.ndarray]:
        """Return the problems linearised, and the largest norms of columns so far.

        Args:
            values: Their parameters.
            largest: The largest norms before, (n, columns).
        """
        outputs, blocks = self.problems.linearised(values)
        layout, parts = self._whole(self.many), []
        for (term, output), line in zip(paired(self.terms, outputs), blocks, strict=True):
            parts.append(self._weighted(term, output, self._tangent(layout, values, line)))
        cost, r, J, terms = (_side_by_side([p[i] for p in parts]) for i in range(4))
        raw = _side_by_side([t.raw(o).reshape(self.many, -1) for t, o in paired(self.terms, outputs)])
        gram = np.matmul(J.swapaxes(1, 2), J)
        norms = column_norms(J, gram)
        largest = norms if largest is None else np.maximum(largest, norms)
        lengths, unit = np.where(largest > 0, largest, 1.0), np.ones((self.many, 1))
        if self.scales is not None:
            unit = by_column(np.where(largest > 0, largest / self.scales, 0.0)).max(0, initial=0.0)[:, None]
            lengths, unit = np.broadcast_to(self.scales, J.shape[::2]), np.where(unit > 0, unit, 1.0)
        eps = max(torch.finfo(v.dtype).eps for v in (*outputs, *values.values()))
        magnitudes, room = self.by_problem(layout.magnitudes(values)), None
        if self.bounds is not None:
            x = free_numbers(layout, values, self.bounds.lower)
            room = self.by_problem(self.bounds.low - x), self.by_problem(self.bounds.high - x)
        found = Points(values, cost.sum(1), J, gram, norms, r, raw, terms, magnitudes, lengths, unit, float(eps), room)
        return found, largest

    def _tangent(self, layout: Layout, values: Values, line: Sequence[Tensor]) -> np.ndarray:
        """Return the Jacobian of an output by the free tangent columns, (n, rows, columns)."""
        found = []
        for part, own, block in zip(layout.parts, self.layout.parts, line, strict=True):
            J = block.detach().to("cpu", torch.float64).reshape(self.many, -1, own.stored).numpy()
            if own.chart is not None:
                elements = own.lead.numel()
                moves = part.moves(values[part.name]).reshape(self.many, elements, -1, own.width)
                slots = J.reshape(self.many, -1, elements, J.shape[2] // elements).swapaxes(1, 2)
                J = np.matmul(slots, moves).swapaxes(1, 2).reshape(self.many, -1, own.columns)
            found.append(J if own.free is None else J[:, :, own.free])
        return np.concatenate(found, 2) if len(found) > 1 else found[0]

    def _weighted(self, term: Term, output: Tensor, J: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return objectives (n, 1), residuals, Jacobians and magnitudes of a term, weighted and corrected."""
        r, left, many = term.weighted(output), term.root, self.many
        if term.kernel is None:
            cost = np.square(r).reshape(many, -1).sum(1, keepdims=True) / 2
        else:
            blocks = r.reshape(-1, term.width)
            value, fixed, factor, along = correction(term.kernel, blocks, self.second_order)
            cost, r = value.reshape(many, -1).sum(1, keepdims=True) / 2, fixed.reshape(-1)
            left = corrected_left(term, blocks, factor, along)
        rows = weighed(left, J.reshape(-1, J.shape[2])).reshape(J.shape)
        return cost, r.reshape(many, -1), rows, term.magnitude(output).reshape(many, -1)


def _side_by_side(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts, 1) if len(parts) > 1 else parts[0]


# ---- what the caller gives ---------------------------------------------------------------------------------------


def batch_problem(problems: ProblemBatch, values: Values, given: dict[str, Any]) -> BatchProblem:
    """Return the problems that a caller means.

    Args:
        problems: Run the function.
        values: The parameters at the start, (n, ...).
        given: `manifolds`, `fixed`, `bounds`, `x_scale`, `target`, `weight`, `sqrt_weight`, `kernel`, `f_scale` and
            `corrector` as the caller gave them.

    Raises:
        InputTypeError: An argument is of the wrong kind.
        InputError: A shape does not match, or a number is out of range.
        NotDifferentiableError: An output is complex.
    """
    many = len(next(iter(values.values())))
    layout = layout_of({name: value[0] for name, value in values.items()}, given["manifolds"], given["fixed"])
    for part in layout.parts:
        if part.group:
            came, todo = f"a LieTensor in '{part.name}'", "Pass its `.tensor()` and a chart in `manifolds=`."
            raise InputTypeError.of("params", came, "ordinary tensors are needed", todo)
        if part.chart is not None:
            part.chart.check(values[part.name], part.name)
    whole = Layout(tuple(part.of_problems(many) for part in layout.parts))
    bounds = bounds_of(given["bounds"], whole, values)
    scales = scaling_of(given["x_scale"], layout).given
    terms = _terms(problems, values, given, many)
    return BatchProblem(problems, layout, terms, given["corrector"] == "triggs", bounds, scales, many, given)


def _terms(problems: ProblemBatch, values: Values, given: dict[str, Any], many: int) -> tuple[Term, ...]:
    outputs = problems.residuals(values)
    tree = problems.function.outputs
    if tree is None:
        raise InputTypeError.of("model", "one without outputs", "a function that returns residuals is needed")
    each = {key: spread(given[key], tree, key) for key in ("target", "weight", "sqrt_weight")}
    kernel, terms = given["kernel"], []
    kernels = spread(kernel, tree, "kernel") if isinstance(kernel, list | tuple | dict) else [kernel] * len(outputs)
    for i, (name, output) in enumerate(zip(tree.names, outputs, strict=True)):
        label = "" if tree.single else name.removeprefix("output")
        if output.is_complex():
            came, todo = f"of dtype {output.dtype}", "Use torch.view_as_real on it."
            raise NotDifferentiableError.of(name, came, "least squares need real numbers", todo)
        if not output.ndim or len(output) != many or not output.numel():
            needed = f"numbers for each of {many} problems are needed, which count along the first axis"
            raise InputError.of(name, f"of shape {tuple(output.shape)}", needed)
        if each["weight"][i] is not None and each["sqrt_weight"][i] is not None:
            raise InputError.of(f"weight{label}", "given beside `sqrt_weight`", "one of them is needed, not both")
        squared = each["weight"][i] is not None
        word = f"weight{label}" if squared else f"sqrt_weight{label}"
        root = problem_root(each["weight" if squared else "sqrt_weight"][i], output.shape, word, squared)
        rows = output.shape[0] * (output.shape[1] if output.ndim > 1 else 1)
        shape = torch.Size((rows, *output.shape[2:]))
        target = _target(each["target"][i], output, f"target{label}")
        terms.append(Term(name, shape, target, root, kernel_of(kernels[i], given["f_scale"])))
    return tuple(terms)


def _target(target: Any, output: Tensor, argument: str) -> np.ndarray | None:
    if target is None:
        return None
    if not isinstance(target, Tensor):
        raise InputTypeError.of(argument, f"a {type(target).__name__}", "a tensor is needed")
    if target.shape != output.shape:
        needed = f"the outputs of all problems have shape {tuple(output.shape)}"
        raise InputError.of(argument, f"of shape {tuple(target.shape)}", needed, "Nothing is broadcast.")
    if target.dtype != output.dtype:
        todo = f"Call `.to({output.dtype})` on it."
        raise InputError.of(argument, f"of dtype {target.dtype}", f"the output is of {output.dtype}", todo)
    return array(target)
