"""Strategies: how long the next step may be, given how well the last one did as predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np

from .._requirements import check_choice, check_kind, check_number
from .._words import StrategyName
from ..errors import InputError
from ._solvers import PCG, StepSolver
from ._system import LinearizedFit, Singular, Solved
from ._undamped import undamped

_MOST, _LEAST = 1e32, 1e-16  # dampings beyond change nothing: steps of length zero, or undamped in double precision


@dataclass(frozen=True)
class Strategy(ABC):
    r"""A recipe for steps, with one number that limits them: the damping, or the radius of a trust region.

    Dampings solve $(J^\top J + \lambda D) p = -J^\top r$, $D$ the diagonal of $J^\top J$ (Marquardt, 1963). The
    strategies of this module also accept arrays, with one number for each problem of a batch.
    """

    @abstractmethod
    def begin(self) -> float | None:
        """Return the first damping or radius; None to take it from the first step."""

    @abstractmethod
    def step(self, system: LinearizedFit, solver: StepSolver, damping: float | None, /) -> tuple[Solved, float]:
        """Return a step for this damping, and the one it was made for."""

    @abstractmethod
    def next(self, damping: float, ratio: float, rejections: int, length: float, /) -> float:
        """Return the next damping.

        Args:
            damping: The one just tried.
            ratio: Actual by predicted reduction of the objective; below zero for a step uphill.
            rejections: How many steps in a row were rejected, this one included.
            length: The length of the step in units of the scaled parameters.
        """

    @property
    def may_be_undamped(self) -> bool:
        """Whether an undamped step may be tried after a stop rule was met without evidence for a minimum."""
        return True

    def after_undamped(self, damping: float, good: bool, length: float, /) -> float:
        """Return the next damping after such a step.

        Args:
            damping: The one before it.
            good: Whether it was taken.
            length: Its length in units of the scaled parameters.
        """
        return damping


@dataclass(frozen=True)
class _Damped(Strategy):
    damping: float = 1e-4

    def __post_init__(self) -> None:
        check_number("damping", self.damping)

    def begin(self) -> float | None:
        return float(self.damping)

    def step(self, system: LinearizedFit, solver: StepSolver, damping: float | None, /) -> tuple[Solved, float]:
        damping = self.damping if damping is None else damping
        return solver.solve(system, damping * (system.unit * system.scale) ** 2), damping

    def after_undamped(self, damping: float, good: bool, length: float, /) -> float:
        """Return less damping, since a stop without evidence is one where damping holds the steps back."""
        return _at_least(damping * _chosen(good, 1e-2, 0.3))


@final
@dataclass(frozen=True)
class Constant(_Damped):
    """The same damping for every step; a step uphill ends the call, since the next one would be the same."""

    @property
    def may_be_undamped(self) -> bool:
        """No: the damping is constant."""
        return False

    def next(self, damping: float, ratio: float, rejections: int, length: float, /) -> float:
        """Return the same damping."""
        return damping


@final
@dataclass(frozen=True)
class Adaptive(_Damped):
    """Damping times `down` after a ratio above `high`, times `up` after one below `low`, as PyPose's of this name."""

    high: float = 0.5
    low: float = 1e-3
    up: float = 2.0
    down: float = 0.5

    def next(self, damping: float, ratio: float, rejections: int, length: float, /) -> float:
        """Return the next damping; rejections in a row double the exponent, or many steps would be wasted."""
        grown = _at_most(damping * self.up ** np.maximum(1.0, rejections))
        return _chosen(ratio > self.high, _at_least(damping * self.down), _chosen(ratio < self.low, grown, damping))


@final
@dataclass(frozen=True)
class Marquardt(_Damped):
    """Damping divided by ten after every accepted step, times ten after every rejected one (Marquardt, 1963)."""

    def next(self, damping: float, ratio: float, rejections: int, length: float, /) -> float:
        """Return the next damping."""
        return _chosen(rejections, _at_most(damping * 10), _at_least(damping / 10))


@final
@dataclass(frozen=True)
class Nielsen(_Damped):
    r"""Damping times $\max(1/3, 1 - (2\varrho - 1)^3)$; $\times 2, 4, 8 \dots$ while rejected (Nielsen, 1999)."""

    def next(self, damping: float, ratio: float, rejections: int, length: float, /) -> float:
        """Return the next damping."""
        bounded = np.clip(ratio, 0.0, 1.0)  # beyond, the factor is a third, or the step is rejected
        shrunk = _at_least(damping * np.maximum(1 / 3, 1 - (2 * bounded - 1) ** 3))
        return _chosen(rejections, _at_most(damping * 2.0 ** np.minimum(rejections, 60)), shrunk)


