"""Options of the two calls, as typed dicts for overloads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

from .._words import Corrector, OnFailure, StepSolverName, StrategyName
from ._result import FitProgress
from ._solvers import StepSolver
from ._strategies import Strategy


class FitOptions(TypedDict, total=False):
    """Options of `gauss_newton`, `params` left out, on which the type of the result depends."""

    manifolds: Any
    fixed: Any
    bounds: Any
    weight: Any
    sqrt_weight: Any
    kernel: Any
    f_scale: float
    corrector: Corrector
    solver: StepSolverName | StepSolver
    jacobian: Any
    x_scale: Any
    ftol: float | None
    xtol: float | None
    gtol: float | None
    max_steps: int
    max_nfev: int | None
    max_seconds: float | None
    callback: Callable[[FitProgress[Any]], Any] | None
    verbose: int
    inplace: bool | None
    create_graph: bool
    on_failure: OnFailure
    progress: bool | None


class DampedFitOptions(FitOptions, total=False):
    """Options of `levenberg_marquardt`."""

    strategy: StrategyName | Strategy
    damping: float | None
