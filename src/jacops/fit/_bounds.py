r"""Bounds: a box that the parameters stay in.

A parameter at a bound that the gradient leads out of is held, and so is one that a step would lead out; the step is
that of the others, and what still leaves the box is projected or cut. The iterates are feasible, and steps that are
damped enough are projected scaled gradients, so that the objective falls (Bertsekas, Projected Newton methods for
optimization problems with simple constraints, 1982; Kanzow, Yamashita and Fukushima, Levenberg-Marquardt methods with
strong local convergence properties for solving nonlinear equations with convex constraints, 2004).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._runtime.contexts import arithmetic
from .._runtime.restoring import restoring
from ..errors import InputError, InputTypeError
from ._certificate import MOST_REDUCTION, Certificate, magnitude_of_terms
from ._layout import Layout, ParameterPart, Values, by_name
from ._state import Face, FitPoint
from ._system import LinearizedFit, Solved, positive
from ._undamped import predicted_reduction

_NEAR = 4.0  # rounding errors between a bound and where a step to it may end: those of a product and two sums


@dataclass(eq=False)
class Box:
    """Lower and upper bounds.

    Attributes:
        layout: The parameters.
        lower: By name, like the parameter; of those that have bounds.
        upper: By name.
        low: Over the free columns.
        high: Over the free columns.
    """

    layout: Layout
    lower: Values
    upper: Values
    low: np.ndarray
    high: np.ndarray
    _last: tuple[bytes, LinearizedFit] | None = field(default=None, repr=False)

    def at(self, point: FitPoint) -> FitPoint:
        """Return a point without the columns that are at a bound and that the gradient leads out of."""
        x, whole = self._numbers(point.values), point.system
        at_low, at_high = x <= self.low, x >= self.high
        blocked = (at_low & (whole.gradient > 0)) | (at_high & (whole.gradient < 0))
        face = Face(whole, point.magnitudes, ~blocked, blocked, self.low - x, self.high - x)
        return self._on(point, face)

    def narrowed(self, point: FitPoint, step: np.ndarray) -> FitPoint | None:
        """Return the point without the columns at a bound that a step leads out of; None if there are none."""
        face = point.face
        if face is None:
            return None
        full = face.full(step)
        out = ((face.down >= 0) & (full < 0)) | ((face.up <= 0) & (full > 0))
        return self._on(point, replace(face, free=face.free & ~out)) if out.any() else None

    def _on(self, point: FitPoint, face: Face) -> FitPoint:
        if face.free.all():
            return replace(point, system=face.whole, magnitudes=face.magnitudes, face=face)
        key, last = face.free.tobytes(), self._last
        system = _columns_of(face, None if last is None or last[0] != key else last[1])
        self._last = key, system
        return replace(point, system=system, magnitudes=face.magnitudes[face.free], face=face)

    def within(self, point: FitPoint, solved: Solved) -> Solved:
        """Return a step that stays in the box: projected onto it, or cut where it leaves, whichever predicts more."""
        face = point.face
        if face is None:
            return solved
        step, down, up = solved.step, face.down[face.free], face.up[face.free]
        projected = np.clip(step, down, up)
        if (projected == step).all():
            return solved
        room = np.where(step < 0, down, up)[step != 0] / step[step != 0]
        cut = min(1.0, float(room.min(initial=1.0))) * step
        best = max((projected, cut), key=lambda one: predicted_reduction(point.system, one))
        return replace(solved, step=best, note=", ".join(filter(None, (solved.note, "within bounds"))))

    def holds(self, point: FitPoint) -> bool:
        """Return whether all columns that change a residual are at a bound that the gradient leads out of."""
        face = point.face
        return face is not None and bool(face.blocked.any() and (face.blocked | (face.whole.norms == 0)).all())

    def judged(self, point: FitPoint, found: Certificate) -> Certificate:
        """Return a certificate, without its reason where a column that is held by a step alone could gain."""
        face = point.face
        if face is None or not found.reason:
            return found
        held = ~face.free & ~face.blocked
        gains = (face.whole.gradient[held] / positive(face.whole.norms[held])) ** 2 / 2
        gain = float(gains.sum()) / point.cost if point.cost > 0 else 0.0
        return found if gain <= MOST_REDUCTION else Certificate(gain, length=found.length)

    def active(self, values: Values) -> Values:
        """Return where parameters are at a bound: -1 the lower, 1 the upper, else 0; zeros without bounds."""
        found = {}
        for name, value in values.items():
            mask = torch.zeros(value.shape, dtype=torch.int8, device=value.device)
            if name in self.lower:
                mask = mask - (value <= self.lower[name]).to(mask) + (value >= self.upper[name]).to(mask)
            found[name] = mask
        return found

    @restoring
    def clamped(self, values: Values) -> Values:
        """Return parameters within the box, at a bound where rounding alone parts them from it."""
        inside = {}
        with arithmetic(False):
            for name, low in self.lower.items():
                value, high = values[name].clamp(low, self.upper[name]), self.upper[name]
                for bound in (low, high):
                    near = torch.isclose(value, bound, rtol=_NEAR * torch.finfo(value.dtype).eps, atol=0.0)
                    value = torch.where(near, bound, value)
                inside[name] = value
        return {**values, **inside}

    def check_start(self, values: Values) -> None:
        """Refuse a start outside.

        Raises:
            InputError: A free entry is out of its bounds.
        """
        x = self._numbers(values)
        outside = ((x < self.low) | (x > self.high)).nonzero()[0]
        if len(outside):
            first = int(outside[0])
            part = self.layout.parts[int(np.searchsorted(np.cumsum(self.layout.sizes), first, side="right"))]
            came = f"[{self.low[first]:g}, {self.high[first]:g}] where '{part.name}' starts at {x[first]:g}"
            todo = f"Start inside ({len(outside)} entries do not), or widen them."
            raise InputError.of("bounds", came, "the start must be within its bounds", todo)

    def _numbers(self, values: Values) -> np.ndarray:
        return free_numbers(self.layout, values, self.lower)


def free_numbers(layout: Layout, values: Mapping[str, Tensor], bounded: Mapping[str, Tensor]) -> np.ndarray:
    """Return the free columns of parameters with bounds as numbers, zeros for the others."""
    found = []
    for part in layout.parts:
        if part.name in bounded:
            flat = values[part.name].detach().to("cpu", torch.float64).reshape(-1).numpy()
            found.append(flat[part.kept])
        else:
            found.append(np.zeros(len(part.kept)))
    return np.concatenate(found)


def _columns_of(face: Face, like: LinearizedFit | None) -> LinearizedFit:
    """Return the linearised problem in the free columns, on the structure of another one with the same columns."""
    whole, free = face.whole, face.free
    J = whole.J[:, free.nonzero()[0]]
    blocks = np.unique(whole.blocks[free], return_inverse=True)[1]
    system = LinearizedFit(J, whole.r, blocks, lengths=whole.scale[free], unit=whole.unit, eps=whole.eps)
    if whole.is_sparse:
        J.sum_duplicates()
        system.structure = like.normal if like is not None else None
    # Rounding of the columns that are held is in the residual too.
    system.memory["terms"] = magnitude_of_terms(whole, face.magnitudes)
    return system


def bounds_of(given: Any, layout: Layout, values: Values) -> Box | None:
    """Return the bounds that the caller means; None if there are none.

    Raises:
        InputTypeError: They are no pairs of numbers or tensors.
        InputError: A name or a shape does not fit, a lower bound is not below the upper one, a parameter is on a
            chart, or the start is outside.
    """
    if given is None:
        return None
    lower, upper = {}, {}
    for part, pair in _by_part(given, layout):
        value = values[part.name]
        if part.chart or part.group:
            needed = "elements of a group have no bounds"
            raise InputError.of("bounds", f"given for '{part.name}' on a chart", needed, "Leave it out.")
        low, high = (_side(part, side, value, sign) for side, sign in zip(_pair(pair), (-1, 1), strict=True))
        if not bool((low < high).all()):
            came, todo = f"not in order for '{part.name}'", "Hold what has one value only with `fixed=`."
            raise InputError.of("bounds", came, "each lower bound must be below its upper one", todo)
        lower[part.name], upper[part.name] = _of_free(part, low, -1), _of_free(part, high, 1)
    ends = []
    for side, sign in ((lower, -1), (upper, 1)):
        column = [p.name in lower for p in layout.parts for _ in p.kept]
        ends.append(np.where(column, free_numbers(layout, side, side), sign * np.inf))
    found = Box(layout, lower, upper, *ends)
    found.check_start(values)
    return found


def _of_free(part: ParameterPart, side: Tensor, sign: int) -> Tensor:
    """Return bounds without those of fixed entries, which may be outside."""
    if part.free is None:
        return side
    free = torch.zeros(part.columns, dtype=torch.bool, device=side.device)
    free[torch.from_numpy(part.kept).to(side.device)] = True
    return torch.where(free.reshape(part.shape), side, sign * float("inf"))


def _by_part(given: Any, layout: Layout) -> list[tuple[ParameterPart, Any]]:
    parts = {p.name: p for p in layout.parts}
    if isinstance(given, Mapping):
        return [(parts[name], pair) for name, pair in by_name("bounds", given, list(parts)).items()]
    pair = _pair(given)
    if len(parts) == 1 and "x[0]" not in parts and not any(isinstance(side, Mapping) for side in pair):
        return [(layout.parts[0], pair)]
    sides = []
    for side in pair:
        if side is None or isinstance(side, float | int):
            free = [p.name for p in layout.parts if not (p.chart or p.group)]
            sides.append(dict.fromkeys(free, side))
        else:
            tree = dict(enumerate(side)) if isinstance(side, list | tuple) else side
            sides.append(by_name("bounds", tree, list(parts)))
    return [(p, (sides[0].get(p.name), sides[1].get(p.name))) for p in layout.parts if p.name in sides[0] | sides[1]]


def _pair(given: Any) -> tuple[Any, Any]:
    if hasattr(given, "lb") and hasattr(given, "ub"):  # scipy.optimize.Bounds
        return given.lb, given.ub
    if not isinstance(given, tuple | list) or len(given) != 2:
        came = f"a {type(given).__name__}" + (f" of {len(given)}" if isinstance(given, tuple | list) else "")
        raise InputTypeError.of("bounds", came, "a pair (lower, upper) is needed, or such pairs by parameter name")
    return given[0], given[1]


def _side(part: ParameterPart, side: Any, value: Tensor, sign: int) -> Tensor:
    """Return one side of the bounds of a parameter, in its shape."""
    side = sign * float("inf") if side is None else side
    if isinstance(side, bool) or not isinstance(side, float | int | Tensor | np.ndarray | list | tuple):
        came = f"a {type(side).__name__} for '{part.name}'"
        raise InputTypeError.of("bounds", came, "a number, None or a tensor is needed")
    found = torch.as_tensor(side, dtype=value.dtype).detach().as_subclass(Tensor).to(value.device)
    if found.ndim and found.shape not in (part.shape, part.shape[part.batch :]):
        needed = f"a number or the parameter's shape {tuple(part.shape)} is needed"
        raise InputError.of("bounds", f"of shape {tuple(found.shape)} for '{part.name}'", needed)
    if bool(torch.isnan(found).any()):
        raise InputError.of("bounds", f"NaN for '{part.name}'", "numbers are needed", "None leaves a side open.")
    return found.expand(part.shape)