@final
@dataclass(frozen=True)
class TrustRegion(Strategy):
    """Powell's dogleg (1970): a path from the steepest descent to the Gauss-Newton step, cut off at `radius`.

    Needs one factorisation per accepted step. Lengths are measured with the diagonal of the normal matrix.

    Attributes:
        radius: The first radius; None for the length of the first Gauss-Newton step.
    """

    radius: float | None = None

    def __post_init__(self) -> None:
        """Refuse a radius that is not positive.

        Raises:
            InputError: It is not.
        """
        if self.radius is not None:
            check_number("radius", self.radius)

    def begin(self) -> float | None:
        """Return the first radius."""
        return self.radius

    def step(self, system: LinearizedFit, solver: StepSolver, radius: float | None, /) -> tuple[Solved, float]:
        """Return the dogleg step."""
        scale = system.scale
        newton = system.memory.get("newton")
        if newton is None:
            newton = system.memory["newton"] = _newton(system, solver)
        full = newton.step * scale
        length = float(np.linalg.norm(full))
        radius = length if radius is None else radius
        if length <= radius:
            return newton, radius
        slope = system.gradient / scale
        path = dogleg(full, slope, np.sum((system.J @ (slope / scale)) ** 2), radius)
        return replace(newton, step=path / scale, note=", ".join(filter(None, (newton.note, "dogleg")))), radius

    def next(self, radius: float, ratio: float, rejections: int, length: float, /) -> float:
        """Return the next radius."""
        # The usual quarters, and factors, of trust regions (Nocedal and Wright, 2006, algorithm 4.1).
        less = _at_least(np.minimum(length, radius) / 4)
        more = _at_most(np.maximum(radius, 3 * length))
        return _chosen(rejections, less, _chosen(ratio < 0.25, less, _chosen(ratio > 0.75, more, radius)))

    def after_undamped(self, radius: float, good: bool, length: float, /) -> float:
        """Return a radius that holds the step if it was taken."""
        return _chosen(good, _at_most(np.maximum(radius, length)), radius)


def dogleg(full: np.ndarray, slope: np.ndarray, bend: Any, radius: Any) -> np.ndarray:
    """Return where Powell's path ends at a radius that the Gauss-Newton step exceeds; of many problems, row by row.

    Args:
        full: The Gauss-Newton step, in units of the scaled parameters, (..., columns).
        slope: The gradient by these.
        bend: The squared length of what the Jacobian makes of `slope`.
        radius: The radius.
    """
    steepest = np.einsum("...k,...k->...", slope, slope) / np.maximum(bend, np.finfo(float).tiny)
    cauchy = -steepest[..., None] * slope
    descent = np.linalg.norm(cauchy, axis=-1)
    leg = full - cauchy
    a, b = np.einsum("...k,...k->...", leg, leg), np.einsum("...k,...k->...", cauchy, leg)
    c = np.minimum(descent**2 - radius**2, 0.0)
    share = -c / np.maximum(b + np.sqrt(b * b - a * c), np.finfo(float).tiny)
    scaled = cauchy * (radius / np.maximum(descent, np.finfo(float).tiny))[..., None]
    return np.where((descent >= radius)[..., None], scaled, cauchy + leg * share[..., None])


def _chosen(condition: Any, one: Any, other: Any) -> Any:
    """Return one of two numbers, or of two arrays entry by entry."""
    return np.where(condition, one, other)[()]


def _at_least(number: Any) -> Any:
    return np.maximum(number, _LEAST)


def _at_most(number: Any) -> Any:
    return np.minimum(number, _MOST)


def _newton(system: LinearizedFit, solver: StepSolver) -> Solved:
    """Return the Gauss-Newton step, with as little damping as it takes to lead downhill."""
    damping = 0.0
    while True:
        try:
            solved = solver.solve(system, damping * system.scale**2) if damping else undamped(system, solver)
            if float(system.gradient @ solved.step) < 0 or not system.gradient.any():
                return replace(solved, note=f"damped by {damping:.0e}") if damping else solved
        except Singular:
            if damping >= 1.0:
                raise
        # From the rounding errors of a matrix with unit diagonal up in seven steps.
        damping = max(damping * 100, 1e-12)
        if damping > 1.0:
            raise Singular("the normal matrix is singular, however damped")


_NAMES: dict[StrategyName, type[Strategy]] = {
    "constant": Constant,
    "adaptive": Adaptive,
    "marquardt": Marquardt,
    "nielsen": Nielsen,
    "trust_region": TrustRegion,
    "auto": TrustRegion,
}


BUILT_IN = tuple(dict.fromkeys(_NAMES.values()))


def name_of(strategy: Strategy) -> str:
    """Return the name of a strategy: that by which it can be given, or of its class."""
    return next((name for name, kind in _NAMES.items() if type(strategy) is kind), type(strategy).__name__)


def strategy_of(strategy: Any, damping: float | None, solver: StepSolver) -> Strategy:
    """Return the strategy meant by a name or a recipe, and a first damping.

    `"auto"` is the dogleg. Over 16 made-up pose graphs it took 4 to 46 steps, 7 in the median, where Nielsen's damping
    took 8 to 42, 20 in the median. Over 62 curve fits of Moré, Garbow and Hillstrom (1981) and of NIST, many from far
    starts, the medians were 32 and 57, and 16 and 14 had no success within 200 steps. An exact trust region (Moré,
    1978) did no better than the dogleg on either.

    Raises:
        InputError: The name is unknown, or a damping is given where there is none.
        InputTypeError: It is neither a name nor a recipe.
    """
    if isinstance(strategy, Strategy):
        if damping is not None:
            raise InputError.of("damping", repr(damping), "the strategy has its own", "Set it there.")
        return strategy
    check_kind("strategy", strategy, str, f"one of {list(_NAMES)} or a Strategy is needed")
    check_choice("strategy", strategy, StrategyName, " or a Strategy")
    # Conjugate gradients converge slowly on undamped equations, which the dogleg needs.
    if strategy == "auto" and (damping is not None or isinstance(solver, PCG)):
        strategy = "nielsen"
    if damping is None:
        return _NAMES[strategy]()
    if strategy == "trust_region":
        todo = "Set the first radius with `strategy=TrustRegion(radius)`."
        raise InputError.of("damping", repr(damping), "a trust region has none", todo)
    return _NAMES[strategy](damping)  # pyright: ignore[reportCallIssue]
